"""With which sizes an ONNX file computes: what it measures by Shape or Size must keep them."""

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import torch

from attrcli.formats.onnx_ops.protos import all_nodes, attributes_of, domain_of, stored_tensor

_SIZES = ("Shape", "Size")
_SAME = ("Identity", "Dropout")
_FEW = 64
"""Most numbers of a constant that is looked at: one that chooses among sizes has one or two."""

Readers = Mapping[str, list[tuple[int, onnx.NodeProto]]]
"""By tensor: the nodes that read it, and in which place; -1 inside a subgraph."""


def measured(proto: onnx.ModelProto) -> set[str]:
    """The tensors with whose sizes the file computes.

    But for the batch's, and but for those in the shape to which a Reshape brings that same tensor.
    """
    graph, ends = proto.graph, {value.name for value in proto.graph.output}
    readers: dict[str, list[tuple[int, onnx.NodeProto]]] = {}
    for node in graph.node:
        for place, name in _reads(node):
            readers.setdefault(name, []).append((place, node))
    numbers, functions = _numbers(graph), _measuring(proto)
    found = set()
    for node in graph.node:
        for place, name in _reads(node):
            sizes = node.op_type in _SIZES and place == 0
            if (sizes and _reaches(node, name, readers, numbers, ends)) or node.op_type in functions or place < 0:
                found.add(name)
    for node in reversed(graph.node):
        if node.op_type in _SAME and node.output[0] in found:
            found.add(node.input[0])
    return found


def _reads(node: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    """What a node reads and in which place; -1 for what its subgraphs do."""
    yield from enumerate(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from ((-1, name) for inner in all_nodes(graph) for name in inner.input)
            yield from ((-1, output.name) for output in graph.output)


def _measuring(proto: onnx.ModelProto) -> set[str]:
    """The file's functions, where one of them measures."""
    bodies = [node.op_type for function in proto.functions for node in function.node]
    return {function.name for function in proto.functions} if set(_SIZES).intersection(bodies) else set()


def _numbers(graph: onnx.GraphProto) -> dict[str, list[Any]]:
    """The constants that hold a few whole numbers."""
    tensors = {entry.name: stored_tensor(entry) for entry in graph.initializer if _small(entry)}
    for node in graph.node:
        if node.op_type == "Constant" and not domain_of(node.domain):
            value = attributes_of(node, {}).get("value")
            if isinstance(value, torch.Tensor) and value.numel() <= _FEW:
                tensors[node.output[0]] = value
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def _small(entry: onnx.TensorProto) -> bool:
    whole = entry.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return whole and len(entry.dims) < 2 and max(entry.dims, default=1) <= _FEW


def _reaches(
    shape: onnx.NodeProto, measured: str, readers: Readers, numbers: Mapping[str, Any], ends: set[str]
) -> bool:
    """Whether sizes that a node asks for reach an output, by other ways than the batch or a Reshape of what it asks."""
    if shape.op_type == "Shape" and _first(attributes_of(shape, {}), "start", "end"):
        return False
    pending = [
        output
        for place, node in readers.get(shape.output[0], [])
        if not _to_batch(place, node, numbers) and not _shapes(place, node, measured)
        for output in node.output
    ]
    seen = set(pending)
    while pending:
        name = pending.pop()
        if name in ends:
            return True
        for place, node in readers.get(name, []):
            if not _shapes(place, node, measured):
                pending.extend(output for output in node.output if output not in seen)
                seen.update(node.output)
    return shape.output[0] in ends


def _shapes(place: int, node: onnx.NodeProto, measured: str) -> bool:
    """Whether a node takes numbers as the shape to which it brings what was measured."""
    return node.op_type == "Reshape" and place == 1 and node.input[0] == measured


def _to_batch(place: int, node: onnx.NodeProto, numbers: Mapping[str, Any]) -> bool:
    """Whether a node takes nothing of a shape but its first number."""
    given = [numbers.get(name) for name in node.input[1:]]
    if node.op_type == "Gather" and place == 0:
        return given == [[0]]
    if node.op_type != "Slice" or place != 0:
        return False
    told = attributes_of(node, {}) if len(node.input) == 1 else {}
    return given == [[0], [1], [0], [1]][: max(2, len(given))] or _first(told, "starts", "ends")


def _first(told: Mapping[str, Any], start: str, end: str) -> bool:
    """Whether attributes cut out the first number."""
    return told.get(start, 0) in (0, [0]) and told.get(end) in (1, [1])
