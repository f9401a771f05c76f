"""Write-back: a graph, masked or with other weights, in the format it came from; reloaded, it predicts the same."""

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from nets import Residual, assert_close, load_script, ready, save_exported, save_scripted, save_traced
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree

from attrcli import formats
from attrcli import model as models
from attrcli.errors import ModelError
from attrcli.formats.spec import Sample
from attrcli.graph import passes
from attrcli.graph.build import FREE
from attrcli.score import Target

aten = torch.ops.aten
SAMPLES = Path(__file__).parents[2] / "sample_models"


def opened(path, shape, dtype=torch.float32, kind=torch.float32):
    source = formats.load(path)
    samples = {source.inputs[0].name: Sample(shape, kind)}
    return source, samples, source.build(samples, dtype, FREE)


def relus(graph):
    return [node for node in graph.graph.nodes if node.target is aten.relu.default]


def some_masks(graph):
    """A mask for each ReLU."""
    masks = {}
    for seed, node in enumerate(relus(graph)):
        generator = torch.Generator().manual_seed(seed)
        masks[node.name] = torch.rand(1, *node.meta["shapes"][0][1:], generator=generator) > 0.4
    return masks


@pytest.mark.parametrize("stem", ["fashion_mlp", "fashion_cnn"])
@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_a_masked_sample_model_is_read_again_as_it_was_written(stem, suffix, tmp_path):
    source, samples, graph = opened(SAMPLES / f"{stem}{suffix}", (1, 28, 28))
    masked = passes.mask(graph, some_masks(graph))
    path = tmp_path / f"masked{suffix}"
    formats.save(source, masked, samples, path)
    again = models.load(path)
    assert again.source.metadata == source.metadata
    for batch in (1, 3, 5):
        x = torch.rand(batch, 1, 28, 28, generator=torch.Generator().manual_seed(batch))
        expected = masked(x)[0]
        assert float((expected - graph(x)[0]).abs().max()) > 0.1
        assert_close(again(x), expected, 1e-6)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(masked(leaf)[0][:, 2].sum(), leaf)
        assert_close(again.gradient(x, Target(torch.full((batch,), 2)))[0], gradient, 1e-5)


def test_a_written_torchscript_file_runs_in_plain_torch(tmp_path):
    source, samples, graph = opened(SAMPLES / "fashion_cnn_scripted.pt", (1, 28, 28))
    masked = passes.mask(graph, some_masks(graph))
    formats.save(source, masked, samples, tmp_path / "masked.pt")
    x = torch.rand(4, 1, 28, 28)
    assert_close(load_script(tmp_path / "masked.pt")(x), masked(x)[0], 1e-6)


class Returning(nn.Module):
    """Two linear layers, returned as the constructor says."""

    def __init__(self, pack):
        super().__init__()
        self.a, self.b, self.pack = nn.Linear(3, 2), nn.Linear(3, 4), pack

    def forward(self, x):
        return self.pack(self.a(x), self.b(x))


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: a,
        lambda a, b: (b,),
        lambda a, b: [a, b],
        lambda a, b: {"one": a, "two": b},
        lambda a, b: (a, {"x": [b, None]}),
    ],
)
def test_a_written_pt2_returns_what_the_program_returned(pack, tmp_path):
    module = ready(Returning(pack), dtype=torch.float32)
    path = save_exported(module, (3,), tmp_path / "net.pt2")
    source, samples, graph = opened(path, (3,))
    formats.save(source, graph, samples, tmp_path / "again.pt2")
    for batch in (1, 4):
        x = torch.rand(batch, 3)
        found, expected = (torch.export.load(name).module()(x) for name in (tmp_path / "again.pt2", path))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert repr(_pytree.tree_structure(found)) == repr(_pytree.tree_structure(expected))


def test_one_output_of_several_is_written_to_a_pt2_as_a_tensor(tmp_path):
    module = ready(Returning(lambda a, b: (a, b)), dtype=torch.float32)
    source, samples, graph = opened(save_exported(module, (3,), tmp_path / "net.pt2"), (3,))
    formats.save(source, passes.only_output(graph, "output_1"), samples, tmp_path / "one.pt2")
    x = torch.rand(4, 3)
    assert_close(torch.export.load(tmp_path / "one.pt2").module()(x), module(x)[1], 1e-6)


def test_in_an_onnx_file_all_that_was_not_masked_stays_byte_for_byte(tmp_path):
    path = SAMPLES / "fashion_cnn.onnx"
    source, samples, graph = opened(path, (1, 28, 28))
    masks = some_masks(graph)
    formats.save(source, passes.mask(graph, masks), samples, tmp_path / "masked.onnx")
    was, now = onnx.load(path), onnx.load(tmp_path / "masked.onnx")
    onnx.checker.check_model(now, full_check=True)
    kept = {entry.name: entry.SerializeToString() for entry in was.graph.initializer}
    assert {e.name: e.SerializeToString() for e in now.graph.initializer if e.name in kept} == kept
    assert len(now.graph.initializer) == len(kept) + len(masks)
    untouched = {node.SerializeToString() for node in was.graph.node if node.op_type != "Relu"}
    assert untouched <= {node.SerializeToString() for node in now.graph.node}
    assert [node.op_type for node in now.graph.node].count("Mul") == len(masks)
    added = [entry for entry in now.graph.initializer if entry.name not in kept]
    assert {entry.data_type for entry in added} == {onnx.TensorProto.BOOL}
    assert sum(len(entry.raw_data) for entry in added) == sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_masks_take_a_byte_for_each_element(suffix, tmp_path):
    path = SAMPLES / f"fashion_cnn{suffix}"
    source, samples, graph = opened(path, (1, 28, 28))
    masks, sizes = some_masks(graph), []
    for name, put in (("plain", {}), ("masked", masks)):
        formats.save(source, passes.mask(graph, put), samples, tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sum(mask.numel() for mask in masks.values()) == 42336
    assert 42336 < sizes[1] - sizes[0] < 42336 + 12000  # and what the nodes take


def test_what_overflows_is_nan_behind_a_mask_in_the_file_as_in_the_graph(tmp_path):
    source, samples, graph = opened(SAMPLES / "fashion_mlp.onnx", (1, 28, 28))
    masked = passes.mask(graph, some_masks(graph))
    formats.save(source, masked, samples, tmp_path / "masked.onnx")
    x = torch.rand(2, 1, 28, 28)
    x[1] = 3e38
    session = onnxruntime.InferenceSession(str(tmp_path / "masked.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = masked(x)[0]
    assert expected.isnan().all(1).tolist() == [False, True]
    assert_close(torch.from_numpy(output)[:1], expected[:1], 1e-5)
    assert (torch.from_numpy(output).isnan() == expected.isnan()).all()


def test_other_weights_are_put_into_the_initializers_of_an_onnx_file(tmp_path):
    path = SAMPLES / "fashion_mlp.onnx"
    source, samples, graph = opened(path, (1, 28, 28))
    name, weight = next((n, p) for n, p in graph.named_parameters() if p.dim() == 2)
    changed = passes.mask(graph, {})
    scope, _, leaf = name.rpartition(".")
    setattr(changed.get_submodule(scope), leaf, nn.Parameter(weight.detach() * 2, requires_grad=False))
    formats.save(source, changed, samples, tmp_path / "other.onnx")
    was = {e.name: numpy_helper.to_array(e) for e in onnx.load(path).graph.initializer}
    now = {e.name: numpy_helper.to_array(e) for e in onnx.load(tmp_path / "other.onnx").graph.initializer}
    different = [key for key in was if not (was[key] == now[key]).all()]
    assert len(different) == 1
    assert (now[different[0]] == 2 * was[different[0]]).all()
    x = torch.rand(3, 1, 28, 28)
    session = onnxruntime.InferenceSession(str(tmp_path / "other.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(output), changed(x)[0], 1e-5)


class Awkward(nn.Module):
    """Sizes that depend on the batch, empty and optional lists, infinities, several outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        n = x.size(0)
        rows = x.reshape(n * 2, -1).roll(1, 1).reshape(n, 2, -1)
        masked = rows.masked_fill(rows > 0.5, -float("inf")).softmax(2)
        picked = x.flatten(1)[:, torch.tensor([3, 1])]
        spread = torch.zeros(n, 2, dtype=x.dtype) + torch.cat([picked, picked], 0)[:n]
        return {"masked": masked, "max": spread.max(dim=1, keepdim=True)[0], "mean": x.mean()[None].expand(n)}


@pytest.mark.parametrize("save", [save_scripted, save_traced, save_exported])
@pytest.mark.parametrize("make", [Awkward, Residual])
def test_every_node_has_a_spelling(make, save, tmp_path):
    shape = (2, 6) if make is Awkward else (3, 6, 6)
    suffix = ".pt2" if save is save_exported else ".pt"
    module = ready(make())
    if make is Awkward and save is save_traced:
        pytest.skip("a trace of dictionaries is refused by torch")
    path = save(module, *(() if save is save_scripted else (shape,)), tmp_path / f"net{suffix}")
    source, samples, graph = opened(path, shape, torch.float64)
    formats.save(source, graph, samples, tmp_path / f"again{suffix}")
    _, _, again = opened(tmp_path / f"again{suffix}", shape, torch.float64)
    for batch in (1, 3, 5):
        x = torch.rand(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        for mine, theirs in zip(again(x), graph(x), strict=True):
            assert_close(mine, theirs, 1e-14)


def test_a_mask_where_the_file_has_no_tensor_is_refused_by_name(tmp_path):
    source, samples, graph = opened(SAMPLES / "fashion_cnn.onnx", (1, 28, 28))
    name = relus(graph)[0].name
    masked = passes.mask(graph, {name: torch.ones(1, dtype=torch.bool)})
    next(node for node in masked.graph.nodes if "mask" in node.meta).meta["mask"] = None
    with pytest.raises(ModelError, match=f"node '{name}' is inside an operation of the file"):
        formats.save(source, masked, samples, tmp_path / "masked.onnx")
