"""DeepLIFT's rule for a grid sampler whose places move: pictures and places as two players, then each coordinate."""

import itertools
import math
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import PLAIN, Rule, Step, Verdict, own
from attrcli.methods._contributions import safe_quotient
from attrcli.methods._deeplift_step import pair

Tensor = torch.Tensor
aten = torch.ops.aten


def _sampled(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    return _rule if depends[1] else PLAIN


def _rule(step: Step) -> Any:
    """h(x, p), linear in x: each of the two with the other at both its values; of p, each coordinate in every order."""
    x, at = pair(step, 0), pair(step, 1)
    pictures, place = (x.x.detach(), x.r.expand_as(x.x)), at.x.detach()
    place0 = at.r.expand_as(place)

    def both(p: Tensor) -> Tensor:
        first, second = (step.run(z, p, *step.args[2:]) for z in pictures)
        return (first + second) / 2  # type: ignore[no-any-return]

    def backward(g: Tensor) -> tuple[Tensor, Tensor]:
        leaf, moved = pictures[0].requires_grad_(True), place.clone().requires_grad_(True)
        with torch.enable_grad():
            seen = (step.run(leaf, place, *step.args[2:]) + step.run(leaf, place0, *step.args[2:])) / 2
            (first,) = torch.autograd.grad(seen, leaf, g)
            (slope,) = torch.autograd.grad(both(moved), moved, g)
        with torch.no_grad():
            shares = torch.zeros_like(place)
            for order in itertools.permutations(range(place.shape[-1])):
                here, value = place0.clone(), both(place0)
                for d in order:
                    here[..., d] = place[..., d]
                    after = both(here)
                    shares[..., d] += (g * (after - value)).sum(1) / math.factorial(len(order))
                    value = after
        return first, safe_quotient(shares, place - place0, slope)

    return own(step.run(pictures[0], place, *step.args[2:]), [x.x, at.x], backward)


GRIDS = {aten.grid_sampler_2d.default: _sampled, aten.grid_sampler_3d.default: _sampled}
