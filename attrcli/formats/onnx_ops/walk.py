"""The walk over an ONNX graph: nodes become ATen calls by the op table, shapes stay numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import defs, numpy_helper
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.onnx_ops.base import DTYPES, SMALL, Known, Node, Op, Operand, Stored, known, tensor
from attrcli.formats.onnx_ops.numbers import ON_NUMBERS
from attrcli.formats.onnx_ops.tables import TABLES
from attrcli.graph.build import Builder, Value


class Walk:
    """One walk over a graph: an environment from ONNX tensor names to operands."""

    def __init__(self, builder: Builder, opsets: Mapping[str, int], stored: Mapping[str, Stored]) -> None:
        self.b = builder
        self.opsets = opsets
        self.env: dict[str, Operand] = {"": None, **stored}

    def placeholder(self, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        """Add an input of the model."""
        value = self.b.placeholder(name, shapes, dtype)
        value.node.meta["tensor"] = name
        self.env[name] = value

    def output(self, name: str) -> Value:
        """The tensor of this name, as an output."""
        if name not in self.env:
            raise ModelError(f"no node makes the output '{name}'")
        return tensor(self.b, self.env[name])

    def run(self, graph: onnx.GraphProto, outputs: Sequence[str]) -> None:
        """Evaluate the nodes that these outputs need, in the order of the file."""
        for proto in _needed(graph, outputs):
            name = proto.name or next((output for output in proto.output if output), "")
            self.b.where = one_line(f"node '{name}' ({proto.op_type})")
            try:
                results = self.step(proto, Node(proto.op_type, _attributes(proto), proto.output))
            except AttrcliError:
                raise
            except Exception as error:
                raise ModelError(f"{self.b.where}: {_first_line(error)}") from error
            for output, result in zip(proto.output, results, strict=False):
                self.env[output] = self.folded(output, result)
        self.b.where = ""

    def folded(self, name: str, result: Operand) -> Operand:
        """A result under its name; one computed from constants alone is a constant from here on.

        What is computed from parameters stays in the graph, so that it still shows which parameter it uses.
        """
        if not isinstance(result, Value) or result.node.op != "call_function":
            return result
        result.node.meta.setdefault("tensor", name)
        first, second = result.probes
        if result.data or first.is_meta or not torch.equal(first, second) or _uses_parameters(self.b.root, result.node):
            return result
        return Stored(first, name)

    def step(self, proto: onnx.NodeProto, node: Node) -> list[Operand]:
        """The outputs of one node."""
        missing = next((name for name in proto.input if name not in self.env), None)
        if missing is not None:
            raise ModelError(
                f"{self.b.where} reads '{one_line(missing)}', which nothing before it makes in a supported type"
            )
        operands = [self.env[name] for name in proto.input]
        result = self.on_numbers(node, operands) if not domain_of(proto.domain) else None
        if result is None:
            op = self.find(proto)
            result = op.function(self.b, node, *(self.convert(op, i, operand) for i, operand in enumerate(operands)))
        return result if isinstance(result, list) else [result]

    def on_numbers(self, node: Node, operands: Sequence[Operand]) -> Any:
        """The outputs as numbers when all inputs are; None where this is an operation on tensors."""
        if node.op not in ON_NUMBERS or not operands or not all(_small(operand) for operand in operands):
            return None
        if any(isinstance(x, Stored) and x.tensor.is_floating_point() for x in operands) and not any(
            isinstance(x, Known) for x in operands
        ):
            return None
        return ON_NUMBERS[node.op](self.b, node, *(known(self.b, operand) for operand in operands))

    def find(self, proto: onnx.NodeProto) -> Op:
        """The row of the op table for this node in its operator set's version."""
        domain = domain_of(proto.domain)
        version = self.opsets.get(domain)
        rows = TABLES.get(domain, {}).get(proto.op_type, {})
        since = version or 1
        if not domain and version is not None:
            try:
                since = defs.get_schema(proto.op_type, version, "").since_version
            except defs.SchemaError:
                rows = {}
        fitting = [row for row in rows if row <= since]
        if not fitting or version is None:
            opset = f"opset {version}" if version is not None else "an operator set that the file does not import"
            where = self.b.where.removesuffix(f" ({proto.op_type})")
            raise UnsupportedOp(f"{where}: op {proto.op_type} (domain {domain or 'ai.onnx'}, {opset}) has no importer")
        row = rows[max(fitting)]
        return row if isinstance(row, Op) else Op(row)

    def convert(self, op: Op, position: int, operand: Operand) -> Operand:
        """An input as the op function wants it."""
        if op.raw:
            return operand
        if operand is None:
            return None
        return known(self.b, operand) if position in op.reads else tensor(self.b, operand)


def _needed(graph: onnx.GraphProto, outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that these outputs need; what a subgraph reads from outside counts as an input of its node."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(node.input)
            for attribute in node.attribute:
                for inner in (attribute.g, *attribute.graphs):
                    wanted.update(name for item in all_nodes(inner) for name in item.input)
                    wanted.update(output.name for output in inner.output)
    return nodes[::-1]


def _uses_parameters(root: torch.nn.Module, node: fx.Node) -> bool:
    """Whether a node that depends on no input depends on a parameter."""
    parameters = dict(root.named_parameters())
    pending, seen = [node], {node}
    while pending:
        item = pending.pop()
        if item.op == "get_attr" and item.target in parameters:
            return True
        pending.extend(other for other in item.all_input_nodes if other not in seen)
        seen.update(item.all_input_nodes)
    return False


def _small(operand: Operand) -> bool:
    return (
        operand is None
        or isinstance(operand, Known)
        or (isinstance(operand, Stored) and operand.tensor.numel() <= SMALL)
    )


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values: text decoded, tensors as torch tensors, floats as the decimal that was written."""
    found: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.ref_attr_name:
            raise ModelError(f"attribute '{attribute.name}' refers to '{attribute.ref_attr_name}' of a function")
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, float):
            value = _decimal(value)
        elif isinstance(value, onnx.TensorProto):
            value = stored_tensor(value)
        elif not isinstance(value, onnx.GraphProto | int):
            value = [_decimal(item) if isinstance(item, float) else item for item in value]
        found[attribute.name] = value
    return found


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same single precision number.

    ONNX holds 0.01 as 0.00999999977; the decimal is what the exporter was given and what the other formats hold.
    """
    return float(str(np.float32(value)))


def one_line(text: str) -> str:
    """Text of a file that may hold anything, fit for one line of an error."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# -- reading protobufs ---------------------------------------------------------------------------------------------


def domain_of(domain: str) -> str:
    """A domain under its shorter name: '' is ONNX's own."""
    return "" if domain == "ai.onnx" else domain


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs in its attributes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from all_nodes(inner)


def stored_tensor(entry: onnx.TensorProto) -> torch.Tensor:
    """A stored tensor of any type that torch computes with."""
    if entry.data_type not in DTYPES:
        raise ModelError(f"tensor '{entry.name}' has data type {type_name(entry.data_type)}, which is not supported")
    if entry.data_location == onnx.TensorProto.EXTERNAL:  # numpy_helper would read it, from anywhere
        raise ModelError(f"tensor '{entry.name}' of a function keeps its data outside the file")
    try:
        array = np.array(numpy_helper.to_array(entry))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor '{entry.name}': its data does not fit its shape {list(entry.dims)}") from error
    if entry.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


def type_name(number: int) -> str:
    """ONNX's name of a data type."""
    return str(onnx.TensorProto.DataType.Name(number)) if number in onnx.TensorProto.DataType.values() else str(number)
