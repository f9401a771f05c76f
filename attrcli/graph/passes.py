"""Passes: a canonical graph in, a new canonical graph out; the tensors are shared, nothing is mutated."""

import difflib
from collections.abc import Callable
from typing import Literal

import torch
from torch import fx, nn

from attrcli.errors import ModelError, UsageError
from attrcli.graph import ops
from attrcli.graph.check import attribute, check

aten = torch.ops.aten

_LOOK_THROUGH = frozenset(
    (
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.to.dtype,
        aten.flatten.using_ints,
    )
)
Head = Literal["none", "softmax", "log_softmax", "sigmoid"]
"""What a model applies to its logits."""

_HEADS: dict[object, Head] = {
    aten.softmax.int: "softmax",
    aten.log_softmax.int: "log_softmax",
    aten.sigmoid.default: "sigmoid",
}


def _copied(module: fx.GraphModule, edit: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
    """A copy of the graph over the same tensors, edited, cleaned of dead code and checked."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    graph.output(output)
    copy = fx.GraphModule(module, graph)
    copy.meta.update(module.meta)
    for old, new in mapping.items():
        new.meta.update(old.meta)
    edit(copy)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    check(copy)
    return copy


def only_output(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Keep one output, by name, and what it needs."""
    index = module.meta["outputs"].index(name)

    def edit(copy: fx.GraphModule) -> None:
        output = _output(copy)
        output.args = ((output.args[0][index],),)  # type: ignore[index]
        copy.meta["outputs"] = (name,)

    return _copied(module, edit)


def strip_head(module: fx.GraphModule) -> tuple[fx.GraphModule, Head]:
    """Step over a final softmax, log_softmax or sigmoid; return the graph of the logits, and what was stepped over.

    Looks through reshapes and casts. A head that something else reads too is left in place. 'none' when there is none.
    """
    node = _output(module).args[0][0]  # type: ignore[index]
    while node.target in _LOOK_THROUGH and len(node.users) == 1:
        node = node.args[0]
    head: Head = _HEADS.get(node.target, "none")
    if head == "none" or len(node.users) != 1:
        return module, "none"
    name = node.name

    def edit(copy: fx.GraphModule) -> None:
        found = next(item for item in copy.graph.nodes if item.name == name)
        found.replace_all_uses_with(found.args[0])

    return _copied(module, edit), head


def fold_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """Fold each batch norm into the convolution or linear op that alone feeds it, computed in float64.

    W' = W s, b' = (b - mean) s + beta, s = gamma / sqrt(var + eps). For speed: methods that need the original nodes
    or parameters take the graph as it was.
    """

    def edit(copy: fx.GraphModule) -> None:
        for node in list(copy.graph.nodes):
            if node.target is aten.batch_norm.default and (producer := _foldable(node)) is not None:
                _fold(copy, node, producer)

    return _copied(module, edit)


def _foldable(node: fx.Node) -> fx.Node | None:
    producer = node.args[0]
    if not isinstance(producer, fx.Node) or len(producer.users) != 1:
        return None
    if producer.target not in (aten.convolution.default, aten.linear.default):
        return None
    if producer.target is aten.convolution.default and producer.args[6]:
        return None  # transposed: the output channels lie on another axis, split by groups
    tensors = [*producer.args[1:3], *node.args[1:5]]
    known = all(t is None or (isinstance(t, fx.Node) and t.op == "get_attr") for t in tensors)
    return producer if known else None


def _fold(module: fx.GraphModule, node: fx.Node, producer: fx.Node) -> None:
    def value(argument: object, default: float | None = None) -> torch.Tensor:
        if isinstance(argument, fx.Node):
            return attribute(module, str(argument.target)).double()
        assert default is not None
        return torch.full((), default, dtype=torch.float64)

    weight = value(producer.args[1])
    gamma, beta = value(node.args[1], 1.0), value(node.args[2], 0.0)
    mean, variance = value(node.args[3]), value(node.args[4])
    scale = gamma * torch.rsqrt(variance + float(node.args[7]))  # type: ignore[arg-type]
    bias = (value(producer.args[2], 0.0) - mean) * scale + beta
    dtype = attribute(module, str(producer.args[1].target)).dtype  # type: ignore[union-attr]
    names = [f"{producer.name}_folded_weight", f"{producer.name}_folded_bias"]
    folded = (weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias.expand(weight.shape[0]))
    with module.graph.inserting_before(producer):
        nodes = []
        for name, tensor in zip(names, folded, strict=True):
            module.register_buffer(name, tensor.to(dtype).contiguous())
            nodes.append(module.graph.get_attr(name))
    producer.args = (producer.args[0], *nodes, *producer.args[3:])
    node.replace_all_uses_with(producer)
    module.graph.erase_node(node)


def place(module: fx.GraphModule, device: torch.device, *, channels_last: bool) -> fx.GraphModule:
    """Move the graph's tensors to a device, in the layout that its convolutions run best in."""

    def edit(copy: fx.GraphModule) -> None:
        rank4 = {n.args[1].target for n in copy.graph.nodes if n.target is aten.convolution.default}
        for owner in copy.modules():
            for kind in (owner._parameters, owner._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        kind[name] = _moved(tensor, device)
        for name in rank4:
            scope, _, leaf = str(name).rpartition(".")
            owner = copy.get_submodule(scope)
            tensor = getattr(owner, leaf)
            if channels_last and tensor.dim() == 4:
                held = tensor.detach().contiguous(memory_format=torch.channels_last)
                held = nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held
                setattr(owner, leaf, held)
        for node in copy.graph.nodes:
            made = ops.classify(node.target) is ops.OpClass.CREATION
            if device.type != "cpu" and made and str(node.target._schema.arguments[0].type) != "Tensor":
                node.kwargs = {**node.kwargs, "device": device}

    return _copied(module, edit)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def cut(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Make a node an input: the graph from there to the output, with the original inputs held beside it.

    The new input comes first and bears the node's name. Raises UsageError for a name that is no such node.
    """

    def edit(copy: fx.GraphModule) -> None:
        node = _named(copy, name)
        first = next(iter(copy.graph.nodes))
        with copy.graph.inserting_before(first):
            new = copy.graph.placeholder(f"{name}_value")
        node.replace_all_uses_with(new)
        copy.meta["inputs"] = (name, *module.meta["inputs"])

    return _copied(module, edit)


def until(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph from the inputs to one node, as its only output. Raises UsageError for a name that is no node."""

    def edit(copy: fx.GraphModule) -> None:
        node = _named(copy, name)
        _output(copy).args = ((node,),)
        copy.meta["outputs"] = (name,)
        copy.meta["output_shapes"] = {name: node.meta["shapes"]}

    return _copied(module, edit)


def _named(module: fx.GraphModule, name: str) -> fx.Node:
    nodes = {node.name: node for node in module.graph.nodes if node.op == "call_function" and "shapes" in node.meta}
    if name not in nodes:
        close = difflib.get_close_matches(name, nodes, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"no node '{name}' in the graph{hint}; its nodes: {', '.join(nodes)}")
    return nodes[name]


def _output(module: fx.GraphModule) -> fx.Node:
    node = next(iter(reversed(module.graph.nodes)))
    if node.op != "output":
        raise ModelError("the graph does not end in an output")
    return node
