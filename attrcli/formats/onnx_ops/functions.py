"""Functions: those that a file defines, and the bodies that ONNX's standard gives to its own ops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import defs

from attrcli.errors import ModelError
from attrcli.formats.onnx_ops.base import DTYPES, Known, Operand, Stored
from attrcli.formats.onnx_ops.protos import attribute_value, domain_of, one_line

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Function:
    """A body with its operator sets and the defaults of its attributes."""

    proto: onnx.FunctionProto
    opsets: dict[str, int]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def functions_of(proto: onnx.ModelProto) -> dict[tuple[str, str], Function]:
    """The functions that a file defines, by domain and name."""
    found = {}
    for entry in proto.functions:
        if entry.overload:
            raise ModelError(f"function '{one_line(entry.name)}' is an overload: several of one name are not supported")
        defaults = {attribute.name: attribute_value(attribute) for attribute in entry.attribute_proto}
        versions = {domain_of(item.domain): item.version for item in (*proto.opset_import, *entry.opset_import)}
        found[domain_of(entry.domain), entry.name] = Function(entry, versions, defaults)
    return found


def standard_function(
    node: onnx.NodeProto, attributes: Mapping[str, Any], opsets: Mapping[str, int], operands: Sequence[Operand]
) -> Function | None:
    """The body that ONNX's standard gives to this op in this version; None where it has none."""
    domain = domain_of(node.domain)
    version = opsets.get(domain)
    if version is None or version > (1 << 31) - 1:
        return None
    try:
        schema: Any = defs.get_schema(node.op_type, version, domain)
    except defs.SchemaError:
        return None
    newest = opsets.get("", version)
    body = onnx.FunctionProto()
    if schema.has_context_dependent_function:
        held = [item for item in schema.context_dependent_function_opset_versions if item <= newest]
        types = [_type(operand, i).SerializeToString() for i, operand in enumerate(operands)]
        if not held:
            return None
        data = schema.get_context_dependent_function_with_opset_version(
            max(held), _resolved(node, attributes).SerializeToString(), types
        )
        body.ParseFromString(data)
    elif schema.has_function:
        held = [item for item in schema.function_opset_versions if item <= newest]
        if not held:
            return None
        body.ParseFromString(schema.get_function_with_opset_version(max(held)))
    else:
        return None
    defaults = {
        name: attribute_value(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type
    }
    versions = {**opsets, **{domain_of(item.domain): item.version for item in body.opset_import}}
    return Function(body, versions, defaults)


def _resolved(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> onnx.NodeProto:
    """A node whose attributes refer to no function around it."""
    if not any(attribute.ref_attr_name for attribute in node.attribute):
        return node
    resolved = onnx.NodeProto()
    resolved.CopyFrom(node)
    del resolved.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            resolved.attribute.append(attribute)
        elif attribute.name in attributes:
            resolved.attribute.append(onnx.helper.make_attribute(attribute.name, attributes[attribute.name]))
    return resolved


def _type(operand: Operand, position: int) -> onnx.TypeProto:
    """The type of an operand, with the dimensions that are constants of the model."""
    if operand is None:
        return onnx.TypeProto()
    if isinstance(operand, tuple):
        return onnx.helper.make_sequence_type_proto(_type(operand[0] if operand else None, position))
    if isinstance(operand, Known):
        shapes = (operand.array.shape,) * 2
        dtype = operand.dtype
    elif isinstance(operand, Stored):
        shapes, dtype = (tuple(operand.tensor.shape),) * 2, operand.tensor.dtype
    else:
        shapes, dtype = (tuple(operand.probes[0].shape), tuple(operand.probes[1].shape)), operand.dtype
    sizes = [a if a == c else f"free_{position}_{i}" for i, (a, c) in enumerate(zip(*shapes, strict=True))]
    return onnx.helper.make_tensor_type_proto(_CODES[dtype], sizes)
