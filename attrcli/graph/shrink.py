"""Leaving out the channels and units that masks have emptied: smaller tensors, the same output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.check import attribute
from attrcli.graph.passes import edited

aten = torch.ops.aten

_CHANNEL_BY_CHANNEL = {
    aten.relu.default: 2,
    aten.dropout.default: 2,
    aten.mean.dim: 3,
    aten.max_pool1d.default: 3,
    aten.max_pool2d.default: 4,
    aten.max_pool3d.default: 5,
    aten.avg_pool1d.default: 3,
    aten.avg_pool2d.default: 4,
    aten.avg_pool3d.default: 5,
    aten.adaptive_avg_pool1d.default: 3,
    aten.adaptive_avg_pool2d.default: 4,
    aten.adaptive_avg_pool3d.default: 5,
}
"""Ops that make zeros of a channel of zeros, and each channel by itself; and the rank from which dimension 1 is it."""


@dataclass
class _Way:
    """From a masked node to those that mix its channels; with each, how many features a channel has become."""

    passed: dict[Any, int] = field(default_factory=dict)
    consumers: dict[Any, int] = field(default_factory=dict)


def shrink(module: fx.GraphModule, resizable: Callable[[fx.Node], bool]) -> fx.GraphModule:
    """A masked graph without the channels that are empty everywhere, where one chain of ops makes and reads them.

    The chain is convolution or linear, [batch norm], nonlinearity, mask, pools, [flatten], and convolutions or linear
    ops again. All whose values get other sizes, stored tensors included, must be `resizable`; a reshape among them
    carries the meta `resized`. What a sum or a concatenation reads stays; so does one channel of each layer.
    """

    def edit(copy: fx.GraphModule) -> None:
        for node in list(copy.graph.nodes):
            if "mask" in node.meta:
                _shrink_at(copy, node, resizable)

    return edited(module, edit)


def _shrink_at(module: fx.GraphModule, masked: Any, resizable: Callable[[fx.Node], bool]) -> None:
    shape = masked.meta["shapes"][0]
    mask = attribute(module, masked.args[1].target)
    if len(shape) < 2 or mask.dim() != len(shape) or mask.shape[1] != shape[1]:
        return
    live = mask[0].flatten(1).any(1) if mask.dim() > 2 else mask[0].clone()
    if bool(live.all()):
        return
    if not bool(live.any()):
        live[0] = True
    chain, way = _producers(masked), _Way()
    if chain is None or not _follow(masked, 1, way):
        return
    producer, norm = chain
    made = [node for node in (producer, norm, masked) if node is not None]
    stored = [*producer.args[1:3], *(norm.args[1:5] if norm is not None else ())]
    stored += [consumer.args[1] for consumer in way.consumers]
    if not all(map(resizable, (*made, *way.passed, *(tensor for tensor in stored if tensor is not None)))):
        return
    keep = live.nonzero().flatten()
    for place, tensor in ((1, "weight"), (2, "bias")):
        _put(module, producer, place, tensor, 0, keep)
    for place in range(1, 5) if norm is not None else ():
        _put(module, norm, place, f"tensor_{place}", 0, keep)
    _put(module, masked, 1, "mask", 1, keep)
    for consumer, factor in way.consumers.items():
        places = (keep[:, None] * factor + torch.arange(factor, device=keep.device)).flatten()
        _put(module, consumer, 1, "columns", 1, places)
    for node in (*made, masked.args[0]):
        _resize(node, len(keep))
    for node, factor in way.passed.items():
        _resize(node, len(keep) * factor)
        if node.target is aten.reshape.default:
            node.args = (node.args[0], [node.args[1][0], len(keep) * factor])
            node.meta["resized"] = True


def _producers(masked: Any) -> tuple[Any, Any] | None:
    """The convolution or linear op, and the batch norm or None, that alone make what a masked node holds."""
    activation = masked.args[0]
    if len(activation.all_input_nodes) != 1 or _readers(activation) != [masked]:
        return None
    node = activation.all_input_nodes[0]
    norm, reader = None, activation
    if node.target is aten.batch_norm.default:
        norm, reader, node = node, node, node.args[0]
        if _readers(norm) != [activation]:
            return None
    if not _mixes(node) or _readers(node) != [reader]:
        return None
    tensors = [*node.args[1:3], *(norm.args[1:5] if norm is not None else ())]
    return (node, norm) if all(tensor is None or _own(tensor) for tensor in tensors) else None


def _follow(node: Any, factor: int, way: _Way) -> bool:
    """Collect all that reads a node; False where something does that is no link of the chain."""
    for user in _readers(node):
        if user.all_input_nodes.count(node) != 1 or user.args[0] is not node:
            return False
        if _mixes(user) and _own(user.args[1]):
            way.consumers[user] = factor
            continue
        wide, shape = factor, node.meta["shapes"][0]
        if user.target is aten.reshape.default and _flattens(user):
            wide = factor * (user.meta["shapes"][0][1] // shape[1])
        elif user.target not in _CHANNEL_BY_CHANNEL or len(shape) < _CHANNEL_BY_CHANNEL[user.target]:
            return False
        if user.target is aten.mean.dim and {0, 1} & {dim % len(shape) for dim in user.args[1]}:
            return False
        way.passed[user] = wide
        if not _follow(user, wide, way):
            return False
    return bool(_readers(node))


def _readers(node: Any) -> list[Any]:
    """Who reads a node's values; asking for the batch does not count."""
    return [user for user in node.users if not (user.target is ops.SIZE and user.args[1] == 0)]


def _mixes(node: Any) -> bool:
    """Whether this is a plain convolution, or a linear op on vectors: all its outputs read all its channels."""
    if node.target is aten.convolution.default:
        return bool(not node.args[6] and node.args[8] == 1)
    return bool(node.target is aten.linear.default and len(node.meta["shapes"][0]) == 2)


def _own(tensor: Any) -> bool:
    """Whether a stored tensor serves one node only."""
    if not isinstance(tensor, fx.Node) or tensor.op != "get_attr" or len(tensor.users) != 1:
        return False
    return bool(sum(node.op == "get_attr" and node.target == tensor.target for node in tensor.graph.nodes) == 1)


def _flattens(node: Any) -> bool:
    """Whether a reshape makes one vector of each sample, and says so with numbers."""
    source, shape, made = node.args[0].meta["shapes"], node.args[1], node.meta["shapes"]
    rows = all(len(new) == 2 and new[0] == old[0] for old, new in zip(source, made, strict=True))
    return bool(rows and len(shape) == 2 and shape[1] in (made[0][1], -1))


def _put(module: fx.GraphModule, node: Any, place: int, role: str, dim: int, keep: torch.Tensor) -> None:
    """Replace a stored tensor by some of its slices."""
    if len(node.args) <= place or (held := node.args[place]) is None:
        return
    name = f"{node.name}_{role}_kept"
    module.register_buffer(name, attribute(module, held.target).detach().index_select(dim, keep).contiguous())
    with module.graph.inserting_before(node):
        new = module.graph.get_attr(name)
    new.meta.update(held.meta)
    node.args = (*node.args[:place], new, *node.args[place + 1 :])


def _resize(node: Any, channels: int) -> None:
    node.meta["shapes"] = tuple((shape[0], channels, *shape[2:]) for shape in node.meta["shapes"])
