"""Where a NaN or an infinity came from: the node, forward or backward, that made it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx


class _Watch(fx.Interpreter):
    """Runs a graph node by node and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep its gradient where it has one."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value.retain_grad()
        self.values[n] = value
        return value


def first_nonfinite(
    module: fx.GraphModule,
    inputs: Mapping[str, torch.Tensor],
    explained: str,
    score: Callable[[torch.Tensor], torch.Tensor],
) -> str:
    """Name the input or the node from which a NaN, else an infinity, reaches the output.

    When the output is finite, name the node through which the gradient of the score with respect to the input
    `explained` stops being finite.
    """
    watch = _Watch(module)
    with torch.enable_grad():
        given = {name: value.detach().clone() for name, value in inputs.items()}
        given[explained].requires_grad_(given[explained].is_floating_point())
        outputs = watch.run(*given.values())
        for what, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            if node := _origin(watch, test):
                return f"{_described(watch, node, list(given))} {what}"
        score(outputs[0]).sum().backward()  # type: ignore[no-untyped-call]
        for node in reversed(list(watch.values)):
            if node.op == "call_function" and _breaks_gradient(watch, node):
                return f"the gradient of node '{node.name}' ({_operation(node)}) is not finite"
    return "no single node: the score, or the sum of its gradients over paths, overflows"


def _origin(watch: _Watch, test: Callable[[torch.Tensor], torch.Tensor]) -> fx.Node | None:
    """The node where values come up that do not pass a test and reach the output, if there is one."""
    node, found = next(reversed(watch.values)), None
    while source := next((n for n in node.all_input_nodes if _holds(watch.values[n], test)), None):
        node = found = source
    return found


def _holds(value: Any, test: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds(item, test) for item in value)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(test(value).any())


def _breaks_gradient(watch: _Watch, node: fx.Node) -> bool:
    """Whether a finite gradient of a node's output becomes one that is not finite at one of its operands."""
    output = watch.values[node]
    if not isinstance(output, torch.Tensor) or output.grad is None or not bool(torch.isfinite(output.grad).all()):
        return False
    operands = {
        source: value.detach().requires_grad_()
        for source in node.all_input_nodes
        if isinstance(value := watch.values[source], torch.Tensor) and value.requires_grad
    }

    def operand(source: fx.Node) -> Any:
        return operands.get(source, watch.values[source])

    target: Any = node.target
    again = target(*fx.map_arg(node.args, operand), **fx.map_arg(node.kwargs, operand))
    if not operands or not again.requires_grad:
        return False
    flowing = torch.autograd.grad(again, list(operands.values()), output.grad, allow_unused=True)
    return not all(bool(torch.isfinite(gradient).all()) for gradient in flowing if gradient is not None)


def _described(watch: _Watch, node: fx.Node, inputs: list[str]) -> str:
    if node.op == "placeholder":
        placeholders = [item for item in watch.values if item.op == "placeholder"]
        return f"input '{inputs[placeholders.index(node)]}' holds"
    if node.op == "get_attr":
        return f"stored tensor '{node.meta.get('origin', node.target)}' holds"
    return f"node '{node.name}' ({_operation(node)}) outputs"


def _operation(node: fx.Node) -> str:
    origin = node.meta.get("origin")
    return f"{node.target}, {origin}" if origin else str(node.target)
