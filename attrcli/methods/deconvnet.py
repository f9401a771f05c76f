"""Deconvnet."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _guided
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class Deconvnet:
    """The gradient, with max(g, 0) in place of each ReLU's own: what the forward pass cut off is not looked at.

    A ReLU is told by what is computed, as in guided_backprop; a graph without one is refused. The map depends on the
    input through the winners of max pools alone, and without these it is the same for every input; it barely depends on
    the class or on the upper layers' weights (Adebayo et al. 2018, arXiv 1810.03292).
    """

    paper: ClassVar[str] = "Zeiler and Fergus 2014, arXiv 1311.2901"
    cost: ClassVar[str] = "1 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    acts: Literal["relu", "all"] = "relu"
    """all: every activation in one node is replaced by max(g, 0); as published, for ReLUs alone."""

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph with other ReLUs. Raises UnsupportedOp for one that has none."""
        return _guided.ruled(model, inputs, "deconvnet", self.acts, lambda slope, gradient: gradient.clamp_min(0))

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Carry the gradient back through other ReLUs. Raises UnsupportedOp for a graph that has none."""
        return _guided.attribute(model, inputs, target, self.ruled(model, inputs))
