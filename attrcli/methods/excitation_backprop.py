"""Excitation backpropagation."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from attrcli.errors import UsageError
from attrcli.graph.rules import Ruled
from attrcli.methods import _excitation
from attrcli.methods._grid import Grid, located, upsampled
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target


@dataclass(frozen=True)
class ExcitationBackprop:
    """A probability of 1 at the score, handed down to what excites it: p_i = sum over j of p_j a_i w+_ij / z+_j.

    Negative weights and biases have no part. It is read at a node, summed over channels: the last one with at least an
    eighth of the input's resolution. What reaches a unit that nothing excites is lost, and booked as remainder; what
    flows past a node inside a residual block is not in its map. Refused are ops through which no excitation is defined:
    softmax, layer norms, GELU and others that fall somewhere. At the node, map and remainder sum to 1 unless it
    is contrastive; interpolated, values stay those of the cells: of cells of k x k pixels the map sums to k^2 as much.
    """

    paper: ClassVar[str] = "Zhang et al. 2016, arXiv 1608.00507"
    cost: ClassVar[str] = "1 forward + 1 backward with the products twice, to the node"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "node", "rules"})
    gives: ClassVar[frozenset[str]] = frozenset({"positions"})
    axioms: ClassVar[frozenset[str]] = frozenset({"batch_exact"})

    contrastive: bool = False
    """Take away what excites all other classes: the last product's weights, negated; then what is below zero."""

    node: str = "auto"
    """The node to read, as --at names it; auto: the last one with an eighth of the input's resolution or more."""

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def _ruled(self, model: Model, inputs: torch.Tensor) -> tuple[Grid, Ruled]:
        shape, name = tuple(inputs.shape[1:]), "excitation_backprop"
        place = located(model, shape, self.node, "auto", name, coarse=8)
        choose = _excitation.choice(contrastive=self.contrastive)
        advice = "a mass has no way through it; grad_cam needs none"
        return place, model.ruled(inputs, choose, name, advice, at=place.node, norms="kept")

    def ruled(self, model: Model, inputs: torch.Tensor) -> Ruled:
        """The graph from the node on. Raises UnsupportedOp for an op without a rule, ModelError without a grid."""
        return self._ruled(model, inputs)[1]

    def attribute(
        self, model: Model, inputs: torch.Tensor, target: Target, baseline: torch.Tensor | None
    ) -> Attribution:
        """Hand a mass down to the node. Raises as `ruled`."""
        if target.score != "logit":
            raise UsageError(f"excitation_backprop starts at a logit; --score {target.score} is none")
        place, made = self._ruled(model, inputs)
        maps, remainders = [], []
        for rows in model.passes(len(inputs)):
            _, mass, _ = model.gradient_at(inputs[rows], target.take(rows), made)
            cells = place.cut(mass.double()).sum(1)
            maps.append(upsampled(cells.clamp_min(0) if self.contrastive else cells, tuple(inputs.shape[1:])))
            remainders.append(made.remainder(len(rows)))
        return Attribution(torch.cat(maps), remainder=torch.cat(remainders), note=(str(place),) * len(inputs))
