"""DeepLIFT's rules for what is several ops in one: softmax, norms, variances, attention; each is taken apart."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attrcli.graph.rules import PLAIN, REFUSE, Rule, Step, Verdict, place_of
from attrcli.methods import _contributions as c
from attrcli.methods._contributions import Pair
from attrcli.methods._deeplift_step import pair

Tensor = torch.Tensor
aten = torch.ops.aten
Found = Callable[[fx.Node, list[bool]], Rule | Verdict]


def _alone(rule: Rule) -> Found:
    """A rule for the first operand; another that depends on the input is refused."""
    return lambda node, depends: REFUSE if any(depends[1:]) else rule


def _softmax(step: Step) -> Any:
    return c.softmax(pair(step, 0), step.args[1]).x


def _log_softmax(step: Step) -> Any:
    return c.log_softmax(pair(step, 0), step.args[1]).x


def _logsumexp(step: Step) -> Any:
    given, keepdim = step.args[1], len(step.args) > 2 and bool(step.args[2])
    return c.logsumexp(pair(step, 0), [given] if isinstance(given, int) else list(given), keepdim=keepdim).x


def _scaled(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    value = value if weight is None else value * weight
    return value if bias is None else value + bias


def _layer_norm(step: Step) -> Any:
    x, rank = pair(step, 0), len(step.args[1])
    dims = list(range(x.x.dim() - rank, x.x.dim()))
    made = c.normalised(x, dims, step.argument("eps", 1e-5), place_of(step.node))
    return _scaled(made.x, step.argument("weight", None), step.argument("bias", None))


def _rms_norm(step: Step) -> Any:
    x, rank = pair(step, 0), len(step.args[1])
    dims = list(range(x.x.dim() - rank, x.x.dim()))
    eps = step.argument("eps", torch.finfo(x.x.dtype).eps)
    made = c.normalised(x, dims, eps, place_of(step.node), centre=False)
    return _scaled(made.x, step.argument("weight", None), None)


def _group_norm(step: Step) -> Any:
    x, groups = pair(step, 0), step.args[1]
    grouped = x.linear(lambda z: z.reshape(len(z), groups, -1))
    made = c.normalised(grouped, [2], step.argument("eps", 1e-5), place_of(step.node)).x.reshape(x.x.shape)
    return _channels(step, made)


def _instance_norm(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    def rule(step: Step) -> Any:
        x = pair(step, 0)
        made = c.normalised(x, list(range(2, x.x.dim())), step.argument("eps", 1e-5), place_of(step.node))
        return _channels(step, made.x)

    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    uses = node.args[names.index("use_input_stats")]
    return REFUSE if any(depends[1:]) else rule if uses else PLAIN


def _channels(step: Step, value: Tensor) -> Tensor:
    """Scale and shift by channel."""
    shape = (1, -1, *[1] * (value.dim() - 2))
    weight, bias = step.argument("weight", None), step.argument("bias", None)
    return _scaled(value, *(None if t is None else t.reshape(shape) for t in (weight, bias)))


def _variance(root: bool, with_mean: bool) -> Rule:
    def rule(step: Step) -> Any:
        x = pair(step, 0)
        given = step.argument("dim", None)
        dims = [dim % x.x.dim() for dim in ([given] if isinstance(given, int) else given or range(x.x.dim()))]
        correction = step.argument("correction", 1)
        count = math.prod(x.x.shape[dim] for dim in dims)
        made = c.mean_square(c.centred(x, dims), dims, max(count - correction, 0))
        value = c.rescale(made, c.CLOSED[aten.sqrt.default], made.x.detach().sqrt()) if root else made.x
        keep = bool(step.argument("keepdim", False))
        shown = value if keep else value.squeeze(dims)
        return (shown, x.x.mean(dims, keep)) if with_mean else shown

    return rule


def _attention(node: fx.Node, depends: list[bool]) -> Rule | Verdict:
    """softmax(q k' scale + mask) v."""

    def rule(step: Step) -> Any:
        query, key, value = (pair(step, i) for i in range(3))
        if value.x.shape[-3:-2] != query.x.shape[-3:-2]:  # fewer heads of keys and values, each for several queries
            repeat = query.x.shape[-3] // key.x.shape[-3]
            key, value = (p.linear(lambda z: z.repeat_interleave(repeat, -3)) for p in (key, value))
        scale = step.argument("scale", query.x.shape[-1] ** -0.5)
        scores = c.matmul(query.linear(lambda z: z * scale), key.linear(lambda z: z.transpose(-1, -2)))
        mask = step.argument("attn_mask", None)
        if step.argument("is_causal", False):
            mask = torch.ones(scores.x.shape[-2:], dtype=torch.bool, device=scores.x.device).tril()
        if mask is not None:
            added = mask if mask.dtype != torch.bool else torch.zeros_like(mask, dtype=scores.x.dtype)
            added = added if mask.dtype != torch.bool else added.masked_fill(~mask, -math.inf)
            scores = Pair(scores.x + added, scores.r + added)
        return c.matmul(c.softmax(scores, -1), value).x

    dropout = node.args[4] if len(node.args) > 4 else 0.0
    return REFUSE if dropout or (len(depends) > 3 and depends[3]) else rule


NORMS: dict[Any, Found] = {
    aten.softmax.int: _alone(_softmax),
    aten.log_softmax.int: _alone(_log_softmax),
    aten.logsumexp.default: _alone(_logsumexp),
    aten.layer_norm.default: _alone(_layer_norm),
    aten.rms_norm.default: _alone(_rms_norm),
    aten.group_norm.default: _alone(_group_norm),
    aten.instance_norm.default: _instance_norm,
    aten.var.correction: _alone(_variance(root=False, with_mean=False)),
    aten.std.correction: _alone(_variance(root=True, with_mean=False)),
    aten.var_mean.correction: _alone(_variance(root=False, with_mean=True)),
    aten.std_mean.correction: _alone(_variance(root=True, with_mean=True)),
    aten._safe_softmax.default: _alone(_softmax),
    aten.scaled_dot_product_attention.default: _attention,
}

NORMED = frozenset(
    (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, aten.instance_norm.default)
)
"""Norms that divide by a spread, which may nearly vanish."""
