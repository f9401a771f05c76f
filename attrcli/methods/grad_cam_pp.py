"""Grad-CAM++."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.graph.rules import Ruled
from attrcli.methods import _cam
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class GradCamPlusPlus:
    """Grad-CAM with w_k the sum over positions of alpha g+, alpha = g^2 / (2 g^2 + g^3 sum A_k).

    So that several small places of a channel count as one large one does. alpha is that of a score exp(f), whose own
    factor drops out; where its denominator is zero it is 0. The node is chosen as in grad_cam.
    """

    paper: ClassVar[str] = "Chattopadhay et al. 2018, arXiv 1710.11063"
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
        return _cam.ruled(model, inputs, self.node, self.grid, "grad_cam_pp")[1]

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Explain by the node's channels. Raises ModelError where there is no grid to read."""
        place, made = _cam.ruled(model, inputs, self.node, self.grid, "grad_cam_pp")
        return _cam.attribute(model, inputs, target, place, made, weigh)


def weigh(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Sum over channels of the weights times the values; alpha is 0 where the gradient or its denominator is."""
    total = value.sum(_cam.over_grid(value), keepdim=True)
    divisor = 2 * gradient.square() + total * gradient.pow(3)
    alpha = torch.where(divisor == 0, 0, gradient.square() / torch.where(divisor == 0, 1, divisor))
    weights = (alpha * gradient.clamp_min(0)).sum(_cam.over_grid(gradient), keepdim=True)
    return (weights * value).sum(1)
