"""What a factor of a product is to LRP: a signal, or a gate that says how much of the signal goes through."""

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from attrcli.graph import ops
from attrcli.graph.ops import OpClass

aten = torch.ops.aten

_DIVISORS = frozenset((aten.rsqrt.default, aten.reciprocal.default))
_GATES = frozenset((aten.sigmoid.default, aten.softmax.int, aten._safe_softmax.default))
_HALF = frozenset((aten.tanh.default, aten.erf.default))
_THROUGH = frozenset(
    (
        aten.select.int, aten.slice.Tensor, aten.index_select.default, aten.split.Tensor, aten.split_with_sizes.default,
        aten.chunk.default, aten.unbind.int, aten.repeat.default, aten.repeat_interleave.self_int, aten.add.Tensor,
        aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor, aten.mul.Tensor,
        aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default,
    )
)  # fmt: skip


def gate_rank(node: Any, varying: Collection[fx.Node]) -> int:
    """How much of a gate a factor is, seen through copies and affine maps by constants; of two, the larger is it.

    3: a divisor; 2: a sigmoid or softmax, or a clamp from zero up to a number; 1: a tanh or erf, which is a signal
    beside a sigmoid; 0: a signal.
    """
    while isinstance(node, fx.Node) and node in varying and node.op == "call_function":
        if node.target in _DIVISORS or (node.target is aten.pow.Tensor_Scalar and _negative(node.args[1])):
            return 3
        if node.target in _GATES or _clamped(node):
            return 2
        if node.target in _HALF:
            return 1
        through = node.target in _THROUGH or ops.classify(node.target) is OpClass.SHAPE
        before = [item for item in node.all_input_nodes if item in varying]
        if not through or len(before) != 1:
            return 0
        node = before[0]
    return 0


def _negative(power: Any) -> bool:
    return isinstance(power, int | float) and power < 0


def _clamped(node: Any) -> bool:
    """Whether a clamp keeps to an interval from zero up, as a hard sigmoid does."""
    if node.target not in (aten.clamp.default, aten.hardtanh.default):
        return False
    low, high = (*node.args[1:3], None, None)[:2]
    return low == 0 and high is not None
