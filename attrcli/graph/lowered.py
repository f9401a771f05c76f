"""bfloat16 where it pays, as autocast does it: products in half the bits, what sums or divides in float32."""

import operator
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.check import attribute
from attrcli.graph.ops import OpClass
from attrcli.graph.passes import edited

aten = torch.ops.aten

_LOWERED = frozenset(
    (
        aten.convolution.default,
        aten.linear.default,
        aten.addmm.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
    )
)
"""Ops that are worth a cast of what they read."""

_FOLLOWING = (
    frozenset(
        (
            operator.getitem,
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.mul.Tensor,
            aten.mul.Scalar,
            aten.gelu.default,
            aten.silu.default,
            aten.sigmoid.default,
            aten.constant_pad_nd.default,
            aten.avg_pool2d.default,
            aten.max_pool2d.default,
            aten.cat.default,
            aten.stack.default,
            aten.select.int,
            aten.slice.Tensor,
            aten.index_select.default,
            aten.roll.default,
            aten.unbind.int,
            aten.split.Tensor,
            aten.chunk.default,
        )
    )
    | {op for op, kind in ops.TABLE.items() if kind is OpClass.KINKED and op is not aten.prelu.default}
    | {op for op, kind in ops.TABLE.items() if kind is OpClass.SHAPE and op is not aten.to.dtype}
)
"""Ops that stay in bfloat16 where all that they read is."""


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with convolutions and matrix products in bfloat16; inputs and outputs stay float32.

    Stored tensors that only such nodes read are held in bfloat16. An op that is neither worth a cast nor content with
    fewer bits (a softmax, a norm, a sum) is given float32.
    """

    def edit(copy: fx.GraphModule) -> None:
        _Lowering(copy)

    return edited(module, edit)


class _Lowering:
    """One walk over a graph that is edited in place; `low` are the nodes that hold bfloat16."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.low: set[fx.Node] = set()
        self.floating = {node for node in self.graph.nodes if node.op == "placeholder"}
        self.casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        for node in list(self.graph.nodes):
            self.visit(node)

    def visit(self, node: Any) -> None:
        if node.op == "get_attr":
            if attribute(self.module, str(node.target)).dtype == torch.float32:
                self.floating.add(node)
            return
        if node.op == "output":
            self.read(node, torch.float32)
            return
        if node.op != "call_function" or not (read := self.floating.intersection(node.all_input_nodes)):
            return
        computed = [item for item in read if item.op != "get_attr"]
        if node.target in _LOWERED or (node.target in _FOLLOWING and computed and self.low.issuperset(computed)):
            self.read(node, torch.bfloat16)
            self.low.add(node)
        elif node.target is not ops.SIZE:
            self.read(node, torch.float32)
        if ops.classify(node.target) not in (OpClass.DISCRETE, None) and node.target is not ops.SIZE:
            self.floating.add(node)

    def read(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Give a node its floating operands in a type."""
        for operand in node.all_input_nodes:
            if operand in self.floating and (operand in self.low) != (dtype == torch.bfloat16):
                node.replace_input_with(operand, self.cast(operand, dtype))

    def cast(self, operand: Any, dtype: torch.dtype) -> fx.Node:
        """The operand in another type; a stored tensor is stored in it."""
        if (operand, dtype) not in self.casts:
            with self.graph.inserting_after(operand):
                if operand.op == "get_attr":
                    name = f"{operand.name}_bfloat16"
                    self.module.register_buffer(name, attribute(self.module, str(operand.target)).to(dtype))
                    made = self.graph.get_attr(name)
                else:
                    made = self.graph.call_function(aten.to.dtype, (operand, dtype))
            made.meta.update(operand.meta)
            self.casts[operand, dtype] = made
        return self.casts[operand, dtype]
