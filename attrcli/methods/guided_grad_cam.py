"""Guided Grad-CAM."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods._method import Attribution
from attrcli.methods.grad_cam import GradCam
from attrcli.methods.guided_backprop import GuidedBackprop
from attrcli.model import Model, Target


@dataclass(frozen=True)
class GuidedGradCam:
    """Guided backpropagation times Grad-CAM: where in the input's detail the class is.

    Shaped like the input. It takes over that guided backpropagation barely depends on the class: what tells classes
    apart is the coarse map of Grad-CAM alone. A graph without a ReLU is refused.
    """

    paper: ClassVar[str] = "Selvaraju et al. 2017, arXiv 1610.02391 (section 3.2)"
    cost: ClassVar[str] = "2 forward + 2 backward, one of them to the node"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "node", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset()
    axioms: ClassVar[frozenset[str]] = frozenset({"dummy", "batch_exact"})

    node: str = "auto"
    """The node that Grad-CAM reads, as --at names it; auto: chosen as in grad_cam."""

    grid: str = "auto"
    """Its positions where they cannot be told, as 14x14: the last ones of its tokens."""

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Two of each."""
        return 2, 2

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph with guided ReLUs. Raises UnsupportedOp for one that has none, ModelError where no grid is."""
        GradCam(self.node, self.grid).ruled(model, inputs)
        return GuidedBackprop().ruled(model, inputs)

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """The product of the two. Raises as they do."""
        self.ruled(model, inputs)
        coarse = GradCam(self.node, self.grid).attribute(model, inputs, target, None)
        fine = GuidedBackprop().attribute(model, inputs, target, None)
        return Attribution(fine.values * coarse.values, note=coarse.note)
