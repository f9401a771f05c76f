"""Passes: a canonical graph in, a new canonical graph out; the tensors are shared, nothing is mutated."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import fx, nn

from attrcli.errors import ModelError, UsageError
from attrcli.graph import ops
from attrcli.graph.check import attribute, check

aten = torch.ops.aten

_LOOK_THROUGH = frozenset(
    (
        aten.reshape.default,
        aten.squeeze.dims,
        aten.to.dtype,
    )
)
Head = Literal["none", "softmax", "log_softmax", "sigmoid"]
"""What a model applies to its logits."""

_HEADS: dict[object, Head] = {
    aten.softmax.int: "softmax",
    aten.log_softmax.int: "log_softmax",
    aten.sigmoid.default: "sigmoid",
}


def edited(module: fx.GraphModule, edit: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
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
    check(copy, module)
    return copy


def only_output(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Keep one output, by name, and what it needs."""
    index = module.meta["outputs"].index(name)

    def edit(copy: fx.GraphModule) -> None:
        output = _output(copy)
        output.args = ((output.args[0][index],),)
        copy.meta["outputs"] = (name,)

    return edited(module, edit)


def strip_head(module: fx.GraphModule) -> tuple[fx.GraphModule, Head]:
    """Step over a final softmax, log_softmax or sigmoid; return the graph of the logits, and what was stepped over.

    Looks through reshapes and casts. Left in place, as 'none': a head that something else reads too, and a softmax
    over another dimension than the classes, which are dimension 1 of the output.
    """
    node = last = _output(module).args[0][0]
    while node.target in _LOOK_THROUGH and _read_once(node):
        node = node.args[0]
    head: Head = _HEADS.get(node.target, "none")
    if head == "none" or not _read_once(node) or (head != "sigmoid" and not _over_classes(node, last)):
        return module, "none"
    name = node.name

    def edit(copy: fx.GraphModule) -> None:
        found = next(item for item in copy.graph.nodes if item.name == name)
        after = _output(copy).args[0][0]
        while after is not found:  # what follows the head held probabilities in the file, and now holds logits
            after.meta.pop("tensor", None)
            after = after.args[0]
        found.replace_all_uses_with(found.args[0])

    return edited(module, edit), head


def _read_once(node: fx.Node) -> bool:
    """Whether one node reads the values of this one; asking for its size does not count."""
    return sum(user.target is not ops.SIZE for user in node.users) == 1


def _over_classes(softmax: Any, output: Any) -> bool:
    """Whether a softmax is over dimension 1, and what follows it keeps the first two dimensions apart."""
    before, after = softmax.meta.get("shapes"), output.meta.get("shapes")
    if not before or not after or len(before[0]) < 2:
        return False
    return softmax.args[1] % len(before[0]) == 1 and [s[:2] for s in before] == [s[:2] for s in after]


def fold_batch_norm(module: fx.GraphModule) -> fx.GraphModule:
    """Fold each batch norm into the convolution or linear op that alone feeds it, computed in float64.

    W' = W s, b' = (b - mean) s + beta, s = gamma / sqrt(var + eps). For speed: methods that need the original nodes
    or parameters take the graph as it was.
    """

    def edit(copy: fx.GraphModule) -> None:
        for node in list(copy.graph.nodes):
            if node.target is aten.batch_norm.default and (producer := _foldable(node)) is not None:
                _fold(copy, node, producer)

    return edited(module, edit)


def _foldable(node: Any) -> Any:
    """The node that a batch norm folds into, None where it cannot."""
    producer = node.args[0]
    if len(producer.users) != 1 or producer.target not in (aten.convolution.default, aten.linear.default):
        return None
    if producer.target is aten.convolution.default and producer.args[6]:
        return None  # transposed: the output channels lie on another axis, split by groups
    if producer.target is aten.linear.default and len(producer.meta["shapes"][0]) != 2:
        return None  # the features that linear makes are last, the channels that batch norm scales are second
    tensors = [*producer.args[1:3], *node.args[1:5]]
    known = all(t is None or (isinstance(t, fx.Node) and t.op == "get_attr") for t in tensors)
    return producer if known else None


def _fold(module: fx.GraphModule, node: Any, producer: Any) -> None:
    def value(argument: Any, default: float = 0.0) -> torch.Tensor:
        if argument is None:
            return torch.full((), default, dtype=torch.float64)
        return attribute(module, argument.target).double()

    weight = value(producer.args[1])
    gamma, beta = value(node.args[1], 1.0), value(node.args[2])
    mean, variance = value(node.args[3]), value(node.args[4])
    scale = gamma * torch.rsqrt(variance + node.args[7])
    bias = (value(producer.args[2]) - mean) * scale + beta
    dtype = attribute(module, producer.args[1].target).dtype
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


def mask(module: fx.GraphModule, masks: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """Multiply nodes, by name, by masks (bool) that broadcast over the batch, for everyone who reads them.

    What is not finite stays so: zero times infinity is NaN, as where pruning multiplies.
    """

    def edit(copy: fx.GraphModule) -> None:
        for name, kept in masks.items():
            node = named(copy, name)
            copy.register_buffer(f"{name}_mask", kept)
            with copy.graph.inserting_after(node):
                held = copy.graph.get_attr(f"{name}_mask")
            with copy.graph.inserting_after(held):
                masked = copy.graph.call_function(aten.mul.Tensor, (node, held))
            held.meta["origin"] = held.target
            node.replace_all_uses_with(masked)
            masked.args = (node, held)
            masked.meta = {**node.meta, "mask": node.meta.get("tensor")}
            node.meta.pop("tensor", None)

    return edited(module, edit)


def fold_constants(module: fx.GraphModule) -> fx.GraphModule:
    """Compute once what depends on no input: a standardised weight, a table of positions.

    Only ops of the op table run. What is larger than all that it was computed from, and than a megabyte, stays in the
    graph. For speed, as `fold_batch_norm`.
    """

    def edit(copy: fx.GraphModule) -> None:
        known: dict[fx.Node, Any] = {}
        for node in list(copy.graph.nodes):
            if node.op == "get_attr":
                known[node] = attribute(copy, str(node.target))
            elif node.op == "call_function" and all(item in known for item in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
        for number, (node, value) in enumerate([*known.items()]):
            read = [user for user in node.users if user not in known]
            if node.op == "get_attr" or not read or not _worth_holding(value, node, known):
                continue
            copy.register_buffer(f"constant_{number}", value.contiguous())
            with copy.graph.inserting_before(node):
                held = copy.graph.get_attr(f"constant_{number}")
            held.meta = {**node.meta, "origin": f"constant_{number}"}
            node.replace_all_uses_with(held)
            known[held] = value

    with torch.no_grad():
        return edited(module, edit)


def _worth_holding(value: Any, node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    sources = [known[item].numel() for item in node.all_input_nodes if isinstance(known[item], torch.Tensor)]
    return bool(value.numel() <= max([1 << 18, *sources]))


def without_dropout(module: fx.GraphModule) -> fx.GraphModule:
    """Leave out dropout, which in inference passes on what it is given."""

    def edit(copy: fx.GraphModule) -> None:
        for node in list(copy.graph.nodes):
            if node.target is aten.dropout.default:
                node.replace_all_uses_with(node.args[0])
                copy.graph.erase_node(node)  # as something random it never counts as dead code

    return edited(module, edit)


def to_training(module: fx.GraphModule) -> fx.GraphModule:
    """The graph as it trains: batch norm by the statistics of the batch, which it gathers, and dropout on.

    Running statistics are the new graph's own. Raises ModelError, naming what is missing, for a file without
    parameters, as freezing leaves it: there they are folded away.
    """
    if not any(True for _ in module.parameters()):
        raise ModelError("the file has no parameters (it was frozen, its dropout and batch norm folded): not trainable")

    def edit(copy: fx.GraphModule) -> None:
        for node in copy.graph.nodes:
            if node.target is aten.batch_norm.default:
                for statistic in node.args[3:5]:
                    scope, _, leaf = str(statistic.target).rpartition(".")
                    copy.get_submodule(scope).register_buffer(leaf, attribute(copy, str(statistic.target)).clone())
                node.args = (*node.args[:5], True, *node.args[6:])
            elif node.target is aten.dropout.default:
                node.args = (*node.args[:2], True)

    return edited(module, edit)


def place(module: fx.GraphModule, device: torch.device, *, channels_last: bool) -> fx.GraphModule:
    """Move the graph's tensors to a device, in the layout that its convolutions run best in."""

    def edit(copy: fx.GraphModule) -> None:
        kernels = {_name(n.args[1]) for n in copy.graph.nodes if n.target is aten.convolution.default}
        for name in {node.target for node in copy.graph.nodes if node.op == "get_attr"}:
            scope, _, leaf = name.rpartition(".")
            tensor = attribute(copy, name)
            held = tensor.detach().to(device)
            if channels_last and name in kernels and held.dim() == 4:
                held = held.contiguous(memory_format=torch.channels_last)
            if isinstance(tensor, nn.Parameter):
                held = nn.Parameter(held, requires_grad=False)
            setattr(copy.get_submodule(scope), leaf, held)
        for node in copy.graph.nodes:
            if device.type != "cpu" and _chooses_device(node.target):
                node.kwargs = {**node.kwargs, "device": device}

    return edited(module, edit)


def _name(node: Any) -> str | None:
    """The name of a stored tensor, None for what is computed."""
    return str(node.target) if node.op == "get_attr" else None


def _chooses_device(op: Any) -> bool:
    """Whether an op makes a tensor on a device that no operand tells."""
    if ops.classify(op) is not ops.OpClass.CREATION:
        return False
    arguments = op._schema.arguments
    return any(argument.name == "device" for argument in arguments) and str(arguments[0].type) != "Tensor"


def cut(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Make a node an input: the graph from there to the output, with the original inputs held beside it.

    The new input comes first and bears the node's name. Raises UsageError for a name that is no such node.
    """

    def edit(copy: fx.GraphModule) -> None:
        node = named(copy, name)
        first = next(iter(copy.graph.nodes))
        with copy.graph.inserting_before(first):
            new = copy.graph.placeholder(f"{name}_value")
        node.replace_all_uses_with(new)
        copy.meta["inputs"] = (name, *module.meta["inputs"])

    return edited(module, edit)


def until(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph from the inputs to one node, as its only output. Raises UsageError for a name that is no node."""

    def edit(copy: fx.GraphModule) -> None:
        node = named(copy, name)
        _output(copy).args = ((node,),)
        copy.meta["outputs"] = (name,)
        copy.meta["output_shapes"] = {name: node.meta["shapes"]}

    return edited(module, edit)


def also(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """The graph with a node as one more output, so that no pass leaves it out. Raises UsageError for no such node."""

    def edit(copy: fx.GraphModule) -> None:
        node, output = named(copy, name), _output(copy)
        output.args = ((*output.args[0], node),)

    return edited(module, edit)


def named(module: fx.GraphModule, name: str) -> fx.Node:
    """The node of that name. Raises UsageError, with the nodes that there are."""
    nodes: dict[str, fx.Node] = {
        node.name: node for node in module.graph.nodes if node.op == "call_function" and "shapes" in node.meta
    }
    if name not in nodes:
        close = difflib.get_close_matches(name, nodes, 1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"no node '{name}' in the graph{hint}; its nodes: {', '.join(nodes)}")
    return nodes[name]


def _output(module: fx.GraphModule) -> Any:
    node = next(iter(reversed(module.graph.nodes)))
    if node.op != "output":
        raise ModelError("the graph does not end in an output")
    return node
