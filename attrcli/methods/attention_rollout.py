"""Attention rollout."""

from dataclasses import dataclass
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import fx

from attrcli.errors import ModelError, UnsupportedOp, UsageError
from attrcli.graph.axis import BATCH, CHANNEL, Axis, plain
from attrcli.graph.rules import Ruled
from attrcli.methods import _attention
from attrcli.methods._grid import Grid, felt, grids, upsampled
from attrcli.methods._method import Attribution
from attrcli.model import Model, Target

Tensor = torch.Tensor


@dataclass(frozen=True)
class AttentionRollout:
    """The product over layers of (A + I) / 2, A the mean attention of the heads: which patches flow into the output.

    It is the same for every class: the target plays no part, and neither do values, norms and MLPs. The map is the row
    of the class token, or the mean row of all tokens that the head reads, over the patches, interpolated. Needs global
    self-attention over patches: windows, pooled keys and cross-attention are refused.
    """

    paper: ClassVar[str] = "Abnar and Zuidema 2020, arXiv 2005.00928 (section 3)"
    cost: ClassVar[str] = "1 forward"
    needs: ClassVar[frozenset[str]] = frozenset({"rules"})
    gives: ClassVar[frozenset[str]] = frozenset({"positions"})
    axioms: ClassVar[frozenset[str]] = frozenset({"batch_exact"})

    heads: Literal["mean", "max", "min"] = "mean"
    """How the maps of the heads become one."""

    discard: float = 0.0
    """Share of each layer's attentions, the lowest of its map, that is set to zero first."""

    def __post_init__(self) -> None:
        if not 0 <= self.discard < 1:
            raise UsageError(f"attention_rollout: discard={self.discard}; accepted: from 0 to below 1")

    def passes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """One forward."""
        return 1, 0

    def ruled(self, model: Model, inputs: Tensor) -> Ruled:
        """The graph, its attentions kept. Raises UnsupportedOp where it has none over all patches."""
        return self._recording(model, inputs, [])

    def _recording(self, model: Model, inputs: Tensor, kept: list[Tensor]) -> Ruled:
        found = _found(model, tuple(inputs.shape[1:]))
        return model.ruled(inputs, _attention.recording(found.nodes, kept), "attention_rollout")

    def attribute(self, model: Model, inputs: Tensor, target: Target, baseline: Tensor | None) -> Attribution:
        """Roll out the attentions of a forward pass. Raises UnsupportedOp as `ruled`."""
        shape, kept = tuple(inputs.shape[1:]), list[Tensor]()
        found, made = _found(model, shape), self._recording(model, inputs, kept)
        layers = len(found.nodes)
        maps = []
        for rows in model.passes(len(inputs)):
            kept.clear()
            model.logits(inputs[rows], target.take(rows).held, ruled=made)
            by_layer = [torch.cat(kept[layer::layers])[: len(rows)].double() for layer in range(layers)]
            flow = rolled_out([self._fused(each) for each in by_layer])
            cells = found.patches.cut(flow[:, found.read.to(flow.device)].mean(1)[..., None])[:, 0]
            maps.append(upsampled(cells, shape))
        size = "x".join(map(str, found.patches.sizes))
        note = f"{layers} attentions of {len(found.read)} tokens, {int(found.read.sum())} of them read, grid {size}"
        return Attribution(torch.cat(maps), note=(note,) * len(inputs))

    def _fused(self, maps: Tensor) -> Tensor:
        """Maps of all heads (N, heads, T, T) to one (N, T, T), the lowest share of it at zero."""
        fused = {"mean": maps.mean(1), "max": maps.amax(1), "min": maps.amin(1)}[self.heads]
        count = int(self.discard * fused[0].numel())
        if not count:
            return fused
        flat = fused.flatten(1)
        return flat.scatter(1, flat.topk(count, largest=False).indices, 0).reshape(fused.shape)


def rolled_out(maps: list[Tensor]) -> Tensor:
    """The product of the layers' maps (N, T, T), the last one leftmost, each with a residual, its rows summing to 1."""
    flow = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    for each in maps:
        both = each + torch.eye(each.shape[-1], dtype=each.dtype, device=each.device)
        flow = (both / both.sum(-1, keepdim=True)) @ flow
    return flow


@dataclass(frozen=True)
class _Found:
    """The names of the nodes of attention, the patches among their tokens, and which tokens (T,) the output reads."""

    nodes: tuple[str, ...]
    patches: Grid
    read: Tensor


_FOUND: "WeakKeyDictionary[fx.GraphModule, dict[str, _Found]]" = WeakKeyDictionary()


def _found(model: Model, shape: tuple[int, ...]) -> _Found:
    """What a graph has of attention, looked up once. Raises UnsupportedOp where that is not what rollout needs."""
    known = _FOUND.setdefault(model.engine(shape).run, {})
    if model.input not in known:
        maps = _attention.find(model, shape, "attention_rollout")
        try:
            read = _read(model, shape, maps.tokens)
        except ModelError as error:
            raise type(error)(f"{model.path}: attention_rollout: {error}") from error
        known[model.input] = _Found(tuple(node.name for node in maps.nodes), *read)
    return known[model.input]


def _read(model: Model, shape: tuple[int, ...], tokens: Axis) -> tuple[Grid, Tensor]:
    """The patches among tokens, and which of them (T,) the output is computed from, as a gradient tells."""
    found = grids(model, shape)
    nodes = [node for node, grid in found.items() if grid.tokens is not None and grid.axes[grid.tokens] == tokens]
    gradients = felt(model, shape, nodes[-1:])
    if not gradients:
        raise UnsupportedOp("no tokens lead from the attentions to the output")
    ((node, gradient),) = gradients.items()
    dim = found[node].tokens
    assert dim is not None
    read = gradient.movedim(dim, 0).flatten(1).abs().amax(1) > 0
    axes = (plain(BATCH, found[node].axes[0].size), tokens, plain(CHANNEL, 1))
    return Grid(node.name, axes, found[node].sizes), read
