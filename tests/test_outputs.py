"""Outputs that are no scores, or that are probabilities where nobody said so: told before the run."""

import numpy as np
import pytest
import torch
from cli_runs import explain, linear, onnx_file, refused, rows, scripted, table
from onnx import TensorProto, helper

from attrcli import model as models
from attrcli.errors import AttrcliWarning
from attrcli.outputs import examine

WEIGHT = np.array([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 1.0, -1.0], [2.0, 0.0, -1.0, 3.0]], np.float32)
TABLE = '[input]\nkind = "table"\n'


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def csv(tmp_path):
    return table(tmp_path / "rows.csv", np.random.default_rng(0).normal(size=(10, 4)))


class Net(torch.nn.Module):
    """A linear layer, then what `step` says."""

    def __init__(self, step: str, classes: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.step = torch.nn.Linear(4, classes), step

    def forward(self, x):
        z = self.linear(x)
        if self.step == "argmax":
            return z.argmax(1)
        if self.step == "rounded":
            return z.round().to(torch.int64)
        if self.step == "chosen":
            return torch.nn.functional.one_hot(z.argmax(1), 3).to(torch.float32)
        if self.step == "normalised":
            return z.exp() / z.exp().sum(1, keepdim=True)
        if self.step == "squashed":
            return 0.5 * (1 + torch.tanh(z))
        return z


def argmax(path, keepdims, second_output=False):
    """The class of the likeliest in an ONNX file, with the logits beside it if wanted."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["z"], transB=1),
        helper.make_node("ArgMax", ["z"], ["y"], axis=1, keepdims=keepdims),
    ]
    outputs = {"y": (["N", 1] if keepdims else ["N"], TensorProto.INT64)}
    return onnx_file(
        path, nodes, {"x": ["N", 4]}, outputs | ({"z": ["N", 3]} if second_output else {}), {"w": WEIGHT}, TABLE
    )


@pytest.mark.parametrize("method", ["gradient", "occlusion"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_the_class_that_an_onnx_file_chose_is_no_score(tmp_path, csv, out, method, keepdims):
    baseline = ("-b", "zero") if method == "occlusion" else ()
    model = argmax(tmp_path / "net.onnx", keepdims)
    message = refused(out, *baseline, model=model, inputs=csv, method=method, code=4)
    assert "the output 'y' is whole numbers (int64)" in message
    assert "save the model without that step" in message


def test_an_output_that_has_scores_is_proposed(tmp_path, csv, out):
    model = argmax(tmp_path / "net.onnx", 0, second_output=True)
    message = refused(out, "--output", "y", model=model, inputs=csv, code=4)
    assert "choose another with --output (z)" in message
    explain(out, "--output", "z", model=model, inputs=csv)


@pytest.mark.parametrize("step", ["argmax", "rounded"])
def test_whole_numbers_of_a_torchscript_file_are_no_scores(tmp_path, csv, out, step):
    model = scripted(tmp_path / "net.pt", Net(step), TABLE)
    assert "is whole numbers (int64)" in refused(out, model=model, inputs=csv, code=4)


def test_a_step_without_a_gradient_is_refused_where_one_is_needed(tmp_path, csv, out):
    model = scripted(tmp_path / "net.pt", Net("chosen"), TABLE)
    message = refused(out, model=model, inputs=csv, method="integrated_gradients", code=2)
    assert "--background" in message
    message = refused(out, "-b", "zero", model=model, inputs=csv, method="integrated_gradients", code=4)
    assert "no gradient leads from the output back to the input" in message
    assert "occlusion" in message
    explain(out, "-b", "zero", model=model, inputs=csv, method="occlusion")
    assert rows(out)["attribution"].any()


@pytest.mark.parametrize(
    ("step", "classes", "seen"),
    [
        ("normalised", 3, "they add up to 1"),
        ("squashed", 3, "all lie between 0 and 1"),
        ("squashed", 1, "all lie between 0 and 1"),
    ],
)
def test_probabilities_without_a_known_activation_are_told_once(tmp_path, csv, out, step, classes, seen):
    model = scripted(tmp_path / "net.pt", Net(step, classes), TABLE)
    told = explain(out, "--batch-size", "2", model=model, inputs=csv).err
    assert told.count("looks like probabilities") == 1
    assert f"({seen})" in told
    explain(tmp_path / "plain.h5", "--dry-run", model=model, inputs=csv)


def test_an_empty_mask_is_told_of_the_inputs_alone(tmp_path, out):
    """(N, 3) as classes at each of two positions: class 1 where x[0] is positive, else class 0."""
    nodes = [helper.make_node("Gemm", ["x", "w"], ["f"]), helper.make_node("Reshape", ["f", "s"], ["z"])]
    weights = {"w": np.array([[0, 0, 1, 1, 0, 0]], np.float32), "s": np.array([-1, 3, 2])}
    model = onnx_file(tmp_path / "m.onnx", nodes, {"x": ["N", 1]}, {"z": ["N", 3, 2]}, weights, TABLE)
    (here, there), target = (table(tmp_path / f"{x}.csv", [[x]]) for x in (2, -2)), ("-t", "1@mask")
    assert explain(out, *target, model=model, inputs=here).err == ""
    told = explain(tmp_path / "b.h5", *target, model=model, inputs=[here, there]).err
    assert told.count("in 1 of 2 inputs class 1 is the likeliest at no position") == 1
    assert explain(tmp_path / "c.h5", *target, "--dry-run", model=model, inputs=there).err == ""


@pytest.mark.parametrize("head", [None, "Softmax", "Sigmoid"])
def test_logits_and_known_activations_are_not_told(tmp_path, csv, out, head):
    model = linear(tmp_path / "net.onnx", WEIGHT, head=head, sidecar=TABLE)
    assert explain(out, model=model, inputs=csv).err == ""


def test_a_few_numbers_between_0_and_1_prove_nothing(tmp_path, out):
    model = linear(tmp_path / "net.onnx", WEIGHT / 100, [0.5, 0.2, 0.4], sidecar=TABLE)
    assert explain(out, model=model, inputs=table(tmp_path / "two.csv", np.zeros((2, 4)))).err == ""


@pytest.mark.parametrize(
    ("classes", "names", "told"), [(3, 2, True), (3, 4, True), (3, 3, False), (1, 2, False), (1, 1, False)]
)
def test_labels_that_are_not_one_per_class_are_told(tmp_path, csv, out, classes, names, told):
    labels = "".join(f"name {i}\n" for i in range(names))
    (tmp_path / "labels.txt").write_text(labels)
    (tmp_path / "net.toml").write_text(f'{TABLE}[output]\nlabels = "labels.txt"\n')
    model = linear(tmp_path / "net.onnx", WEIGHT[:classes])
    words = f"{names} labels for an output of {classes} classes"
    assert (words in explain(out, model=model, inputs=csv).err) == told


def test_numbers_that_are_not_finite_are_left_to_their_rows(tmp_path):
    model = models.load(linear(tmp_path / "net.onnx", WEIGHT))
    with pytest.warns(AttrcliWarning, match="5 labels for an output of 3 classes"):
        examine(model, torch.full((9, 4), float("nan")), labels=5)


def test_inputs_that_the_model_cannot_take_are_left_to_their_rows(tmp_path, out):
    nodes = [
        helper.make_node("Gather", ["t", "x"], ["e"]),
        helper.make_node("ReduceSum", ["e", "a"], ["z"], keepdims=0),
    ]
    weights = {"t": np.ones((5, 2), np.float32), "a": np.array([1])}
    model = onnx_file(tmp_path / "e.onnx", nodes, {"x": (["N", 3], TensorProto.INT64)}, {"z": ["N", 2]}, weights)
    np.save(tmp_path / "ids.npy", np.array([[0, 1, 9], [0, 1, 2]]))
    explain(out, "--precision", "float64", model=model, inputs=tmp_path / "ids.npy", method="occlusion", code=3)
    assert rows(out)["status"].tolist() == [2, 1]
