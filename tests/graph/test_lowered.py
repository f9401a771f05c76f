"""bfloat16: only where it pays, close to float32, and the graph that went in is as it was."""

from pathlib import Path

import pytest
import torch
from nets import Residual, ResNet18, build, ready, save_traced
from torch import nn

from attrcli import model as models
from attrcli.graph.lowered import lower
from attrcli.score import Target

aten = torch.ops.aten
LOW = torch.bfloat16


class Attends(nn.Module):
    """Attention written out, with layer norms, a softmax and two uses of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = ((q @ k.transpose(1, 2)) / 4).softmax(-1)
        return self.head((weights @ v + x).mean(1))


NETS = {
    "residual": (Residual, (3, 8, 8)),
    "attends": (Attends, (6, 16)),
    "resnet": (lambda: ResNet18(8, 6), (3, 32, 32)),
}


@pytest.fixture(params=NETS)
def graph(request, tmp_path):
    torch.manual_seed(1)
    make, shape = NETS[request.param]
    path = save_traced(ready(make()).float(), shape, tmp_path / "net.pt")
    return path, shape, build(path, shape, dtype=torch.float32)


def types(module, x):
    """The dtype that each node makes, by running the graph."""
    found = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                found[node.name] = (node.target, result.dtype)
            return result

    Recorder(module).run(x)
    return found


def test_products_are_in_bfloat16_and_norms_and_sums_are_not(graph):
    _, shape, module = graph
    code = module.code
    lowered = lower(module)
    assert module.code == code
    found = types(lowered, torch.rand(2, *shape)).values()
    products = {aten.convolution.default, aten.linear.default, aten.matmul.default}
    assert {dtype for target, dtype in found if target in products} == {LOW}
    careful = {aten.softmax.int, aten.layer_norm.default, aten.mean.dim, aten.batch_norm.default}
    assert {dtype for target, dtype in found if target in careful} <= {torch.float32}
    weights = {node.target for node in lowered.graph.nodes if node.op == "get_attr" and "weight" in str(node.target)}
    assert any(getattr(lowered, name).dtype == LOW for name in weights if "." not in name)


def test_what_comes_out_is_float32_and_close(graph):
    path, shape, _ = graph
    exact, coarse = models.load(path), models.load(path, precision="bf16")
    x, target = torch.rand(6, *shape), Target(torch.arange(6) % 4)
    (mine, score), (theirs, exact_score) = coarse.gradient(x, target), exact.gradient(x, target)
    assert mine.dtype == theirs.dtype == torch.float32
    assert float((score - exact_score).abs().max()) < 0.03 * float(exact_score.abs().max())
    assert float((score - exact_score).abs().max()) > 0
    for ours, other in zip(mine, theirs, strict=True):
        pair = torch.stack([ours.flatten(), other.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.95


def test_an_onnx_file_runs_in_torch_in_bfloat16():
    path = Path(__file__).parents[2] / "sample_models/fashion_cnn.onnx"
    coarse = models.load(path, precision="bf16")
    x = torch.rand(4, 1, 28, 28)
    exact = models.load(path)(x)
    difference = float((coarse(x) - exact).abs().max())
    assert 0 < difference < 0.05 * float(exact.abs().max())
