"""`attrcli explain`: inputs, preprocessing, targets, scores, baselines, options; each number known by hand."""

import json
import os
import pty
import subprocess
import sys
import tomllib
from dataclasses import fields

import h5py
import numpy as np
import pytest
import torch
from cli_runs import (
    CNN,
    MLP,
    SAMPLES,
    SIDECAR,
    TEST,
    TRAIN,
    assert_same_rows,
    attrcli,
    explain,
    image,
    images,
    linear,
    onnx_file,
    refused,
    rows,
    scripted,
    table,
)
from onnx import TensorProto, helper

from attrcli.config import Config

WEIGHT = np.array([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 1.0, -1.0], [2.0, 0.0, -1.0, 3.0]])
BIAS = np.array([0.1, -0.2, 0.3])
VALUES = np.array([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 1.0]])
LOGITS = VALUES @ WEIGHT.T + BIAS
NAMES = '[input]\nkind = "table"\n[output]\nlabels = ["cat", "dog", "on-off"]\n'


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """The linear classifier, with labels in a sidecar inside the file."""
    return linear(tmp_path_factory.mktemp("net") / "net.onnx", WEIGHT, BIAS, sidecar=NAMES)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return table(tmp_path_factory.mktemp("csv") / "rows.csv", VALUES)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# -- every kind of input -------------------------------------------------------------------------------------------


def test_files_folders_globs_lists_and_stdin_are_the_same_inputs(tmp_path, out):
    names = sorted(str(path) for path in (TEST / "Bag").glob("*.png"))
    (tmp_path / "list.txt").write_text("\n".join(names))
    forms = [[TEST / "Bag"], [f"{TEST}/Bag/*.png"], names[::-1], [f"@{tmp_path / 'list.txt'}"], ["-"]]
    for number, form in enumerate(forms):
        explain(tmp_path / f"{number}.h5", inputs=form, stdin="\n".join(names))
        assert_same_rows(tmp_path / "0.h5", tmp_path / f"{number}.h5")
    assert rows(tmp_path / "0.h5")["sample_id"] == [name.rpartition("/")[2] for name in names]


def test_arrays_in_npy_npz_and_h5(tmp_path, net):
    sidecar = tmp_path / "array.toml"
    sidecar.write_text('[input]\nkind = "array"\nsize = [4]\n')
    np.save(tmp_path / "all.npy", VALUES)
    np.savez(tmp_path / "all.npz", all=VALUES)
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file["all"] = VALUES
    ids = {"npy": "all.npy#{}", "npz": "all.npz#all[{}]", "h5": "all.h5#all[{}]"}
    for kind, form in ids.items():
        run = tmp_path / f"{kind}.run"
        explain(run, "-t", "2", "-p", sidecar, model=net, inputs=tmp_path / f"all.{kind}", method="input_x_gradient")
        found = rows(run)
        assert found["sample_id"] == [form.format(row) for row in range(3)]
        np.testing.assert_allclose(found["attribution"], VALUES * WEIGHT[2], rtol=1e-6)
        np.testing.assert_allclose(found["score"], LOGITS[:, 2], rtol=1e-6)


def test_a_table_takes_the_columns_of_the_sidecar_and_the_mean_of_a_background(tmp_path, net, out):
    sidecar = tmp_path / "table.toml"
    sidecar.write_text('[input]\nkind = "table"\ncolumns = ["d", "c", "b", "a"]\nmean = [1.0]\nstd = [2.0]\n')
    labels = {"id": ["x", "y", "z"], "label": [0, 1, 2]}
    file = table(tmp_path / "rows.csv", VALUES[:, ::-1], "dcba"[::-1], labels)  # the columns a, b, c, d hold d, c, b, a
    data, background = file, tmp_path / "all.csv"
    background.write_text("a,b,c,d\n" + "\n".join(",".join(map(str, row[::-1])) for row in [[0] * 4, [2, 4, 6, 8]]))
    explain(out, "-p", sidecar, "--background", background, "-t", "1", model=net, inputs=data, method="occlusion")
    found = rows(out)
    assert found["sample_id"] == ["rows.csv#x", "rows.csv#y", "rows.csv#z"]
    assert found["label"].tolist() == [0, 1, 2]
    # both the rows and the background are read in the order d, c, b, a, then normalised
    x, base = (VALUES - 1) / 2, (np.array([1.0, 2.0, 3.0, 4.0]) - 1) / 2
    np.testing.assert_allclose(found["attribution"], WEIGHT[1] * (x - base), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["baseline_score"], np.full(3, WEIGHT[1] @ base + BIAS[1]), rtol=1e-5)


def test_a_table_wants_a_background_unless_told_otherwise(tmp_path, net, csv, out):
    message = refused(out, model=net, inputs=csv, method="integrated_gradients")
    assert "--background" in message
    assert "--baseline zero" in message
    message = refused(out, "--background", tmp_path / "no.csv", model=net, inputs=csv, method="occlusion")
    assert "--background" in message
    assert "no.csv" in message
    explain(out, "--baseline", "zero", model=net, inputs=csv, method="integrated_gradients")
    with h5py.File(out) as run:
        np.testing.assert_allclose(run["baseline_score"], BIAS[LOGITS.argmax(1)], rtol=1e-6)


def test_a_table_of_another_width_is_refused_before_the_run(tmp_path, net, out):
    data = table(tmp_path / "five.csv", np.ones((3, 5)))
    message = refused(out, model=net, inputs=data)
    assert "5" in message
    assert "4" in message
    assert "columns" in message


def test_tables_are_read_by_the_names_of_the_first_one(tmp_path, net, out):
    (tmp_path / "in").mkdir()
    table(tmp_path / "in/1.csv", VALUES)
    table(tmp_path / "in/2.csv", VALUES[:, ::-1], "dcba")
    table(tmp_path / "in/3.csv", VALUES[:, :3])
    done = explain(out, "-t", "1", model=net, inputs=tmp_path / "in", method="gradient", code=3)
    found = rows(out)
    assert found["status"].tolist() == [1] * 6 + [2] * 3
    np.testing.assert_allclose(found["score"][:6], np.tile(LOGITS[:, 1], 2), rtol=1e-6)
    assert "no column 'd'" in done.err
    assert json.loads(found["attributes"]["preprocess"])["input"]["columns"] == ["a", "b", "c", "d"]


# -- preprocessing information -------------------------------------------------------------------------------------


def test_an_image_without_preprocessing_information_is_refused_with_two_ways_out(tmp_path, out):
    model = tmp_path / "bare.onnx"
    model.write_bytes(MLP.read_bytes())
    message = refused(out, model=model)
    assert "--preprocess imagenet" in message
    assert "--preprocess unit" in message
    assert f"attrcli inspect {model} --write-sidecar" in message


def test_write_sidecar_gives_what_explain_accepts(tmp_path, out):
    model = tmp_path / "bare.onnx"
    model.write_bytes(MLP.read_bytes())
    assert attrcli("inspect", model, "--write-sidecar").out.strip() == str(tmp_path / "bare.toml")
    explain(out, model=model)
    explain(tmp_path / "unit.h5", "-p", "unit", model=model)
    assert_same_rows(out, tmp_path / "unit.h5")


@pytest.mark.parametrize("kind", ["onnx", "pt"])
def test_a_sidecar_inside_the_model_file(tmp_path, kind, out):
    text = SIDECAR + 'labels = ["a", "b"]\n'
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 2))
    if kind == "pt":
        model = scripted(tmp_path / "net.pt", module, sidecar=text)
    else:
        weight = module[1].weight.detach().numpy()
        nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)]
        model = onnx_file(
            tmp_path / "net.onnx", nodes, {"x": ["N", 1, 28, 28]}, {"z": ["N", 2]}, {"w": weight}, sidecar=text
        )
    explain(out, "-t", "b", model=model)
    attributes = rows(out)["attributes"]
    assert json.loads(attributes["preprocess"])["input"]["mean"] == [0.286]
    # a file beside the model goes before what is inside, a flag before both
    (tmp_path / "net.toml").write_text(text.replace("0.2860", "0.5"))
    explain(tmp_path / "two.h5", model=model)
    assert json.loads(rows(tmp_path / "two.h5")["attributes"]["preprocess"])["input"]["mean"] == [0.5]
    explain(tmp_path / "three.h5", "-p", "unit", model=model)
    assert json.loads(rows(tmp_path / "three.h5")["attributes"]["preprocess"])["input"]["mean"] == [0.0]


def test_channels_bgr_and_layout_nhwc_reach_the_model(tmp_path, out):
    """The score is 1 x first + 10 x second + 100 x third channel of the one pixel, as the model sees them."""
    weight = np.array([[1, 10, 100]], np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)]
    picture = image(tmp_path / "in" / "p.png", [[[51, 102, 153]]])
    for number, (layout, channels) in enumerate([("NCHW", "RGB"), ("NCHW", "BGR"), ("NHWC", "RGB"), ("NHWC", "BGR")]):
        shape = ["N", 3, 1, 1] if layout == "NCHW" else ["N", 1, 1, 3]
        text = (
            f'[input]\nkind = "image"\nsize = [1, 1]\nresize = "exact"\nchannels = "{channels}"\nlayout = "{layout}"\n'
        )
        model = onnx_file(tmp_path / f"{number}.onnx", nodes, {"x": shape}, {"z": ["N", 1]}, {"w": weight}, text)
        run = tmp_path / f"{number}.h5"
        explain(run, "-t", "0", model=model, inputs=picture, method="gradient")
        found, pixel = rows(run), np.array([0.2, 0.4, 0.6])
        np.testing.assert_allclose(found["score"], weight[0] @ (pixel if channels == "RGB" else pixel[::-1]), rtol=1e-5)
        np.testing.assert_allclose(found["attribution"][0, :, 0, 0], weight[0])


# -- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "classes"),
    [
        (None, [2, 2, 2]),
        ("predicted", None),
        ("0", [0, 0, 0]),
        ("2", [2, 2, 2]),
        ("dog", [1, 1, 1]),
        ("on-off", [2, 2, 2]),
    ],
)
def test_a_target_is_a_class_of_the_output(net, csv, out, target, classes):
    explain(out, *(("-t", target) if target else ()), model=net, inputs=csv, method="gradient")
    found = rows(out)
    classes = LOGITS.argmax(1) if classes is None or target is None else np.array(classes)
    assert found["target"].tolist() == classes.tolist()
    np.testing.assert_allclose(found["attribution"], WEIGHT[classes])
    np.testing.assert_allclose(found["score"], LOGITS[np.arange(3), classes], rtol=1e-6)
    np.testing.assert_allclose(found["prediction"], LOGITS, rtol=1e-6)


@pytest.mark.parametrize("target", ["cat-dog", "0-1", "on-off-dog", "2-cat"])
def test_a_contrast_of_two_classes(net, csv, out, target):
    explain(out, "-t", target, model=net, inputs=csv, method="gradient")
    first, second = {"cat-dog": (0, 1), "0-1": (0, 1), "on-off-dog": (2, 1), "2-cat": (2, 0)}[target]
    found = rows(out)
    assert found["target"].tolist() == [first] * 3
    np.testing.assert_allclose(found["attribution"], np.tile(WEIGHT[first] - WEIGHT[second], (3, 1)))
    np.testing.assert_allclose(found["score"], LOGITS[:, first] - LOGITS[:, second], rtol=1e-5)


def test_the_label_as_target_comes_from_class_folders_or_a_csv(tmp_path, out):
    picked = [TEST / "Bag", TEST / "Coat"]
    explain(out, "-t", "label", inputs=picked)
    found, labels = rows(out), (SAMPLES / "labels.txt").read_text().split("\n")
    wanted = [labels.index(name.partition("/")[0]) for name in found["sample_id"]]
    assert found["target"].tolist() == found["label"].tolist() == wanted
    listed = tmp_path / "labels.csv"
    listed.write_text("id,label\n" + "\n".join(f"{name},Dress" for name in found["sample_id"][::2]))
    done = explain(tmp_path / "b.h5", "-t", "label", "--labels", listed, inputs=picked, code=3)
    assert "has no label" in done.err
    given = rows(tmp_path / "b.h5")
    assert given["target"][::2].tolist() == [labels.index("Dress")] * len(given["target"][::2])
    assert given["status"].tolist() == [1, 2] * (len(given["status"]) // 2)
    assert np.isnan(given["attribution"][1::2]).all()
    assert json.loads(given["attributes"]["files"])["labels"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("3", ["--target 3", "out of range", "3 classes", "0 to 2"]),
        ("0-7", ["7 is out of range", "3 classes"]),
        ("dgo", ["'dgo'", "did you mean 'dog'", "cat, dog, on-off", "predicted"]),
        ("-1", ["-1"]),
        ("0-cat", ["--target 0-cat", "always zero"]),
        ("01", ["'01' is no label"]),
        ("label", ["--target label", "class folders", "--labels"]),
        ("1@sum", ["1@sum", "predicted, label, an index or A-B"]),
        ("1@max", ["sum or mask"]),
        ("0,0,1", ["0,0,1"]),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_the_run(net, csv, out, target, words):
    message = refused(out, f"--target={target}", model=net, inputs=csv)
    assert all(word in message for word in words), message
    assert "--dry-run" not in message
    assert attrcli("explain", net, csv, "-m", "saliency", "--out", out, f"--target={target}", "--dry-run").code == 2


def test_a_class_folder_given_alone_is_the_label(tmp_path, out):
    explain(out, "-t", "label", inputs=TEST / "Bag")
    found = rows(out)
    assert (
        set(found["label"]) == set(found["target"]) == {(SAMPLES / "labels.txt").read_text().split("\n").index("Bag")}
    )


def test_label_names_that_match_nothing_are_told(tmp_path, net, out):
    for name in ("lion", "tiger"):
        (tmp_path / name).mkdir()
        table(tmp_path / name / f"{name}.csv", VALUES)
    done = explain(out, model=net, inputs=[tmp_path / "lion", tmp_path / "tiger"])
    assert "lion" in done.err
    assert "cat" in done.err
    assert (rows(out)["label"] == 65535).all()
    wrong = tmp_path / "labels.csv"
    wrong.write_text("id,label\nlion.csv#0,lion\n")
    message = refused(tmp_path / "b.h5", "--labels", wrong, model=net, inputs=tmp_path / "lion")
    assert "lion" in message
    assert "cat, dog, on-off" in message


def test_outputs_of_higher_rank(tmp_path, csv, out):
    """Per-pixel classes (N, 2, 3): sums, masks and positions; a plain class is refused."""
    weight = np.arange(24, dtype=np.float32).reshape(6, 4) / 10
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["f"], transB=1),
        helper.make_node("Reshape", ["f", "s"], ["z"]),
    ]
    weights = {"w": weight, "s": np.array([-1, 2, 3])}
    model = onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 4]}, {"z": ["N", 2, 3]}, weights)
    message = refused(out, model=model, inputs=csv)
    assert "2x3" in message
    assert "C@sum" in message
    explain(out, "-t", "1@sum", model=model, inputs=csv, method="gradient")
    np.testing.assert_allclose(rows(out)["attribution"], np.tile(weight[3:].sum(0), (3, 1)), rtol=1e-6)
    assert rows(out)["prediction"].shape == (3, 6)
    explain(out, "-t", "1,2", "--force", model=model, inputs=csv, method="gradient")
    np.testing.assert_allclose(rows(out)["attribution"], np.tile(weight[5], (3, 1)), rtol=1e-6)
    assert "not a position" in refused(tmp_path / "c.h5", "-t", "1,3", model=model, inputs=csv)


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores(tmp_path, net, csv):
    p = softmax(LOGITS)
    margin = LOGITS[:, 0] - np.delete(LOGITS, 0, 1).max(1)
    for score, value in {"logit": LOGITS[:, 0], "prob": p[:, 0], "logprob": np.log(p[:, 0]), "margin": margin}.items():
        run = tmp_path / f"{score}.h5"
        explain(run, "-t", "cat", "--score", score, model=net, inputs=csv, method="gradient")
        np.testing.assert_allclose(rows(run)["score"], value, rtol=1e-5)
        assert rows(run)["attributes"]["score"] == score
    expected = p[:, :1] * (WEIGHT[0] - p @ WEIGHT)
    np.testing.assert_allclose(rows(tmp_path / "prob.h5")["attribution"], expected, rtol=1e-4, atol=1e-9)
    message = refused(tmp_path / "x.h5", "--score", "logits", model=net, inputs=csv)
    assert "did you mean 'logit'" in message
    assert "margin" in message


class Headed(torch.nn.Module):
    def __init__(self, weight, bias, head):
        super().__init__()
        self.linear = torch.nn.Linear(weight.shape[1], len(weight))
        self.linear.weight.data = torch.tensor(weight, dtype=torch.float32)
        self.linear.bias.data = torch.tensor(bias, dtype=torch.float32)
        self.softmax = head == "Softmax"

    def forward(self, x):
        z = self.linear(x)
        return torch.softmax(z, 1) if self.softmax else torch.sigmoid(z)


@pytest.mark.parametrize("kind", ["onnx", "pt"])
def test_a_final_softmax_is_stepped_over(tmp_path, csv, out, kind):
    if kind == "pt":
        model = scripted(tmp_path / "net.pt", Headed(WEIGHT, BIAS, "Softmax"))
    else:
        model = linear(tmp_path / "net.onnx", WEIGHT, BIAS, "Softmax")
    explain(out, "-t", "1", model=model, inputs=csv, method="gradient")
    found = rows(out)
    np.testing.assert_allclose(found["attribution"], np.tile(WEIGHT[1], (3, 1)))
    np.testing.assert_allclose(found["score"], LOGITS[:, 1], rtol=1e-5)
    np.testing.assert_allclose(found["prediction"], softmax(LOGITS), rtol=1e-5)


@pytest.mark.parametrize("kind", ["onnx", "pt"])
def test_one_sigmoid_output_has_two_classes(tmp_path, csv, kind):
    logit = LOGITS[:, 0]
    assert (logit > 0).tolist() == [False, True, False]
    if kind == "pt":
        model = scripted(tmp_path / "net.pt", Headed(WEIGHT[:1], BIAS[:1], "Sigmoid"))
    else:
        model = linear(tmp_path / "net.onnx", WEIGHT[:1], BIAS[:1], "Sigmoid")
    for target, classes in {"predicted": [0, 1, 0], "1": [1, 1, 1], "0": [0, 0, 0]}.items():
        run, sign = tmp_path / f"{target}.h5", 2 * np.array(classes) - 1
        explain(run, "-t", target, model=model, inputs=csv, method="gradient")
        found = rows(run)
        assert found["target"].tolist() == classes
        np.testing.assert_allclose(found["attribution"], sign[:, None] * WEIGHT[0])
        np.testing.assert_allclose(found["score"], sign * logit, rtol=1e-5)
        np.testing.assert_allclose(found["prediction"][:, 0], sigmoid(logit), rtol=1e-5)
    explain(tmp_path / "p.h5", "-t", "0", "--score", "prob", model=model, inputs=csv, method="gradient")
    np.testing.assert_allclose(rows(tmp_path / "p.h5")["score"], 1 - sigmoid(logit), rtol=1e-4)
    assert "out of range" in refused(tmp_path / "x.h5", "-t", "2", model=model, inputs=csv)
    assert "two classes" in refused(tmp_path / "x.h5", "--score", "margin", model=model, inputs=csv)


# -- baselines -----------------------------------------------------------------------------------------------------


def test_baselines_live_in_raw_input_space(tmp_path):
    """Integrated gradients of a linear model: W (x - x'), both after mean and std."""
    text = SIDECAR.replace("28, 28", "2, 2")
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)]
    weight = np.array([[1, -2, 3, 4]], np.float32)
    model = onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 1, 2, 2]}, {"z": ["N", 1]}, {"w": weight}, text)
    pixels = np.array([[10, 20], [30, 200]])
    picture = image(tmp_path / "in/a.png", pixels)
    image(tmp_path / "base.png", [[1, 2], [3, 4]])
    bases = {"white": 255, "grey": 127.5, "mean": 65, "black": 0, None: 0, tmp_path / "base.png": [[1, 2], [3, 4]]}
    for number, (name, value) in enumerate(bases.items()):
        run = tmp_path / f"{number}.h5"
        arguments = ("-b", name) if name else ()
        explain(run, *arguments, "-t", "0", model=model, inputs=picture, method="integrated_gradients")
        found, base = rows(run), np.broadcast_to(value, (2, 2))
        difference = (pixels - base) / 255 / 0.3530
        np.testing.assert_allclose(found["attribution"][0, 0], weight.reshape(2, 2) * difference, rtol=1e-4, atol=1e-5)
        score = (((base / 255 - 0.2860) / 0.3530) * weight.reshape(2, 2)).sum()
        np.testing.assert_allclose(found["baseline_score"], score, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["completeness_delta"], 0, atol=1e-4)
    named = json.loads(rows(tmp_path / "5.h5")["attributes"]["files"])
    assert len(named["baseline"]) == 64


def test_a_set_of_baselines_gives_the_mean(tmp_path):
    options = ("--limit", 3, "-o", "steps=5")
    found = []
    for number, path in enumerate(images(tmp_path / "set", 2)):
        explain(tmp_path / f"{number}.h5", *options, "-b", path, method="integrated_gradients")
        found.append(rows(tmp_path / f"{number}.h5"))
    explain(tmp_path / "set.h5", *options, "-b", tmp_path / "set", method="integrated_gradients")
    made = rows(tmp_path / "set.h5")
    for name in ("attribution", "baseline_score", "completeness_delta"):
        np.testing.assert_allclose(made[name], (found[0][name] + found[1][name]) / 2, atol=5e-6)
    assert json.loads(made["attributes"]["baseline"]) == {"name": "file", "count": 2}
    assert len(json.loads(made["attributes"]["files"])["baseline"]) == 64


def test_a_baseline_that_cannot_be(tmp_path, out):
    message = refused(out, "-b", "blakc", method="integrated_gradients")
    assert "did you mean 'black'" in message
    assert "a file" in message
    (tmp_path / "broken.png").write_bytes(b"no image")
    message = refused(out, "-b", tmp_path / "broken.png", method="occlusion")
    assert "--baseline" in message
    assert "broken.png" in message
    message = refused(out, "-b", "black", method="saliency")
    assert "saliency uses no baseline" in message


# -- several inputs and outputs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """y = a . u + b . v, z = a . (u v), with an integer input n that counts v twice."""
    nodes = [
        helper.make_node("Mul", ["a", "u"], ["au"]),
        helper.make_node("Mul", ["b", "v"], ["bv"]),
        helper.make_node("Add", ["au", "bv"], ["s"]),
        helper.make_node("Cast", ["n"], ["nf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "nf"], ["y"]),
        helper.make_node("Mul", ["a", "v"], ["z"]),
    ]
    inputs = {"a": ["N", 2], "b": ["N", 2], "n": (["N", 2], TensorProto.INT64)}
    weights = {"u": np.float32([1, 2]), "v": np.float32([3, 5])}
    path = tmp_path_factory.mktemp("pair") / "pair.onnx"
    return onnx_file(path, nodes, inputs, {"y": ["N", 2], "z": ["N", 2]}, weights)


def test_several_inputs_and_outputs_must_be_chosen(tmp_path, pair, out):
    data = table(tmp_path / "x.csv", [[1, 2]])
    done = refused(out, model=pair, inputs=data)
    assert all(word in done for word in ("--input", "a Nx2 float32", "b Nx2 float32", "n Nx2 int64")), done
    assert "--fix b=FILE|zero" in refused(out, "--input", "a", model=pair, inputs=data)
    assert "--fix b=FILE|zero" in refused(out, "--input", "a", "--fix", "n=zero", model=pair, inputs=data)
    chosen = ("--input", "a", "--fix", "b=zero", "--fix", "n=zero")
    assert all(word in refused(out, *chosen, model=pair, inputs=data) for word in ("--output", "y [2]", "z [2]"))
    message = refused(out, *chosen, "--output", "x", model=pair, inputs=data)
    assert "no output 'x'" in message
    assert "y, z" in message
    assert "c" in refused(out, *chosen, "--fix", "c=zero", "--output", "y", model=pair, inputs=data)
    assert "no input 'c'" in refused(out, "--input", "c", model=pair, inputs=data)
    assert "NAME=VALUE" in refused(out, "--fix", "b", model=pair, inputs=data)
    assert "missing.npy" in refused(out, "--input", "a", "--fix", "b=missing.npy", model=pair, inputs=data)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_fixed_inputs(tmp_path, pair, out, precision):
    data = table(tmp_path / "x.csv", [[1, 2], [3, -1]])
    np.save(tmp_path / "b.npy", np.array([10.0, 20.0]))
    np.save(tmp_path / "n.npy", np.array([2, 7]))
    fixed = ("--fix", f"b={tmp_path / 'b.npy'}", "--fix", f"n={tmp_path / 'n.npy'}", "--precision", precision)
    explain(out, "--input", "a", *fixed, "--output", "y", "-t", "1", model=pair, inputs=data, method="gradient")
    found = rows(out)
    np.testing.assert_allclose(found["attribution"], [[0, 14], [0, 14]])
    np.testing.assert_allclose(found["score"], [7 * (2 * 2 + 100), 7 * (-2 + 100)])
    assert found["score"].dtype == ("f4" if precision == "float32" else "f8")
    assert set(json.loads(found["attributes"]["files"])) == {"fix b", "fix n"}
    explain(tmp_path / "z.h5", "--input", "a", *fixed, "--output", "z", "-t", "0", model=pair, inputs=data)
    np.testing.assert_allclose(rows(tmp_path / "z.h5")["attribution"], [[3, 0], [3, 0]])
    np.savez(tmp_path / "two.npz", p=np.zeros(2), q=np.zeros(2))
    message = refused(
        tmp_path / "w.h5",
        "--input",
        "a",
        "--fix",
        f"b={tmp_path / 'two.npz'}",
        "--fix",
        "n=zero",
        model=pair,
        inputs=data,
    )
    assert "holds 2 arrays" in message


def test_an_integer_input_is_explained_at_a_node(tmp_path, out):
    """Token ids through an embedding, summed: the attribution lies on the embedding."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("ReduceSum", ["e", "axis"], ["z"], keepdims=0),
    ]
    embedding = np.arange(10, dtype=np.float32).reshape(5, 2)
    weights = {"table": embedding, "axis": np.array([1])}
    sidecar = '[input]\nkind = "array"\nsize = [3]\ndtype = "int64"\n'
    inputs = {"ids": (["N", 3], TensorProto.INT64)}
    model = onnx_file(tmp_path / "e.onnx", nodes, inputs, {"z": ["N", 2]}, weights, sidecar)
    np.save(tmp_path / "ids.npy", np.array([[0, 1, 4], [2, 2, 3]]))
    message = refused(out, model=model, inputs=tmp_path / "ids.npy", method="gradient")
    assert "--at NODE" in message
    assert "int64" in message
    nodes = json.loads(attrcli("inspect", model, "--json").out)["nodes"]
    arguments = ("--at", nodes[0], "-t", "1")
    explain(out, *arguments, model=model, inputs=tmp_path / "ids.npy", method="input_x_gradient")
    ids = np.array([[0, 1, 4], [2, 2, 3]])
    expected = embedding[ids] * [0, 1]
    np.testing.assert_allclose(rows(out)["attribution"], expected)
    message = refused(tmp_path / "x.h5", "--at", "gahter", model=model, inputs=tmp_path / "ids.npy")
    assert "gahter" in message


# -- options of the run --------------------------------------------------------------------------------------------


def test_a_method_option_is_converted_recorded_and_checked(out):
    explain(out, "-o", "samples=4", "-o", "noise=0.1", "-o", "reduce=squared", method="smoothgrad")
    assert json.loads(rows(out)["attributes"]["options"]) == {"samples": 4, "noise": 0.1, "reduce": "squared"}


def test_limit_takes_the_first_of_the_sorted_inputs(tmp_path, out):
    explain(out, "--limit", "7", inputs=TEST)
    explain(tmp_path / "all.h5", inputs=TEST)
    assert rows(out)["sample_id"] == rows(tmp_path / "all.h5")["sample_id"][:7]
    assert "--limit 0" in refused(tmp_path / "x.h5", "--limit", "0")


def test_a_dry_run_tells_and_writes_nothing(tmp_path, out):
    arguments = ("--dry-run", "--json", "--overlays", tmp_path / "pictures", "-o", "steps=20", "--batch-size", "4")
    told = json.loads(explain(out, *arguments, method="integrated_gradients").out)
    assert told["files"] == told["inputs"] == 6
    assert told["input_shape"] == told["attribution_shape"] == [1, 28, 28]
    assert told["output_shape"] == [10]
    assert told["batch_size"] == 4
    assert told["forward"] == told["backward"] == 6 * 20
    assert told["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    explain(out, method="integrated_gradients")
    with h5py.File(out) as run:
        stored = sum(run[name].size * run[name].dtype.itemsize for name in run if not run[name].is_scale)
    assert told["file_bytes"] == stored
    assert "files:" in explain(tmp_path / "b.h5", "--dry-run").out


def test_print_config_round_trips(tmp_path, out):
    given = ("-o", "steps=12", "-o", "rule=trapezoid", "-t", "3", "--score", "prob", "-b", "white", "--seed", "5")
    given += ("--batch-size", "5", "--limit", "4", "--max-errors", "50%", "--panel", "--scale", "run")
    printed = explain(out, *given, "--print-config", method="integrated_gradients").out
    assert not out.exists()
    values = tomllib.loads(printed)
    assert values["options"] == {"steps": 12, "rule": "trapezoid", "tolerance": 0.01, "max_steps": 1600}
    assert values["batch_size"] == 5
    assert values["score"] == "prob"
    file = tmp_path / "run.toml"
    for mark in ("\ufeff", ""):
        file.write_text(mark + printed, encoding="utf-8")
        assert attrcli("explain", "--config", file, "--print-config").out == printed
    assert attrcli("explain", "--config", file).code == 0
    explain(tmp_path / "b.h5", *given, method="integrated_gradients")
    assert_same_rows(out, tmp_path / "b.h5")
    assert set(values) | {
        "background",
        "length",
        "preprocess",
        "labels",
        "input",
        "fix",
        "output",
        "at",
        "threads",
        "overlays",
    } == {field.name for field in fields(Config)}


def test_a_flag_goes_before_the_config_file_and_that_before_the_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{MLP}"\ninputs = ["{TEST}/Bag"]\nmethod = "smoothgrad"\nout = "{tmp_path}/a.h5"\n'
        "seed = 3\nlimit = 2\n[options]\nsamples = 4\nnoise = 0.2\n"
    )
    assert attrcli("explain", "--config", file, "--limit", "3", "-o", "samples=6", "-q").code == 0
    found = rows(tmp_path / "a.h5")
    assert len(found["status"]) == 3
    assert found["attributes"]["seed"] == 3
    assert json.loads(found["attributes"]["options"]) == {"samples": 6, "noise": 0.2, "reduce": "mean"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sede = 3", ["run.toml: ", "unknown key 'sede'", "did you mean 'seed'"]),
        ("seed = 1.5", ["run.toml: ", "seed = 1.5", "a whole number"]),
        ("seed = true", ["run.toml: ", "seed = True"]),
        ('limit = "3"', ["run.toml: ", "limit = '3'"]),
        ("inputs = [1]", ["run.toml: ", "inputs = [1]", "a list of texts"]),
        ('inputs = "x"', ["run.toml: ", "inputs = 'x'"]),
        ("force = 1", ["run.toml: ", "true or false"]),
        ("seed = ", ["run.toml: ", "is not TOML"]),
        ("[options]\nsampels = 4", ["sampels", "did you mean 'samples'"]),
        ('batch_size = "many"', ["--batch-size many", "auto"]),
        ('max_errors = "few"', ["--max-errors few"]),
    ],
)
def test_a_wrong_config_file_is_refused_naming_file_and_key(tmp_path, out, text, words):
    file = tmp_path / "run.toml"
    file.write_text(text)
    message = refused(out, "--config", file, method="smoothgrad")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--batch-size", "0"),
        ("--batch-size", "many"),
        ("--threads", "0"),
        ("--limit", "-3"),
        ("--scale", "images"),
        ("--precision", "float16"),
        ("--device", "tpu"),
        ("--max-errors", "1.5"),
        ("--max-errors", "-1"),
        ("--max-errors", "101%"),
        ("--seed", "-1"),
        ("-o", "samples"),
        ("--config", "missing.toml"),
    ],
    ids=" ".join,
)
def test_options_that_cannot_be(out, arguments):
    assert arguments[-1] in refused(out, *arguments, method="smoothgrad")


def test_a_name_that_no_disk_takes(tmp_path):
    assert "the name is too long" in explain(tmp_path / f"{'n' * 250}.h5", code=2).err


def test_what_is_missing_is_named(tmp_path, out):
    assert "MODEL" in attrcli("explain").err
    assert "INPUTS" in attrcli("explain", MLP).err
    assert "--method" in attrcli("explain", MLP, TEST).err
    assert "--out" in attrcli("explain", MLP, TEST, "-m", "saliency").err
    assert attrcli("explain", "--unknown").code == 2


# -- what is printed -----------------------------------------------------------------------------------------------


def test_stdout_is_parseable_and_stderr_silent_without_a_terminal(tmp_path, out):
    done = explain(out, "--json", "--overlays", tmp_path / "ov", inputs=TEST, method="integrated_gradients")
    told = json.loads(done.out)
    assert done.err == ""
    assert (told["rows"], told["ok"], told["errors"], told["computed"], told["kept"]) == (60, 60, 0, 60, 0)
    assert told["labelled"] == 60
    assert 0.8 < told["accuracy"] <= 1
    assert 0 <= told["gap_median"] <= told["gap_max"] < 0.1
    assert told["overlays"] == 60
    lines = explain(tmp_path / "b.h5", "-q").out.splitlines()
    names = {"run_file", "rows", "ok", "errors", "computed", "kept", "accuracy"}
    assert {line.partition(":")[0] for line in lines} == names


def on_a_terminal(*arguments):
    """What a command writes to stderr when that is a terminal, and to stdout, which is not."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "attrcli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"}) as child:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # the other side is closed
            pass
        stdout = child.stdout.read().decode()
    os.close(ours)
    assert child.returncode == 0
    return shown.decode(), stdout


def test_progress_is_on_stderr_only(out):
    shown, stdout = on_a_terminal("explain", MLP, TEST / "Bag", "-m", "saliency", "--out", out)
    assert "explain" in shown
    assert "6/6" in shown
    assert stdout.startswith("run_file:")
    assert "\x1b" not in stdout
    assert on_a_terminal("explain", MLP, TEST / "Bag", "-m", "saliency", "--out", out, "-q")[0] == ""


def test_names_cannot_steer_the_terminal(tmp_path):
    folder = tmp_path / "in"
    image(folder / "good.png", np.zeros((28, 28)))
    (folder / "\x1b[31mred\x07\nattrcli: forged.png").write_bytes(b"no image")
    done = explain(tmp_path / "run.h5", inputs=folder, code=3)
    assert "\x1b" not in done.err + done.out
    assert "\x07" not in done.err
    assert "\\x1b[31mred" in done.err
    assert not any(line.startswith("attrcli: forged") for line in done.err.splitlines())
    told = attrcli("inspect", tmp_path / "run.h5")
    assert "\x1b" not in told.out


# -- accuracy ------------------------------------------------------------------------------------------------------


def test_an_accuracy_near_chance_is_told(tmp_path, out):
    scrambled = tmp_path / "scrambled.toml"
    scrambled.write_text(
        SIDECAR.replace("range = [0.0, 1.0]", "range = [1.0, 0.0]") + f'labels = "{SAMPLES}/labels.txt"\n'
    )
    done = explain(out, "-p", scrambled, inputs=TEST, model=CNN)
    assert "about what guessing gives" in done.err
    assert "preprocessing" in done.err
    done = explain(tmp_path / "right.h5", inputs=TEST, model=CNN)
    assert done.err == ""
    assert "accuracy: 5" in done.out


# -- results do not depend on how the work is cut ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad", "occlusion"])
def test_batch_size_order_and_subset_do_not_change_results(tmp_path, method):
    folder, options = (
        tmp_path / "in",
        {"smoothgrad": "samples=8", "integrated_gradients": "steps=10", "occlusion": "patch=7"},
    )
    images(folder, 16)
    whole = tmp_path / "64.h5"
    for size in (64, 1, 7):
        run = tmp_path / f"{size}.h5"
        explain(run, "--batch-size", size, "-o", options[method], inputs=folder, method=method)
        largest = np.abs(rows(whole)["attribution"]).max()
        assert_same_rows(whole, run, rtol=1e-4, atol=1e-5 * largest)
        assert rows(run)["attributes"]["batch_size"] == size
    few = [folder / f"{i:03d}.png" for i in (11, 3, 4)]
    explain(tmp_path / "few.h5", "-o", options[method], inputs=few, method=method)
    assert_same_rows(tmp_path / "few.h5", whole, rows(tmp_path / "few.h5")["sample_id"], rtol=1e-4, atol=1e-5 * largest)


def test_the_seed_decides_what_is_drawn(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        explain(tmp_path / f"{name}.h5", "--seed", seed, "-o", "samples=4", method="smoothgrad")
    a, b, c = (rows(tmp_path / f"{name}.h5")["attribution"] for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_the_three_formats_agree(tmp_path):
    runs = []
    for suffix in ("pt", "onnx", "pt2"):
        runs.append(tmp_path / f"{suffix}.h5")
        explain(runs[-1], "-o", "steps=8", model=SAMPLES / f"fashion_cnn.{suffix}", method="integrated_gradients")
    largest = np.abs(rows(runs[0])["attribution"]).max()
    for run in runs[1:]:
        assert_same_rows(runs[0], run, rtol=1e-4, atol=1e-5 * largest)


def test_folders_are_followed_through_links(tmp_path, out):
    (tmp_path / "train").symlink_to(TRAIN / "Bag")
    explain(out, "--limit", "3", inputs=tmp_path)
    assert rows(out)["status"].tolist() == [1, 1, 1]
