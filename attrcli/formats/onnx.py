"""ONNX files: opened, checked, and walked node by node into a canonical graph.

Shapes are followed as numbers beside the graph (onnx_ops/numbers.py), so that the batch stays free; every other node
becomes ATen calls through the op table (onnx_ops). Nothing of the file is executed, and external data is read only
from the model's own folder.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import defs
from torch import fx

from attrcli.errors import ModelError
from attrcli.formats.onnx_ops.base import DTYPES, Stored
from attrcli.formats.onnx_ops.functions import functions_of
from attrcli.formats.onnx_ops.protos import (
    FOUR_BITS,
    all_nodes,
    check_size,
    dense_tensor,
    domain_of,
    one_line,
    stored_tensor,
    type_name,
)
from attrcli.formats.onnx_ops.walk import File, Walk
from attrcli.formats.spec import Sample, TensorSpec
from attrcli.graph.bounded import BoundedBuilder


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
            self.stored = _initializers(self._proto, path)
            self._functions = functions_of(self._proto)
            names = {entry.name for entry in graph.initializer}
            given = [value for value in graph.input if value.name not in names]
            self.inputs = tuple(_spec(value) for value in given)
            held = [value for value in graph.output if _is_numeric(value)]
            _check_names(graph)
            self.outputs: tuple[TensorSpec, ...] | None = tuple(_spec(value) for value in held)
        except ModelError as error:
            raise ModelError(f"{path}: {one_line(str(error))}") from error
        if not self.inputs or not self.outputs:
            raise ModelError(f"{path}: the ONNX graph has no {'numeric outputs' if self.inputs else 'inputs'}")
        self.metadata: Mapping[str, str] = {entry.key: entry.value for entry in self._proto.metadata_props}

    def build(self, samples: Mapping[str, Sample], dtype: torch.dtype, batches: Sequence[int]) -> fx.GraphModule:
        """Walk the graph for inputs of these sample shapes. Raises UnsupportedOp, ModelError."""
        shapes = {}
        for spec in self.inputs:
            if spec.name not in samples:
                raise ModelError(f"the model also takes input '{spec.name}', which is not given")
            sample = samples[spec.name]
            _check_sample(spec, sample)
            shapes[spec.name] = [() if spec.shape == () else (batch, *sample.shape) for batch in batches]
        return self.imported(shapes, dtype)

    def imported(self, shapes: Mapping[str, Sequence[Sequence[int]]], dtype: torch.dtype) -> fx.GraphModule:
        """Walk the graph for inputs of these whole shapes at the two probes. Raises UnsupportedOp, ModelError."""
        stored = sum(item.tensor.numel() for item in self.stored.values())
        walk = Walk(BoundedBuilder(dtype), self.opsets, dict(self.stored), File(self._functions, stored))
        for spec in self.inputs:
            walk.placeholder(spec.name, shapes[spec.name], spec.dtype)
        names = [output.name for output in self.outputs or ()]
        with torch.no_grad():
            walk.run(self._proto.graph.node, names)
            return _without_unused(walk.b.finish({name: walk.output(name) for name in names}))

    def operations(self) -> dict[str, int]:
        """Count the nodes by op type, subgraphs included; ops of other operator sets with their domain."""
        counts: dict[str, int] = {}
        for node in all_nodes(self._proto.graph):
            name = f"{node.domain}.{node.op_type}" if domain_of(node.domain) else node.op_type
            counts[name] = counts.get(name, 0) + 1
        return counts

    def parameter_count(self) -> int:
        """Number of elements of the floating initializers, without scalars and the statistics of batch norm."""
        return sum(stored.tensor.numel() for stored in self.stored.values() if stored.parameter)

    @property
    def half(self) -> bool:
        """Whether the file stores numbers in float16."""
        return any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in _all_tensors(self._proto))

    def proto_bytes(self) -> bytes:
        """The model serialised, with its external data inside. Raises ModelError above 2 GB."""
        return self._serialised(self._proto)

    def exposed(self, tensor_names: Sequence[str]) -> bytes:
        """The serialised model with these tensors as its outputs, for ONNX Runtime; otherwise as it is in the file.

        Each CastLike becomes the Cast that it stands for: ONNX Runtime opens it too late to fold what follows, which
        costs the fusion of batch norm in files exported without optimisation.
        """
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
        types = {name: value.type.tensor_type.elem_type for name, value in typed.items()}
        types |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "CastLike" and not node.domain and types.get(node.input[1]) and not node.attribute:
                node.attribute.append(onnx.helper.make_attribute("to", types[node.input[1]]))
                node.op_type = "Cast"
                node.input.pop()
        return self._serialised(proto)

    def _serialised(self, proto: onnx.ModelProto) -> bytes:
        try:
            return bytes(proto.SerializeToString())
        except Exception as error:  # protobuf's own error, as above
            raise ModelError(f"{self.path}: the model with its weights exceeds the 2 GB of one protobuf") from error


# -- opening and checking --------------------------------------------------------------------------------------------


def _open(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own errors, which only its library could name
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: the protobuf cannot be read") from error
    if not proto.HasField("graph") or not proto.opset_import:
        what = "graph" if not proto.HasField("graph") else "operator set version"
        raise ModelError(f"{path}: not an ONNX model, or a truncated one: it holds no {what}")
    return proto


def _opsets(proto: onnx.ModelProto, path: Path) -> dict[str, int]:
    versions = {domain_of(entry.domain): entry.version for entry in proto.opset_import}
    newest = defs.onnx_opset_version()
    if not 1 <= versions.get("", 1) <= newest:
        raise ModelError(
            f"{path}: opset {versions['']} is not one that the installed onnx {onnx.__version__} knows (1 to {newest})"
        )
    return versions


def _initializers(proto: onnx.ModelProto, path: Path) -> dict[str, Stored]:
    """Every stored tensor of a known type under its name; external data is read into the protobuf first."""
    statistics = {
        name for node in all_nodes(proto.graph) if node.op_type == "BatchNormalization" for name in node.input[3:5]
    }
    stored, files, read = {}, {}, 0
    for entry in _all_tensors(proto):
        check_size(f"tensor '{entry.name}'", entry.dims)
        if entry.data_location == onnx.TensorProto.EXTERNAL:
            file = _external_file(entry, path.parent)
            files[file] = file.stat().st_size
            read += _read_external(entry, file, files[file])
            if read > 2 * sum(files.values()):  # some files tie weights; a bomb reads the same bytes again and again
                raise ModelError(f"tensor '{entry.name}': its data in '{file.name}' is that of other tensors")
    narrow = _only_dequantised(proto.graph)
    for entry in proto.graph.initializer:
        known = entry.data_type in DTYPES or (entry.data_type in FOUR_BITS and entry.name in narrow)
        if not known:  # an error only in a graph that reads it: ONNX Runtime may know it
            continue
        held = stored_tensor(entry, narrow=True)
        parameter = held.is_floating_point() and held.dim() > 0 and entry.name not in statistics
        stored[entry.name] = Stored(held, entry.name, parameter)
    for sparse in proto.graph.sparse_initializer:
        held = dense_tensor(sparse)
        stored[sparse.values.name] = Stored(held, sparse.values.name, held.is_floating_point())
    return stored


def _only_dequantised(graph: onnx.GraphProto) -> set[str]:
    """Names that DequantizeLinear alone reads: there a type of 4 bits means no more than its numbers."""
    read: dict[str, set[str]] = {}
    for node in all_nodes(graph):
        for name in node.input:
            read.setdefault(name, set()).add(f"{domain_of(node.domain)}.{node.op_type}")
    return {name for name, ops in read.items() if ops <= {".DequantizeLinear", "com.microsoft.DequantizeLinear"}}


def _check_names(graph: onnx.GraphProto) -> None:
    """Raise ModelError when two inputs, or two outputs of nodes, have one name."""
    for what, names in (
        ("input", [value.name for value in graph.input]),
        ("tensor", [name for node in graph.node for name in node.output if name]),
    ):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise ModelError(f"{what} '{name}' is there twice")
            seen.add(name)


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


def _external_file(entry: onnx.TensorProto, folder: Path) -> Path:
    """The file beside the model that holds a tensor's data."""
    location = next((item.value for item in entry.external_data if item.key == "location"), "")
    shown = one_line(location)
    inside = location and "\0" not in location and not Path(location).is_absolute() and ".." not in Path(location).parts
    try:
        file = (folder / location).resolve() if inside else Path()
        if not inside or not file.is_relative_to(folder.resolve()):
            raise ModelError(f"tensor '{entry.name}': refused: its data lies outside the model's folder: '{shown}'")
        if not file.is_file():
            what = "is no file but a directory, a pipe or a device" if file.exists() else "is missing beside the model"
            raise ModelError(f"tensor '{entry.name}': its data file '{shown}' {what}")
    except (OSError, RuntimeError) as error:  # a name that is too long, a link to itself
        raise ModelError(f"tensor '{entry.name}': its data file '{shown}' cannot be found") from error
    return file


def _read_external(entry: onnx.TensorProto, file: Path, size: int) -> int:
    """Hold a tensor's data in the protobuf; return its number of bytes."""
    facts = {item.key: item.value for item in entry.external_data}
    wanted = math.prod(entry.dims) * DTYPES[entry.data_type].itemsize if entry.data_type in DTYPES else None
    try:
        offset = int(facts.get("offset", 0))
        length = int(facts.get("length", size - offset if wanted is None else wanted))
    except ValueError as error:
        raise ModelError(f"tensor '{entry.name}': its data's offset or length is not a number") from error
    if wanted is not None and length != wanted:
        raise ModelError(f"tensor '{entry.name}': {length} bytes of data do not fit its shape {list(entry.dims)}")
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(f"tensor '{entry.name}': its data is not all in '{file.name}', which is {size} bytes long")
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            entry.raw_data = stream.read(length)
    except OSError as error:
        raise ModelError(f"tensor '{entry.name}': '{file.name}' cannot be read: {error.strerror or error}") from error
    del entry.external_data[:]
    entry.data_location = onnx.TensorProto.DEFAULT
    return length


def _is_numeric(value: onnx.ValueInfoProto) -> bool:
    """Whether an output can be computed at all: classifiers of other libraries return labels and maps beside it."""
    kind = value.type.WhichOneof("value")
    return kind in ("tensor_type", None) and value.type.tensor_type.elem_type in (0, *DTYPES)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind not in ("tensor_type", None):
        raise ModelError(f"'{value.name}' is a {kind.removesuffix('_type')}, not a tensor")
    declared = value.type.tensor_type
    if declared.elem_type and declared.elem_type not in DTYPES:
        raise ModelError(f"'{value.name}' has data type {type_name(declared.elem_type)}, which is not supported")
    shape = None
    if declared.HasField("shape"):
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in declared.shape.dim)
        check_size(f"'{value.name}'", [size for size in shape if size is not None])
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


def _without_unused(module: fx.GraphModule) -> fx.GraphModule:
    """Drop stored tensors that no node reads, such as the parts of what was folded."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in used]:
        scope, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(scope), leaf)
    return module
