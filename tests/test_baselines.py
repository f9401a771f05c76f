"""Baselines: values in raw space, seeds by sample id, files and backgrounds, refusals."""

import re
from pathlib import Path

import numpy as np
import pytest

from attrcli.baselines import BASELINES, DEFAULTS, column_means, resolve
from attrcli.errors import InputError, UsageError

RAW = np.random.default_rng(0).uniform(0, 255, (20, 30, 3)).astype(np.float32)
ROWS = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])


def nothing(path):
    raise AssertionError("no file should be read")


def stored(*values):
    return [(f"{i}.npy", np.asarray(each)) for i, each in enumerate(values)]


def image_baseline(name, raw=RAW, sample_id="a", seed=0):
    return resolve(name, "image", load=nothing)(raw, sample_id, seed)[0]


@pytest.mark.parametrize(("name", "value"), [("black", 0), ("white", 255), ("grey", 127.5)])
def test_constants(name, value):
    np.testing.assert_array_equal(image_baseline(name), np.full((20, 30, 3), value, np.float32))


def test_mean_is_the_colour_of_this_image():
    raw = np.zeros((2, 2, 3), np.float32)
    raw[0, 0] = [4, 8, 12]
    np.testing.assert_array_equal(image_baseline("mean", raw), np.broadcast_to([1, 2, 3], (2, 2, 3)))


def test_blur_is_the_stated_gaussian():
    raw = np.zeros((41, 41, 1), np.float32)
    raw[20, 20] = 1000
    distance = np.arange(-8, 9)
    weights = np.exp(-(distance**2) / (2 * (0.05 * 41) ** 2))
    expected = 1000 * np.outer(weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(image_baseline("blur", raw)[12:29, 12:29, 0], expected, atol=1e-3)


def test_blur_stays_in_range_and_does_not_mix_channels():
    raw = RAW.copy()
    raw[:, :, 1] = 7
    blurred = image_baseline("blur", raw)
    np.testing.assert_allclose(blurred[:, :, 1], 7, rtol=1e-5)
    assert raw.min() <= blurred.min() <= blurred.max() <= raw.max()
    assert blurred[:, :, 0].std() < raw[:, :, 0].std() / 2


def test_noise_depends_on_id_and_seed_alone():
    first = image_baseline("noise", RAW, "a", 0)
    np.testing.assert_array_equal(first, image_baseline("noise", RAW * 0, "a", 0))
    assert not np.array_equal(first, image_baseline("noise", RAW, "b", 0))
    assert not np.array_equal(first, image_baseline("noise", RAW, "a", 1))
    assert first.min() >= 0
    assert first.max() <= 255
    assert abs(first.mean() - 127.5) < 10


@pytest.mark.parametrize("name", BASELINES)
def test_shape_dtype_and_input_are_kept(name):
    kind = BASELINES[name].kinds[0]
    before = RAW.copy()
    filled = resolve(name, kind, load=nothing)(RAW, "a", 0)[0]
    assert (filled.shape, filled.dtype) == (RAW.shape, RAW.dtype)
    np.testing.assert_array_equal(RAW, before)


@pytest.mark.parametrize("name", BASELINES)
def test_shared_means_that_the_input_does_not_matter(name):
    baseline = resolve(name, BASELINES[name].kinds[0], load=nothing)
    same = np.array_equal(baseline(RAW, "a", 0)[0], baseline(RAW[::-1] / 2, "b", 0)[0])
    assert same == baseline.shared


def test_defaults():
    assert resolve(None, "image", load=nothing).name == "black"
    np.testing.assert_array_equal(resolve(None, "array", load=nothing)(ROWS, "a", 0), [np.zeros((3, 2))])
    table = resolve(None, "table", load=lambda path: stored(*ROWS), background=Path("b.csv"))
    assert (table.name, table.shared, table.file) == ("mean", True, Path("b.csv"))
    np.testing.assert_array_equal(table(ROWS[0], "a", 0), [[3, 20]])
    assert set(DEFAULTS) == {"image", "array", "table", "sequence"}


def test_table_without_background_is_refused_with_the_way_out():
    with pytest.raises(UsageError, match=r"default baseline of a table.*--background FILE, or --baseline zero"):
        resolve(None, "table", load=nothing)
    with pytest.raises(UsageError, match="--background"):
        resolve("mean", "table", load=nothing)


@pytest.mark.parametrize(("spec", "kind"), [("zero", "table"), (None, "image"), (None, "array")])
def test_a_background_that_nothing_uses_is_refused(spec, kind):
    with pytest.raises(UsageError, match=r"--background b\.csv: only --baseline mean of a table uses one"):
        resolve(spec, kind, load=nothing, background=Path("b.csv"))


def test_column_means_of_whole_numbers_are_not_cut():
    whole = resolve("mean", "table", load=lambda path: stored([1], [2]), background=Path("b"))
    np.testing.assert_array_equal(whole(np.array([5]), "a", 0), [[1.5]])


def test_empty_background():
    with pytest.raises(UsageError, match=r"--background b\.csv: the file holds no rows"):
        column_means(Path("b.csv"), lambda path: [])


def test_file_is_used_for_every_sample(tmp_path):
    path = tmp_path / "x.png"
    path.touch()
    baseline = resolve(str(path), "image", load=lambda given: stored(RAW) if given == path else [])
    assert (baseline.name, baseline.shared, baseline.file) == ("file", True, path)
    np.testing.assert_array_equal(baseline(RAW * 0, "b", 3), [RAW])
    with pytest.raises(InputError, match=r"x\.png' has the shape \(20, 30, 3\), the input \(5, 5, 3\)"):
        baseline(RAW[:5, :5], "a", 0)


def test_several_inputs_are_a_set(tmp_path):
    baseline = resolve(str(tmp_path), "image", load=lambda path: stored(RAW, RAW / 2))
    assert (baseline.name, baseline.shared, baseline.file) == ("file", True, tmp_path)
    np.testing.assert_array_equal(baseline(RAW * 0, "b", 3), [RAW, RAW / 2])


def test_of_a_set_the_one_with_another_shape_is_named(tmp_path):
    baseline = resolve(str(tmp_path), "image", load=lambda path: stored(RAW, RAW[:5]))
    with pytest.raises(InputError, match=rf"'{tmp_path}: 1\.npy' has the shape \(5, 30, 3\), the input \(20, 30, 3\)"):
        baseline(RAW, "a", 0)


@pytest.mark.parametrize(
    ("spec", "kind"), [(None, "image"), ("black", "array"), ("zero", "table"), ("zero", "sequence")]
)
def test_where_a_set_is_needed_names_of_one_baseline_are_refused(spec, kind):
    told = f"--baseline {spec or 'black (the default)'}: .*at least 2 baselines; accepted: "
    told += "shuffle:K, a directory" if kind == "sequence" else "a directory, or a file of several inputs"
    with pytest.raises(UsageError, match=re.escape(told).replace(r"\.\*", ".*")):
        resolve(spec, kind, load=nothing, several=True)


def test_where_a_set_is_needed_a_set_of_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds one input; accepted: 2 to 1000"):
        resolve(str(tmp_path), "image", load=lambda path: stored(RAW), several=True)
    with pytest.raises(UsageError, match="shuffle:K, with K from 2 to 1000"):
        resolve("shuffle:1", "sequence", load=nothing, alphabet="ACGT", several=True)
    assert len(resolve(None, "sequence", load=nothing, alphabet="ACGT", several=True).fills) == 20


@pytest.mark.parametrize(("count", "message"), [(0, "--baseline .*holds no input"), (1001, "more than 1000 inputs")])
def test_a_set_of_none_or_too_many_is_refused(tmp_path, count, message):
    with pytest.raises(UsageError, match=message):
        resolve(str(tmp_path), "image", load=lambda path: stored(*[RAW] * count))


def test_unknown_name_gets_a_suggestion_and_the_list():
    with pytest.raises(
        UsageError,
        match=r"--baseline blakc: neither a file nor .* image \(did you mean 'black'\?\); accepted: black, blur, grey",
    ):
        resolve("blakc", "image", load=nothing)
    with pytest.raises(
        UsageError, match=r"--baseline blur: .* for kind table.*accepted: mean, zero, a file or a directory"
    ):
        resolve("blur", "table", load=nothing)
