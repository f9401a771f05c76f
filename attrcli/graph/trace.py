"""Where a NaN or an infinity came from: the first node, forward or backward, that made it."""

from typing import Any

import torch
from torch import fx


class _Watch(fx.Interpreter):
    """Runs a graph node by node and keeps every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep its gradient where it has one."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if value.requires_grad and not value.is_leaf:
                value.retain_grad()
            self.values[n] = value
        return value


def first_nonfinite(module: fx.GraphModule, inputs: list[torch.Tensor]) -> str:
    """Name the first node with a NaN in its output, else the first with an infinity that its inputs do not have.

    When all outputs are finite, name the node through which the gradient of the summed output stops being finite.
    """
    watch = _Watch(module)
    with torch.enable_grad():
        leaves = [
            x.detach().clone().requires_grad_(index == 0 and x.is_floating_point()) for index, x in enumerate(inputs)
        ]
        outputs = watch.run(*leaves)
        for node, value in watch.values.items():
            if node.op == "call_function" and bool(torch.isnan(value).any()):
                return f"node '{node.name}' ({_describe(node)}) outputs NaN"
        for node, value in watch.values.items():
            sources = [watch.values[n] for n in node.all_input_nodes if n in watch.values]
            if bool(torch.isinf(value).any()) and not any(bool(torch.isinf(source).any()) for source in sources):
                return f"node '{node.name}' ({_describe(node)}) outputs Inf"
        outputs[0].sum().backward()
    for node in reversed(list(watch.values)):
        gradient = watch.values[node].grad
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            continue
        for source in node.all_input_nodes:
            flowing = watch.values[source].grad if source in watch.values else None
            if flowing is not None and not bool(torch.isfinite(flowing).all()):
                return f"the gradient of node '{node.name}' ({_describe(node)}) is not finite"
    return "no single node: the sum over paths overflows"


def _describe(node: fx.Node) -> str:
    origin = node.meta.get("origin") or ""
    return f"{node.target}{', ' + origin if origin else ''}"
