"""Saliency."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.methods._method import Attribution, gradients
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Saliency:
    """The absolute gradient of the score: |df/dx_i|."""

    paper: ClassVar[str] = "Simonyan et al. 2013, arXiv 1312.6034 (section 3)"
    cost: ClassVar[str] = "1 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """A = |df/dx|."""
        return Attribution(gradients(model, inputs, target).abs())
