import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_runs import ATTRIBUTES, LAYOUT, batch, begin, fill, leftovers, make, names, open_run, part_of, sha

from attrcli.errors import UsageError
from attrcli.store import Layout, RunFile, RunWriter, Status

FLOATS = ("attribution", "prediction", "score", "baseline_score", "completeness_delta", "remainder")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


# Round trip ----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(path):
    make(path, names(10))
    with RunFile(path) as run:
        expected = batch(names(10))
        assert run.ids == names(10)
        assert run.complete
        assert run.status.tolist() == [Status.OK] * 10
        assert run.messages == [""] * 10
        assert run.layout == LAYOUT
        assert len(run) == 10
        for name, values in expected.items():
            np.testing.assert_array_equal(run.read(name), values.astype(run.read(name).dtype))
        assert {key: run.attributes[key] for key in ATTRIBUTES} == ATTRIBUTES
        assert run.attributes["schema"] == "attrcli/1"
        assert run.attributes["history"] == []
    assert leftovers(path) == []


def test_datasets_have_the_documented_types(path):
    make(path, names(3))
    with h5py.File(path) as file:
        kinds = {name: file[name].dtype.str for name in file if name not in ("sample", "channel", "y", "x", "output")}
        assert kinds == {
            **dict.fromkeys(FLOATS, "<f4"),
            "label": "<u2",
            "target": "<i4",
            "sample_id": "|S18",
            "sample_sha256": "|S64",
            "status": "|u1",
            "message": "|S200",
        }
        assert h5py.check_string_dtype(file["sample_id"].dtype).encoding == "utf-8"
        assert bool(file.attrs["complete"])


def test_one_sample_is_one_compressed_chunk_and_small_rows_share_one(path):
    make(path, names(6), layout=Layout((1, 28, 28), (10,), ("channel", "y", "x")))
    with h5py.File(path) as file:
        assert file["attribution"].chunks == (1, 1, 28, 28)
        assert (file["attribution"].compression, file["attribution"].shuffle) == ("gzip", True)
        assert file["prediction"].chunks == (6, 10)


def test_axes_are_named_dimension_scales(path):
    make(path, names(3))
    with h5py.File(path) as file:
        assert [dim.label for dim in file["attribution"].dims] == ["sample", "channel", "y", "x"]
        assert [dim[0].name for dim in file["attribution"].dims] == ["/sample", "/channel", "/y", "/x"]
        assert [dim[0].name for dim in file["prediction"].dims] == ["/sample", "/output"]


@pytest.mark.parametrize("layout", [Layout((7,), (), ("feature",)), Layout((4, 11), (2, 3), ("base", "position"))])
def test_tables_sequences_and_outputs_of_any_rank(path, layout):
    make(path, names(3), layout=layout)
    with RunFile(path) as run:
        assert run.layout == layout
        assert run["prediction"].shape == (3, int(np.prod(layout.outputs)))
        np.testing.assert_array_equal(run.read("attribution"), batch(names(3), layout)["attribution"].astype("f4"))


def test_float64_is_kept(path):
    layout = replace(LAYOUT, dtype="f8")
    make(path, names(2), layout=layout)
    with RunFile(path) as run:
        for name in FLOATS:
            np.testing.assert_array_equal(run.read(name).ravel(), batch(names(2))[name].ravel())


@pytest.mark.parametrize("dims", [("channel", "y"), ("channel", "y", "y"), ("label", "y", "x"), ("sample", "y", "x")])
def test_a_layout_needs_one_new_name_for_each_axis(dims):
    with pytest.raises(ValueError, match="one new name for each axis"):
        Layout((3, 8, 9), (5,), dims)


@pytest.mark.parametrize(
    "value",
    [
        *(True, 3, -(2**70), 0.1, float("inf"), None, [1, "a", None], {"a": {"b": [1.5]}}, ["x" * 100_000]),
        *("text", "", "null", "5", '"quoted"', "[1", "{", "two\nlines", "é\udce9", "zero\0byte"),
    ],
)
def test_attributes_come_back_as_they_were(path, value):
    make(path, names(1), {**ATTRIBUTES, "options": value})
    with RunFile(path) as run:
        assert run.attributes["options"] == value
        assert type(run.attributes["options"]) is type(value)


def test_attributes_may_be_numpy_values_and_paths(path):
    given = {"seed": np.int64(3), "options": {"size": (2, np.float32(0.5)), "file": Path("/a/b")}}
    make(path, names(1), ATTRIBUTES | given)
    with RunFile(path) as run:
        assert run.attributes["seed"] == 3
        assert run.attributes["options"] == {"size": [2, 0.5], "file": "/a/b"}


def test_ids_that_are_not_utf8_survive(path):
    ids = ["plain", os.fsdecode(b"latin-\xe9.png"), "雪.png"]
    with open_run(path, ids) as writer:
        writer.write(slice(None), {"attribution": np.ones((3, 3, 8, 9))})
        writer.finish()
    with RunFile(path) as run:
        assert run.ids == ids


def test_rows_that_are_not_ok_hold_nan_and_their_message(path):
    with open_run(path, names(4)) as writer:
        states = [Status.OK, Status.ERROR, Status.SKIPPED, Status.OK]
        writer.write(slice(0, 4), batch(names(4)), states, ["", "é" * 101, "not now", "é" * 100])
        writer.finish()
    with RunFile(path) as run:
        assert run.status.tolist() == states
        assert run.messages == ["", "é" * 98 + "…", "not now", "é" * 100]  # at most 200 bytes
        for name in FLOATS:
            missing = np.isnan(run[name][...]).reshape(4, -1)
            assert missing.all(1).tolist() == [False, True, True, False]
            assert missing.any(1).tolist() == [False, True, True, False]
        assert run.read("sample_sha256")[1] == sha(names(4)[1])


def test_a_gap_is_relative_to_the_attribution_and_never_nan_where_there_is_one(path):
    values = np.zeros((5, 3, 8, 9))
    values[0, 0, 0, :2] = 3, -1
    with open_run(path, names(5)) as writer:
        delta = np.array([-1, 0, 0.5, np.nan, 2])
        status = [Status.OK] * 4 + [Status.ERROR]
        writer.write(slice(0, 5), {"attribution": values, "completeness_delta": delta}, status)
        writer.finish()
    with RunFile(path) as run:
        np.testing.assert_array_equal(run.gaps(), [0.25, 0, np.inf, np.nan, np.nan])


def test_columns_left_out_read_as_absent(path):
    with open_run(path, names(2)) as writer:
        writer.write(slice(0, 2), {"attribution": np.ones((2, 3, 8, 9))})
        writer.finish()
    with RunFile(path) as run:
        assert np.isnan(run.read("remainder")).all()
        assert run.read("label").tolist() == [65535, 65535]
        assert run.read("target").tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"attribution": np.ones((4, 3, 9, 8))}, "attribution has shape"),
        ({"score": np.ones(3)}, "score has shape"),
        ({"prediction": np.ones((4, 6))}, "prediction has shape"),
        ({"heat": np.ones(4)}, "heat"),
        ({"status": np.ones(4)}, "status"),
    ],
)
def test_columns_that_do_not_fit_are_refused_and_nothing_counts(path, columns, problem):
    with open_run(path) as writer:
        with pytest.raises(ValueError, match=problem):
            writer.write(slice(0, 4), columns)
        assert not writer.status.any()


def test_an_unfinished_run_cannot_be_finished(path):
    with open_run(path) as writer:
        fill(writer, limit=2)
        with pytest.raises(ValueError, match="2 rows are still to do"):
            writer.finish()


@pytest.mark.parametrize("ids", [[], ["a", "b", "a"]])
def test_ids_are_needed_and_unique(path, ids):
    with pytest.raises(ValueError, match="needs ids"):
        RunWriter.open(path, ids, LAYOUT, ATTRIBUTES)


# A run in progress ---------------------------------------------------------------------------------------------------


def test_a_part_can_be_read_while_it_is_written(path):
    with open_run(path) as writer:
        fill(writer, limit=2)
        with RunFile(part_of(path)) as run:
            assert not run.complete
            assert run.status.tolist() == [1] * 8 + [0] * 2
            np.testing.assert_array_equal(run.read("score")[:8], batch(names(8))["score"].astype("f4"))
            assert np.isnan(run.read("attribution")[8:]).all()


def test_a_batch_changes_data_bytes_only(path):
    with open_run(path) as writer:
        writer.prepare()
        before = part_of(path).read_bytes()
        fill(writer)
        after = part_of(path).read_bytes()
        with h5py.File(part_of(path), locking=False) as file:
            places = [(file[name].id.get_offset(), file[name].nbytes) for name in file]
    changed = np.flatnonzero(np.frombuffer(before, "u1") != np.frombuffer(after, "u1"))
    assert len(before) == len(after)
    assert all(any(start <= byte < start + size for start, size in places) for byte in changed)
    assert len(before) >= max(start + size for start, size in places)


def test_nothing_is_laid_out_before_the_first_write(path):
    with open_run(path) as writer:
        assert not part_of(path).exists()
        writer.prepare()
        assert part_of(path).stat().st_blocks * 512 >= 10 * 3 * 8 * 9 * 4


def test_a_row_that_is_written_again_never_counts_while_it_is_half_new(path, monkeypatch):
    begin(path, batches=3)
    pwrite = os.pwrite
    seen = []

    def spy(*arguments):
        with RunFile(part_of(path)) as run:
            seen.append(run.status[:2].tolist())
        return pwrite(*arguments)

    with open_run(path) as writer:
        writer.prepare()
        monkeypatch.setattr(os, "pwrite", spy)
        writer.write(slice(0, 2), batch(["x", "y"]))
    assert seen[0] == [1, 1]
    assert set(map(tuple, seen[1:])) == {(0, 0)}


def test_a_device_is_never_replaced():
    for force in (False, True):
        with pytest.raises(UsageError, match="device"):
            RunWriter.open("/dev/null", ["a"], Layout((2,), (3,), ("feature",)), {}, force=force)
