"""A loaded model: the same numbers from three formats, frozen batches, several inputs, errors that name the culprit."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import Residual, assert_close, quiet, ready, save_exported, save_scripted, save_traced
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from attrcli import model as models
from attrcli.errors import AttrcliWarning, InputError, ModelError, NonFiniteError, UnsupportedOp, UsageError
from attrcli.graph.engine import Engine
from attrcli.score import Target

SAMPLES = Path(__file__).parents[1] / "sample_models"
FORMATS = (".pt", ".pt2", ".onnx")


def images(count=8, dtype=torch.float32):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(3)).to(dtype) * 2 - 0.5


def classes(*index):
    return Target(torch.tensor(index))


# --- the same everywhere


@pytest.mark.parametrize("stem", ["fashion_mlp", "fashion_cnn"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_three_formats_give_the_same_outputs_and_gradients(stem, precision, tolerance):
    x = images(dtype=models.PRECISIONS[precision])
    target = classes(*range(8))
    first = None
    for suffix in (*FORMATS, "_scripted.pt") if stem == "fashion_cnn" else FORMATS:
        model = models.load(SAMPLES / f"{stem}{suffix}", precision=precision)
        results = (model(x), *model.gradient(x, target), model.scores(x, target))
        first = first or results
        for mine, theirs in zip(results, first, strict=True):
            assert_close(mine, theirs, tolerance)
    assert_close(first[2].double(), first[3], tolerance)


@pytest.mark.parametrize("stem", ["fashion_mlp", "fashion_cnn", "fashion_mlp_init"])
def test_onnx_runtime_and_the_graph_agree(stem):
    x = images()
    model = models.load(SAMPLES / f"{stem}.onnx")
    session = onnxruntime.InferenceSession(SAMPLES / f"{stem}.onnx", providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {model.source.inputs[0].name: x.numpy()})
    assert_close(model.logits(x), torch.from_numpy(outputs), 1e-6)
    assert_close(model.engine((1, 28, 28))(x), torch.from_numpy(outputs), 1e-4)


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_do_not_depend_on_each_other_or_on_the_size_of_a_pass(suffix):
    model = models.load(SAMPLES / f"fashion_cnn{suffix}", precision="float64")
    x, done = images(7, torch.float64), []
    model.on_pass = done.append
    whole = model.logits(x)
    model.rows = 3
    assert_close(model.logits(x), whole, 1e-12)
    assert (done[0], sum(done[1:]), max(done[1:])) == (7, 7, 3)
    assert_close(model.logits(x[4:5]), whole[4:5], 1e-12)
    gradient, _ = model.gradient(x, classes(*[1] * 7))
    assert_close(model.gradient(x[2:3], classes(1))[0], gradient[2:3], 1e-12)


def test_the_gradient_is_autograds_through_the_eager_module(tmp_path):
    module = ready(Residual())
    model = models.load(save_scripted(module, tmp_path / "net.pt"), precision="float64")
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    gradient, score = model.gradient(x, classes(0, 1, 2, 3))
    leaf = x.clone().requires_grad_()
    expected = module(leaf).diagonal()
    assert_close(score, expected, 1e-12)
    assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0], 1e-12)
    assert not x.requires_grad


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), dim=1)


@pytest.mark.parametrize("how", FORMATS)
def test_a_model_is_called_as_the_file_is_and_scored_before_its_head(how, tmp_path):
    module, path = ready(WithHead(), dtype=torch.float32), tmp_path / f"net{how}"
    if how == ".onnx":
        with quiet():
            torch.onnx.export(
                module, (torch.rand(2, 6),), path, dynamo=False, dynamic_axes={"x": [0]}, input_names=["x"]
            )
    else:
        (save_exported if how == ".pt2" else save_traced)(module, (6,), path)
    model, x = models.load(path), torch.rand(5, 6)
    assert model.head(x) == "softmax"
    assert_close(model(x), module(x), 1e-6)
    assert_close(model.logits(x), module.linear(x), 1e-5)
    assert_close(model.scores(x, Target(torch.zeros(5, dtype=torch.long), "prob")), module(x)[:, 0].double(), 1e-6)
    model.bind(declared="sigmoid")  # what the graph shows counts
    assert model.head(x) == "softmax"


def test_a_declared_head_that_the_graph_does_not_have_is_refused(tmp_path):
    model = models.load(SAMPLES / "fashion_mlp.pt")
    model.bind(declared="softmax")
    with pytest.raises(
        UsageError, match=r'went through a softmax, but the graph does not end in one.*activation = "none"'
    ):
        model(images())


# --- a frozen batch


def frozen_at(batch):
    how = "one by one" if batch == 1 else f"{batch} by {batch}"
    return pytest.warns(AttrcliWarning, match=f"its batch is frozen at {batch}; samples run {how}")


@pytest.mark.parametrize("batch", [1, 4])
def test_an_exported_frozen_batch_runs_in_groups_and_says_so(batch, tmp_path):
    module = ready(Residual())
    model = models.load(save_exported(module, (3, 5, 5), tmp_path / "net.pt2", batch=batch), precision="float64")
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64).requires_grad_()
    target = classes(0, 1, 2, 3, 0, 1)
    with frozen_at(batch):
        outputs = model(x.detach())
    assert_close(outputs, module(x), 1e-12)
    gradient, score = model.gradient(x.detach(), target)  # warned once
    expected = module(x).gather(1, target.index[:, None])[:, 0]
    assert_close(score, expected, 1e-12)
    assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0], 1e-12)


class BakedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(1, 12))


class BakedWithoutBatch(BakedView):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(12)).softmax(0)


class SumsItUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum()


@pytest.mark.parametrize("make", [BakedView, BakedWithoutBatch, SumsItUp])
def test_a_batch_of_one_baked_into_torchscript_runs_one_by_one(make, tmp_path):
    module = ready(make())
    model = models.load(save_traced(module, (3, 4), tmp_path / "net.pt", batch=1), precision="float64")
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    with frozen_at(1):
        outputs = model(x)
    expected = torch.stack([module(row[None]).reshape(-1) for row in x])
    assert_close(outputs.reshape(3, -1), expected, 1e-12)


def test_a_batch_baked_at_another_size_is_an_error_with_the_line(tmp_path):
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 12) @ torch.ones(12, 3, dtype=x.dtype)

    model = models.load(save_traced(View(), (3, 4), tmp_path / "net.pt", batch=4), precision="float64")
    with pytest.raises(ModelError, match=r"net\.pt: .*test_model\.py:\d+"):
        model(torch.rand(4, 3, 4, dtype=torch.float64))


# --- rows that influence each other


class CentresTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        made = self.linear(x)
        return made - 0.5 * made.mean(0)


@pytest.mark.parametrize("save", [save_scripted, save_traced, save_exported])
def test_samples_that_influence_each_other_run_one_by_one(save, tmp_path):
    module = ready(CentresTheBatch())
    shape = () if save is save_scripted else ((4,),)
    model = models.load(save(module, *shape, tmp_path / "net.pt"), precision="float64")
    x = torch.rand(5, 4, dtype=torch.float64)
    with pytest.warns(AttrcliWarning, match="depends on the others of the batch; samples run one by one"):
        outputs = model(x)
    assert_close(outputs, torch.cat([module(row[None]) for row in x]), 1e-12)
    gradient, _ = model.gradient(x, classes(0, 1, 2, 0, 1))
    assert_close(gradient, 0.5 * module.linear.weight[[0, 1, 2, 0, 1]], 1e-12)


def test_a_scale_taken_over_the_batch_is_one_sample_s_in_both_engines(tmp_path):
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    model, x = models.load(save_onnx(tmp_path / "net.onnx", nodes)), torch.rand(3, 4)
    x[2] *= 1000
    with pytest.warns(AttrcliWarning, match="depends on the others of the batch; samples run one by one"):
        outputs = model(x)
    assert_close(outputs, torch.cat([model(row[None]) for row in x]), 0)
    assert float((outputs[:2] - x[:2]).abs().max()) < 1 / 255


def test_from_a_node_on_samples_that_influence_each_other_run_one_by_one(tmp_path):
    module = ready(CentresTheBatch())
    model, x = models.load(save_scripted(module, tmp_path / "net.pt"), precision="float64"), torch.rand(2, 4).double()
    with pytest.warns(AttrcliWarning, match="depends on the others"):
        graph = model.engine((4,)).graph.graph
    node = next(n.name for n in graph.nodes if "linear" in n.name and n.op != "get_attr")
    rest, target = model.at(node, (4,)), Target(torch.tensor([0, 1]), held=model.arguments(x))
    gradient, _ = rest.gradient(model.activation(node, x), target)  # and says nothing: that of the whole was enough
    assert rest.engine((3,)).batch == 1
    assert_close(gradient, 0.5 * torch.eye(3, dtype=torch.float64)[:2], 1e-12)


def test_an_index_beyond_the_table_is_the_inputs_error(tmp_path):
    module = ready(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2)))
    model = models.load(save_scripted(module, tmp_path / "net.pt"))
    model.bind(dtype=torch.int64)
    with pytest.raises(InputError, match=r"net\.pt: .*index beyond the model's tables: index out of range"):
        model(torch.tensor([[1, 9]]))
    node = next(n.name for n in model.engine((2,)).graph.graph.nodes if n.target is torch.ops.aten.embedding.default)
    with pytest.raises(InputError, match=r"index beyond the model's tables"):
        model.activation(node, torch.tensor([[1, 9]]))
    nodes = [helper.make_node("Gather", ["w", "i"], ["e"]), helper.make_node("Flatten", ["e"], ["y"])]
    weight = np.ones((7, 3), np.float32)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("i", TensorProto.INT64, ("N", 2))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", 6))],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    with pytest.raises(InputError, match=r"net\.onnx: ONNX Runtime: .*out of data bounds"):
        models.load(path)(torch.tensor([[1, 9]]))


def test_a_graph_that_does_not_run_is_the_models_error(monkeypatch):
    model, x = models.load(SAMPLES / "fashion_mlp.pt"), images()

    def fail(*_, **__):
        raise RuntimeError("shapes do not fit\nand more")

    monkeypatch.setattr(type(model.engine((1, 28, 28))), "__call__", fail)
    with pytest.raises(ModelError, match=r"fashion_mlp\.pt: the graph does not run on this input: shapes do not fit$"):
        model(x)


# --- several inputs, several outputs, layouts


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, scale: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        picked = torch.stack([x[:, 0], x[:, 1]], dim=1) * scale
        return picked + index.unsqueeze(1), x.sum(dim=(1, 2))


@pytest.fixture
def two_inputs(tmp_path):
    return models.load(save_scripted(TwoInputs(), tmp_path / "net.pt"), precision="float64")


def test_the_other_inputs_are_held_and_an_output_is_chosen(two_inputs):
    fixed = {"scale": torch.tensor([[2.0, 3.0], [4.0, 5.0]]), "index": torch.tensor([10, 20])}
    x = torch.rand(3, 2, 2, dtype=torch.float64)
    two_inputs.bind(input="x", output="output_0", fixed=fixed)
    expected = TwoInputs()(x, fixed["scale"].expand(3, 2, 2), fixed["index"].expand(3, 2))[0]
    assert_close(two_inputs(x), expected, 1e-15)
    held = {name: torch.stack([value * factor for factor in (1, 2, 3)]) for name, value in fixed.items()}
    held["scale"] = held["scale"].double()
    target = Target(torch.tensor([0, 1, 0]), held=held)
    gradient, score = two_inputs.gradient(x, target)
    assert_close(score, two_inputs.scores(x, target), 1e-15)
    assert gradient[1].tolist() == [[0, 0], [8, 10]]
    two_inputs.bind(input="x", output="output_1", fixed=fixed)
    assert_close(two_inputs(x), x.sum((1, 2)), 1e-15)


def test_what_is_not_said_of_several_is_asked_for(two_inputs):
    names = "x \\? float32, scale \\? float32, index \\? float32"
    for given, message in (
        ({}, f"several inputs; choose one with --input: {names}"),
        ({"input": "y"}, f"no input 'y'; its inputs: {names}"),
        ({"input": "x", "fixed": {"scale": torch.ones(1)}}, "give --fix index=FILE"),
        ({"input": "x", "fixed": {n: torch.ones(1) for n in ("scale", "index", "z")}}, "--fix z: no other input"),
    ):
        with pytest.raises(UsageError, match=message):
            two_inputs.bind(**given)
    two_inputs.bind(input="x", fixed={"scale": torch.ones(2, 2), "index": torch.ones(2)})
    with pytest.raises(
        UsageError, match=r"several outputs: choose one with --output NAME: output_0 \[2, 2\], output_1"
    ):
        two_inputs(torch.rand(1, 2, 2, dtype=torch.float64))
    two_inputs.bind(input="x", output="logits", fixed={"scale": torch.ones(2, 2), "index": torch.ones(2)})
    with pytest.raises(UsageError, match="no output 'logits'; outputs: output_0, output_1"):
        two_inputs(torch.rand(1, 2, 2, dtype=torch.float64))


class LastChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).mean((2, 3))


def test_a_file_that_takes_nhwc_is_given_nchw(tmp_path):
    module = ready(LastChannels())
    model = models.load(save_exported(module, (6, 5, 3), tmp_path / "net.pt2"), precision="float64")
    model.bind(layout="NHWC")
    x = torch.rand(2, 3, 6, 5, dtype=torch.float64).requires_grad_()
    expected = module(x.movedim(1, -1))
    assert_close(model(x.detach()), expected, 1e-13)
    gradient, _ = model.gradient(x.detach(), classes(0, 0))
    assert_close(gradient, torch.autograd.grad(expected[:, 0].sum(), x)[0], 1e-13)
    with pytest.raises(ModelError, match="input is 6x5x3 per sample; this input is 6x5x4"):
        model(torch.rand(2, 4, 6, 5, dtype=torch.float64))


def test_a_model_from_a_node_on_is_the_rest_of_the_model():
    model = models.load(SAMPLES / "fashion_cnn.pt", precision="float64")
    x = images(3, torch.float64)
    rest = model.at("relu_1", (1, 28, 28))
    value = model.activation("relu_1", x)
    target = Target(torch.tensor([1, 2, 3]), held=model.arguments(x))
    assert_close(rest.scores(value, target), model.scores(x, target), 1e-12)
    gradient, _ = rest.gradient(value, target)
    assert gradient.shape == value.shape
    with pytest.raises(UsageError, match="no node 'relu_99'"):
        model.activation("relu_99", x)


# --- refused


def test_what_cannot_be_chosen_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--precision float16: choose from float32, float64"):
        models.load(SAMPLES / "fashion_mlp.pt", precision="float16")
    with pytest.raises(UsageError, match="--device tpu: choose from auto, cpu, cuda"):
        models.load(SAMPLES / "fashion_mlp.pt", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: torch finds no CUDA device"):
            models.load(SAMPLES / "fashion_mlp.pt", device="cuda")
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(tmp_path / "none.pt")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_shape_that_the_file_does_not_take_is_refused_with_both(suffix):
    model = models.load(SAMPLES / f"fashion_cnn{suffix}")
    for shape in ((3, 28, 28), (1, 32, 32), (28, 28)):
        with pytest.raises(ModelError, match=f"input is 1x28x28 per sample; this input is {'x'.join(map(str, shape))}"):
            model.gradient(torch.rand(2, *shape), classes(0, 0))


def test_whole_numbers_have_no_gradient(tmp_path):
    model = models.load(save_scripted(nn.Embedding(5, 3).double(), tmp_path / "net.pt"), precision="float64")
    model.bind(dtype=torch.int64)
    x = torch.tensor([1, 2, 4])
    assert model.logits(x).shape == (3, 3)
    with pytest.raises(ModelError, match=r"net\.pt: input 'input' holds whole numbers .*--at NODE"):
        model.gradient(x, classes(0, 1, 2))


class Inverts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x)


@pytest.mark.parametrize("save", [save_scripted, lambda m, p: save_exported(m, (2, 2), p)])
def test_an_unsupported_op_is_named_with_file_op_and_line(save, tmp_path):
    model = models.load(save(Inverts(), tmp_path / "net.pt"), precision="float64")
    with pytest.raises(
        UnsupportedOp, match=r"net\.pt: op aten\.linalg_inv.*test_model\.py:.*torch\.linalg.inv\(x\)"
    ) as error:
        model(torch.eye(2, dtype=torch.float64)[None])
    assert error.value.exit_code == 4


# --- not finite


@pytest.mark.parametrize("save", [save_scripted, lambda m, p: save_exported(m, (3, 6, 6), p)])
def test_nan_in_a_weight_is_named(save, tmp_path):
    module = ready(Residual())
    module.second.weight.data[0, 0, 0, 0] = float("nan")
    model = models.load(save(module, tmp_path / "net.pt"))
    with pytest.raises(ModelError, match=r"net\.pt: stored tensor 'second\.weight' holds NaN"):
        model(torch.rand(1, 3, 6, 6))


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.sqrt(x)
        return torch.stack([y.sum(1), x.sum(1)], dim=1)


@pytest.fixture(params=["free", "frozen"])
def root(request, tmp_path):
    batch = 3 if request.param == "frozen" else None
    model = models.load(save_exported(Root().double(), (4,), tmp_path / "net.pt2", batch=batch), precision="float64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttrcliWarning)
        model.engine((4,))
    return model


def test_a_nan_that_the_model_makes_is_traced_to_its_node(root):
    x = torch.ones(5, 4, dtype=torch.float64)
    assert bool(torch.isfinite(root.scores(x, classes(*[0] * 5))).all())
    x[3, 1] = -1
    for run in (root.scores, root.gradient):
        with pytest.raises(NonFiniteError, match=r"net\.pt2: node 'sqrt' \(aten\.sqrt.*torch\.sqrt\(x\).* outputs NaN"):
            run(x, classes(*[0] * 5))
    root.gradient(x[:3], classes(0, 0, 0))


def test_a_gradient_that_is_not_finite_is_traced_to_its_node(root):
    x = torch.ones(5, 4, dtype=torch.float64)
    x[2, 0] = 0
    assert bool(torch.isfinite(root.scores(x, classes(*[0] * 5))).all())
    with pytest.raises(NonFiniteError, match=r"the gradient of node 'sqrt' \(aten\.sqrt.* is not finite"):
        root.gradient(x, classes(*[0] * 5))


def test_an_input_that_is_not_finite_is_named(root):
    x = torch.ones(2, 4, dtype=torch.float64)
    x[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="input 'x' holds NaN"):
        root.scores(x, classes(1, 1))


def test_a_large_but_finite_gradient_is_no_error(tmp_path):
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3e38

    model = models.load(save_scripted(Large(), tmp_path / "net.pt"))
    gradient, _ = model.gradient(torch.zeros(2, 3), classes(0, 1))
    assert bool(torch.isfinite(gradient).all())


# --- ONNX Runtime


def save_onnx(path, nodes, initializers=(), shape=("N", 4)):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("N", "K"))],
        [numpy_helper.from_array(array, name) for name, array in initializers],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.parametrize("batch", [1, 4])
def test_a_frozen_onnx_batch_runs_in_groups_in_both_engines(batch, tmp_path):
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    path = save_onnx(
        tmp_path / "net.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], [("w", weight)], (batch, 4)
    )
    model, x = models.load(path), torch.rand(6, 4)
    with frozen_at(batch):
        outputs = model(x)
    assert_close(outputs, x @ torch.from_numpy(weight), 1e-6)
    assert_close(model.gradient(x, classes(*[1] * 6))[0], torch.from_numpy(weight[:, 1]).expand(6, 4), 1e-6)


def test_engines_that_disagree_are_an_error(monkeypatch):
    model = models.load(SAMPLES / "fashion_mlp.onnx")
    run = Engine.__call__
    monkeypatch.setattr(Engine, "__call__", lambda *args, **kwargs: run(*args, **kwargs) * 1.01)
    with pytest.raises(ModelError, match=r"fashion_mlp\.onnx: ONNX Runtime and the imported graph differ by 0\.01"):
        model(images())


@pytest.mark.parametrize("declared", [None, "softmax", "sigmoid"])
def test_a_graph_that_cannot_be_imported_still_runs_forward(declared, tmp_path, monkeypatch):
    head = {"softmax": "Softmax", "sigmoid": "Sigmoid", None: "Identity"}[declared]
    path = save_onnx(tmp_path / "net.onnx", [helper.make_node(head, ["x"], ["y"])])
    model, x = models.load(path), torch.randn(3, 4)
    model.bind(declared=declared)

    def refuse(*_):
        raise UnsupportedOp("node 'y': op Strange has no importer")

    monkeypatch.setattr(model.source, "build", refuse)
    with pytest.warns(AttrcliWarning, match="op Strange has no importer; forward-only methods still run"):
        outputs = model(x)
    activation = {"softmax": lambda z: z.softmax(1), "sigmoid": torch.sigmoid, None: lambda z: z}[declared]
    assert_close(outputs, activation(x), 1e-6)
    probabilities = model.scores(x, Target(torch.tensor([0, 1, 2]), "prob"))
    expected = x.sigmoid() if declared == "sigmoid" else x.softmax(1)
    assert_close(probabilities, expected.diagonal().double(), 1e-5)
    with pytest.raises(UnsupportedOp, match="Strange"):
        model.gradient(x, classes(0, 0, 0))


def test_sha256_and_describe():
    model = models.load(SAMPLES / "fashion_mlp.onnx")
    assert len(model.sha256) == 64
    assert models.describe(model.source.inputs) == "image Nx1x28x28 float32"
