"""Changes to an ONNX file: masks and other weights put into the original protobuf, all else left byte for byte."""

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
from attrcli.formats.spec import Source
from attrcli.graph.check import attribute


def save(source: Source, module: fx.GraphModule, path: Path) -> None:
    """Write the file that `module` was imported from, changed as `module` was: masked, or with other weights.

    Raises ModelError for a change that no node or initializer of the file stands for.
    """
    if not isinstance(source, Onnx):
        raise ModelError("a model that begins at a node has no file of its own")
    proto = onnx.ModelProto()
    proto.ParseFromString(source.proto_bytes())
    _put_weights(proto, source, module)
    for node in module.graph.nodes:
        if "mask" in node.meta:
            _put_mask(proto, module, node)
    path.write_bytes(proto.SerializeToString())


def _put_weights(proto: onnx.ModelProto, source: Onnx, module: fx.GraphModule) -> None:
    """Replace the initializers whose tensors in the graph are no longer those of the file."""
    held = {node.meta["origin"]: node for node in module.graph.nodes if node.op == "get_attr"}
    entries = {entry.name: entry for entry in proto.graph.initializer}
    resized = False
    for name, stored in source.stored.items():
        if name not in held:
            continue
        tensor = attribute(module, str(held[name].target)).detach().cpu()
        if tensor.shape != stored.tensor.shape:
            resized = True
        was = stored.tensor.to(tensor.dtype)
        if tensor.shape == was.shape and torch.equal(tensor, was):
            continue
        if name not in entries:
            raise ModelError(f"{source.path}: '{name}' is no initializer of the file and cannot be written anew")
        entries[name].CopyFrom(_entry(tensor, name, entries[name].data_type))
    if resized:  # the shapes between that the file tells are no longer those
        del proto.graph.value_info[:]


def _entry(tensor: torch.Tensor, name: str, data_type: int) -> Any:
    """An initializer of a floating type of ONNX."""
    cast = tensor.to(DTYPES[data_type])
    if cast.dtype == torch.bfloat16:
        raw = cast.contiguous().view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, data_type, list(cast.shape), raw, raw=True)
    return numpy_helper.from_array(np.ascontiguousarray(cast.numpy()), name)


def _put_mask(proto: onnx.ModelProto, module: fx.GraphModule, node: Any) -> None:
    """Multiply the tensor that a masked node stands for, for everyone who reads it."""
    graph, name = proto.graph, node.meta["mask"]
    if name is None:
        raise ModelError(f"node '{node.args[0].name}' is inside an operation of the file and cannot be masked there")
    place = next((i for i, item in enumerate(graph.node) if name in item.output), None)
    if place is None:
        raise ModelError(f"no node of the file makes the tensor '{name}'")
    taken = {o for item in graph.node for o in item.output} | {entry.name for entry in graph.initializer}
    unmasked, mask = _free(f"{name}_unmasked", taken), _free(f"{name}_mask", taken)
    maker = graph.node[place]
    maker.output[list(maker.output).index(name)] = unmasked
    data_type = _type_of(proto, name)
    graph.initializer.append(_entry(attribute(module, str(node.args[1].target)), mask, data_type))
    graph.node.insert(place + 1, helper.make_node("Mul", [unmasked, mask], [name], name=mask))


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _type_of(proto: onnx.ModelProto, name: str) -> int:
    """The element type of a tensor, as the file or the inference of shapes tells; float32 where neither does."""
    declared = [*proto.graph.value_info, *proto.graph.output]
    try:
        declared += onnx.shape_inference.infer_shapes(proto).graph.value_info
    except Exception:  # the inference has its own errors, and its answer is only a help
        declared += []
    found = (value.type.tensor_type.elem_type for value in declared if value.name == name)
    return next((kind for kind in found if kind in DTYPES), onnx.TensorProto.FLOAT)
