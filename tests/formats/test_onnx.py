"""ONNX import: against ONNX Runtime at several batch sizes, against finite differences, and against bad files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import BATCHES, Case, assert_same, built, ints, model, node, normal, positive, reference, saved
from onnx_nets import Residual, Transformer, Windows, exported
from torch import fx, nn

from attrcli.errors import ModelError, UnsupportedOp
from attrcli.formats.onnx import Onnx
from attrcli.formats.spec import Sample
from attrcli.graph.build import FREE

IMAGE = (3, 9, 8)
UNARY = {
    "normal": "Abs Atan Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish LeakyRelu Neg Relu Round Selu Sigmoid "
    "Sign Sin Sinh Softplus Softsign Tan Tanh Celu Mish Identity IsNaN IsInf Hardmax Softmax LogSoftmax "
    "ThresholdedRelu Shape Size",
    "positive": "Log Sqrt Reciprocal Asinh",
    "unit": "Asin Acos Atanh",
    "above one": "Acosh",
    "bool": "Not",
}
BINARY = {
    "normal": "Add Sub Mul Div Equal Greater Less GreaterOrEqual LessOrEqual Max Min Sum Mean",
    "bool": "And Or Xor",
    "positive": "Pow",
}
REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
WEIGHT = normal(6, 3, 3, 3)
PAD_MODES = ("constant", "reflect", "edge", "wrap")
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}

CASES = [
    *(Case(op, [(4, 5)], kind=kind) for kind, ops in UNARY.items() for op in ops.split()),
    *(Case(op, [(4, 5), (4, 5)], kind=kind) for kind, ops in BINARY.items() for op in ops.split()),
    *(Case(op, [(4, 5)], {}, [normal(5)]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")),
    Case("Mod", [(4, 5)], {}, [ints(1, 2, 3, 2, 1)], kind="index"),
    Case("Mod", [(4, 5)], {"fmod": 1}, [positive(5)]),
    Case("Div", [(4, 5)], {}, [ints(1, -2, 3, 2, -1)], kind="index"),
    *(Case("Pow", [(4,)], {}, [np.float32(power)], kind="positive") for power in (2, 0.5, -1, 3, 1)),
    Case("LeakyRelu", [(4,)], {"alpha": 0.2}),
    Case("Elu", [(4,)], {"alpha": 0.5}),
    Case("Celu", [(4,)], {"alpha": 0.5}),
    Case("Selu", [(4,)], {"alpha": 1.5, "gamma": 1.2}),
    Case("Gelu", [(4,)], {"approximate": "none"}, opset=20),
    Case("Gelu", [(4,)], {"approximate": "tanh"}, opset=20),
    Case("HardSigmoid", [(4,)], {"alpha": 1 / 6, "beta": 0.5}),
    Case("HardSigmoid", [(4,)], {"alpha": 0.3, "beta": 0.4}),
    Case("ThresholdedRelu", [(4,)], {"alpha": 0.3}),
    Case("Shrink", [(4,)], {"lambd": 0.3, "bias": 0.3}),
    Case("Shrink", [(4,)], {"lambd": 0.3, "bias": 0.1}),
    Case("PRelu", [(3, 4, 4)], {}, [normal(3, 1, 1)]),
    Case("PRelu", [(3, 4, 4)], {}, [normal(1)]),
    Case("PRelu", [(3, 4, 4)], {}, [normal(3, 4, 4)]),
    Case("Clip", [(4, 5)], {"min": -0.3, "max": 0.4}, opset=6),
    Case("Clip", [(4, 5)], {"max": 0.4}, opset=6),
    Case("Clip", [(4, 5)], {}, [np.float32(-0.3), np.float32(0.4)]),
    Case("Clip", [(4, 5)], {}, [np.float32(0.0)]),
    Case("Clip", [(4, 5)], {}, [None, np.float32(0.4)]),
    Case("Cast", [(4, 5)], {"to": TensorProto.INT64}),
    Case("Cast", [(4, 5)], {"to": TensorProto.BOOL}),
    Case("Cast", [(4, 5)], {"to": TensorProto.FLOAT}, kind="index"),
    # convolutions and matrix products
    Case("Conv", [IMAGE], {}, [WEIGHT, normal(6)]),
    Case("Conv", [IMAGE], {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}, [WEIGHT]),
    Case("Conv", [IMAGE], {"group": 3, "pads": [1, 1, 1, 1]}, [normal(6, 1, 3, 3), normal(6)]),
    *(Case("Conv", [IMAGE], {"auto_pad": f"SAME_{end}", "strides": [2, 2]}, [WEIGHT]) for end in ("UPPER", "LOWER")),
    Case("Conv", [IMAGE], {"auto_pad": "VALID"}, [WEIGHT]),
    Case("Conv", [(3, 9)], {"pads": [0, 2]}, [normal(4, 3, 3), normal(4)]),
    Case("Conv", [(2, 5, 5, 5)], {"pads": [1, 1, 1, 1, 1, 1]}, [normal(4, 2, 3, 3, 3)]),
    Case("ConvTranspose", [IMAGE], {"strides": [2, 2], "output_padding": [1, 1]}, [normal(3, 4, 3, 3), normal(4)]),
    Case("ConvTranspose", [IMAGE], {"strides": [2, 3], "pads": [1, 0, 0, 2]}, [normal(3, 4, 3, 3), normal(4)]),
    Case("ConvTranspose", [IMAGE], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, [normal(3, 4, 3, 3)]),
    Case("ConvTranspose", [IMAGE], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}, [normal(3, 4, 3, 3)]),
    Case("ConvTranspose", [IMAGE], {"strides": [2, 2], "output_shape": [18, 17]}, [normal(3, 4, 3, 3)]),
    Case("ConvTranspose", [(4, 6)], {"group": 2, "dilations": [2]}, [normal(4, 3, 3)]),
    Case("MatMul", [(4, 5)], {}, [normal(5, 3)]),
    Case("MatMul", [(2, 4, 5), (2, 5, 3)]),
    Case("Gemm", [(5,)], {}, [normal(5, 3), normal(3)]),
    Case("Gemm", [(5,)], {"transB": 1}, [normal(3, 5), normal(3)]),
    Case("Gemm", [(5,)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, [normal(3, 5), normal(1, 3)]),
    Case("Gemm", [(5,)], {}, [normal(5, 3)]),
    Case("Einsum", [(4, 5), (5, 3)], {"equation": "bij, bjk -> bik"}),
    Case("Einsum", [(4, 5)], {"equation": "...ij->...ji"}),
    # normalisations
    Case("BatchNormalization", [IMAGE], {"epsilon": 0.01}, [normal(3), normal(3), normal(3), positive(3)]),
    Case("BatchNormalization", [(3,)], {}, [normal(3), normal(3), normal(3), positive(3)], opset=9),
    Case("LayerNormalization", [(4, 5)], {}, [normal(5), normal(5)]),
    Case("LayerNormalization", [(4, 5)], {"axis": 1, "epsilon": 0.01}, [normal(4, 5)]),
    Case("LayerNormalization", [(4, 5)], {"axis": 2}, [normal(5), normal(5)], outputs=3),
    Case("GroupNormalization", [(4, 5)], {"num_groups": 2}, [normal(4), normal(4)], opset=21),
    Case("InstanceNormalization", [IMAGE], {"epsilon": 0.01}, [normal(3), normal(3)]),
    Case("LRN", [(7, 4, 4)], {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 2.0}),
    Case("LpNormalization", [(4, 5)], {"axis": -1, "p": 2}),
    Case("LpNormalization", [(4, 5)], {"axis": 1, "p": 1}),
    Case("MeanVarianceNormalization", [(3, 4, 4)], {"axes": [2, 3]}),
    # softmax
    *(Case(op, [(3, 4)], {"axis": axis}, opset=11) for op in ("Softmax", "LogSoftmax", "Hardmax") for axis in (1, 2)),
    *(Case(op, [(3, 4)], {"axis": axis}) for op in ("Softmax", "LogSoftmax", "Hardmax") for axis in (1, -1)),
    # pooling
    *(
        Case("MaxPool", [IMAGE], {**POOL, "ceil_mode": ceil, "pads": pads})
        for ceil in (0, 1)
        for pads in ([1] * 4, [0, 1, 1, 0])
    ),
    *(Case("MaxPool", [IMAGE], {**POOL, "auto_pad": pad}) for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    Case("MaxPool", [IMAGE], {**POOL, "dilations": [2, 1]}),
    Case("MaxPool", [IMAGE], {**POOL, "pads": [1] * 4}, outputs=2),
    Case("MaxPool", [(3, 9)], {"kernel_shape": [2]}),
    Case("MaxPool", [(2, 5, 5, 5)], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
    *(
        Case("AveragePool", [IMAGE], {**POOL, "count_include_pad": count, "ceil_mode": ceil, "pads": pads}, opset=19)
        for count in (0, 1)
        for ceil in (0, 1)
        for pads in ([1] * 4, [0, 1, 1, 0])
    ),
    Case("AveragePool", [IMAGE], {**POOL, "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", [IMAGE], {**POOL, "dilations": [2, 1], "pads": [1, 0, 0, 1]}, opset=19),
    Case("LpPool", [IMAGE], {**POOL, "pads": [1] * 4, "p": 3}),
    *(Case(f"Global{kind}Pool", [IMAGE]) for kind in ("Average", "Max", "Lp")),
    # reductions and choices
    *(Case(f"Reduce{kind}", [(4, 5)], {"axes": [1]}, kind="positive", opset=11) for kind in REDUCTIONS.split()),
    *(Case(f"Reduce{kind}", [(4, 5)], {"keepdims": 0}, [ints(-1, 1)], kind="positive") for kind in REDUCTIONS.split()),
    Case("ReduceSum", [(4, 5)], {"noop_with_empty_axes": 1}, [ints()]),
    Case("ReduceMean", [(4, 5)]),
    *(Case("ArgMax", [(4, 5)], {"axis": 1, "keepdims": keep, "select_last_index": keep}) for keep in (0, 1)),
    Case("ArgMin", [(4, 5)], {"axis": -1}),
    Case("TopK", [(4, 6)], {"axis": -1}, [ints(3)], outputs=2),
    Case("TopK", [(4, 6)], {"axis": 1, "largest": 0}, [ints(2)], outputs=2),
    *(Case("CumSum", [(4, 5)], {"reverse": r, "exclusive": e}, [np.int64(1)]) for r in (0, 1) for e in (0, 1)),
    # shapes
    Case("Reshape", [(4, 6)], {}, [ints(0, -1, 3)]),
    Case("Reshape", [(4, 6)], {}, [ints(-1, 12)]),
    Case("Reshape", [(4, 6)], {"allowzero": 1}, [ints(-1, 4, 6)]),
    *(Case("Flatten", [(4, 3, 2)], {"axis": axis}) for axis in (0, 1, 2, 4, -1)),
    Case("Transpose", [(4, 3, 2)], {"perm": [0, 3, 1, 2]}),
    Case("Transpose", [(4, 3)]),
    Case("Squeeze", [(1, 4, 1)], {}, [ints(1, -1)]),
    Case("Squeeze", [(1, 4)], {"axes": [1]}, opset=11),
    Case("Unsqueeze", [(4, 3)], {}, [ints(-1, 1)]),
    Case("Unsqueeze", [(4, 3)], {"axes": [0, 4]}, opset=11),
    Case("Concat", [(4, 3), (2, 3)], {"axis": 1}),
    Case("Concat", [(4, 3), (4, 3)], {"axis": -1}),
    Case("Split", [(6, 3)], {"axis": 1}, [ints(1, 2, 3)], outputs=3),
    Case("Split", [(7, 3)], {"axis": 1, "num_outputs": 3}, outputs=3),
    Case("Split", [(6, 3)], {"axis": -1}, outputs=3, opset=11),
    Case("Slice", [(6, 5)], {"starts": [1, -3], "ends": [5, 100], "axes": [1, 2]}, opset=9),
    Case("Slice", [(6, 5)], {}, [ints(1, 0), ints(2**63 - 1, -1), ints(1, 2), ints(2, 3)]),
    Case("Slice", [(6, 5)], {}, [ints(-1), ints(-(2**63)), ints(1), ints(-2)]),
    Case("Slice", [(6, 5)], {}, [ints(-1), ints(-(2**63)), ints(0), ints(-1)]),
    Case("Slice", [(6, 5)], {}, [ints(4), ints(1), ints(1), ints(-1)]),
    Case("Gather", [(6, 5)], {"axis": 1}, [ints(0, -1, 2)]),
    Case("Gather", [(6, 5)], {"axis": 2}, [np.int64(-2)]),
    Case("Gather", [(6, 5)], {"axis": 1}, [np.array([[0, 1], [2, 3]])]),
    Case("GatherElements", [(3, 5)], {"axis": 2}, [np.array([[[0, -1], [2, 1], [4, 3]]])]),
    Case("GatherND", [(6, 5)], {}, [np.array([[0, 1], [0, -2]])]),
    Case("Expand", [(1, 5)], {}, [ints(4, 1)]),
    Case("Expand", [(1, 5)], {}, [ints(2, 1, 4, 5)]),
    Case("Tile", [(4, 5)], {}, [ints(1, 2, 3)]),
    *(
        Case("Pad", [(4, 5)], {"mode": mode}, [ints(0, 1, 2, 0, 3, 1)], opset=19)
        for mode in ("constant", "reflect", "edge", "wrap")
    ),
    Case("Pad", [(4, 5)], {}, [ints(0, -1, 2, 0, 3, -1), np.float32(0.5)]),
    Case("Pad", [(4, 5)], {}, [ints(1, 1), None, ints(2)]),
    Case("Pad", [(4, 5)], {"pads": [0, 1, 0, 0, 0, 2], "value": 1.5}, opset=2),
    Case("DepthToSpace", [(8, 3, 2)], {"blocksize": 2, "mode": "DCR"}),
    Case("DepthToSpace", [(8, 3, 2)], {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [(3, 4, 2)], {"blocksize": 2}),
    Case("Trilu", [(4, 5)], {}, [np.int64(1)]),
    Case("Trilu", [(4, 5)], {"upper": 0}),
    Case("OneHot", [(2,)], {}, [np.int64(4), normal(2)], kind="index"),
    Case("OneHot", [(2,)], {"axis": 1}, [np.int64(4), normal(2)], kind="index"),
    Case("Compress", [(4, 5)], {"axis": 1}, [np.array([True, False, True, True])]),
    # resize
    *(
        Case("Resize", [(2, 4, 5)], {"mode": mode, **how}, [None, np.array([1, 1, *scale], np.float32)])
        for scale in ((2, 2), (1.5, 0.6), (1, 3))
        for mode, how in (
            ("nearest", {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
            ("nearest", {"coordinate_transformation_mode": "half_pixel"}),
            ("nearest", {"coordinate_transformation_mode": "align_corners", "nearest_mode": "round_prefer_ceil"}),
            ("linear", {"coordinate_transformation_mode": "half_pixel"}),
            ("linear", {"coordinate_transformation_mode": "pytorch_half_pixel"}),
            ("linear", {"coordinate_transformation_mode": "align_corners"}),
            ("linear", {"coordinate_transformation_mode": "asymmetric"}),
            ("cubic", {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75}),
        )
    ),
    Case("Resize", [(2, 4, 5)], {"mode": "linear", "axes": [2, 3]}, [None, None, ints(7, 3)]),
    Case("Upsample", [(2, 4, 5)], {"mode": "nearest"}, [np.array([1, 1, 2, 3], np.float32)], opset=9),
    Case("Upsample", [(2, 4, 5)], {"mode": "linear", "scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_onnx_runtime(case: Case, tmp_path: Path) -> None:
    source = saved(case.proto(), tmp_path)
    graph = built(source)
    for batch in BATCHES:
        assert_same(graph, source.proto_bytes(), case.feeds(batch))


GRADIENTS = ["Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "LRN", "Resize", "Pad", "LayerNormalization"]


@pytest.mark.parametrize("case", [case for case in CASES if case.op in GRADIENTS], ids=str)
def test_gradients_equal_finite_differences(case: Case, tmp_path: Path) -> None:
    graph = built(saved(case.proto(), tmp_path), torch.float64)
    x = torch.randn(2, *case.shapes[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda v: graph(v)[0].flatten()[:40], x.requires_grad_(), fast_mode=True)


# -- shape arithmetic ------------------------------------------------------------------------------------------------


CHAINS = {
    "shape, gather, concat, reshape": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s zero", "n"),
            node("Unsqueeze", "n axes", "n1"),
            node("Concat", "n1 minus", "t", axis=0),
            node("Reshape", "x t", "y"),
        ],
        {"zero": np.int64(0), "axes": ints(0), "minus": ints(-1)},
    ),
    "a class token expanded to the batch": (
        [
            node("Shape", "x", "s"),
            node("Slice", "s from to", "n"),
            node("Concat", "n rest", "wanted", axis=0),
            node("Equal", "wanted minus", "keep"),
            node("ConstantOfShape", "three", "ones", value=numpy_helper.from_array(ints(1))),
            node("Where", "keep ones wanted", "target"),
            node("Expand", "token target", "e"),
            node("Concat", "e x", "y", axis=1),
        ],
        {
            "from": ints(0),
            "to": ints(1),
            "rest": ints(-1, -1),
            "minus": ints(-1),
            "three": ints(3),
            "token": normal(1, 1, 6),
        },
    ),
    "heads merged into the batch and back": (
        [
            node("Shape", "x", "s"),
            node("Split", "s ones", "n c w", axis=0),
            node("Mul", "n two", "m"),
            node("Div", "c two", "h"),
            node("Concat", "m h w", "t", axis=0),
            node("Reshape", "x t", "a"),
            node("Relu", "a", "r"),
            node("Reshape", "r s", "y"),
        ],
        {"ones": ints(1, 1, 1), "two": ints(2)},
    ),
    "zeros of the batch's size": (
        [node("Shape", "x", "s"), node("ConstantOfShape", "s", "z"), node("Sub", "z x", "y")],
        {},
    ),
    "positions by Range, as floats": (
        [
            node("Shape", "x", "s", start=1, end=2),
            node("Squeeze", "s", "l"),
            node("Range", "zero l one", "p"),
            node("Cast", "p", "f", to=TensorProto.FLOAT),
            node("Unsqueeze", "f axes", "c"),
            node("Add", "x c", "y"),
        ],
        {"zero": np.int64(0), "one": np.int64(1), "axes": ints(1)},
    ),
    "a scale computed from the shape": (
        [
            node("Shape", "x", "s", start=2),
            node("Cast", "s", "f", to=TensorProto.FLOAT),
            node("Sqrt", "f", "r"),
            node("Div", "x r", "y"),
        ],
        {},
    ),
    "the mean as a sum divided by the size": (
        [
            node("ReduceSum", "x", "t", keepdims=0),
            node("Size", "x", "n"),
            node("Cast", "n", "f", to=TensorProto.FLOAT),
            node("Div", "t f", "y"),
        ],
        {},
    ),
    "channels last at the door": (
        [node("Transpose", "x", "t", perm=[0, 2, 1]), node("Relu", "t", "r"), node("Flatten", "r", "y")],
        {},
    ),
    "a weight behind Identity, Constant and Cast": (
        [
            node("Constant", "", "k", value=numpy_helper.from_array(normal(6, 3))),
            node("Identity", "k", "i"),
            node("Cast", "half", "h", to=TensorProto.FLOAT),
            node("Add", "i h", "w"),
            node("MatMul", "x w", "y"),
        ],
        {"half": normal(6, 3).astype(np.float16)},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_shape_arithmetic_leaves_the_batch_free(name: str, tmp_path: Path) -> None:
    nodes, constants = CHAINS[name]
    source = saved(model(nodes, {"x": ("N", 4, 6)}, constants=constants), tmp_path)
    graph = built(source)
    for batch in BATCHES:
        assert_same(graph, source.proto_bytes(), {"x": torch.randn(batch, 4, 6)})


def test_shape_arithmetic_is_not_in_the_graph(tmp_path: Path) -> None:
    nodes, constants = CHAINS["shape, gather, concat, reshape"]
    graph = built(saved(model(nodes, {"x": ("N", 4, 6)}, constants=constants), tmp_path))
    calls = [entry.target for entry in graph.graph.nodes if entry.op == "call_function"]
    assert calls == [torch.ops.aten.sym_size.int, torch.ops.aten.reshape.default]
    assert not list(graph.state_dict())


def test_what_is_computed_from_constants_is_folded_but_not_parameters(tmp_path: Path) -> None:
    nodes = [
        node("Expand", "zero shape", "bias"),
        node("Transpose", "w", "t", perm=[1, 0]),
        node("MatMul", "x t", "m"),
        node("Add", "m bias", "y"),
    ]
    constants = {"zero": np.float32(0.5), "shape": ints(3), "w": normal(3, 4)}
    graph = built(saved(model(nodes, {"x": ("N", 4)}, constants=constants), tmp_path))
    assert {name for name, _ in graph.named_parameters()} == {"w"}
    assert {name for name, _ in graph.named_buffers()} == {"bias"}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_initializers_of_other_floating_types_take_the_graphs_type(kind: int, tmp_path: Path) -> None:
    proto = model([node("Mul", "x w", "y")], {"x": ("N", 2)}, kind=kind)
    proto.graph.initializer.append(helper.make_tensor("w", kind, [2], [1.5, -2.0]))
    graph = built(saved(proto, tmp_path))
    assert graph.w.dtype is torch.float32
    assert graph(torch.ones(3, 2))[0].tolist() == [[1.5, -2.0]] * 3


def test_attributes_are_the_decimals_that_were_written(tmp_path: Path) -> None:
    graph = built(saved(Case("LeakyRelu", [(1,)], {"alpha": 0.01}).proto(), tmp_path), torch.float64)
    assert graph(torch.tensor([[-1.0]], dtype=torch.float64))[0].item() == -0.01


# -- exported networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
@pytest.mark.parametrize("network", [Residual, Transformer, Windows])
def test_exported_networks_equal_the_module(network: type[nn.Module], dynamo: bool) -> None:
    module, path = exported(network, dynamo=dynamo)
    torch.manual_seed(0)
    source = Onnx(path)
    graph = built(source)
    for batch in BATCHES:
        x = torch.randn(batch, 3, 16, 16, requires_grad=True)
        ours, theirs = graph(x)[0], module(x)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-5 * float(gradients[1].abs().max()))
        assert_same(graph, source.proto_bytes(), {source.inputs[0].name: x.detach()})


def test_every_named_tensor_is_the_one_that_onnx_runtime_exposes() -> None:
    source = Onnx(exported(Transformer, dynamo=True)[1])
    graph = built(source)
    named = {entry: entry.meta["tensor"] for entry in graph.graph.nodes if "tensor" in entry.meta}
    assert len(named) > 20

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    seen: dict[fx.Node, torch.Tensor] = {}
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        Recorder(graph).run(x)
    names = list(named.values())
    for entry, wanted in zip(named, reference(source.exposed(names), {source.inputs[0].name: x}), strict=True):
        np.testing.assert_allclose(seen[entry].numpy(), wanted, rtol=0, atol=1e-5, err_msg=str(entry))


# -- the file --------------------------------------------------------------------------------------------------------


def test_inputs_outputs_metadata_and_counts(tmp_path: Path) -> None:
    proto = model([node("MatMul", "x w", "h"), node("Relu", "h", "y")], {"x": ("N", 4)}, constants={"w": normal(4, 3)})
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    proto.metadata_props.append(onnx.StringStringEntryProto(key="attrcli.kind", value="table"))
    source = saved(proto, tmp_path)
    assert [(spec.name, spec.shape, spec.dtype) for spec in source.inputs] == [("x", (None, 4), torch.float32)]
    assert [(spec.name, spec.shape) for spec in source.outputs or ()] == [("y", None)]
    assert source.metadata == {"attrcli.kind": "table"}
    assert source.operations() == {"MatMul": 1, "Relu": 1}
    assert source.parameter_count() == 12
    origins = [entry.meta["origin"] for entry in built(source).graph.nodes if entry.op == "call_function"]
    assert origins == ["node 'MatMul_h' (MatMul)", "node 'Relu_y' (Relu)"]


def test_exposed_leaves_the_rest_of_the_file_as_it_is(tmp_path: Path) -> None:
    proto = model([node("Softmax", "x", "s"), node("Relu", "s", "y")], {"x": ("N", 4)})
    source = saved(proto, tmp_path)
    changed = onnx.load_model_from_string(source.exposed(["s"]))
    assert [output.name for output in changed.graph.output] == ["s"]
    del changed.graph.output[:]
    changed.graph.output.extend(proto.graph.output)
    assert changed == proto
    assert source.proto_bytes() == proto.SerializeToString()
    with pytest.raises(ModelError, match="no tensor 'other'"):
        source.exposed(["other"])


def test_a_frozen_batch_works_at_its_own_size(tmp_path: Path) -> None:
    proto = model([node("Reshape", "x shape", "y")], {"x": (1, 2, 6)}, constants={"shape": ints(1, 12)})
    source = saved(proto, tmp_path)
    assert source.inputs[0].shape == (1, 2, 6)
    assert_same(built(source), source.proto_bytes(), {"x": torch.randn(1, 2, 6)})
    with pytest.raises(ModelError, match="node 'Reshape_y'"):
        source.build({"x": Sample((2, 6), torch.float32)}, torch.float32, FREE)


def test_several_inputs_and_awkward_names(tmp_path: Path) -> None:
    nodes = [node("Add", "0 a.b", "s"), node("Sub", "s a_b", "t"), node("Mul", "t lambda", "y")]
    source = saved(model(nodes, dict.fromkeys(("0", "a.b", "a_b", "lambda"), ("N", 4))), tmp_path)
    feeds = {spec.name: torch.randn(3, 4) for spec in source.inputs}
    graph = built(source)
    assert graph.meta["inputs"] == ("0", "a.b", "a_b", "lambda")
    assert_same(graph, source.proto_bytes(), feeds)


def test_only_what_the_outputs_need_is_imported(tmp_path: Path) -> None:
    proto = model([node("Unique", "x", "u"), node("Relu", "x", "y")], {"x": ("N", 4)})
    assert built(saved(proto, tmp_path))(torch.ones(2, 4))[0].sum() == 8


def test_outputs_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y"), node("SequenceConstruct", "x", "z")], {"x": ("N", 4)})
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 4])
    proto.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(element)))
    source = saved(proto, tmp_path)
    assert [spec.name for spec in source.outputs or ()] == ["y"]
    assert built(source).meta["outputs"] == ("y",)


def test_operands_of_opset_6_are_aligned_at_their_axis(tmp_path: Path) -> None:
    add = node("Add", "x w", "y", broadcast=1, axis=1)
    weight = normal(3)
    graph = built(saved(model([add], {"x": ("N", 3, 2)}, constants={"w": weight}, opset=6), tmp_path))
    x = torch.randn(4, 3, 2)
    assert torch.equal(graph(x)[0], x + torch.from_numpy(weight)[:, None])
    plain = model([node("Add", "x w", "y")], {"x": ("N", 2, 3)}, constants={"w": weight}, opset=6)
    with pytest.raises(UnsupportedOp, match="broadcast=1"):
        built(saved(plain, tmp_path))


# -- what is refused -------------------------------------------------------------------------------------------------


def refused(proto: onnx.ModelProto, folder: Path, match: str, error: type[ModelError] = ModelError) -> None:
    with pytest.raises(error, match=match) as caught:
        built(saved(proto, folder))
    assert "\n" not in str(caught.value)


def test_an_unsupported_op_is_named(tmp_path: Path) -> None:
    unique = model([node("Unique", "x", "y")], {"x": ("N", 4)})
    wanted = r"node 'Unique_y': op Unique \(domain ai.onnx, opset 18\) gives an output whose size depends on the data"
    refused(unique, tmp_path, wanted, UnsupportedOp)
    proto = model([node("Fancy", "x", "y", domain="com.example")], {"x": ("N", 4)})
    proto.opset_import.append(helper.make_opsetid("com.example", 3))
    refused(proto, tmp_path, r"op Fancy \(domain com.example, opset 3\)", UnsupportedOp)
    old = model([node("Mish", "x", "y")], {"x": ("N", 4)}, opset=13)
    refused(old, tmp_path, r"op Mish \(domain ai.onnx, opset 13\)", UnsupportedOp)


REFUSED = {
    "training": (node("BatchNormalization", "x c c c c", "y", training_mode=1), "training mode"),
    "a shape from data": (node("Reshape", "x x", "y"), "input's data"),
    "an axis outside": (node("Softmax", "x", "y", axis=7), "node 'Softmax_y'"),
    "shapes that do not fit": (node("MatMul", "x c", "y"), "node 'MatMul_y'"),
    "a tensor that nobody makes": (node("Relu", "nowhere", "y"), "reads 'nowhere'"),
    "an absurd constant": (node("ConstantOfShape", "huge", "y"), "elements made from constants"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_naming_the_node(name: str, tmp_path: Path) -> None:
    entry, match = REFUSED[name]
    constants = {"c": positive(3), "huge": ints(1 << 20, 1 << 20)}
    refused(model([entry], {"x": ("N", 4)}, constants=constants), tmp_path, match)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_one_clear_line(keep: float, tmp_path: Path) -> None:
    data = model([node("MatMul", "x w", "y")], {"x": ("N", 64)}, constants={"w": normal(64, 64)}).SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"cut\.onnx: not an ONNX model, or a truncated one") as caught:
        Onnx(tmp_path / "cut.onnx")
    assert "\n" not in str(caught.value)


def test_another_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is not a model\n" * 40)
    with pytest.raises(ModelError, match="not an ONNX model"):
        Onnx(tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        Onnx(tmp_path / "missing.onnx")


def external(folder: Path, location: str, offset: int = 0, length: int = 16) -> Onnx:
    proto = model([node("Mul", "x w", "y")], {"x": ("N", 4)}, constants={"w": np.arange(4, dtype=np.float32)})
    held = proto.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        held.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
    return saved(proto, folder)


def test_external_data_in_the_models_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8 + np.arange(4, dtype=np.float32).tobytes())
    source = external(tmp_path, "weights.bin", offset=8)
    assert_same(built(source), source.proto_bytes(), {"x": torch.randn(3, 4)})


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 16)
    (folder / "link.bin").symlink_to(secret)
    for location in ("../secret.bin", str(secret), "link.bin", "", "sub/../../secret.bin", "a\0b"):
        with pytest.raises(ModelError, match="outside the model's folder"):
            external(folder, location)
    with pytest.raises(ModelError, match="missing beside the model"):
        external(folder, "nothing.bin")
    (folder / "short.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ModelError, match="is not all in"):
        external(folder, "short.bin")


@pytest.mark.parametrize(("sizes", "match"), [([-1, 4], "negative dimension"), ([1 << 30, 1 << 30], "elements")])
def test_impossible_sizes_are_refused(sizes: list[int], match: str, tmp_path: Path) -> None:
    proto = model([node("Relu", "x", "y")], {"x": ("N", 4)})
    proto.graph.initializer.append(TensorProto(name="w", dims=sizes, data_type=TensorProto.FLOAT))
    refused(proto, tmp_path, match)
    refused(model([node("Relu", "x", "y")], {"x": tuple(sizes)}), tmp_path, match)


def test_data_that_does_not_fit_its_shape_is_refused(tmp_path: Path) -> None:
    proto = model([node("Add", "x w", "y")], {"x": ("N", 4)}, constants={"w": normal(4)})
    proto.graph.initializer[0].dims[0] = 5
    refused(proto, tmp_path, "does not fit its shape")


def test_a_sample_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = saved(model([node("Relu", "x", "y")], {"x": ("N", 3, "H")}), tmp_path)
    with pytest.raises(ModelError, match=r"input 'x' takes samples of shape \(3, 'free'\), not \(4, 5\)"):
        source.build({"x": Sample((4, 5), torch.float32)}, torch.float32, FREE)
    with pytest.raises(ModelError, match="also takes input 'x'"):
        source.build({}, torch.float32, FREE)


def test_an_unknown_opset_is_refused(tmp_path: Path) -> None:
    refused(model([node("Relu", "x", "y")], {"x": ("N", 4)}, opset=999), tmp_path, "opset 999")


def test_gather_counts_given_indices_from_the_end_and_lets_none_wrap_around(tmp_path: Path) -> None:
    nodes = [node("Gather", "w x", "y")]
    proto = model(nodes, {"x": ("N", 5)}, constants={"w": normal(10, 4)}, kind=TensorProto.INT64, opset=17)
    graph = built(saved(proto, tmp_path))
    places = torch.tensor([[1, -1, 3, -10, 9], [0, 1, 2, 3, 4]])
    assert_same(graph, proto.SerializeToString(), {"x": places})
    for beyond in (-11, 10):
        with pytest.raises(IndexError):
            graph(torch.full((1, 5), beyond))
