"""Changes to an ONNX file: masks and other weights put into the original protobuf, all else left byte for byte."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx

from attrcli.errors import ModelError
from attrcli.formats.onnx import Onnx
from attrcli.formats.onnx_ops.base import DTYPES
from attrcli.formats.onnx_ops.protos import domain_of
from attrcli.formats.onnx_ops.sizes import measured, measures, reads
from attrcli.formats.spec import Source
from attrcli.graph.check import attribute

aten = torch.ops.aten

_OLDEST = 7
"""The opset from which on operands broadcast as a mask does."""


def save(source: Source, module: fx.GraphModule, path: Path) -> None:
    """Write the file that `module` was imported from, changed as `module` was: masked, shrunk, or with other weights.

    Raises ModelError for a change that no node or initializer of the file stands for.
    """
    proto = _copied(source)
    types = _types(proto) if any("mask" in node.meta for node in module.graph.nodes) else {}
    _put_weights(proto, source, module)
    for node in module.graph.nodes:
        if "mask" in node.meta:
            _put_mask(proto, module, node, types)
        if "resized" in node.meta:
            _put_shape(proto, node)
    path.write_bytes(proto.SerializeToString())


def resizable(source: Source) -> Callable[[fx.Node], bool]:
    """Whether the file can be changed so that a node's value has other sizes than it has.

    Not where it computes with them, nor where a reshape is neither a Reshape nor a Flatten; of what is stored, an
    initializer that is read once.
    """
    proto = _copied(source)
    makers = {name: node for node in proto.graph.node for name in node.output}
    times = Counter(name for node in proto.graph.node if not measures(node) for _, name in reads(node))
    fixed = measured(proto)
    own = {entry.name for entry in proto.graph.initializer if times[entry.name] == 1} - fixed

    def answer(node: fx.Node) -> bool:
        if node.op == "get_attr":
            return node.meta["origin"] in own
        name = node.meta.get("mask") or node.meta.get("tensor")
        if name not in makers or name in fixed:
            return False
        return node.target is not aten.reshape.default or _reshapes(makers[name])

    return answer


def _copied(source: Source) -> onnx.ModelProto:
    if not isinstance(source, Onnx):
        raise ModelError("a model that begins at a node has no file of its own")
    proto = onnx.ModelProto()
    proto.ParseFromString(source.proto_bytes())
    return proto


def _reshapes(node: onnx.NodeProto) -> bool:
    return not domain_of(node.domain) and node.op_type in ("Flatten", "Reshape")


def _put_weights(proto: onnx.ModelProto, source: Any, module: fx.GraphModule) -> None:
    """Replace the initializers whose tensors in the graph are no longer those of the file."""
    held = {node.meta["origin"]: node for node in module.graph.nodes if node.op == "get_attr"}
    entries = {entry.name: entry for entry in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input}
    resized: set[str] = set()
    for name, stored in source.stored.items():
        if name not in held:
            continue
        tensor = attribute(module, str(held[name].target)).detach().cpu()
        if tensor.shape != stored.tensor.shape:
            resized.add(name)
        was = stored.tensor.to(tensor.dtype)
        if tensor.shape == was.shape and torch.equal(tensor, was):
            continue
        if name not in entries:
            raise ModelError(f"{source.path}: '{name}' is no initializer of the file and cannot be written anew")
        entries[name].CopyFrom(_entry(tensor, name, entries[name].data_type))
        if name in inputs:  # as the file may, and below version 4 must, list its initializers
            inputs[name].CopyFrom(helper.make_tensor_value_info(name, entries[name].data_type, tensor.shape))
    if resized:
        for value in proto.graph.value_info:  # whose types stay: a runtime that knows them fuses more
            value.type.tensor_type.ClearField("shape")
        _drop_zeros(proto, module, resized)


def _drop_zeros(proto: onnx.ModelProto, module: fx.GraphModule, resized: set[str]) -> None:
    """Leave out computed biases of zeros, which the graph has not, where their length is another now."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    for node in module.graph.nodes:
        if node.target is aten.convolution.default and node.args[2] is None:
            maker: Any = makers.get(node.meta.get("tensor"))
            if maker is not None and node.args[1].meta.get("origin") in resized:
                del maker.input[2:]


def _entry(tensor: torch.Tensor, name: str, data_type: int) -> Any:
    """An initializer of a floating type of ONNX."""
    cast = tensor.to(DTYPES[data_type])
    if cast.dtype == torch.bfloat16:
        raw = cast.contiguous().view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, data_type, list(cast.shape), raw, raw=True)
    return numpy_helper.from_array(np.ascontiguousarray(cast.numpy()), name)


def _put_mask(proto: onnx.ModelProto, module: fx.GraphModule, node: Any, types: Mapping[str, int]) -> None:
    """Multiply the tensor that a masked node stands for, for everyone who reads it.

    The mask takes a byte for each element; its Cast to the tensor's type is what a runtime does once, on loading.
    """
    graph, name = proto.graph, node.meta["mask"]
    if name is None:
        raise ModelError(f"node '{node.args[0].name}' is inside an operation of the file and cannot be masked there")
    place = next((i for i, item in enumerate(graph.node) if name in item.output), None)
    if place is None:
        raise ModelError(f"no node of the file makes the tensor '{name}'")
    opset = next((entry.version for entry in proto.opset_import if not domain_of(entry.domain)), 1)
    if opset < _OLDEST:
        raise ModelError(
            f"opset {opset} is older than {_OLDEST} and has no product with a mask; convert the file first, with "
            "onnx.version_converter"
        )
    unmasked, mask, factor = (_free(f"{name}_{what}", graph) for what in ("unmasked", "mask", "factor"))
    maker = graph.node[place]
    maker.output[list(maker.output).index(name)] = unmasked
    _hold(proto, numpy_helper.from_array(attribute(module, str(node.args[1].target)).cpu().numpy(), mask))
    kind = types.get(name, onnx.TensorProto.FLOAT)
    graph.node.insert(place + 1, helper.make_node("Cast", [mask], [factor], name=factor, to=kind))
    graph.node.insert(place + 2, helper.make_node("Mul", [unmasked, factor], [name], name=mask))


def _put_shape(proto: onnx.ModelProto, node: Any) -> None:
    """Tell a Reshape into one row for each sample, however it learnt its shape, how long a row is now."""
    name = node.meta["tensor"]
    maker = next(item for item in proto.graph.node if name in item.output)
    if maker.op_type == "Reshape":
        shape = _free(f"{name}_shape", proto.graph)
        _hold(proto, numpy_helper.from_array(np.array([-1, node.meta["shapes"][0][1]], np.int64), shape))
        maker.input[1] = shape


def _hold(proto: onnx.ModelProto, entry: Any) -> None:
    """Add an initializer; below version 4 of the format it is an input, too."""
    proto.graph.initializer.append(entry)
    if proto.ir_version < 4:
        proto.graph.input.append(helper.make_tensor_value_info(entry.name, entry.data_type, entry.dims))


def _free(name: str, graph: onnx.GraphProto) -> str:
    taken = {output for item in graph.node for output in item.output}
    taken |= {entry.name for entry in graph.initializer} | {value.name for value in graph.input}
    while name in taken:
        name += "_"
    return name


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element types of tensors, as far as the file or the inference of shapes tells."""
    declared = [*proto.graph.value_info, *proto.graph.output]
    try:
        declared += onnx.shape_inference.infer_shapes(proto).graph.value_info
    except Exception:  # the inference has its own errors, and its answer is only a help
        declared += []
    kinds = {value.name: value.type.tensor_type.elem_type for value in declared}
    return {name: kind for name, kind in kinds.items() if kind in DTYPES}
