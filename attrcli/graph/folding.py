"""Batch norm folded wherever that leaves the function as it is, for methods that read the signs of single weights.

`passes.fold_batch_norm` folds for speed and takes the plain cases; here also transposed convolutions, batch norm in
front of a layer, and a product with a constant whose bias is added apart. All is computed in float64.
"""

from typing import Any

import torch
from torch import fx

from attrcli.graph.check import attribute
from attrcli.graph.passes import edited, fold_batch_norm

aten = torch.ops.aten
Tensor = torch.Tensor


def fold(module: fx.GraphModule) -> fx.GraphModule:
    """The same function with every batch norm folded that can be, and matmul + constant as one linear op."""

    def edit(copy: fx.GraphModule) -> None:
        for node in list(copy.graph.nodes):
            if node.target is aten.batch_norm.default and not _into_transposed(copy, node):
                _into_next(copy, node)
            elif node.target is aten.add.Tensor:
                _into_linear(copy, node)

    return edited(fold_batch_norm(module), edit)


def _constant(node: Any) -> bool:
    return node is None or (isinstance(node, fx.Node) and node.op == "get_attr")


def _value(module: fx.GraphModule, node: Any, default: float = 0.0) -> Tensor:
    return torch.full((1,), default).double() if node is None else attribute(module, str(node.target)).double()


def _affine(module: fx.GraphModule, node: Any) -> tuple[Tensor, Tensor] | None:
    """What a batch norm multiplies each channel by, and then adds; None where that is computed in the graph."""
    if not all(map(_constant, node.args[1:5])):
        return None
    gamma, beta = _value(module, node.args[1], 1.0), _value(module, node.args[2])
    mean, variance = _value(module, node.args[3]), _value(module, node.args[4])
    scale = gamma * torch.rsqrt(variance + node.args[7])
    return scale, beta - mean * scale


def _hold(module: fx.GraphModule, node: fx.Node, like: fx.Node, **tensors: Tensor) -> list[fx.Node]:
    """New constants of the graph for a node, in the type of another."""
    dtype, held = attribute(module, str(like.target)).dtype, []
    with module.graph.inserting_before(node):
        for name, tensor in tensors.items():
            module.register_buffer(f"{node.name}_merged_{name}", tensor.to(dtype).contiguous())
            held.append(module.graph.get_attr(f"{node.name}_merged_{name}"))
    return held


def _into_transposed(module: fx.GraphModule, norm: Any) -> bool:
    """Fold into the transposed convolution in front: its output channels are axis 1, split by groups."""
    conv = norm.args[0]
    if conv.target is not aten.convolution.default or not conv.args[6] or len(conv.users) != 1:
        return False
    found = _affine(module, norm)
    if found is None or not all(map(_constant, conv.args[1:3])):
        return False
    (scale, shift), weight, groups = found, _value(module, conv.args[1]), conv.args[8]
    each = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    factor = each.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    bias = _value(module, conv.args[2]) * scale + shift
    conv.args = (conv.args[0], *_hold(module, conv, conv.args[1], weight=weight * factor, bias=bias), *conv.args[3:])
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)
    return True


def _into_next(module: fx.GraphModule, norm: Any) -> None:
    """Fold into the one layer behind, unless it pads: what batch norm adds is not there in its zeros."""
    layer, found = next(iter(norm.users)), _affine(module, norm)
    if len(norm.users) != 1 or found is None or not _takes(layer, norm):
        return
    (scale, shift), weight = found, _value(module, layer.args[1])
    groups = layer.args[8] if layer.target is aten.convolution.default else 1
    each = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    broad = [*weight.shape[:2], *[1] * (weight.dim() - 2)]
    added = weight * shift.reshape(groups, 1, -1).expand_as(each).reshape(broad)
    bias = _value(module, layer.args[2]) + added.flatten(1).sum(1)
    held = _hold(module, layer, layer.args[1], weight=weight * each.reshape(broad), bias=bias)
    layer.args = (norm.args[0], *held, *layer.args[3:])
    module.graph.erase_node(norm)


def _takes(layer: Any, norm: Any) -> bool:
    """Whether a layer can take up the batch norm in front of it."""
    if layer.target is aten.linear.default:
        fits = len(norm.meta["shapes"][0]) == 2  # elsewhere the channels that batch norm scales are not the features
    else:
        fits = layer.target is aten.convolution.default and not layer.args[6] and not any(layer.args[4])
    return fits and layer.args[0] is norm and all(map(_constant, layer.args[1:3]))


def _into_linear(module: fx.GraphModule, add: Any) -> None:
    """x @ W + b, as exporters write a linear layer over more than two dimensions."""
    operands = add.args[:2]
    for product, bias in (operands, operands[::-1]):
        if not isinstance(product, fx.Node) or product.target not in (aten.matmul.default, aten.mm.default):
            continue
        weight: Any = product.args[1]
        if not (isinstance(bias, fx.Node) and _constant(bias) and _constant(weight)) or add.kwargs:
            continue
        shapes = [attribute(module, str(node.target)).shape for node in (weight, bias)]
        if len(product.users) != 1 or len(shapes[0]) != 2 or tuple(shapes[1]) != tuple(shapes[0][1:]):
            continue
        (held,) = _hold(module, product, weight, weight=_value(module, weight).t())
        with module.graph.inserting_before(add):
            linear = module.graph.call_function(aten.linear.default, (product.args[0], held, bias))
        linear.meta = dict(add.meta)
        add.replace_all_uses_with(linear)
        module.graph.erase_node(add)
        return
