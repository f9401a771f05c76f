"""The verb `explain` as Python calls it: what a run file holds, and what is not done twice."""

import json
import shutil
import threading
import warnings

import h5py
import numpy as np
import onnx
import pytest
from cli_runs import CNN, MLP, SAMPLES, TEST, TRAIN, assert_same_rows, image, images, linear, rows, table
from scipy.stats import rankdata

from attrcli import data
from attrcli.config import Config
from attrcli.errors import AttrcliWarning
from attrcli.explain import Plan, explain
from attrcli.methods.integrated_gradients import IntegratedGradients
from attrcli.store import RunFile, RunWriter, Status

IG = {"model": str(CNN), "method": "integrated_gradients", "options": {"steps": 10}}


def run(out, **options):
    """Explain; by default integrated gradients of six images on the sample CNN."""
    values = IG | {"inputs": (str(TEST / "Bag"),), "out": str(out)} | options
    return explain(Plan(Config(**{key: value for key, value in values.items() if value is not None})))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over a folder with one file that is no image."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(TEST / "Bag", folder / "in" / "Bag")
    shutil.copytree(TEST / "Coat", folder / "in" / "Coat")
    (folder / "in" / "Bag" / "broken.png").write_bytes(b"no image")
    summary = run(folder / "run.h5", inputs=(str(folder / "in"),), seed=3)
    return folder / "run.h5", summary


def test_three_lines_of_python(tmp_path, capfd):
    plan = Plan(Config(model=str(MLP), inputs=(str(TEST),), method="saliency", out=str(tmp_path / "run.h5")))
    summary = explain(plan)
    assert (summary.rows, summary.ok, summary.computed, summary.errors) == (60, 60, 60, [])
    assert summary.accuracy[1] == 60
    assert capfd.readouterr() == ("", "")  # a verb prints nothing


def test_the_datasets_of_a_run_file(finished):
    path, summary = finished
    found, labels = rows(path), (SAMPLES / "labels.txt").read_text().split("\n")
    n = len(found["sample_id"])
    assert n == 13
    shapes = {name: (values.shape, values.dtype.str[1:]) for name, values in found.items() if hasattr(values, "shape")}
    assert shapes == {
        "attribution": ((n, 1, 28, 28), "f4"),
        "prediction": ((n, 10), "f4"),
        "label": ((n,), "u2"),
        "target": ((n,), "i4"),
        **dict.fromkeys(("score", "baseline_score", "completeness_delta", "remainder"), ((n,), "f4")),
        "status": ((n,), "u1"),
    }
    assert found["sample_id"] == sorted(found["sample_id"])
    good = found["status"] == Status.OK
    bad = found["sample_id"].index("Bag/broken.png")
    assert np.flatnonzero(~good).tolist() == [bad]
    assert found["status"][bad] == Status.ERROR
    assert "not an image" in found["message"][bad]
    for name in ("attribution", "prediction", "score", "baseline_score", "completeness_delta"):
        assert np.isnan(found[name][bad]).all()
        assert np.isfinite(found[name][good]).all()
    assert np.isnan(found["remainder"]).all()
    assert found["label"].tolist() == [labels.index(name.split("/")[0]) for name in found["sample_id"]]
    np.testing.assert_array_equal(found["target"][good], found["prediction"][good].argmax(1))
    np.testing.assert_allclose(found["score"][good], found["prediction"][good].max(1), rtol=1e-5)
    for row in np.flatnonzero(good):
        assert found["sample_sha256"][row] == data.sha256_of(path.parent / "in" / found["sample_id"][row])
    assert [name for name, _ in summary.errors] == ["Bag/broken.png"]


def test_the_completeness_delta_is_the_sum_less_the_difference_of_the_scores(finished):
    found = rows(finished[0])
    good = found["status"] == Status.OK
    total = found["attribution"][good].astype(np.float64).sum((1, 2, 3))
    delta = total - (found["score"] - found["baseline_score"])[good]
    np.testing.assert_allclose(found["completeness_delta"][good], delta, atol=1e-4)
    with RunFile(finished[0]) as run_file:
        gaps = run_file.gaps()
    size = np.abs(found["attribution"][good]).sum((1, 2, 3))
    np.testing.assert_allclose(gaps[good], np.abs(found["completeness_delta"][good]) / size, rtol=1e-5)
    assert np.isnan(gaps[~good]).all()
    np.testing.assert_array_equal(sorted(finished[1].gaps), sorted(gaps[good]))


def test_the_attributes_of_a_run_file(finished):
    path, _ = finished
    with RunFile(path) as run_file:
        told = run_file.attributes
    assert told["schema"] == "attrcli/1"
    assert told["complete"] is True
    assert told["method"] == "integrated_gradients"
    assert told["options"] == {"steps": 10, "rule": "gausslegendre", "tolerance": 0.01, "max_steps": 1600}
    assert told["preprocess"]["input"]["size"] == [28, 28]
    assert told["preprocess"]["output"]["labels"][1] == "Trouser"
    assert (told["target"], told["score"], told["baseline"]) == ("predicted", "logit", {"name": "black", "count": 1})
    assert told["inputs_root"] == str(path.parent / "in")
    assert told["model_sha256"] == data.sha256_of(CNN)
    assert (told["model_format"], told["seed"], told["device"], told["precision"]) == ("onnx", 3, "cpu", "float32")
    assert told["files"] == {}
    assert told["batch_size"] >= 1
    assert told["threads"] >= 1
    assert set(told["versions"]) == {"attrcli", "python", "torch", "onnx", "onnxruntime", "numpy", "h5py", "pillow"}
    assert isinstance(told["argv"], list)


def test_a_method_without_a_baseline_leaves_its_columns_empty(tmp_path):
    summary = run(tmp_path / "run.h5", method="gradient", options={})
    found = rows(tmp_path / "run.h5")
    assert np.isnan(found["baseline_score"]).all()
    assert np.isnan(found["completeness_delta"]).all()
    assert summary.gaps == []
    assert found["attributes"]["baseline"] == "null"


@pytest.mark.parametrize("suffix", ["pt", "onnx"])
def test_an_input_that_is_the_baseline_has_no_gap(tmp_path, suffix):
    """Its score is that of the baseline, whatever the rounding of batches of two sizes."""
    images(tmp_path / "in", 7)
    image(tmp_path / "in/black.png", np.zeros((28, 28)))
    summary = run(tmp_path / "run.h5", model=str(SAMPLES / f"fashion_cnn.{suffix}"), inputs=(str(tmp_path / "in"),))
    found = rows(tmp_path / "run.h5")
    row = found["sample_id"].index("black.png")
    assert not found["attribution"][row].any()
    assert found["completeness_delta"][row] == 0
    assert found["baseline_score"][row] == found["score"][row]
    assert summary.gaps[row] == 0
    assert np.isfinite(summary.gaps).all()


def test_a_warning_of_many_batches_is_shown_once(tmp_path):
    given = {"options": {"steps": "auto", "max_steps": 25, "tolerance": 1e-9}, "batch_size": 2}
    with pytest.warns(AttrcliWarning) as caught:
        run(tmp_path / "run.h5", **given)
    [text] = [str(each.message) for each in caught]
    assert text.startswith("integrated_gradients: 2 of 2 samples still miss the tolerance")
    assert text.endswith("(and likewise in 2 more batches)")
    with pytest.warns(AttrcliWarning) as caught:
        run(tmp_path / "one.h5", **given | {"batch_size": 6})
    assert "likewise" not in str(caught[0].message)


def test_warnings_are_shown_for_a_run_that_stops_too(tmp_path, monkeypatch):
    def stopping(self, model, inputs, target, baseline):
        for text in ("odd", "strange"):
            warnings.warn(text, AttrcliWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(IntegratedGradients, "attribute", stopping)
    with pytest.warns(AttrcliWarning) as caught, pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run.h5")
    assert [str(each.message) for each in caught] == ["odd", "strange"]


def test_float64_is_stored_as_float64(tmp_path):
    run(tmp_path / "run.h5", precision="float64", options={"steps": 40})
    found = rows(tmp_path / "run.h5")
    assert found["attribution"].dtype == found["score"].dtype == np.float64
    total = found["attribution"].sum((1, 2, 3)) - (found["score"] - found["baseline_score"])
    np.testing.assert_allclose(found["completeness_delta"], total, atol=1e-12)


def test_nothing_is_read_twice(tmp_path, monkeypatch):
    read = []
    original = data.read
    monkeypatch.setattr(
        data, "read", lambda record, *given, **named: (read.append(record.id), original(record, *given, **named))[1]
    )
    run(tmp_path / "a.h5", batch_size=4)
    assert sorted(read) == sorted(path.name for path in (TEST / "Bag").iterdir())
    read.clear()
    model = linear(tmp_path / "net.onnx", np.eye(3))
    rows_ = table(tmp_path / "rows.csv", np.ones((5, 3)))
    run(tmp_path / "b.h5", model=str(model), inputs=(str(rows_),), method="gradient", options={})
    assert len(read) == 5


def test_reading_and_writing_run_beside_the_computation(tmp_path, monkeypatch):
    plan = Plan(Config(**IG, inputs=(str(TEST),), out=str(tmp_path / "run.h5"), batch_size=16))
    threads = {"read": set(), "write": set()}
    original, put = data.read, RunWriter.write
    monkeypatch.setattr(
        data, "read", lambda *given, **named: (threads["read"].add(threading.get_ident()), original(*given, **named))[1]
    )
    monkeypatch.setattr(
        RunWriter,
        "write",
        lambda *given, **named: (threads["write"].add(threading.get_ident()), put(*given, **named))[1],
    )
    seen = []
    explain(plan, lambda stage, done, total: seen.append((stage, done, total)))
    assert {("explain", done, 60) for done in (16, 32, 48, 60)} <= set(seen)
    assert seen == sorted(seen)
    assert len(seen) > 8  # within batches, too
    assert len(threads["read"]) == len(threads["write"]) == 1
    assert threading.get_ident() not in threads["read"] | threads["write"]
    assert threads["read"].isdisjoint(threads["write"])


def test_the_rest_of_a_batch_has_the_same_numbers_whatever_one_input_does(tmp_path):
    """An input that cannot be read keeps its place: mending it later gives the file of an undisturbed run."""
    folder = tmp_path / "in"
    paths = images(folder, 10)
    run(tmp_path / "clean.h5", inputs=(str(folder),), batch_size=8)
    kept = paths[3].read_bytes()
    paths[3].write_bytes(b"no image")
    assert len(run(tmp_path / "run.h5", inputs=(str(folder),), batch_size=8).errors) == 1
    paths[3].write_bytes(kept)
    summary = run(tmp_path / "run.h5", inputs=(str(folder),), batch_size=8)
    assert (summary.computed, summary.resumed, summary.errors) == (1, 9, [])
    assert_same_rows(tmp_path / "clean.h5", tmp_path / "run.h5")


def test_an_unreadable_input_is_not_paid_for_again(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    images(folder, 5)[2].write_bytes(b"no image")
    run(tmp_path / "run.h5", inputs=(str(folder),))
    monkeypatch.setattr(IntegratedGradients, "attribute", None)  # would fail if it were called
    summary = run(tmp_path / "run.h5", inputs=(str(folder),))
    assert [name for name, _ in summary.errors] == ["002.png"]
    assert rows(tmp_path / "run.h5")["status"].tolist() == [1, 1, 2, 1, 1]


def test_attribution_at_a_node(tmp_path):
    """Integrated gradients at a layer add up to the same difference of scores."""
    plan = Plan(Config(**IG, inputs=(str(TEST / "Bag"),), out=str(tmp_path / "x.h5")))
    nodes = [node for node in plan.model.engine(plan.shape).graph.graph.nodes if "max_pool" in node.name]
    run(tmp_path / "run.h5", at=nodes[0].name, options={"steps": 50})
    found = rows(tmp_path / "run.h5")
    assert found["attribution"].ndim == 4
    assert found["attribution"].shape[2] < 28
    total = found["attribution"].astype(np.float64).sum((1, 2, 3))
    np.testing.assert_allclose(total, found["score"] - found["baseline_score"], rtol=0.05)
    assert found["attributes"]["at"] == nodes[0].name
    run(tmp_path / "plain.h5")
    np.testing.assert_allclose(found["score"], rows(tmp_path / "plain.h5")["score"], rtol=1e-5)


def test_the_parts_of_the_grid_are_cut_by_the_batch_size(tmp_path, monkeypatch):
    sizes = []
    original = IntegratedGradients.attribute

    def counted(self, model, inputs, target, baseline):
        sizes.append(len(inputs))
        return original(self, model, inputs, target, baseline)

    monkeypatch.setattr(IntegratedGradients, "attribute", counted)
    run(tmp_path / "run.h5", inputs=(str(TRAIN / "Bag"),), limit=20, batch_size=8)
    assert sizes == [8, 8, 4]


def test_a_file_with_a_frozen_batch_still_works(tmp_path):
    """The sample CNN saved for a batch of exactly one: the same numbers, one by one, and said so."""
    model = onnx.load(CNN)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    shutil.copy(SAMPLES / "fashion_cnn.toml", tmp_path / "one.toml")
    shutil.copy(SAMPLES / "labels.txt", tmp_path)
    with pytest.warns(AttrcliWarning, match="frozen at 1"):
        run(tmp_path / "one.h5", model=str(tmp_path / "one.onnx"))
    run(tmp_path / "free.h5")
    assert_same_rows(tmp_path / "one.h5", tmp_path / "free.h5", rtol=1e-3, atol=1e-4)


def test_netcdf_readers_find_named_dimensions(finished):
    with h5py.File(finished[0]) as file:
        assert [dim.label for dim in file["attribution"].dims] == ["sample", "channel", "y", "x"]
        assert json.loads(file["prediction"].attrs["shape"]) == [10]


def test_bfloat16_tells_what_it_costs(tmp_path):
    """Spearman's correlation of its attributions with those of float32, from two run files, is what the run says."""
    runs = {}
    for precision in ("float32", "bf16"):
        given = {**IG, "inputs": (str(TEST),), "limit": 4, "out": str(tmp_path / f"{precision}.h5")}
        runs[precision] = explain(Plan(Config(**given, precision=precision)))
    assert runs["float32"].rank_correlation is None
    with RunFile(runs["float32"].out) as exact, RunFile(runs["bf16"].out) as coarse:
        ranks = [rankdata(run["attribution"][:].reshape(4, -1), axis=1) for run in (exact, coarse)]
    expected = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(*ranks, strict=True)])
    assert 0.9 < expected < 1
    assert runs["bf16"].rank_correlation == pytest.approx(expected, abs=1e-3)
