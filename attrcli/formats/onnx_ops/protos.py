"""Reading the protobufs of an ONNX file: tensors, attributes, nodes, names fit for an error."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from attrcli.errors import ModelError
from attrcli.formats.onnx_ops.base import DTYPES
from attrcli.graph.bounded import LARGEST


def attribute_value(attribute: onnx.AttributeProto) -> Any:
    """An attribute as a Python value: text decoded, tensors as torch tensors, floats as the decimal that was written.

    Graphs stay protobufs.
    """
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return _decimal(value)
    if isinstance(value, onnx.TensorProto):
        return stored_tensor(value)
    if isinstance(value, onnx.SparseTensorProto):
        return dense_tensor(value)
    if isinstance(value, onnx.GraphProto | int):
        return value
    return [_decimal(item) if isinstance(item, float) else item for item in value]


def attributes_of(node: onnx.NodeProto, outer: Mapping[str, Any]) -> dict[str, Any]:
    """A node's attributes; one that refers to an attribute of the function around it is taken from `outer`."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            found[attribute.name] = attribute_value(attribute)
        elif attribute.ref_attr_name in outer:
            found[attribute.name] = outer[attribute.ref_attr_name]
    return found


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same single precision number.

    ONNX holds 0.01 as 0.00999999977; the decimal is what the exporter was given and what the other formats hold.
    """
    return float(str(np.float32(value)))


_LONGEST = 400


def one_line(text: str) -> str:
    """Text of a file that may hold anything, fit for one line of an error."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(character if character.isprintable() else "?" for character in text)


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


FOUR_BITS: dict[int, Any] = {onnx.TensorProto.UINT4: np.uint8, onnx.TensorProto.INT4: np.int8}
"""Types of 4 bits, and those that hold their numbers: for weights that are dequantised and read by nothing else."""


def stored_tensor(entry: onnx.TensorProto, *, narrow: bool = False) -> torch.Tensor:
    """A stored tensor of any type that torch computes with, or of 4 bits where `narrow`."""
    if entry.data_type not in DTYPES and not (narrow and entry.data_type in FOUR_BITS):
        raise ModelError(f"tensor '{entry.name}' has data type {type_name(entry.data_type)}, which is not supported")
    if entry.data_location == onnx.TensorProto.EXTERNAL:  # numpy_helper would read it, from anywhere
        raise ModelError(f"tensor '{entry.name}' of a function keeps its data outside the file")
    try:
        array = np.array(numpy_helper.to_array(entry))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor '{entry.name}': its data does not fit its shape {list(entry.dims)}") from error
    if entry.data_type in FOUR_BITS:
        return torch.from_numpy(array.astype(FOUR_BITS[entry.data_type]))
    if entry.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


def type_name(number: int) -> str:
    """ONNX's name of a data type."""
    return str(onnx.TensorProto.DataType.Name(number)) if number in onnx.TensorProto.DataType.values() else str(number)


def dense_tensor(entry: onnx.SparseTensorProto) -> torch.Tensor:
    """A sparse tensor of a file, as a dense one."""
    sizes = list(entry.dims)
    check_size(f"tensor '{entry.values.name}'", sizes)
    values, places = stored_tensor(entry.values), stored_tensor(entry.indices).to(torch.int64)
    if (
        math.prod(sizes) > LARGEST
        or values.dim() != 1
        or places.shape not in ((len(values),), (len(values), len(sizes)))
    ):
        raise ModelError(f"tensor '{entry.values.name}': its values and indices do not fit its shape {sizes}")
    if places.dim() == 2:
        places = (places * torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])).sum(1)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < math.prod(sizes):
        raise ModelError(f"tensor '{entry.values.name}': an index lies outside its shape {sizes}")
    dense = torch.zeros(math.prod(sizes), dtype=values.dtype)
    dense[places] = values
    return dense.reshape(sizes)


_MOST_ELEMENTS = 1 << 40


def check_size(what: str, sizes: Sequence[int]) -> None:
    """Raise ModelError for a shape that no tensor can have."""
    if any(size < 0 for size in sizes):
        raise ModelError(f"{what} has a negative dimension: {list(sizes)}")
    if math.prod(sizes) > _MOST_ELEMENTS or any(size > _MOST_ELEMENTS for size in sizes):
        raise ModelError(f"{what} has {math.prod(sizes)} elements: {list(sizes)}")
