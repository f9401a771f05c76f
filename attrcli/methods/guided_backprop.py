"""Guided backpropagation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _guided
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class GuidedBackprop:
    """The gradient, of which ReLUs let only the positive part through: 1[z > 0] max(g, 0).

    A ReLU is told by what is computed, however it is written; one with a ceiling and one with a leak of a slope that is
    not negative count. All else keeps its gradient, and a graph without a ReLU is refused. Maps are sharp, but barely
    depend on the class or on the upper layers' weights (Adebayo et al. 2018, arXiv 1810.03292): they show what the
    lower layers see, not why the model decided.
    """

    paper: ClassVar[str] = "Springenberg et al. 2015, arXiv 1412.6806"
    cost: ClassVar[str] = "1 forward + 1 backward"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    acts: Literal["relu", "all"] = "relu"
    """all: every activation in one node is a gate, max(slope, 0) max(g, 0); as published, for ReLUs alone."""

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph with guided ReLUs. Raises UnsupportedOp for one that has none."""
        return _guided.ruled(model, inputs, "guided_backprop", self.acts, guided)

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Carry the gradient back through guided ReLUs. Raises UnsupportedOp for a graph that has none."""
        return _guided.attribute(model, inputs, target, self.ruled(model, inputs))


def guided(slope: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What a guided activation lets through; of a falling one, such as SiLU's left end, nothing."""
    return slope.clamp_min(0) * gradient.clamp_min(0)
