"""ONNX files: opened, checked, and walked node by node into a canonical graph.

Shapes are followed as numbers beside the graph (onnx_ops/numbers.py), so that the batch stays free; every other node
becomes ATen calls through the op table (onnx_ops). Nothing of the file is executed, and external data is read only
from the model's own folder.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import defs, numpy_helper
from torch import fx

from attrcli.errors import AttrcliError, ModelError, UnsupportedOp
from attrcli.formats.onnx_ops import TABLES
from attrcli.formats.onnx_ops.base import DTYPES, SMALL, Known, Node, Op, Operand, Stored, known, tensor
from attrcli.formats.onnx_ops.numbers import ON_NUMBERS
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph.build import Builder, Value

_MOST_ELEMENTS = 1 << 40


class Onnx:
    """A checked and opened ONNX file.

    Raises ModelError when the file is not an ONNX model, is truncated, or points outside its own folder.
    """

    format = "onnx"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._proto = _open(path)
        graph = self._proto.graph
        self.opsets = _opsets(self._proto, path)
        try:
            self._stored = _initializers(self._proto, path)
            names = {entry.name for entry in graph.initializer}
            given = [value for value in graph.input if value.name not in names]
            self.inputs = tuple(_spec(value) for value in given)
            self.outputs: tuple[TensorSpec, ...] | None = tuple(_spec(value) for value in graph.output)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        if not self.inputs or not self.outputs:
            raise ModelError(f"{path}: the ONNX graph has no {'outputs' if self.inputs else 'inputs'}")
        self.metadata: Mapping[str, str] = {entry.key: entry.value for entry in self._proto.metadata_props}

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Walk the graph for inputs of these sample shapes. Raises UnsupportedOp, ModelError."""
        builder = Builder(dtype)
        walk = _Walk(builder, self.opsets, self._stored)
        for spec in self.inputs:
            sample = samples[spec.name]
            _check_sample(spec, sample)
            shapes = [() if spec.shape == () else (batch, *sample.shape) for batch in batches]
            walk.placeholder(spec.name, shapes, spec.dtype)
        names = [output.name for output in self._proto.graph.output]
        with torch.no_grad():
            walk.run(self._proto.graph, names)
            return _without_unused(builder.finish({name: walk.output(name) for name in names}))

    def operations(self) -> dict[str, int]:
        """Count the nodes by op type, subgraphs included; ops of other operator sets with their domain."""
        counts: dict[str, int] = {}
        for node in _all_nodes(self._proto.graph):
            name = f"{node.domain}.{node.op_type}" if _domain(node.domain) else node.op_type
            counts[name] = counts.get(name, 0) + 1
        return counts

    def parameter_count(self) -> int:
        """Number of elements of the floating initializers, without scalars and the statistics of batch norm."""
        return sum(stored.tensor.numel() for stored in self._stored.values() if stored.parameter)

    def proto_bytes(self) -> bytes:
        """The model serialised, with its external data inside. Raises ModelError above 2 GB."""
        return self._serialised(self._proto)

    def exposed(self, tensor_names: Sequence[str]) -> bytes:
        """The serialised model with these tensors as its outputs, otherwise as it is in the file."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        typed = {value.name: value for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)}
        made = {name for node in proto.graph.node for name in node.output if name} | typed.keys()
        outputs = []
        for name in tensor_names:
            if name not in made:
                raise ModelError(f"{self.path}: the graph has no tensor '{name}'")
            outputs.append(onnx.ValueInfoProto())
            outputs[-1].CopyFrom(typed.get(name, onnx.ValueInfoProto(name=name)))
        del proto.graph.output[:]
        proto.graph.output.extend(outputs)
        return self._serialised(proto)

    def _serialised(self, proto: onnx.ModelProto) -> bytes:
        try:
            return bytes(proto.SerializeToString())
        except (EncodeError, ValueError) as error:
            raise ModelError(f"{self.path}: the model with its weights exceeds the 2 GB of one protobuf") from error


# -- opening and checking --------------------------------------------------------------------------------------------


def _open(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: the protobuf cannot be read") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        what = "graph" if not proto.HasField("graph") else "operator set version"
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: it holds no {what}")
    return proto


def _opsets(proto: onnx.ModelProto, path: Path) -> dict[str, int]:
    versions = {_domain(entry.domain): entry.version for entry in proto.opset_import}
    newest = defs.onnx_opset_version()
    if not 1 <= versions.get("", 1) <= newest:
        raise ModelError(
            f"{path}: opset {versions['']} is not one that the installed onnx {onnx.__version__} knows (1 to {newest})"
        )
    return versions


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _initializers(proto: onnx.ModelProto, path: Path) -> dict[str, Stored]:
    """Every stored tensor of a known type under its name; external data is read into the protobuf first."""
    if proto.graph.sparse_initializer:
        raise ModelError("sparse initializers are not supported: store them dense")
    statistics = {
        name for node in _all_nodes(proto.graph) if node.op_type == "BatchNormalization" for name in node.input[3:5]
    }
    stored = {}
    for entry in _all_tensors(proto):
        _check_size(f"tensor '{entry.name}'", entry.dims)
        if entry.data_location == onnx.TensorProto.EXTERNAL:
            _read_external(entry, path.parent)
    for entry in proto.graph.initializer:
        if entry.data_type not in DTYPES:  # an error only in a graph that reads it: ONNX Runtime may know it
            continue
        held = _tensor(entry)
        parameter = held.is_floating_point() and held.dim() > 0 and entry.name not in statistics
        stored[entry.name] = Stored(held, entry.name, parameter)
    return stored


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                graphs.extend([attribute.g] if attribute.HasField("g") else [])
                graphs.extend(attribute.graphs)


def _check_size(what: str, sizes: Sequence[int]) -> None:
    if any(size < 0 for size in sizes):
        raise ModelError(f"{what} has a negative dimension: {list(sizes)}")
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise ModelError(f"{what} has {math.prod(sizes)} elements: {list(sizes)}")


def _read_external(entry: onnx.TensorProto, folder: Path) -> None:
    """Read a tensor's data from the file beside the model that it names, and hold it in the protobuf."""
    facts = {item.key: item.value for item in entry.external_data}
    location = facts.get("location", "")
    file = (folder / location).resolve()
    if (
        not location
        or Path(location).is_absolute()
        or ".." in Path(location).parts
        or not file.is_relative_to(folder.resolve())
    ):
        raise ModelError(f"tensor '{entry.name}': refused: its data lies outside the model's folder: '{location}'")
    if not file.is_file():
        raise ModelError(f"tensor '{entry.name}': its data file '{location}' is missing beside the model")
    try:
        offset, size = int(facts.get("offset", 0)), file.stat().st_size
        length = int(facts.get("length", size - offset))
    except ValueError as error:
        raise ModelError(f"tensor '{entry.name}': its data's offset or length is not a number") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(f"tensor '{entry.name}': its data is not all in '{location}', which is {size} bytes long")
    with file.open("rb") as stream:
        stream.seek(offset)
        entry.raw_data = stream.read(length)
    del entry.external_data[:]
    entry.data_location = onnx.TensorProto.DEFAULT


def _tensor(entry: onnx.TensorProto) -> torch.Tensor:
    """A stored tensor of any type that torch computes with."""
    if entry.data_type not in DTYPES:
        raise ModelError(f"tensor '{entry.name}' has data type {_type_name(entry.data_type)}, which is not supported")
    try:
        array = np.array(numpy_helper.to_array(entry))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor '{entry.name}': its data does not fit its shape {list(entry.dims)}") from error
    if entry.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


def _type_name(number: int) -> str:
    return str(onnx.TensorProto.DataType.Name(number)) if number in onnx.TensorProto.DataType.values() else str(number)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        raise ModelError(f"'{value.name}' is a {kind.removesuffix('_type')}, not a tensor")
    declared = value.type.tensor_type
    if declared.elem_type and declared.elem_type not in DTYPES:
        raise ModelError(f"'{value.name}' has data type {_type_name(declared.elem_type)}, which is not supported")
    shape = None
    if declared.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in declared.shape.dim)
        _check_size(f"'{value.name}'", [size for size in shape if size is not None])
    return TensorSpec(value.name, shape, DTYPES.get(declared.elem_type, torch.float32))


def _check_sample(spec: TensorSpec, sample: Sample) -> None:
    if not spec.shape:
        return
    wanted = spec.shape[1:]
    fits = len(wanted) == len(sample.shape) and all(
        want in (None, have) for want, have in zip(wanted, sample.shape, strict=True)
    )
    if not fits:
        shape = tuple("free" if size is None else size for size in wanted)
        raise ModelError(f"input '{spec.name}' takes samples of shape {shape}, not {tuple(sample.shape)}")


# -- the walk --------------------------------------------------------------------------------------------------------


class _Walk:
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
            self.b.where = f"node '{name}' ({proto.op_type})"
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
            raise ModelError(f"{self.b.where} reads '{missing}', which nothing before it makes in a supported type")
        operands = [self.env[name] for name in proto.input]
        result = self.on_numbers(node, operands) if not _domain(proto.domain) else None
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
        domain = _domain(proto.domain)
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
                    wanted.update(name for item in _all_nodes(inner) for name in item.input)
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


def _without_unused(module: fx.GraphModule) -> fx.GraphModule:
    """Drop stored tensors that no node reads, such as the parts of what was folded."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in used]:
        scope, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(scope), leaf)
    return module


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
            value = _tensor(value)
        elif not isinstance(value, onnx.GraphProto | int):
            value = [_decimal(item) if isinstance(item, float) else item for item in value]
        found[attribute.name] = value
    return found


def _decimal(value: float) -> float:
    """ONNX holds float attributes in single precision: 0.01 is read as 0.00999999977. Its shortest decimal that
    rounds to the same is what the exporter was given, and what the other formats hold.
    """
    return float(str(np.float32(value)))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
