"""Grad-CAM."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _cam
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class GradCam:
    """L = max(0, sum over channels k of w_k A_k), w_k the mean over positions of the score's gradient at A_k.

    A is the value of one node, by default the last one that still has the input's grid: of a convolutional network,
    what its classifier averages or flattens; of a vision transformer, the last norm whose patches reach the score. One
    value for each position of the input, interpolated between the node's cells: the map is as coarse as they are.
    """

    paper: ClassVar[str] = "Selvaraju et al. 2017, arXiv 1610.02391"
    cost: ClassVar[str] = "1 forward + 1 backward to the node"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "node"})
    gives: ClassVar[frozenset[str]] = frozenset({"positions"})
    axioms: ClassVar[frozenset[str]] = frozenset({"batch_exact"})

    node: str = "auto"
    """The node to read, as --at names it; auto: the last one with a grid of positions that the score depends on."""

    grid: str = "auto"
    """Its positions where they cannot be told, as 14x14: the last ones of its tokens."""

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph from the node on. Raises ModelError where there is no grid to read."""
        return _cam.ruled(model, inputs, self.node, self.grid, "grad_cam")[1]

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Explain by the node's channels. Raises ModelError where there is no grid to read."""
        place, made = _cam.ruled(model, inputs, self.node, self.grid, "grad_cam")
        return _cam.attribute(model, inputs, target, place, made, weigh)


def weigh(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Sum over channels of their mean gradient times their value."""
    weights = gradient.mean(_cam.over_grid(gradient), keepdim=True)
    return (weights * value).sum(1)
