"""With which sizes an ONNX file computes: what it measures by Shape or Size must keep them."""

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch

from attrcli.formats.onnx_ops.protos import all_nodes, attributes_of, domain_of, stored_tensor

_SIZES = ("Shape", "Size")
_SAME = ("Identity", "Dropout")
_BESIDE = {"Reshape": (0, 1), "Conv": (1, 2)}
"""Ops that read a tensor in the first of these places and, in the second, what may follow its size: shape or bias."""

_FEW = 64
"""Most numbers of a constant that is looked at: one that chooses among sizes has one or two."""


def measured(proto: onnx.ModelProto) -> set[str]:
    """The tensors with whose sizes the file computes, initializers included.

    But for the batch's, and but for the shape to which a Reshape brings that same tensor, and the bias beside a weight.
    """
    file, functions = _File(proto), _measuring(proto)
    found = set()
    for node in proto.graph.node:
        for place, name in reads(node):
            sizes = node.op_type in _SIZES and place == 0
            if (sizes and file.computes_with(node)) or node.op_type in functions or place < 0:
                found.add(name)
    for node in reversed(proto.graph.node):
        if node.op_type in _SAME and node.output[0] in found:
            found.add(node.input[0])
    return found


def reads(node: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    """What a node reads and in which place; -1 for what its subgraphs do."""
    yield from enumerate(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from ((-1, name) for inner in all_nodes(graph) for name in inner.input)
            yield from ((-1, output.name) for output in graph.output)


def measures(node: onnx.NodeProto) -> bool:
    """Whether a node reads nothing of a tensor but its sizes."""
    return node.op_type in _SIZES and not domain_of(node.domain)


def _measuring(proto: onnx.ModelProto) -> set[str]:
    """The file's functions, where one of them measures."""
    bodies = [node.op_type for function in proto.functions for node in function.node]
    return {function.name for function in proto.functions} if set(_SIZES).intersection(bodies) else set()


class _File:
    """Who reads what, and the few constants that may choose among sizes."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph: Any = proto.graph
        self.ends = {value.name for value in graph.output}
        self.stored = {entry.name for entry in graph.initializer}
        self.readers: dict[str, list[tuple[int, Any]]] = {}
        for node in graph.node:
            for place, name in reads(node):
                self.readers.setdefault(name, []).append((place, node))
        tensors = {entry.name: stored_tensor(entry) for entry in graph.initializer if _small(entry)}
        for node in graph.node:
            value = attributes_of(node, {}).get("value") if node.op_type == "Constant" else None
            if isinstance(value, torch.Tensor) and value.numel() <= _FEW:
                tensors[node.output[0]] = value
        self.numbers = {name: tensor.flatten().tolist() for name, tensor in tensors.items()}

    def computes_with(self, sizes: Any) -> bool:
        """Whether what a Shape or Size gives reaches an output by more than what `measured` leaves out."""
        tensor = sizes.input[0]
        batched = tensor not in self.stored and sizes.op_type == "Shape"
        if batched and _first(attributes_of(sizes, {}), "start", "end"):
            return False
        pending, seen = [sizes.output[0]], {sizes.output[0]}
        while pending:
            name = pending.pop()
            if name in self.ends:
                return True
            for place, node in self.readers.get(name, []):
                batch = batched and name == sizes.output[0] and self._takes_first(place, node)
                if not batch and not _beside(place, node, tensor):
                    pending.extend(output for output in node.output if output not in seen)
                    seen.update(node.output)
        return False

    def _takes_first(self, place: int, node: Any) -> bool:
        """Whether a node takes nothing of a shape but its first number."""
        given = [self.numbers.get(name) for name in node.input[1:]]
        if node.op_type == "Gather" and place == 0:
            return given == [[0]]
        if node.op_type != "Slice" or place != 0:
            return False
        told = attributes_of(node, {}) if not given else {}
        return given == [[0], [1], [0], [1]][: max(2, len(given))] or _first(told, "starts", "ends")


def _small(entry: Any) -> bool:
    whole = entry.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return whole and len(entry.dims) < 2 and max(entry.dims, default=1) <= _FEW


def _beside(place: int, node: Any, tensor: str) -> bool:
    """Whether a node takes numbers for that same tensor which it reads."""
    own, numbers = _BESIDE.get(node.op_type, (0, -2))
    return place == numbers and node.input[own] == tensor


def _first(told: Mapping[str, Any], start: str, end: str) -> bool:
    """Whether attributes cut out the first number."""
    return told.get(start, 0) in (0, [0]) and told.get(end) in (1, [1])
