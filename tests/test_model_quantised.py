"""Quantised and float16 ONNX files: what rounding does is told from defects, which stay errors."""

import numpy as np
import onnx
import pytest
import torch
from nets import assert_close
from onnx import TensorProto, helper, numpy_helper

from attrcli import model as models
from attrcli.errors import AttrcliWarning, ModelError
from attrcli.graph import ties
from attrcli.graph.engine import Engine
from attrcli.session import Session

STEP = 0.25
WEIGHT = np.array([[0.5, -0.5], [0.5, 2.0], [1.0, 1.0], [-2.0, 0.5]], np.float32)
ROWS = torch.tensor([[0.125, 1.0, -0.5, 0.75], [0.3, -0.7, 1.6, 0.05]])
"""The first element is a tie, half a step; all others are at least 0.05 of a step away from one."""


def save(path, *, inputs):
    """A linear net whose inputs, or else its weights, go through steps of 0.25; weights are multiples of 0.5."""
    stored = {"scale": np.float32(STEP), "zero": np.int8(0)}
    if inputs:
        stored |= {"w": WEIGHT}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("MatMul", ["d", "w"], ["y"]),
        ]
    else:
        stored |= {"q": (WEIGHT / STEP).astype(np.int8)}
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
    return save_nodes(path, nodes, stored)


def save_nodes(path, nodes, stored):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 2))],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return models.load(path)


def spread(model, x):
    made = model.engine((4,))
    return ties.spread(made.run, lambda run: made(x, run=run), made(x))


def test_the_spread_is_what_the_other_side_of_the_tie_gives(tmp_path):
    model = save(tmp_path / "net.onnx", inputs=True)
    assert spread(model, ROWS) == pytest.approx(STEP * 0.5, rel=1e-6)
    assert spread(model, ROWS[1:]) == 0
    assert spread(save(tmp_path / "weights.onnx", inputs=False), ROWS) == 0


def test_a_tie_that_falls_otherwise_in_onnx_runtime_is_a_warning(tmp_path, monkeypatch):
    model, run = save(tmp_path / "net.onnx", inputs=True), Session.run
    monkeypatch.setattr(Session, "run", lambda self, inputs: run(self, {"x": inputs["x"] + np.float32(1e-6)}))
    with pytest.warns(AttrcliWarning) as said:
        outputs = model(ROWS)
    assert "it is run as it says, with its QuantizeLinear nodes one by one" in str(said[0].message)
    assert "differ by 0.071 of the largest output on real input: values midway between" in str(said[1].message)
    moved = STEP * torch.from_numpy(WEIGHT[0])
    assert_close(outputs - model.engine((4,))(ROWS), torch.stack([moved, 0 * moved]), 1e-6)


@pytest.mark.parametrize(
    ("inputs", "factor", "said"),
    [(True, 1.2, "differ by 0.2 .*accepted: 0.081"), (False, 1.01, "differ by 0.01 .*accepted: 0.001")],
)
@pytest.mark.filterwarnings("ignore:.*it is run as it says")
def test_a_wrong_import_of_a_quantised_file_is_an_error(inputs, factor, said, tmp_path, monkeypatch):
    model = save(tmp_path / "net.onnx", inputs=inputs)
    own = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda *args, **kwargs: own(*args, **kwargs) * factor)
    with pytest.raises(ModelError, match=rf"net\.onnx: .*{said}.*defect of the importer"):
        model(ROWS)


def save_half(path):
    """A linear net in float16, from and to float32."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["z"]),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    return save_nodes(path, nodes, {"w": WEIGHT.astype(np.float16) / np.float16(3)})


def test_a_float16_file_is_computed_in_float32_on_its_weights(tmp_path):
    model, x = save_half(tmp_path / "net.onnx"), torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.from_numpy(WEIGHT.astype(np.float16) / np.float16(3)).float()
    gradient, score = model.gradient(x, models.Target(torch.ones(5, dtype=torch.long)))
    assert_close(gradient, weight[:, 1].expand(5, 4), 1e-6)
    assert_close(score, x @ weight[:, 1], 1e-6)
    assert 1e-5 < float((model(x) - x @ weight).abs().max()) < 1e-3  # ONNX Runtime's float16


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [
        (1.005, pytest.warns(AttrcliWarning, match=r"differ by 0\.005.*: ONNX Runtime rounds each result to float16")),
        (1.02, pytest.raises(ModelError, match=r"differ by 0\.02 .*accepted: 0\.01\).*defect of the importer")),
    ],
)
def test_a_float16_file_may_differ_by_what_float16_does(factor, outcome, tmp_path, monkeypatch):
    model = save_half(tmp_path / "net.onnx")
    own = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda *args, **kwargs: own(*args, **kwargs) * factor)
    with outcome:
        model(ROWS)
