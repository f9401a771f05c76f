"""ONNX families beyond the plain layers: recurrent, quantised, fused, linear models, control flow, functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import BATCHES, Case, assert_same, built, ints, model, node, normal, positive, reference, saved

from attrcli.errors import ModelError, UnsupportedOp
from attrcli.formats.spec import Sample
from attrcli.graph import bounded
from attrcli.graph.build import FREE

MS = "com.microsoft"
ML = "ai.onnx.ml"
SCALE = np.float32(0.02)
ZERO = np.uint8(120)


def bytes_(*shape: int, kind: type = np.uint8) -> np.ndarray:
    bounds = np.iinfo(kind)
    return np.random.default_rng(1).integers(bounds.min, bounds.max + 1, shape).astype(kind)


# -- com.microsoft and ai.onnx.ml --------------------------------------------------------------------------------------

WIDE = normal(8)
FUSED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("Relu", "Tanh", "Sigmoid")},
    "LeakyRelu": {"activation_params": [0.1]},
    "Clip": {"activation_params": [0.0, 1.0]},
    "HardSigmoid": {"activation_params": [0.2, 0.4]},
}
LEAKY = {"activation": "LeakyRelu", "activation_alpha": 0.2}
TURN = {"interleaved": 1, "num_heads": 2}
CASES = [
    Case("Gelu", [(4, 8)], domain=MS),
    Case("FastGelu", [(4, 8)], {}, [WIDE], domain=MS),
    Case("FastGelu", [(4, 8)], domain=MS),
    Case("BiasGelu", [(4, 8)], {}, [WIDE], domain=MS),
    Case("QuickGelu", [(4, 8)], {"alpha": 1.5}, domain=MS),
    *(
        Case("FusedConv", [(3, 6, 6)], {"activation": name, **params}, [normal(4, 3, 3, 3), normal(4)], domain=MS)
        for name, params in FUSED.items()
    ),
    Case("FusedGemm", [(5,)], {"activation": "Relu", "alpha": 0.5, "transB": 1}, [normal(3, 5), normal(3)], domain=MS),
    Case("FusedGemm", [(5,)], LEAKY, [normal(5, 3), normal(3)], domain=MS),
    Case("FusedMatMul", [(4, 5)], {"alpha": 0.25, "transB": 1}, [normal(3, 5)], domain=MS),
    Case("FusedMatMul", [(2, 4, 5), (2, 4, 3)], {"transA": 1}, domain=MS),
    Case("SkipLayerNormalization", [(4, 8), (4, 8)], {"epsilon": 1e-5}, [WIDE, WIDE, WIDE], domain=MS),
    Case("SkipSimplifiedLayerNormalization", [(4, 8), (4, 8)], {"epsilon": 1e-5}, [WIDE, WIDE], domain=MS),
    Case("SimplifiedLayerNormalization", [(4, 8)], {"axis": -1, "epsilon": 1e-5}, [WIDE], outputs=2),
    Case("RotaryEmbedding", [(2, 6, 8)], {}, [ints(3), normal(20, 4), normal(20, 4)], domain=MS),
    Case("RotaryEmbedding", [(6, 16)], TURN, [ints(0), normal(9, 4), normal(9, 4)], domain=MS),
    Case("Attention", [(5, 8)], {"num_heads": 2}, [normal(8, 24), normal(24)], domain=MS),
    Case("Attention", [(5, 8)], {"num_heads": 2, "unidirectional": 1}, [normal(8, 24), normal(24)], domain=MS),
    Case("Attention", [(5, 8)], {"num_heads": 2, "scale": 0.3}, [normal(8, 24)], domain=MS),
    Case("MultiHeadAttention", [(5, 8), (6, 8), (6, 8)], {"num_heads": 2}, [normal(24)], domain=MS),
    Case("MultiHeadAttention", [(5, 8), (5, 8), (5, 8)], {"num_heads": 4, "unidirectional": 1}, domain=MS),
    Case("ArrayFeatureExtractor", [(6,)], {}, [ints(0, 3, 3)], domain=ML),
    Case("Binarizer", [(6,)], {"threshold": 0.2}, domain=ML),
    Case("Scaler", [(3,)], {"offset": [0.1, 0.2, 0.3], "scale": [1.0, 2.0, 3.0]}, domain=ML),
    *(Case("Normalizer", [(6,)], {"norm": kind}, kind="positive", domain=ML) for kind in ("MAX", "L1", "L2")),
    Case("Imputer", [(3,)], {"imputed_value_floats": [0.1, 0.2, 0.3], "replaced_value_float": 0.0}, domain=ML),
    Case("FeatureVectorizer", [(3,), (2,)], {"inputdimensions": [3, 2]}, domain=ML),
    Case("LinearRegressor", [(3,)], {"coefficients": [1.0, -2.0, 0.5], "intercepts": [0.25], "targets": 1}, domain=ML),
    *(
        Case(
            "LinearClassifier",
            [(2,)],
            {"coefficients": [1.0, -2, 0.5, 1, 0, 3], "intercepts": [0.1, 0.2, 0.3], "classlabels_ints": [4, 5, 6],
             "post_transform": post},
            outputs=2,
            domain=ML,
        )
        for post in ("NONE", "SOFTMAX", "LOGISTIC")
    ),
    # quantised
    Case("QuantizeLinear", [(4, 5)], {}, [SCALE, ZERO]),
    Case("QuantizeLinear", [(4, 5)], {"axis": 2}, [positive(5) / 20, bytes_(5, kind=np.int8)]),
    Case("DynamicQuantizeLinear", [(4, 5)], outputs=3),
    Case("DynamicQuantizeMatMul", [(4, 5)], {}, [bytes_(5, 3), SCALE, ZERO, normal(3)], domain=MS),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_onnx_runtime(case: Case, tmp_path: Path) -> None:
    source = saved(case.proto(), tmp_path)
    graph = built(source)
    for batch in BATCHES:
        assert_same(graph, source.proto_bytes(), case.feeds(batch))


QUANTISED = {
    "QLinearConv": "q s z w ws wz s z b",
    "QLinearMatMul": "q s z w s z s z",
    "QLinearAdd": "q s z q s z s2 z",
    "QLinearMul": "q s z q s z s2 z",
    "QLinearSigmoid": "q s z s2 z",
    "QLinearLeakyRelu": "q s z s2 z",
    "QLinearGlobalAveragePool": "q s z s2 z",
    "QLinearAveragePool": "q s z s2 z",
    "QLinearSoftmax": "q s z s2 z",
    "QLinearConcat": "s2 z q s z q s z",
    "MatMulIntegerToFloat": "q w s s z z",
    "QGemm": "q s z w s z b s2 z",
    "MatMulInteger": "q w z z",
    "ConvInteger": "q w z wz",
}
STANDARD = {"QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger"}


def quantised(op: str) -> onnx.ModelProto:
    """An image quantised, then the op, then dequantised where it gives levels."""
    shape: tuple[Any, ...] = ("N", 3, 6, 6)
    weight, attributes = bytes_(6, 5), {}
    if op in ("QLinearConv", "ConvInteger"):
        weight, attributes = bytes_(4, 3, 3, 3, kind=np.int8 if op == "QLinearConv" else np.uint8), {"pads": [1] * 4}
    elif op == "QGemm":
        shape, attributes = ("N", 6), {"alpha": 1.0}
    elif op == "QLinearAveragePool":
        attributes = {"kernel_shape": [2, 2]}
    elif op == "QLinearConcat":
        attributes = {"axis": 1}
    elif op == "QLinearSoftmax":
        attributes = {"axis": -1, "opset": 13}
    constants = {
        "s": SCALE,
        "z": ZERO,
        "s2": np.float32(0.037),
        "w": weight,
        "ws": positive(4) / 100,
        "wz": np.zeros(4, np.int8) if op == "QLinearConv" else np.uint8(7),
        "b": np.arange(4 if op == "QLinearConv" else 5, dtype=np.int32) * 100,
    }
    domain = "" if op in STANDARD else MS
    nodes = [node("QuantizeLinear", "x s z", "q"), node(op, QUANTISED[op], "t", domain=domain, **attributes)]
    if op in ("MatMulInteger", "ConvInteger"):
        nodes.append(node("Cast", "t", "y", to=TensorProto.FLOAT))
    elif op == "MatMulIntegerToFloat":
        nodes.append(node("Identity", "t", "y"))
    else:
        nodes.append(
            node("DequantizeLinear", f"t {'s' if op.startswith('QLinearM') or op == 'QLinearConv' else 's2'} z", "y")
        )
    used = {name for item in nodes for name in item.input}
    proto = model(nodes, {"x": shape}, constants={name: item for name, item in constants.items() if name in used})
    proto.opset_import.append(helper.make_opsetid(MS, 1))
    return proto


@pytest.mark.parametrize("op", QUANTISED)
def test_quantised_op_equals_onnx_runtime(op: str, tmp_path: Path) -> None:
    source = saved(quantised(op), tmp_path)
    graph = built(source)
    shape = [size or 0 for size in source.inputs[0].shape or ()][1:]
    for batch in BATCHES:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
        wanted = reference(source.proto_bytes(), {"x": x})[0]
        result = graph(x)[0].numpy()
        off = np.abs(result - wanted) > 1e-5 * max(1.0, np.abs(wanted).max())
        assert off.mean() < 0.01, "more than an element or two on the edge between two levels"
        assert np.abs(result - wanted).max() <= 0.0371


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_weights_of_four_bits(kind: int, tmp_path: Path) -> None:
    levels = list(range(-8, 7)) if kind == TensorProto.INT4 else list(range(15))
    nodes = [node("DequantizeLinear", "w s", "d", axis=0), node("MatMul", "x d", "y")]
    proto = model(nodes, {"x": ("N", 5)}, constants={"s": positive(5)}, opset=21)
    proto.graph.initializer.append(helper.make_tensor("w", kind, [5, 3], levels))
    source = saved(proto, tmp_path)
    assert_same(built(source), source.proto_bytes(), {"x": torch.randn(4, 5)})
    proto.graph.node[0].op_type = "Cast"
    del proto.graph.node[0].input[1:]
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    with pytest.raises(ModelError, match="reads 'w', which nothing before it makes in a supported type"):
        built(saved(proto, tmp_path))


def test_sparse_constants(tmp_path: Path) -> None:
    def sparse(name: str, places: np.ndarray) -> onnx.SparseTensorProto:
        values = numpy_helper.from_array(np.array([1.5, -2.0], np.float32), name)
        return helper.make_sparse_tensor(values, numpy_helper.from_array(places, f"{name}_places"), [4, 3])

    constant = helper.make_node("Constant", [], ["c"], name="c", sparse_value=sparse("v", np.array([[0, 1], [3, 2]])))
    proto = model([constant, node("Add", "c w", "d"), node("MatMul", "x d", "y")], {"x": ("N", 4)})
    proto.graph.sparse_initializer.append(sparse("w", ints(0, 11)))
    dense = torch.zeros(4, 3)
    dense[0, 0], dense[0, 1], dense[3, 2] = 1.5, 1.5, -4.0
    x = torch.randn(2, 4)
    assert torch.allclose(built(saved(proto, tmp_path))(x)[0], x @ dense)
    proto.graph.sparse_initializer[0].indices.CopyFrom(numpy_helper.from_array(ints(0, 12), "p"))
    with pytest.raises(ModelError, match="an index lies outside its shape"):
        saved(proto, tmp_path)


def test_the_gradient_passes_straight_through_the_rounding(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")]
    proto = model(nodes, {"x": ("N", 4)}, constants={"s": np.float32(0.1), "z": np.uint8(128)})
    graph = built(saved(proto, tmp_path))
    x = torch.tensor([[0.33, -0.07, 50.0, -0.449]], requires_grad=True)
    y = graph(x)[0]
    assert torch.allclose(y, torch.tensor([[0.3, -0.1, 12.7, -0.4]]), atol=1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))  # 50 is beyond the largest level


# -- recurrent ---------------------------------------------------------------------------------------------------------


def layer(op: str, direction: str, extras: Sequence[str] = (), **attributes: Any) -> onnx.ModelProto:
    """A recurrent layer over data (N, length, features), outputs with the batch first."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    sides, size, features = 2 if direction == "bidirectional" else 1, 5, 3
    constants = {
        "w": normal(sides, gates * size, features) / 2,
        "r": normal(sides, gates * size, size) / 2,
        "b": normal(sides, 2 * gates * size) / 2,
        "p": normal(sides, 3 * size) / 2,
    }
    states = "h c" if op == "LSTM" else "h"
    inputs = ["t", "w", "r", "b", "", *(states.split() if "states" in extras else [])]
    if "peepholes" in extras:
        inputs = [*inputs, *[""] * (7 - len(inputs)), "p"]
    outs = ["y", "yh", "yc"][: 3 if op == "LSTM" else 2]
    recurrent = helper.make_node(
        op, inputs, [f"{name}0" for name in outs], name="layer", hidden_size=size, direction=direction, **attributes
    )
    nodes = [node("Transpose", "x", "t", perm=[1, 0, 2])]
    shapes: dict[str, tuple[Any, ...]] = {"x": ("N", 4, features)}
    if "states" in extras:
        for name in states.split():
            nodes.append(node("Transpose", f"{name}0", name, perm=[1, 0, 2]))
            shapes[f"{name}0"] = ("N", sides, size)
    nodes.append(recurrent)
    nodes.append(node("Transpose", "y0", "y", perm=[2, 0, 1, 3]))
    nodes += [node("Transpose", f"{name}0", name, perm=[1, 0, 2]) for name in outs[1:]]
    used = {name for item in nodes for name in item.input}
    return model(nodes, shapes, outs, {name: item for name, item in constants.items() if name in used})


LAYERS = {
    **{
        f"{op} {direction}": layer(op, direction)
        for op in ("LSTM", "GRU", "RNN")
        for direction in ("forward", "reverse", "bidirectional")
    },
    "LSTM with states": layer("LSTM", "bidirectional", ["states"]),
    "GRU with states": layer("GRU", "reverse", ["states"]),
    "LSTM with peepholes": layer("LSTM", "bidirectional", ["peepholes"]),
    "LSTM clipped": layer("LSTM", "forward", clip=0.3),
    "LSTM with coupled gates": layer("LSTM", "forward", input_forget=1),
    "GRU linear before reset": layer("GRU", "bidirectional", linear_before_reset=1),
    "GRU clipped": layer("GRU", "forward", clip=0.3),
    "RNN of two activations": layer("RNN", "bidirectional", activations=["Relu", "Sigmoid"]),
    "LSTM of other activations": layer(
        "LSTM", "forward", activations=["HardSigmoid", "Softsign", "Elu"], activation_alpha=[0.25, 0.8],
        activation_beta=[0.4],
    ),
    "RNN affine": layer("RNN", "forward", activations=["Affine"], activation_alpha=[0.5], activation_beta=[0.1]),
    "RNN leaky": layer("RNN", "forward", activations=["LeakyRelu"], activation_alpha=[0.3]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layer_equals_onnx_runtime(name: str, tmp_path: Path) -> None:
    source = saved(LAYERS[name], tmp_path)
    graph = built(source)
    for batch in BATCHES:
        feeds = {spec.name: torch.randn(batch, *(size or 0 for size in spec.shape[1:])) for spec in source.inputs}
        assert_same(graph, source.proto_bytes(), feeds)


@pytest.mark.parametrize("name", ["LSTM bidirectional", "GRU linear before reset", "LSTM with peepholes"])
def test_recurrent_gradients_equal_finite_differences(name: str, tmp_path: Path) -> None:
    graph = built(saved(LAYERS[name], tmp_path), torch.float64)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: graph(v)[0], x, fast_mode=True)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_sequences_of_unequal_length(op: str, tmp_path: Path) -> None:
    proto = layer(op, "bidirectional")
    proto.graph.node[1].input[4] = "lengths"
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    proto.graph.initializer.append(numpy_helper.from_array(np.array([4, 1, 3], np.int32), "lengths"))
    source = saved(proto, tmp_path)
    assert_same(built(source), source.proto_bytes(), {"x": torch.randn(3, 4, 3)})


def test_a_recurrent_layer_over_the_batch_is_refused(tmp_path: Path) -> None:
    proto = layer("LSTM", "forward")
    proto.graph.node[0].attribute[0].ints[:] = [0, 1, 2]
    with pytest.raises(UnsupportedOp, match=r"node 'layer' \(LSTM\)"):
        built(saved(proto, tmp_path))


# -- control flow, functions, sequences --------------------------------------------------------------------------------


def body(nodes: Sequence[onnx.NodeProto], inputs: Sequence[str], outputs: Sequence[str]) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes), "body", [onnx.ValueInfoProto(name=name) for name in inputs],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )  # fmt: skip


def typed(graph: onnx.GraphProto, **kinds: int) -> onnx.GraphProto:
    """ONNX Runtime wants the types of what enters a loop."""
    for value in (*graph.input, *graph.output):
        if value.name in kinds:
            value.type.tensor_type.elem_type = kinds[value.name]
            if kinds[value.name] != FLOAT:
                value.type.tensor_type.shape.SetInParent()
    return graph


FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
STEP = typed(
    body(
        [
            node("Identity", "on", "still"),
            node("Cast", "i", "f", to=TensorProto.FLOAT),
            node("Mul", "v scale", "m"),
            node("Add", "m f", "w"),
            node("ReduceMean", "w", "mean", keepdims=0, axes=[1, 2]),
        ],
        ["i", "on", "v"],
        ["still", "w", "mean"],
    ),
    i=INT, on=BOOL, v=FLOAT, still=BOOL, w=FLOAT, mean=FLOAT,
)  # fmt: skip
SUMS = typed(
    body([node("Add", "total row", "next"), node("Tanh", "next", "seen")], ["total", "row"], ["next", "seen"]),
    total=FLOAT, row=FLOAT, next=FLOAT, seen=FLOAT,
)  # fmt: skip
SQUEEZE_IF_ONE = [
    node("Shape", "x", "s", start=1, end=2),
    node("Equal", "s one", "single"),
    node("If", "single", "y", then_branch=body([node("Neg", "x", "n")], [], ["n"]),
         else_branch=body([node("Mul", "x scale", "m")], [], ["m"])),
]  # fmt: skip
FLOWS: dict[str, tuple[Sequence[onnx.NodeProto], Sequence[str]]] = {
    "if by a size": (SQUEEZE_IF_ONE, ["y"]),
    "loop of a constant count": (
        [helper.make_node("Loop", ["three", "", "x"], ["y", "means"], name="l", body=STEP)],
        ["y", "means"],
    ),
    "loop of a size": (
        [
            node("Shape", "x", "s", start=1, end=2),
            node("Squeeze", "s", "count"),
            helper.make_node("Loop", ["count", "yes", "x"], ["y", "means"], name="l", body=STEP),
        ],
        ["y", "means"],
    ),
    "scan": (
        [
            node("ReduceMean", "x", "start", axes=[1], keepdims=0),
            node("Scan", "start x", "last y", body=SUMS, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1]),
        ],
        ["last", "y"],
    ),
    "scan backwards": (
        [
            node("ReduceMean", "x", "start", axes=[1], keepdims=0),
            node("Scan", "start x", "last y", body=SUMS, num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[1],
                 scan_input_directions=[1], scan_output_directions=[1]),
        ],
        ["last", "y"],
    ),
    "a sequence split and joined": (
        [
            node("SplitToSequence", "x two", "parts", axis=1),
            node("SequenceAt", "parts zero", "first"),
            node("ConcatFromSequence", "parts", "whole", axis=1),
            node("Sub", "whole first", "y"),
        ],
        ["y"],
    ),
}  # fmt: skip
CONSTANTS = {
    "one": ints(1), "zero": np.int64(0), "two": np.int64(2), "three": np.int64(3), "yes": np.bool_(True),
    "scale": np.float32(0.5),
}  # fmt: skip


def flow(name: str) -> onnx.ModelProto:
    nodes, outputs = FLOWS[name]
    shape = ("N", 2, 6) if "sequence" in name else ("N", 4, 6)
    return model(nodes, {"x": shape}, outputs, {key: np.asarray(value) for key, value in CONSTANTS.items()}, opset=17)


@pytest.mark.parametrize("name", FLOWS)
def test_control_flow_is_unrolled(name: str, tmp_path: Path) -> None:
    source = saved(flow(name), tmp_path)
    graph = built(source)
    for batch in BATCHES:
        assert_same(graph, source.proto_bytes(), {"x": torch.randn(batch, *source.inputs[0].shape[1:])})


def test_control_flow_by_data_or_batch_is_refused(tmp_path: Path) -> None:
    branch = body([node("Neg", "x", "n")], [], ["n"])
    by_data = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("Greater", "m scale", "c"),
        node("If", "c", "y", then_branch=branch, else_branch=branch),
    ]
    constants = {"scale": np.float32(0.5)}
    with pytest.raises(UnsupportedOp, match=r"condition of an If depends on the input's data \(node 'If_y' \(If\)\)"):
        built(saved(model(by_data, {"x": ("N", 4)}, constants=constants), tmp_path))
    by_batch = [
        node("Shape", "x", "s", end=1),
        node("Squeeze", "s", "count"),
        helper.make_node("Loop", ["count", "", "x"], ["y", "means"], name="l", body=STEP),
    ]
    with pytest.raises(UnsupportedOp, match="trip count of a Loop depends on the batch size"):
        built(saved(model(by_batch, {"x": ("N", 4, 6)}, constants=constants, opset=17), tmp_path))


def with_functions(nodes: Sequence[onnx.NodeProto], *functions: onnx.FunctionProto) -> onnx.ModelProto:
    proto = model(nodes, {"x": ("N", 4)})
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.functions.extend(functions)
    return proto


def function(name: str, nodes: Sequence[onnx.NodeProto], *attributes: str) -> onnx.FunctionProto:
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["r"], list(nodes), versions, list(attributes))


def test_functions_of_the_file_are_opened(tmp_path: Path) -> None:
    leaky = node("LeakyRelu", "a", "r")
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    inner = function("Inner", [leaky], "slope")
    outer = function("Outer", [node("Inner", "a", "b", domain="local", slope=0.25), node("Neg", "b", "r")])
    proto = with_functions([node("Outer", "x", "h", domain="local"), node("Exp", "h", "y")], inner, outer)
    source = saved(proto, tmp_path)
    graph = built(source)
    for batch in BATCHES:
        assert_same(graph, source.proto_bytes(), {"x": torch.randn(batch, 4)})
    tensors = {entry.meta["tensor"] for entry in graph.graph.nodes if "tensor" in entry.meta}
    assert tensors == {"x", "h", "y"}  # names inside a function are no tensors of the file


def test_an_error_inside_a_function_names_the_way_to_it(tmp_path: Path) -> None:
    proto = with_functions([node("Outer", "x", "y", domain="local")], function("Outer", [node("Unique", "a", "r")]))
    with pytest.raises(UnsupportedOp, match=r"node 'Outer_y' \(Outer\): node 'Unique_r': op Unique"):
        built(saved(proto, tmp_path))


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    proto = with_functions([node("Outer", "x", "y", domain="local")],
                           function("Outer", [node("Outer", "a", "r", domain="local")]))  # fmt: skip
    with pytest.raises(ModelError, match="deep"):
        built(saved(proto, tmp_path))


def test_functions_that_double_their_work_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_STEPS", 30_000)
    functions = [function("F0", [node("Neg", "a", "r")])]
    for i in range(1, 40):
        calls = [node(f"F{i - 1}", "a", "b", domain="local"), node(f"F{i - 1}", "b", "r", domain="local")]
        functions.append(function(f"F{i}", calls))
    with pytest.raises(ModelError, match="unrolls to more than 30000 steps"):
        built(saved(with_functions([node("F39", "x", "y", domain="local")], *functions), tmp_path))


def test_attention_arrives_closed(tmp_path: Path) -> None:
    heads = {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}
    proto = model([node("Attention", "q k v", "y", **heads)], {"q": ("N", 5, 16), "k": ("N", 5, 8), "v": ("N", 5, 8)},
                  opset=23)  # fmt: skip
    source = saved(proto, tmp_path)
    graph = built(source)
    targets = [entry.target for entry in graph.graph.nodes if entry.op == "call_function"]
    assert targets.count(torch.ops.aten.scaled_dot_product_attention.default) == 1
    for batch in BATCHES:
        feeds = {"q": torch.randn(batch, 5, 16), "k": torch.randn(batch, 5, 8), "v": torch.randn(batch, 5, 8)}
        assert_same(graph, source.proto_bytes(), feeds)


def test_an_embedding_layer(tmp_path: Path) -> None:
    proto = model(
        [
            node(
                "EmbedLayerNormalization", "ids types words places kinds w b mask", "y lengths", domain=MS, epsilon=1e-5
            )
        ],
        dict.fromkeys(("ids", "types", "mask"), ("N", 6)),
        ["y"],
        {"words": normal(9, 8), "places": normal(10, 8), "kinds": normal(2, 8), "w": normal(8), "b": normal(8)},
        kind=TensorProto.INT32,
    )
    proto.opset_import.append(helper.make_opsetid(MS, 1))
    source = saved(proto, tmp_path)
    graph = built(source)
    for batch in BATCHES:
        feeds = {
            "ids": torch.randint(0, 9, (batch, 6), dtype=torch.int32),
            "types": torch.randint(0, 2, (batch, 6), dtype=torch.int32),
            "mask": torch.ones(batch, 6, dtype=torch.int32),
        }
        assert_same(graph, source.proto_bytes(), feeds)


@pytest.mark.parametrize("op", ["TreeEnsembleRegressor", "LabelEncoder"])
def test_what_has_no_gradient_says_so(op: str, tmp_path: Path) -> None:
    proto = model([node(op, "x", "y", domain=ML)], {"x": ("N", 4)})
    proto.opset_import.append(helper.make_opsetid(ML, 3))
    with pytest.raises(UnsupportedOp, match=rf"op {op} \(domain ai.onnx.ml, opset 3\) (is|maps)"):
        saved(proto, tmp_path).build({"x": Sample((4,), torch.float32)}, torch.float32, FREE)
