"""Gradient."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.methods._method import Attribution, gradients
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Gradient:
    """The signed gradient of the score: df/dx_i. Says where the score is sensitive, not what it is made of."""

    paper: ClassVar[str] = "Baehrens et al. 2010, JMLR 11; Simonyan et al. 2013, arXiv 1312.6034 (section 3)"
    cost: ClassVar[str] = "1 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"gradient", "dummy", "linear", "batch_exact"})

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """A = df/dx."""
        return Attribution(gradients(model, inputs, target))
