"""LRP's rules for layers with weights: linear, convolution and matrix products with a constant.

Each rule is a set of terms, the op run on an input u with weights W and bias b in place of its own: R is divided by
their stabilised sum z, and R_in = sum of u V(R / st(z); W) over the terms, V being the op's vector-Jacobian product.
No weight is ever flipped, transposed or unfolded by hand.

Source: Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (w-square, z-box), Lapuschkin et al. 2019 (flat),
Montavon et al. 2019 (gamma), here in the general form for inputs and outputs of both signs.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import fx

from attrcli.graph.rules import Rule, Step
from attrcli.methods._lrp_step import booked, divided, in_proportion

Tensor = torch.Tensor
aten = torch.ops.aten
Name = Literal["epsilon", "zplus", "alpha2beta1", "gamma", "flat", "wsquare", "zbox"]
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Term = tuple[Tensor, Tensor, Tensor | None]

_PLACES: dict[Any, tuple[tuple[int, int], int | None]] = {
    aten.linear.default: ((0, 1), 2),
    aten.convolution.default: ((0, 1), 2),
    aten.addmm.default: ((1, 2), 0),
    aten.baddbmm.default: ((1, 2), 0),
    aten.addmv.default: ((1, 2), 0),
    aten.matmul.default: ((0, 1), None),
    aten.mm.default: ((0, 1), None),
    aten.bmm.default: ((0, 1), None),
    aten.mv.default: ((0, 1), None),
    aten.dot.default: ((0, 1), None),
}
"""Where an op has its two factors and its bias."""


@dataclass(frozen=True)
class Layer:
    """A node with weights, opened: its input, weights and bias, and how it runs on others."""

    run: Run
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def a(self) -> Tensor:
        """The input, detached."""
        return self.x.detach()


def is_layer(node: fx.Node, varying: Collection[fx.Node]) -> bool:
    """Whether a node multiplies what depends on the input with constants."""
    if node.target is aten.einsum.default:
        operands: Any = node.args[1]
        return len(operands) == 2 and sum(operand in varying for operand in operands) == 1
    if node.target not in _PLACES or any(factor != 1 for factor in node.kwargs.values()):
        return False
    factors, bias = _PLACES[node.target]
    depends = [node.args[i] in varying for i in factors]
    if node.target is aten.convolution.default and depends[1]:
        return False
    return sum(depends) == 1 and (bias is None or node.args[bias] not in varying)


def opened(step: Step) -> Layer:
    """The layer of a step; its bias is None where it has none."""
    if step.node.target is aten.einsum.default:
        equation, factors = step.args[0], step.args[1]
        x = 0 if factors[0].requires_grad else 1

        def product(u: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return torch.einsum(equation, [u, w] if x == 0 else [w, u])

        return Layer(product, factors[x], factors[1 - x], None)
    places, at = _PLACES[step.node.target]
    x, w = places if step.args[places[0]].requires_grad else places[::-1]
    bias = None if at is None else step.args[at]

    def run(u: Tensor, weight: Tensor, b: Tensor | None) -> Tensor:
        args = list(step.args)
        args[x], args[w] = u, weight
        if at is not None:
            args[at] = torch.zeros_like(bias) if b is None and at == 0 else b  # type: ignore[arg-type]
        return step.run(*args)  # type: ignore[no-any-return]

    return Layer(run, step.args[x], step.args[w], bias)


def shared(run: Run, terms: list[Term], relevance: Tensor, epsilon: float) -> Tensor:
    """R_in = sum over terms (u, W, b) of u V(R / st(z); W), z = sum of F(u; W, b)."""
    leaves = [u.detach().requires_grad_(True) for u, _, _ in terms]
    with torch.enable_grad():
        total = reduce(torch.add, [run(leaf, w, b) for leaf, (_, w, b) in zip(leaves, terms, strict=True)])
    grads = torch.autograd.grad(total, leaves, divided(relevance, total, epsilon))
    return reduce(torch.add, [leaf.detach() * grad for leaf, grad in zip(leaves, grads, strict=True)])


def _high(x: Tensor | None) -> Any:
    return None if x is None else x.clamp_min(0)


def _low(x: Tensor | None) -> Any:
    return None if x is None else x.clamp_max(0)


def _signed(a: Tensor, above: Tensor, below: Tensor, bias: Tensor | None) -> list[Term]:
    """Weights for the positive part of the input, others for the negative one, where it has any."""
    if a.numel() and a.min() >= 0:
        return [(a, above, bias)]
    return [(_high(a), above, bias), (_low(a), below, None)]


def _zplus(layer: Layer, z: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """By the positive contributions alone: P = F(a+; W+, b+) + F(a-; W-)."""
    w = layer.weight
    return shared(layer.run, _signed(layer.a, _high(w), _low(w), _high(layer.bias)), relevance, epsilon)


def _alpha2beta1(layer: Layer, z: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """Twice by the positive contributions, less once by the negative ones: N = F(a+; W-, b-) + F(a-; W+)."""
    w = layer.weight
    below = shared(layer.run, _signed(layer.a, _low(w), _high(w), _low(layer.bias)), relevance, epsilon)
    return 2 * _zplus(layer, z, relevance, epsilon) - below


def _gamma(gamma: float) -> Callable[[Layer, Tensor, Tensor, float], Tensor]:
    """Contributions of z's sign weigh 1 + gamma: z + gamma P where z > 0, z + gamma N where z < 0, else nothing."""

    def rule(layer: Layer, z: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
        result = torch.zeros_like(layer.a)
        for part, one, other in ((z > 0, _high, _low), (z < 0, _low, _high)):
            asked = torch.where(part, relevance, 0)
            if not bool(asked.any()):
                continue
            w, b = layer.weight, layer.bias
            bias = None if b is None else b + gamma * one(b)
            terms = _signed(layer.a, w + gamma * one(w), w + gamma * other(w), bias)
            result = result + shared(layer.run, terms, asked, epsilon)
        return result

    return rule


def _flat(layer: Layer, z: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """To every input that is connected, alike."""
    return shared(layer.run, [(torch.ones_like(layer.a), torch.ones_like(layer.weight), None)], relevance, epsilon)


def _wsquare(layer: Layer, z: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """By the squares of the weights."""
    bias = None if layer.bias is None else layer.bias.square()
    return shared(layer.run, [(torch.ones_like(layer.a), layer.weight.square(), bias)], relevance, epsilon)


def zbox(layer: Layer, low: Tensor, high: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """By the distance from the corner of the box that pulls z down: D = F(a; W) - F(l; W+) - F(h; W-)."""
    w, a = layer.weight, layer.a
    terms: list[Term] = [(a, w, None), (-low.expand_as(a), _high(w), None), (-high.expand_as(a), _low(w), None)]
    return shared(layer.run, terms, relevance, epsilon)


def rule_of(
    name: Name, epsilon: float, gamma: float, box: Callable[[Step], tuple[Tensor, Tensor]] | None = None
) -> Rule:
    """The rule of a layer; `box` gives the bounds of the layer's own input."""
    if name == "epsilon":
        return _epsilon(epsilon)
    forms = {"zplus": _zplus, "alpha2beta1": _alpha2beta1, "gamma": _gamma(gamma), "flat": _flat, "wsquare": _wsquare}

    def rule(step: Step) -> Any:
        layer = opened(step)
        with torch.no_grad():
            z = layer.run(layer.a, layer.weight, layer.bias)

        def spread(relevance: Tensor) -> list[Tensor]:
            if name == "zbox":
                assert box is not None
                return [zbox(layer, *box(step), relevance, epsilon)]
            return [forms[name](layer, z, relevance, epsilon)]

        return booked(step, z, [layer.x], spread)

    return rule


def _epsilon(epsilon: float) -> Rule:
    def rule(step: Step) -> Any:
        layer = opened(step)
        return in_proportion(step, lambda a: layer.run(a, layer.weight, layer.bias), [layer.x], epsilon)

    return rule
