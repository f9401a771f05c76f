"""Input x gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.methods._method import Attribution, gradients
from attrcli.model import Model, Target


@dataclass(frozen=True)
class InputXGradient:
    """The input times the gradient of the score: x_i df/dx_i, in the model's own (normalised) input space.

    Sums to the score only where the score is homogeneous of degree one in the input (ReLU nets without biases).
    """

    paper: ClassVar[str] = "Shrikumar et al. 2016, arXiv 1605.01713"
    cost: ClassVar[str] = "1 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "linear", "batch_exact"})

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """A = x df/dx."""
        return Attribution(inputs * gradients(model, inputs, target))
