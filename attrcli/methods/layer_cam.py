"""Layer-CAM."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _cam
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class LayerCam:
    """L = max(0, sum over channels of g+ A): each place of a channel weighed by its own positive gradient.

    Without Grad-CAM's mean over positions, so that earlier nodes, named with --at, give finer maps. The node is chosen
    as in grad_cam.
    """

    paper: ClassVar[str] = "Jiang et al. 2021, IEEE TIP 30, 5875 (LayerCAM)"
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
        return _cam.ruled(model, inputs, self.node, self.grid, "layer_cam")[1]

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Explain by the node's channels. Raises ModelError where there is no grid to read."""
        place, made = _cam.ruled(model, inputs, self.node, self.grid, "layer_cam")
        return _cam.attribute(model, inputs, target, place, made, weigh)


def weigh(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Sum over channels of the positive gradient times the value, place by place."""
    return (gradient.clamp_min(0) * value).sum(1)
