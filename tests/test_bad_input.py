"""What is wrong with inputs, models and sidecars: refused or recorded, named, and never quietly accepted."""

import shutil
import struct
import zlib

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
from onnx import helper
from PIL import Image

PIXELS = np.arange(784, dtype=np.uint8).reshape(28, 28)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "in"


# -- files that are no inputs --------------------------------------------------------------------------------------


@pytest.fixture
def mixed(folder):
    """Three good images and a damaged one among them."""
    paths = images(folder, 4)
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    return folder


def test_a_corrupt_image_is_recorded_and_the_rest_is_written(mixed, out):
    done = explain(out, inputs=mixed, code=3)
    assert "001.png" in done.err
    assert done.err.count("001.png") == 1
    found = rows(out)
    assert found["status"].tolist() == [1, 2, 1, 1]
    assert "001.png" in found["message"][1]
    assert np.isnan(found["attribution"][1]).all()
    assert np.isfinite(found["attribution"][[0, 2, 3]]).all()
    assert found["attributes"]["complete"]


@pytest.mark.parametrize(("allowed", "code"), [("0", 3), ("1", 0), ("50%", 0), ("25%", 0), ("24%", 3), ("2", 0)])
def test_max_errors_tolerates_some(mixed, out, allowed, code):
    explain(out, "--max-errors", allowed, inputs=mixed, code=code)
    assert rows(out)["status"].tolist() == [1, 2, 1, 1]


def test_fail_fast_stops_and_the_run_can_go_on(mixed, out):
    done = explain(out, "--fail-fast", "--batch-size", "2", inputs=mixed, code=3)
    assert "001.png" in done.err
    assert "--fail-fast" in done.err
    assert not out.exists()
    done = explain(out, inputs=mixed, code=3)
    assert "kept:     1" in done.out


def test_nothing_can_be_read(folder, out):
    for number in range(3):
        (folder / f"{number}.png").parent.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(b"no image")
    assert explain(out, inputs=folder, code=3).err.count("not an image") == 3
    assert rows(out)["status"].tolist() == [2, 2, 2]
    bare = scripted(folder.parent / "net.pt", torch.nn.Flatten())  # a file that says nothing of its input's size
    message = refused(folder.parent / "b.h5", "-p", "unit", model=bare, inputs=folder, code=3)
    assert "none of the 3 inputs can be read" in message
    assert "0.png" in message


def test_empty_and_missing_places(tmp_path, out):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("x")
    assert "holds no files at all" in refused(out, inputs=tmp_path / "empty", code=5)
    assert "a.txt" in refused(out, inputs=tmp_path / "text", code=5)
    assert "missing" in refused(out, inputs=tmp_path / "missing", code=5)
    assert "*.jpg" in refused(out, inputs=f"{TEST}/*.jpg", code=5)
    (tmp_path / "list.txt").write_text(f"{TEST}/Bag/none.png\n")
    done = explain(out, inputs=[TEST / "Coat", f"@{tmp_path}/list.txt"], code=3)
    assert "no such file" in done.err


def test_two_inputs_with_one_id(tmp_path, out):
    images(tmp_path / "a", 1)
    message = refused(out, inputs=[tmp_path / "a", tmp_path / "a/000.png"])
    assert "two inputs have the id '000.png'" in message
    assert "given twice" in message


def test_a_decompression_bomb_is_one_row_with_an_error(folder, out):
    images(folder, 2)
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9999))
        + chunk(b"IEND", b"")
    )
    (folder / "bomb.png").write_bytes(bomb)
    done = explain(out, inputs=folder, code=3)
    assert "3600000000 pixels" in done.err
    assert rows(out)["status"].tolist() == [1, 1, 2]


def test_an_input_that_goes_away_during_the_run(folder, out, monkeypatch):
    from attrcli import explain as verb

    paths = images(folder, 12)
    compute = verb.compute

    def slow(plan, batch):
        paths[-1].unlink(missing_ok=True)
        return compute(plan, batch)

    monkeypatch.setattr(verb, "compute", slow)
    done = explain(out, "--batch-size", "2", inputs=folder, code=3)
    assert "no such file" in done.err
    assert rows(out)["status"].tolist() == [1] * 11 + [2]


# -- images of another kind ----------------------------------------------------------------------------------------


def seen(path, out, channels="L", shape=(28, 28)):
    """What the model saw of an image, in 0..255: the identity network gives it back."""
    count = 1 if channels == "L" else 3
    text = f'[input]\nkind = "image"\nsize = {list(shape)}\nresize = "exact"\nchannels = "{channels}"\n'
    node = helper.make_node("Flatten", ["x"], ["z"])
    size = int(np.prod(shape)) * count
    model = onnx_file(
        out.with_suffix(".onnx"), [node], {"x": ["N", count, *shape]}, {"z": ["N", size]}, {}, sidecar=text
    )
    explain(out, "-t", "0", model=model, inputs=path, method="gradient")
    return rows(out)["prediction"].reshape(count, *shape) * 255


def test_a_16_bit_png_has_the_values_of_its_8_bit_copy(tmp_path, out):
    (tmp_path / "in").mkdir()
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(tmp_path / "in/a.png")
    np.testing.assert_allclose(seen(tmp_path / "in/a.png", out)[0], PIXELS, atol=1e-3)


def test_a_palette_png_has_its_colours(tmp_path, out):
    palette = Image.fromarray(PIXELS % 3)
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    (tmp_path / "in").mkdir()
    palette.save(tmp_path / "in/a.png")
    assert palette.mode == "P"
    expected = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]])[PIXELS % 3]
    np.testing.assert_allclose(seen(tmp_path / "in/a.png", out, "RGB"), expected.transpose(2, 0, 1), atol=1e-3)


def test_a_cmyk_jpeg_has_its_colours(tmp_path, out):
    colour = np.zeros((28, 28, 4), np.uint8)
    colour[..., 1] = 255  # all of magenta: red and blue stay
    (tmp_path / "in").mkdir()
    Image.fromarray(colour, "CMYK").save(tmp_path / "in/a.jpg", quality=100)
    found = seen(tmp_path / "in/a.jpg", out, "RGB")
    np.testing.assert_allclose(found, np.broadcast_to([[[255]], [[0]], [[255]]], (3, 28, 28)), atol=4)


def test_a_rotated_jpeg_is_upright(tmp_path, out):
    picture = np.zeros((14, 28), np.uint8)
    picture[:, :14] = 255  # stored lying down, the bright half to the left: upright it is on top
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in/a.jpg", exif=exif, quality=100)
    found = seen(tmp_path / "in/a.jpg", out, shape=(28, 14))[0]
    np.testing.assert_allclose(found[:12], 255, atol=4)
    np.testing.assert_allclose(found[16:], 0, atol=4)


def test_an_image_of_another_size_or_channel_count_is_converted_as_the_sidecar_says(tmp_path, out):
    image(tmp_path / "in/a.png", np.full((56, 84, 3), 100))
    np.testing.assert_allclose(seen(tmp_path / "in/a.png", out), 100, atol=1e-3)
    np.testing.assert_allclose(seen(tmp_path / "in/a.png", tmp_path / "b.h5", "RGB", (8, 9)), 100, atol=1e-3)


def test_an_image_of_another_size_is_refused_with_both_shapes_where_nothing_is_resized(tmp_path, folder, out):
    images(folder, 2)
    image(folder / "wide.png", np.zeros((30, 40)))
    sidecar = tmp_path / "side.toml"
    sidecar.write_text(SIDECAR.replace('resize = "exact"', 'resize = "none"'))
    done = explain(out, "-p", sidecar, inputs=folder, code=3)
    assert "30 x 40" in done.err
    assert "28 x 28" in done.err
    assert rows(out)["status"].tolist() == [1, 1, 2]
    done = explain(tmp_path / "unit.h5", "-p", "unit", inputs=folder, code=3)  # the model file says the size
    assert "1x30x40" in done.err
    assert "1x28x28" in done.err
    explain(tmp_path / "one.h5", "-p", "unit", inputs=folder / "wide.png", code=3)


# -- arrays and tables ---------------------------------------------------------------------------------------------


def test_a_pickled_npy_is_refused(tmp_path, out):
    net = linear(tmp_path / "net.onnx", np.eye(3))
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/good.npy", np.ones(3))
    np.save(tmp_path / "in/pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    np.save(tmp_path / "in/nan.npy", np.array([1, np.nan, 3]))
    done = explain(out, model=net, inputs=tmp_path / "in", code=3)
    assert "pickled.npy" in done.err
    assert "nan.npy" in done.err
    assert rows(out)["status"].tolist() == [1, 2, 2]


def test_a_csv_without_the_columns(tmp_path, out):
    sidecar = '[input]\nkind = "table"\ncolumns = ["a", "b", "z"]\n'
    net = linear(tmp_path / "net.onnx", np.eye(3), sidecar=sidecar)
    message = refused(out, model=net, inputs=table(tmp_path / "x.csv", np.ones((2, 3))))
    assert "no column 'z'" in message
    assert "a, b, c" in message


def test_a_table_cell_that_is_no_number(tmp_path, out):
    net = linear(tmp_path / "net.onnx", np.eye(2))
    (tmp_path / "x.csv").write_text("a,b\n1,2\n1,two\n")
    done = explain(out, model=net, inputs=tmp_path / "x.csv", code=3)
    assert "'two'" in done.err
    assert rows(out)["status"].tolist() == [1, 2]


def test_an_empty_table_is_one_failed_input(tmp_path, out):
    net = linear(tmp_path / "net.onnx", np.eye(2))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.csv").write_text("")
    table(tmp_path / "in/b.csv", np.ones((2, 2)))
    done = explain(out, model=net, inputs=tmp_path / "in", code=3)
    assert "a.csv" in done.err
    assert "no header row" in done.err
    assert rows(out)["status"].tolist() == [2, 1, 1]


def test_a_table_whose_header_is_missing(tmp_path, out):
    net = linear(tmp_path / "net.onnx", np.eye(2))
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    message = refused(out, model=net, inputs=tmp_path / "x.csv")
    assert "its first line is numbers" in message
    assert "add them as a first line" in message


def test_tables_among_arrays(tmp_path, out):
    net = linear(tmp_path / "net.onnx", np.eye(2))
    (tmp_path / "in").mkdir()
    table(tmp_path / "in/a.csv", np.ones((2, 2)))
    np.save(tmp_path / "in/b.npy", np.ones(2))
    message = refused(out, model=net, inputs=tmp_path / "in")
    assert "'b.npy'" in message
    assert "'a.csv'" in message
    explain(out, model=net, inputs=f"{tmp_path}/in/*.npy")


def test_what_image_files_lose_is_told_once(tmp_path, out):
    (tmp_path / "in").mkdir()
    for number in range(70):  # more than one batch
        Image.new("LA", (28, 28), (number, 7)).save(tmp_path / f"in/{number}.png")
    Image.new("LA", (28, 28), (9, 255)).save(tmp_path / "in/opaque.png")
    done = explain(out, inputs=tmp_path / "in")
    assert done.err.count("its transparency is dropped") == 1
    assert done.err.count("warning") == 1


def test_colours_that_a_model_does_not_take_are_told_once(tmp_path, out):
    generator = np.random.default_rng(0)
    for number in range(70):
        shape = (28, 28) if number % 2 else (28, 28, 3)
        image(tmp_path / f"in/{number:02}.png", generator.integers(0, 256, shape))
    done = explain(out, inputs=tmp_path / "in")
    assert done.err.count("warning") == 1
    assert "warning: 00.png: it has colours, and the model gets their brightness alone (said once for all" in done.err
    done = explain(out, inputs=tmp_path / "in")
    assert "warning" not in done.err


# -- methods and their options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("integrated_gradient", [], ["unknown method", "did you mean 'integrated_gradients'", "saliency"]),
        ("Saliency", [], ["did you mean 'saliency'"]),
        ("integrated_gradients", ["stesp=20"], ["no option 'stesp'", "did you mean 'steps'", "steps=50", "rule="]),
        ("saliency", ["steps=3"], ["saliency has no option 'steps'", "none"]),
        ("integrated_gradients", ["steps=many"], ["steps='many'", "int"]),
        ("integrated_gradients", ["steps=1.5"], ["steps='1.5'"]),
        ("integrated_gradients", ["rule=simpson"], ["rule='simpson'", "trapezoid"]),
        ("integrated_gradients", ["steps=0"], ["steps=0", "at least 1"]),
        ("smoothgrad", ["samples=3"], ["samples=3", "even"]),
        ("occlusion", ["patch=2", "stride=3"], ["stride=3", "patch=2"]),
    ],
)
def test_a_method_or_option_that_is_not_there(out, method, options, words):
    flags = [part for option in options for part in ("-o", option)]
    message = refused(out, *flags, method=method)
    assert all(word in message for word in words), message


# -- sidecars ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("mean", "maen"), ["[input] key 'maen'", "did you mean 'mean'"]),
        (('resize = "exact"', 'resize = "crop"'), ["resize = 'crop'", "exact, shorter-side, none"]),
        (("size = [28, 28]", 'size = "28"'), ["size = '28'", "whole numbers"]),
        (("mean = [0.2860]", "mean = [0.1, 0.2]"), ["mean has 2 values", "1"]),
        (("[output]", "[outputs]"), ["'outputs'", "input, output"]),
        (("[input]", "[input"), ["is not TOML"]),
        (('kind = "image"', 'kind = "picture"'), ["kind = 'picture'", "image, array, table"]),
    ],
)
def test_a_wrong_sidecar_is_refused_naming_file_and_key(tmp_path, out, change, words):
    model = tmp_path / "net.onnx"
    model.write_bytes(MLP.read_bytes())
    (tmp_path / "net.toml").write_text(SIDECAR.replace(*change))
    message = refused(out, model=model)
    assert all(word in message for word in [str(tmp_path / "net.toml"), *words]), message
    assert attrcli("inspect", model).code == 2


def test_a_wrong_sidecar_inside_the_model_file_names_the_model(tmp_path, out):
    model = linear(tmp_path / "net.onnx", np.eye(2), sidecar='[input]\nkind = "table"\nmaen = [1]\n')
    message = refused(out, model=model, inputs=table(tmp_path / "x.csv", np.ones((1, 2))))
    assert "net.onnx (embedded)" in message
    assert "maen" in message


def test_preprocess_names_neither_a_file_nor_a_preset(out):
    message = refused(out, "-p", "imagnet")
    assert "did you mean 'imagenet'" in message


def test_a_sidecar_of_another_size_than_the_model(tmp_path, out):
    sidecar = tmp_path / "side.toml"
    sidecar.write_text(SIDECAR.replace("[28, 28]", "[32, 32]"))
    for suffix in ("onnx", "pt"):
        message = refused(out, "-p", sidecar, model=SAMPLES / f"fashion_mlp.{suffix}", code=4)
        assert "1x32x32" in message
    assert "1x28x28" in refused(out, "-p", sidecar, model=SAMPLES / "fashion_mlp.pt2", code=4)


# -- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rooted(tmp_path):
    """A model that makes NaN of a negative input: z = W sqrt(x)."""
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"], name="the_root"),
        helper.make_node("Gemm", ["root", "w"], ["z"], transB=1),
    ]
    return onnx_file(
        tmp_path / "root.onnx", nodes, {"x": ["N", 2]}, {"z": ["N", 2]}, {"w": np.eye(2, dtype=np.float32)}
    )


@pytest.mark.parametrize("method", ["gradient", "occlusion"])
def test_nan_for_one_input_is_one_row_with_the_first_node(tmp_path, rooted, out, method):
    data = table(tmp_path / "x.csv", [[1, 4], [1, -4], [9, 16]])
    arguments = ("-b", "zero") if method == "occlusion" else ()
    done = explain(out, *arguments, model=rooted, inputs=data, method=method, code=3)
    found = rows(out)
    assert found["status"].tolist() == [1, 2, 1]
    for text in (found["message"][1], done.err):
        assert "sqrt" in text
        assert "NaN" in text
    assert np.isfinite(found["attribution"][[0, 2]]).all()
    (tmp_path / "clean").mkdir()
    clean = table(tmp_path / "clean/x.csv", [[1, 4], [1, 4], [9, 16]])
    explain(tmp_path / "clean.h5", *arguments, model=rooted, inputs=clean, method=method)
    assert_same_rows(out, tmp_path / "clean.h5", ["x.csv#0", "x.csv#2"])


def test_a_gradient_that_is_not_finite_is_one_row_too(tmp_path, rooted, out):
    data = table(tmp_path / "x.csv", [[1, 4], [0, 4]])  # the root of 0 has an infinite slope
    done = explain(out, "-t", "0", model=rooted, inputs=data, method="gradient", code=3)
    assert "sqrt" in done.err
    assert rows(out)["status"].tolist() == [1, 2]


def test_weights_that_are_nan(tmp_path, out):
    weight = np.eye(3)
    weight[1, 1] = np.nan
    data = table(tmp_path / "x.csv", np.ones((3, 3)))
    message = refused(out, model=linear(tmp_path / "net.onnx", weight), inputs=data, code=4)
    assert "'w'" in message
    assert "NaN" in message


def test_files_that_are_no_model(tmp_path, out):
    assert "missing.onnx" in refused(out, model=tmp_path / "missing.onnx", code=4)
    torch.save({"weight": torch.ones(3)}, tmp_path / "state.pt")
    message = refused(out, model=tmp_path / "state.pt", code=4)
    assert "state dict" in message
    assert "torch.jit.trace" in message
    (tmp_path / "cut.onnx").write_bytes(MLP.read_bytes()[:2000])
    assert "cut.onnx" in refused(out, model=tmp_path / "cut.onnx", code=4)
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in refused(out, model=tmp_path / "text.pt", code=4)
    assert "directory" in refused(out, model=tmp_path, code=4)


def test_an_operation_that_cannot_be_imported(tmp_path, out):
    """The error names it; forward-only methods still work on an ONNX file, in ONNX Runtime."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Unique", ["m"], ["u"], sorted=1),
        helper.make_node("Add", ["h", "u"], ["z"]),
    ]
    weights = {"w": np.eye(2, dtype=np.float32), "m": np.array([6, 5, 6], np.float32)}
    model = onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 2]}, {"z": ["N", 2]}, weights)
    data = table(tmp_path / "x.csv", [[1, 4], [2, 3]])
    message = refused(out, model=model, inputs=data, code=4)
    assert "Unique" in message
    done = explain(out, "-b", "zero", "-t", "1", model=model, inputs=data, method="occlusion")
    assert "Unique" in done.err
    np.testing.assert_allclose(rows(out)["attribution"], [[0, 4], [0, 3]], atol=1e-5)
    np.testing.assert_allclose(rows(out)["score"], [10, 9], atol=1e-5)


# -- places to write -----------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path):
    for out in (tmp_path, tmp_path / "none/run.h5"):
        done = explain(out, code=2)
        assert str(out) in done.err
    shutil.copy(CNN, tmp_path / "other.h5")
    message = explain(tmp_path / "other.h5", code=2).err
    assert "other.h5" in message
    assert "--force" not in message
    assert (tmp_path / "other.h5").read_bytes() == CNN.read_bytes()


def test_force_replaces_no_file_that_is_no_run_file(tmp_path):
    """Not what the command itself reads, either."""
    net = linear(tmp_path / "net.onnx", np.eye(2))
    rows_ = table(tmp_path / "rows.csv", np.ones((2, 2)))
    label = table(tmp_path / "labels.csv", np.ones((2, 1)), extra={"id": [0, 1], "label": [0, 1]})
    label.write_text("id,label\nrows.csv#0,1\nrows.csv#1,0\n")
    side, config = tmp_path / "net.toml", tmp_path / "run.toml"
    side.write_text('[input]\nkind = "table"\n')
    config.write_text("seed = 1\n")
    base = table(tmp_path / "base.csv", np.zeros((1, 2)))
    background = table(tmp_path / "all.csv", np.ones((3, 2)))
    keras = tmp_path / "keras.h5"
    with h5py.File(keras, "w") as file:
        file.attrs["keras_version"] = "3"
    given = ("--labels", label, "--config", config, "--background", background, "--force")
    for out in (label, side, config, background, keras):
        before = out.read_bytes()
        message = explain(out, *given, model=net, inputs=rows_, method="occlusion", code=2).err
        assert f"cannot write {out}" in message
        assert "--force" not in message
        assert out.read_bytes() == before
    assert (
        "cannot write" in explain(base, "-b", base, "--force", model=net, inputs=rows_, method="occlusion", code=2).err
    )
    explain(tmp_path / "run.h5", *given, model=net, inputs=rows_, method="occlusion")


def test_force_does_not_replace_a_fixed_input(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "f"], ["z"])]
    net = onnx_file(tmp_path / "net.onnx", nodes, {"x": ["N", 2], "f": ["N", 2]}, {"z": ["N", 2]}, {})
    with h5py.File(tmp_path / "fixed.h5", "w") as file:
        file["f"] = np.ones(2, np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.ones(2, np.float32))
    given = ("--input", "x", "--fix", f"f={tmp_path}/fixed.h5", "-t", "0")
    message = explain(tmp_path / "fixed.h5", *given, "--force", model=net, inputs=tmp_path / "in/a.npy", code=2).err
    assert "cannot write" in message


def test_a_run_file_takes_no_place_of_another_and_becomes_no_input(tmp_path):
    model = linear(tmp_path / "net.onnx", np.eye(3))
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.ones(3))
    given = {"model": model, "inputs": tmp_path / "in"}
    before = model.read_bytes()
    assert "is the model or an input" in explain(model, "--force", code=2, **given).err
    assert "is the model or an input" in explain(tmp_path / "in/a.npy", "--force", code=2, **given).err
    assert model.read_bytes() == before
    message = refused(tmp_path / "in/run.h5", **given)
    assert "for inputs" in message
    explain(tmp_path / "in/run.attr", **given)
