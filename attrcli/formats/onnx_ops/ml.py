"""ai.onnx.ml: the ops of linear models and their preprocessing."""

import math
from typing import Any

import numpy as np
import torch

from attrcli.formats.onnx_ops.base import Node, Result, Table, aten
from attrcli.graph.build import Builder, Value


def _floating(b: Builder, x: Value) -> Result:
    return b.call(aten.to.dtype, x, b.dtype)


def array_feature_extractor(b: Builder, n: Node, x: Value, index: Value) -> Result:
    """ArrayFeatureExtractor: columns of the last dimension."""
    places = b.call(aten.reshape.default, b.call(aten.to.dtype, index, torch.int64), [-1])
    x = b.call(aten.unsqueeze.default, x, 0) if x.rank == 1 else x
    return b.call(aten.index_select.default, x, x.rank - 1, places)


def binarizer(b: Builder, n: Node, x: Value) -> Result:
    """Binarizer: 1 above the threshold."""
    return b.call(aten.to.dtype, b.call(aten.gt.Scalar, x, n.get("threshold", 0.0)), x.dtype)


def scaler(b: Builder, n: Node, x: Value) -> Result:
    """Scaler: (x - offset) scale."""
    offset, scale = (b.literal(list(n.get(name)), torch.float32) for name in ("offset", "scale"))
    return b.call(aten.mul.Tensor, b.call(aten.sub.Tensor, _floating(b, x), offset), scale)


def normalizer(b: Builder, n: Node, x: Value) -> Result:
    """Normalizer: rows divided by a norm, zero rows left alone."""
    x, kind = _floating(b, x), n.get("norm", "MAX")
    if kind == "MAX":
        norm = b.call(aten.amax.default, x, [-1], True)
    else:
        norm = b.call(aten.linalg_vector_norm.default, x, {"L1": 1, "L2": 2}[kind], [-1], True)
    return b.call(aten.div.Tensor, x, b.call(aten.masked_fill.Scalar, norm, b.call(aten.eq.Scalar, norm, 0), 1.0))


def imputer(b: Builder, n: Node, x: Value) -> Result:
    """Imputer: one value replaced by others, column by column."""
    floating = x.dtype.is_floating_point
    new = n.get("imputed_value_floats" if floating else "imputed_value_int64s")
    old = n.get("replaced_value_float", 0.0) if floating else n.get("replaced_value_int64", 0)
    missing = b.call(aten.isnan.default, x) if math.isnan(old) else b.call(aten.eq.Scalar, x, old)
    return b.call(aten.where.self, missing, b.literal(list(new), x.dtype), x)


def feature_vectorizer(b: Builder, n: Node, *parts: Value) -> Result:
    """FeatureVectorizer: columns side by side."""
    return b.call(aten.cat.default, [_floating(b, part) for part in parts], 1)


def _scores(b: Builder, n: Node, x: Value, rows: int) -> Result:
    weights = torch.from_numpy(np.array(n.get("coefficients"), dtype=np.float64).reshape(rows, -1))
    shift = n.get("intercepts")
    bias = None if not shift else b.tensor(torch.tensor(shift, dtype=torch.float64), "intercepts", parameter=True)
    return b.call(aten.linear.default, _floating(b, x), b.tensor(weights, "coefficients", parameter=True), bias)


def _finished(b: Builder, n: Node, scores: Value) -> Result:
    match n.get("post_transform", "NONE"):
        case "NONE":
            return scores
        case "SOFTMAX":
            return b.call(aten.softmax.int, scores, 1)
        case "LOGISTIC":
            return b.call(aten.sigmoid.default, scores)
        case other:
            b.refuse(f"{n.op} with post_transform {other}")


def linear_regressor(b: Builder, n: Node, x: Value) -> Result:
    """LinearRegressor."""
    return _finished(b, n, _scores(b, n, x, n.get("targets", 1)))


def linear_classifier(b: Builder, n: Node, x: Value) -> Result:
    """LinearClassifier: labels, then a score per class; of two classes one row may stand for both."""
    labels = n.get("classlabels_ints")
    count = len(labels or n.get("classlabels_strings") or [])
    rows = len(n.get("intercepts") or []) or count
    scores = _scores(b, n, x, rows)
    best: Any = None
    if rows == 1:
        best = b.call(aten.to.dtype, b.call(aten.gt.Scalar, b.call(aten.select.int, scores, 1, 0), 0), torch.int64)
        if n.get("post_transform", "NONE") == "LOGISTIC":
            second = b.call(aten.sigmoid.default, scores)
            scores = b.call(aten.cat.default, [b.call(aten.rsub.Scalar, second, 1), second], 1)
        else:
            scores = _finished(b, n, b.call(aten.cat.default, [b.call(aten.neg.default, scores), scores], 1))
    else:
        best = b.call(aten.argmax.default, scores, 1, False)
        scores = _finished(b, n, scores)
    if labels is None:
        return [None, scores]
    return [b.call(aten.index_select.default, b.literal(list(labels), torch.int64), 0, best), scores]


ML: Table = {
    "ArrayFeatureExtractor": {1: array_feature_extractor},
    "Binarizer": {1: binarizer},
    "FeatureVectorizer": {1: feature_vectorizer},
    "Imputer": {1: imputer},
    "LinearClassifier": {1: linear_classifier},
    "LinearRegressor": {1: linear_regressor},
    "Normalizer": {1: normalizer},
    "Scaler": {1: scaler},
}
