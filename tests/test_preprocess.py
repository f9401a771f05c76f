"""Preprocessing: geometry against Pillow, the numbers of the formula, round trips, and what a wrong sidecar is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from attrcli.errors import InputError, UsageError
from attrcli.preprocess import KEYS, Preprocess
from attrcli.sidecar import find, from_mapping, load_sidecar, parse_embedded, preset, to_toml

FULL = """
[input]
kind = "image"
size = [224, 224]
resize = "shorter-side"
crop = 0.875
interpolation = "bilinear"
channels = "RGB"
range = [0.0, 1.0]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
layout = "NCHW"
dtype = "float32"
[output]
activation = "softmax"
labels = "labels.txt"
"""


def image(**keys):
    return from_mapping({"input": {"kind": "image", **keys}}, "x.toml", Path())


def pixels(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# --- sidecar files


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_documented_sidecar(tmp_path, mark):
    (tmp_path / "m.toml").write_text(mark + FULL, encoding="utf-8")
    (tmp_path / "labels.txt").write_text(f"{mark}T-shirt/top\nété\n\n", encoding="utf-8")
    found = load_sidecar(tmp_path / "m.toml")
    assert found == replace(preset("imagenet"), activation="softmax", labels=("T-shirt/top", "été"))
    assert found.sample_shape == (3, 224, 224)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "image"},
        {"kind": "image", "channels": "L", "size": [28, 28], "mean": [0.3], "std": [0.25], "layout": "NHWC"},
        {"kind": "image", "size": [224, 112], "resize": "exact", "interpolation": "bicubic", "channels": "BGR"},
        {"kind": "array", "size": [4, 5, 6], "mean": [1, 2, 3, 4], "dtype": "float64"},
        {"kind": "array", "dtype": "int64"},
        {"kind": "table", "columns": ["age", "bmi"], "mean": [48.5, 26.4], "std": [13.1, 4.4]},
    ],
)
def test_round_trip_through_toml_and_json(given, tmp_path):
    found = from_mapping({"input": given, "output": {"labels": ["a", 'b "quoted"']}}, "x", None)
    path = tmp_path / "x.toml"
    path.write_text(to_toml(found), encoding="utf-8")
    assert load_sidecar(path) == found
    assert from_mapping(json.loads(json.dumps(found.as_dict())), "run file", None) == found


def test_defaults_of_an_image_are_written_out():
    assert set(image().as_dict()["input"]) == {"kind", *KEYS["image"]} - {"size"}
    assert image() == preset("unit")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": {"kind": "image", "stdd": [1.0]}}, r"x\.toml: \[input\] key 'stdd' is unknown.*did you mean 'std'"),
        ({"input": {"kind": "table", "crop": 0.5}}, r"x\.toml: \[input\] key 'crop' is unknown for kind = 'table'"),
        ({"inputs": {}}, r"x\.toml: table 'inputs' is unknown \(did you mean 'input'\?\); accepted: input, output"),
        ({"input": 3}, r"x\.toml: input must be a table"),
        ({"input": {"size": [1, 2]}}, r"x\.toml: \[input\] kind is missing; accepted: image, array, table"),
        ({}, r"kind is missing"),
        (
            {"input": {"kind": "audio"}},
            r"\[input\] kind = 'audio' is not possible; accepted: image, array, table, sequence",
        ),
        ({"input": {"kind": ["image"]}}, r"\[input\] kind = \['image'\] is not possible"),
        ({"input": {"kind": "image", "std": [1, 0, 1]}}, r"\[input\] std = \[1, 0, 1\].*above 0"),
        ({"input": {"kind": "image", "std": 0.5}}, r"std = 0\.5 is not possible; accepted: a list of numbers"),
        ({"input": {"kind": "image", "mean": ["a", "b", "c"]}}, r"mean = .*accepted: a number"),
        ({"input": {"kind": "image", "mean": [True, True, True]}}, r"mean = .*accepted: a number"),
        ({"input": {"kind": "image", "mean": [float("nan")] * 3}}, r"mean = "),
        ({"input": {"kind": "image", "mean": [0.5]}}, r"mean has 1 values; accepted: 3, .* channels of RGB"),
        ({"input": {"kind": "image", "channels": "L", "std": [1, 1, 1]}}, r"std has 3 values; accepted: 1"),
        ({"input": {"kind": "image", "channels": "rgb"}}, r"channels = 'rgb' is not possible; accepted: RGB, BGR, L"),
        ({"input": {"kind": "image", "range": [1, 1]}}, r"range = \[1, 1\]"),
        ({"input": {"kind": "image", "range": [0, 1, 2]}}, r"range = \[0, 1, 2\]"),
        ({"input": {"kind": "image", "size": [224]}}, r"size = \[224\]: an image's size is \[height, width\]"),
        ({"input": {"kind": "image", "size": [224, 0]}}, r"size = \[224, 0\]"),
        ({"input": {"kind": "image", "size": [224.0, 224]}}, r"size = \[224\.0, 224\]"),
        ({"input": {"kind": "image", "size": 224}}, r"size = 224"),
        (
            {"input": {"kind": "image", "crop": 1.5}},
            r"crop = 1\.5 is not possible; accepted: a number above 0, up to 1",
        ),
        ({"input": {"kind": "image", "crop": 0}}, r"crop = 0"),
        ({"input": {"kind": "image", "crop": 0.9}}, r"crop = 0\.9 needs the key resize"),
        ({"input": {"kind": "image", "resize": "exact"}}, r"resize = 'exact' needs the key size"),
        ({"input": {"kind": "image", "resize": "shorter_side"}}, r"did you mean 'shorter-side'"),
        ({"input": {"kind": "image", "dtype": "uint8"}}, r"dtype = 'uint8' holds whole numbers"),
        ({"input": {"kind": "table", "columns": ["a", "a"]}}, r"columns = .*different names"),
        ({"input": {"kind": "table", "columns": ["a", "b", "c"], "mean": [1, 2]}}, r"mean has 2 values; accepted: 3"),
        ({"input": {"kind": "array", "mean": [1, 2], "std": [1, 2, 3]}}, r"mean has 2 values and std 3"),
        (
            {"input": {"kind": "image"}, "output": {"label": []}},
            r"\[output\] key 'label' is unknown \(did you mean 'labels'",
        ),
        ({"input": {"kind": "image"}, "output": {"activation": "relu"}}, r"\[output\] activation = 'relu'"),
        ({"input": {"kind": "image"}, "output": {"labels": []}}, r"\[output\] labels: accepted: "),
        ({"input": {"kind": "image"}, "output": {"labels": [1]}}, r"\[output\] labels: accepted: "),
        ({"input": {"kind": "image"}, "output": {"labels": "no.txt"}}, r"\[output\] labels: the file 'no\.txt' cannot"),
    ],
)
def test_wrong_sidecars_name_file_and_key(given, message):
    with pytest.raises(UsageError, match=message) as caught:
        from_mapping(given, "x.toml", Path())
    assert "x.toml" in str(caught.value)


def test_unreadable_sidecars(tmp_path):
    with pytest.raises(UsageError, match=r"m\.toml: cannot be read: No such file"):
        load_sidecar(tmp_path / "m.toml")
    (tmp_path / "m.toml").write_text("[input\n")
    with pytest.raises(UsageError, match=r"m\.toml: is not TOML: .*line 1"):
        load_sidecar(tmp_path / "m.toml")
    (tmp_path / "m.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"m\.toml: is not TOML"):
        load_sidecar(tmp_path / "m.toml")


def test_find_prefers_flag_over_sidecar_over_embedded(tmp_path, monkeypatch):
    model = tmp_path / "net.onnx"
    embedded = {"input": {"kind": "table", "columns": ["a"]}}
    assert find(model, None, None) is None
    assert find(model, None, embedded).kind == "table"
    (tmp_path / "net.toml").write_text("[input]\nkind = 'array'\n")
    assert find(model, None, embedded).kind == "array"
    (tmp_path / "other.toml").write_text("[input]\nkind = 'image'\n")
    assert find(model, str(tmp_path / "other.toml"), embedded) == preset("unit")
    assert find(model, "unit", embedded, channels="L").channels == "L"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").write_text("")  # a preset's name is the preset
    assert find(model, "imagenet", embedded) == preset("imagenet")
    with pytest.raises(UsageError, match=r"'imagnet': no such file \(did you mean 'imagenet'\?\); accepted: a sidecar"):
        find(model, "imagnet", embedded)


def test_an_embedded_sidecar_may_begin_with_a_byte_order_mark():
    text = '[input]\nkind = "array"\n'
    assert parse_embedded("\ufeff" + text, "m.onnx") == parse_embedded(text, "m.onnx") == {"input": {"kind": "array"}}


def test_embedded_labels_must_be_inline():
    with pytest.raises(
        UsageError, match=r"m\.onnx.*labels = '/etc/hosts': inside a model file the names must stand inline"
    ):
        find(Path("m.onnx"), None, {"input": {"kind": "image"}, "output": {"labels": "/etc/hosts"}})


def test_presets():
    assert preset("imagenet").normalize(np.full((1, 1, 3), 255, np.float32)).ravel() == pytest.approx(
        [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rel=1e-6
    )
    with pytest.raises(UsageError, match=r"'unti' \(did you mean 'unit'\?\)"):
        preset("unti")
    with pytest.raises(UsageError, match="RGB"):
        preset("imagenet", "L")


# --- geometry


@pytest.mark.parametrize("how", ["bilinear", "bicubic", "nearest"])
def test_shorter_side_then_centre_crop(how):
    stored = pixels(333, 500)
    fitted = replace(preset("imagenet"), interpolation=how).fit(stored)
    by_hand = Image.fromarray(stored).resize((384, 256), Image.Resampling[how.upper()]).crop((80, 16, 304, 240))
    assert fitted.dtype == np.float32
    np.testing.assert_array_equal(fitted, np.asarray(by_hand))


def test_tall_images_and_other_sizes_than_squares():
    stored = pixels(501, 101)
    scale = image(size=[50, 40], resize="shorter-side", crop=0.8)
    by_hand = Image.fromarray(stored).resize((50, 248), Image.Resampling.BILINEAR)  # 50 * 501 // 101
    np.testing.assert_array_equal(scale.fit(stored), np.asarray(by_hand.crop((5, 99, 45, 149))))


def test_exact_stretches():
    stored = pixels(40, 90, 1)
    by_hand = Image.fromarray(stored[:, :, 0]).resize((28, 20), Image.Resampling.BILINEAR)
    fitted = image(size=[20, 28], resize="exact", channels="L").fit(stored)
    np.testing.assert_array_equal(fitted[:, :, 0], np.asarray(by_hand))


def test_downsampling_is_antialiased():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    fitted = image(size=[8, 8], resize="exact", channels="L").fit(stripes)
    assert fitted.min() > 115
    assert fitted.max() < 140


def test_float_images_are_resized_without_rounding():
    ramp = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[None, :, None], 64, axis=0)
    fitted = image(size=[8, 8], resize="exact", channels="L", interpolation="bicubic").fit(ramp)
    assert len(np.unique(fitted)) == 8
    assert fitted.min() >= 0


def test_no_resize_takes_the_size_as_it_is_or_refuses_with_both():
    stored = pixels(30, 40)
    np.testing.assert_array_equal(preset("unit").fit(stored), stored)
    np.testing.assert_array_equal(image(size=[30, 40]).fit(stored), stored)
    with pytest.raises(InputError, match=r"is 30 x 40 .*takes 28 x 28.*resize = 'none'"):
        image(size=[28, 28]).fit(stored)


def test_wrong_shapes_are_refused_with_both():
    with pytest.raises(InputError, match=r"\(4, 5, 1\).*expects \(height, width, 3\) for RGB"):
        preset("unit").fit(pixels(4, 5, 1))
    with pytest.raises(InputError, match=r"\(3, 4\).*expects \(3, 5\)"):
        Preprocess("array", size=(3, 5)).fit(np.zeros((3, 4)))
    with pytest.raises(InputError, match=r"\(3,\).*expects \(2,\)"):
        Preprocess("table", columns=("a", "b")).fit(np.zeros(3))


def test_absurd_aspect_ratio_is_refused_before_it_is_allocated():
    with pytest.raises(InputError, match="1 x 50000 would be resized to 256 x 12800000, which is too large"):
        preset("imagenet").fit(np.zeros((1, 50_000, 3), np.uint8))


@given(width=st.integers(1, 700), height=st.integers(1, 700), resize=st.sampled_from(["exact", "shorter-side", "none"]))
def test_seen_box_lies_in_the_image(width, height, resize):
    keys = {} if resize == "none" else {"size": [32, 48], "crop": 0.9}
    left, top, right, bottom = image(resize=resize, **keys).seen_box(width, height)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9


def test_seen_box_by_hand():
    assert preset("unit").seen_box(500, 333) == (0, 0, 500, 333)
    assert image(size=[20, 28], resize="exact").seen_box(500, 333) == (0, 0, 500, 333)
    box = preset("imagenet").seen_box(512, 1024)  # resized by a half to 256 x 512, cropped by 16 and 144
    assert box == (32, 288, 480, 736)


def test_what_the_box_shows_is_what_the_model_gets():
    stored = np.zeros((300, 200, 3), np.uint8)
    left, top, right, bottom = (round(edge) for edge in preset("imagenet").seen_box(200, 300))
    stored[top:bottom, left:right] = 255
    assert preset("imagenet").fit(stored)[2:-2, 2:-2].min() == 255


# --- numbers


@given(
    hnp.arrays(np.float32, (4, 5, 3), elements=st.floats(0, 255, width=32)),
    st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from(["float32", "float64"]),
    st.tuples(*[st.floats(-2, 2)] * 3),
    st.tuples(*[st.floats(0.05, 5)] * 3),
    st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (1.0, 0.0)]),
)
def test_denormalize_undoes_normalize(raw, layout, dtype, mean, std, to):
    p = image(layout=layout, dtype=dtype, mean=list(mean), std=list(std), range=list(to))
    x = p.normalize(raw)
    assert x.dtype == dtype
    assert x.shape == ((3, 4, 5) if layout == "NCHW" else (4, 5, 3))
    slack = 1e-10 if dtype == "float64" else 1e-3
    np.testing.assert_allclose(p.denormalize(x), raw, atol=slack)


@given(hnp.arrays(np.uint8, (3, 2, 3)))
def test_pixels_survive_imagenet_exactly(stored):
    raw = stored.astype(np.float32)
    np.testing.assert_array_equal(preset("imagenet").denormalize(preset("imagenet").normalize(raw)).round(), raw)


def test_order_of_range_mean_and_std():
    x = image(range=[-1.0, 1.0], mean=[0.5, 0, 0], std=[2, 1, 1]).normalize(np.array([[[255.0, 0, 51]]]))
    np.testing.assert_allclose(x[:, 0, 0], [(1 - 0.5) / 2, -1, -0.6], rtol=1e-6)


def test_results_are_fresh_and_contiguous():
    raw = np.ones((2, 2, 3), np.float32)
    for p in (preset("unit"), image(range=[0.0, 255.0]), image(range=[0.0, 255.0], layout="NHWC")):
        x = p.normalize(raw)
        assert x.flags.c_contiguous
        assert x.flags.writeable
        assert not np.shares_memory(x, raw)
    fitted = image(size=[2, 2]).fit(raw)
    assert not np.shares_memory(fitted, raw)


def test_channel_axis_of_arrays():
    values = np.arange(6.0).reshape(2, 3)
    first = Preprocess("array", mean=(0.0, 3.0)).encode(values)
    np.testing.assert_array_equal(first, [[0, 1, 2], [0, 1, 2]])
    last = Preprocess("array", mean=(0.0, 1.0, 2.0), layout="NHWC").encode(values)
    np.testing.assert_array_equal(last, [[0, 0, 0], [3, 3, 3]])
    with pytest.raises(InputError, match=r"\(2, 3\); mean and std have 3 values for axis 0"):
        Preprocess("array", mean=(0.0, 1.0, 2.0)).encode(values)


def test_one_mean_for_all_channels_and_as_many_as_channels():
    raw = pixels(2, 3).astype(np.float32)
    plain, shifted = (Preprocess("image", range=(0.0, 1.0), mean=mean).normalize(raw) for mean in ((0.0,), (0.5,)))
    assert plain.shape == (3, 2, 3)
    np.testing.assert_allclose(plain, (raw / 255).transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(shifted, plain - 0.5, atol=1e-6)
    for layout in ("NCHW", "NHWC"):
        grey = Preprocess("image", channels="L", mean=(0.0, 0.1, 0.2), layout=layout)
        with pytest.raises(InputError, match=r"\(2, 3, 1\); mean and std have 3 values for axis -1"):
            grey.encode(pixels(2, 3, 1))
    with pytest.raises(InputError, match="mean has 2 values and std 3"):
        Preprocess("image", mean=(0.0, 0.1), std=(1.0, 1.0, 2.0)).encode(pixels(2, 3))


def test_table_rows():
    p = from_mapping({"input": {"kind": "table", "columns": ["a", "b"], "mean": [1, 2], "std": [2, 4]}}, "x", None)
    x = p.encode(np.array([3.0, 10.0]))
    np.testing.assert_array_equal(x, np.array([1, 2], np.float32))
    np.testing.assert_array_equal(p.denormalize(x), [3, 10])


def test_whole_numbers():
    tokens = np.array([3, 2**31 + 1])
    np.testing.assert_array_equal(Preprocess("array", dtype="int64").encode(tokens), tokens)
    with pytest.raises(InputError, match=r"from 3 to 2\.14748e\+09 are not whole numbers of dtype int32"):
        Preprocess("array", dtype="int32").encode(tokens)
    with pytest.raises(InputError, match="whole numbers of dtype int64"):
        Preprocess("array", dtype="int64").encode(np.array([0.5]))
    with pytest.raises(InputError, match="do not fit dtype float16"):
        Preprocess("array", dtype="float16").encode(np.array([1e6]))
