"""The ONNX op table: one small function per op, by family; variants by the opset since which they hold."""

from attrcli.formats.onnx_ops.base import Table
from attrcli.formats.onnx_ops.elementwise import ELEMENTWISE
from attrcli.formats.onnx_ops.indexing import INDEXING
from attrcli.formats.onnx_ops.layers import LAYERS
from attrcli.formats.onnx_ops.pooling import POOLING
from attrcli.formats.onnx_ops.reductions import REDUCTIONS
from attrcli.formats.onnx_ops.resize import RESIZE
from attrcli.formats.onnx_ops.structure import STRUCTURE

TABLES: dict[str, Table] = {
    "": {**ELEMENTWISE, **INDEXING, **LAYERS, **POOLING, **REDUCTIONS, **RESIZE, **STRUCTURE},
}
"""Operator set domain -> op type -> version -> row."""
