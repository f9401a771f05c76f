"""The ONNX op table: one small function per op, by family; variants by the opset since which they hold."""

from attrcli.formats.onnx_ops.attention import ATTENTION
from attrcli.formats.onnx_ops.base import Table
from attrcli.formats.onnx_ops.contrib import CONTRIB, UNDER_STANDARD
from attrcli.formats.onnx_ops.elementwise import ELEMENTWISE
from attrcli.formats.onnx_ops.indexing import INDEXING
from attrcli.formats.onnx_ops.layers import LAYERS
from attrcli.formats.onnx_ops.ml import ML
from attrcli.formats.onnx_ops.pooling import POOLING
from attrcli.formats.onnx_ops.quantised import QUANTISED
from attrcli.formats.onnx_ops.recurrent import RECURRENT
from attrcli.formats.onnx_ops.reductions import REDUCTIONS
from attrcli.formats.onnx_ops.resize import RESIZE
from attrcli.formats.onnx_ops.sampling import SAMPLING
from attrcli.formats.onnx_ops.signal import SIGNAL
from attrcli.formats.onnx_ops.structure import STRUCTURE

TABLES: dict[str, Table] = {
    "": {
        **ATTENTION,
        **ELEMENTWISE,
        **INDEXING,
        **LAYERS,
        **POOLING,
        **QUANTISED,
        **RECURRENT,
        **REDUCTIONS,
        **RESIZE,
        **SAMPLING,
        **SIGNAL,
        **STRUCTURE,
    },
    "ai.onnx.ml": ML,
    "com.microsoft": CONTRIB,
}
"""Operator set domain -> op type -> version -> row."""

BESIDE_STANDARD = UNDER_STANDARD
"""Op type -> version -> row, for ops of the standard's domain that the standard's version of a file does not have."""

REFUSED: dict[str, dict[str, str]] = {
    "": {
        **dict.fromkeys(
            ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
            "draws random numbers, so that no attribution would be repeatable",
        ),
        **dict.fromkeys(
            ("NonMaxSuppression", "Unique"), "gives an output whose size depends on the data: cut the model before it"
        ),
        **dict.fromkeys(
            ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
            "works on text: cut the model behind it",
        ),
        "BitCast": "reads a tensor's memory as another type, while a graph keeps all floating tensors in one type",
        "ImageDecoder": "reads compressed image files: cut the model behind it",
    },
    "com.microsoft.nchwc": {"": "is laid out for one processor: save the optimised model at the level 'extended'"},
    "ai.onnx.ml": {
        **dict.fromkeys(
            ("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"),
            "is a set of decision trees, constant almost everywhere: forward-only methods run it in ONNX Runtime",
        ),
        **dict.fromkeys(("LabelEncoder", "CategoryMapper", "DictVectorizer"), "maps labels, not numbers"),
    },
}
"""Operator set domain -> op type -> why there is no row for it and will be none; '' stands for all others."""
