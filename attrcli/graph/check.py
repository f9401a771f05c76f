"""`check(graph)`: the invariants of a canonical graph, run after import and after every pass."""

import torch
from torch import fx

from attrcli.errors import ModelError, UnsupportedOp, WeightError
from attrcli.graph import ops


def check(module: fx.GraphModule, before: fx.GraphModule | None = None) -> None:
    """Raise ModelError, naming the node, unless `module` is a canonical graph.

    Holds: placeholders, get_attr of registered tensors, call_function of the op table, one output that is a tuple of
    nodes; no NaN in a stored floating tensor, but for those of `before`, the checked graph that a pass began with.
    """
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise ModelError(f"graph is not well formed: {error}") from error
    seen: set[str] = set()
    checked = {id(held) for held in before.state_dict(keep_vars=True).values()} if before is not None else set()
    for node in module.graph.nodes:
        if node.op == "call_function":
            if ops.classify(node.target) is None:
                raise UnsupportedOp(f"node '{node.name}' calls {node.target}, which is not in the op table")
        elif node.op == "get_attr":
            _check_tensor(module, node, seen, checked)
        elif node.op == "output":
            outputs = node.args[0]
            if not isinstance(outputs, tuple) or not all(isinstance(item, fx.Node) for item in outputs):
                raise ModelError("graph output is not a tuple of tensors")
        elif node.op != "placeholder":
            raise ModelError(f"node '{node.name}' is a {node.op}")


def _check_tensor(module: fx.GraphModule, node: fx.Node, seen: set[str], checked: set[int]) -> None:
    name = str(node.target)
    if name in seen:
        return
    seen.add(name)
    tensor = attribute(module, name)
    if id(tensor) not in checked and tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise WeightError(f"stored tensor '{node.meta.get('origin', name)}' holds NaN")


def attribute(module: fx.GraphModule, name: str) -> torch.Tensor:
    """Return the parameter or buffer that a get_attr node names."""
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise ModelError(f"'{name}' is not a tensor")
    return value
