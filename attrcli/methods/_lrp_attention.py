"""LRP through attention and normalisation, which plain LRP has no rule for: AttnLRP, or attention held constant.

Source: Achtibat et al. 2024, arXiv 2402.05602 (attnlrp); Ali et al. 2022, arXiv 2202.07304 (cp).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import Rule, Step
from attrcli.methods._lrp_step import booked, cut, in_proportion, moving, proportional

Tensor = torch.Tensor
aten = torch.ops.aten

PRODUCTS = frozenset(
    (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.einsum.default)
)
"""Products that attention is written in, where both factors depend on the input."""


def softmax(step: Step, x: Tensor, dim: int) -> Any:
    """R_in = x (R - s sum R), which keeps no sum: what it makes or loses is booked."""
    s = x.detach().softmax(dim)

    def spread(relevance: Tensor) -> list[Tensor]:
        z = x.detach()
        total = relevance.sum(dim, keepdim=True)
        return [torch.where(torch.isinf(z), 0, z) * (relevance - s * total)]

    return booked(step, s, [x], spread)


def _normalised(step: Step, epsilon: float, norm: Callable[[Tensor], Tensor]) -> Any:
    return in_proportion(step, norm, moving(step), epsilon)


def _divided(x: Tensor, dims: list[int], eps: float, *, centre: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + eps) with the denominator held constant."""
    z = x - x.mean(dims, True) if centre else x
    return z / (z.detach().square().mean(dims, True) + eps).sqrt()


def _scaled(y: Tensor, step: Step, shape: tuple[int, ...] | None = None) -> Tensor:
    """Times the op's weight, plus its bias, where it has them; brought to a shape where one is given."""
    target: Any = step.node.target
    names = [each.name for each in target._schema.arguments]
    for name, op in (("weight", torch.mul), ("bias", torch.add)):
        given = step.argument(name, None) if name in names else None
        if given is not None:
            y = op(y, given if shape is None else given.reshape(shape))
    return y


def _layer_norm(epsilon: float, step: Step) -> Any:
    rank, x = len(step.args[1]), step.args[0]
    dims, eps = list(range(x.dim() - rank, x.dim())), step.argument("eps", 1e-5)
    return _normalised(step, epsilon, lambda a: _scaled(_divided(a, dims, eps), step))


def _rms_norm(epsilon: float, step: Step) -> Any:
    rank, x = len(step.args[1]), step.args[0]
    dims, eps = list(range(x.dim() - rank, x.dim())), step.argument("eps", torch.finfo(x.dtype).eps)
    return _normalised(step, epsilon, lambda a: _scaled(_divided(a, dims, eps, centre=False), step))


def _channels(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.dim() - 2))


def _group_norm(epsilon: float, step: Step) -> Any:
    x, groups, eps = step.args[0], step.args[1], step.argument("eps", 1e-5)

    def norm(a: Tensor) -> Tensor:
        divided = _divided(a.reshape(len(a), groups, -1), [2], eps).reshape(a.shape)
        return _scaled(divided, step, _channels(x))

    return _normalised(step, epsilon, norm)


def _instance_norm(epsilon: float, step: Step) -> Any:
    x, eps = step.args[0], step.argument("eps", 1e-5)
    dims = list(range(2, x.dim()))
    return _normalised(step, epsilon, lambda a: _scaled(_divided(a, dims, eps), step, _channels(x)))


def _attention(epsilon: float, constant: bool, step: Step) -> Any:
    """softmax(q k' scale + mask) v, opened."""
    query, key, value = step.args[:3]
    if value.shape[-3:-2] != query.shape[-3:-2]:  # fewer heads of keys and values, each for several queries
        key, value = (t.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for t in (key, value))
    scale = step.argument("scale", query.shape[-1] ** -0.5)
    factors = [t for t in (query, key) if t.requires_grad and not constant]

    def scores(*given: Tensor) -> Tensor:
        rest = iter(given)
        q, k = (next(rest) if any(t is f for f in factors) else t.detach() for t in (query, key))
        product: Tensor = (q * scale) @ k.transpose(-1, -2)
        return product

    made = in_proportion(step, scores, factors, epsilon, len(factors)) if factors else scores()
    mask = step.argument("attn_mask", None)
    if step.argument("is_causal", False):
        mask = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=made.dtype).masked_fill(~mask, -math.inf)
    if mask is not None:
        made = in_proportion(step, lambda z: z + mask, [made], epsilon) if made.requires_grad else made + mask
    weights = softmax(step, made, -1) if made.requires_grad else made.softmax(-1)
    both = [t for t in (weights, value) if t.requires_grad]
    if len(both) == 2:
        return in_proportion(step, torch.matmul, both, epsilon, 2)
    one, other = (lambda w: w @ value), (lambda v: weights @ v)
    return in_proportion(step, one if weights.requires_grad else other, both, epsilon)


def table(attention: str, epsilon: float) -> dict[Any, Rule]:
    """The rule of each op; the same keys whatever the option."""
    constant = attention == "cp"

    def over(step: Step) -> Any:
        return cut(step) if constant else softmax(step, step.args[0], step.args[1])

    return {
        aten.softmax.int: over,
        aten._safe_softmax.default: over,
        aten.layer_norm.default: partial(_layer_norm, epsilon),
        aten.rms_norm.default: partial(_rms_norm, epsilon),
        aten.group_norm.default: partial(_group_norm, epsilon),
        aten.instance_norm.default: partial(_instance_norm, epsilon),
        aten.scaled_dot_product_attention.default: partial(_attention, epsilon, constant),
    }


def product(epsilon: float) -> Rule:
    """A product of two that depend on the input: half of the relevance for each; all to one where the other is held."""
    return lambda step: proportional(epsilon, len(moving(step)))(step)


def is_product(node: fx.Node, varying: Any) -> bool:
    """Whether a node multiplies two that depend on the input, as attention does."""
    operands: Any = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return node.target in PRODUCTS and len(operands) == 2 and all(operand in varying for operand in operands)
