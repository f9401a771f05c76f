"""A final activation that the file reshapes: its logits are no tensor that ONNX Runtime could give."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from attrcli import methods
from attrcli import model as models


@pytest.mark.parametrize(("activation", "classes"), [("Sigmoid", 1), ("Softmax", 5)])
def test_an_activation_before_a_reshape_is_stepped_over_in_onnx(tmp_path, activation, classes):
    weight = torch.randn(8, classes, generator=torch.Generator().manual_seed(0))
    shape = [0] if classes == 1 else [0, classes]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node(activation, ["z"], ["p"], **({"axis": 1} if classes > 1 else {})),
        helper.make_node("Reshape", ["p", "shape"], ["y"]),
    ]
    stored = [
        numpy_helper.from_array(weight.numpy(), "w"),
        helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"] if classes == 1 else ["N", classes])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    model = models.load(tmp_path / "m.onnx")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = x @ weight
    assert torch.allclose(model.logits(x).reshape(4, -1), expected, atol=1e-5)
    file = expected.sigmoid() if classes == 1 else expected.softmax(1)
    assert torch.allclose(model(x).reshape(4, -1), file, atol=1e-6)
    index = torch.zeros(4, dtype=torch.long)
    gradient = methods.load("gradient").attribute(model, x, models.Target(index), None).values
    assert torch.allclose(gradient.float(), weight[:, 0].expand(4, -1), atol=1e-6)
