"""Pictures from run files: `explain --overlays`, `render`, and `export` on the command line."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
from cli_runs import (
    CNN,
    MLP,
    SAMPLES,
    SIDECAR,
    TEST,
    attrcli,
    explain,
    image,
    linear,
    onnx_file,
    refused,
    rows,
    table,
)
from onnx import helper
from PIL import Image

from attrcli import overlays, render


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def texts(path):
    with Image.open(path) as picture:
        return dict(picture.info)


def toned(picture, box):
    """Mean red less blue of a box (left, top, right, bottom): positive for positive attributions."""
    left, top, right, bottom = box
    part = picture[top:bottom, left:right]
    return float((part[..., 0] - part[..., 2]).mean())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two finished runs on the same images, which may be written over."""
    folder = tmp_path_factory.mktemp("done")
    shutil.copytree(TEST / "Bag", folder / "in" / "Bag")
    shutil.copytree(TEST / "Coat", folder / "in" / "Coat")
    explain(folder / "ig.h5", "-o", "steps=8", model=CNN, inputs=folder / "in", method="integrated_gradients")
    explain(folder / "saliency.h5", "--limit", "8", inputs=folder / "in")
    return folder


@pytest.fixture
def moved(done, tmp_path):
    """A copy of the runs, and of the images, which may be changed."""
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def quadrants(tmp_path_factory):
    """A model whose attribution is known: +1 on the upper left quarter, -1 on the lower right, 0 elsewhere."""
    signs = np.zeros((8, 8), np.float32)
    signs[:4, :4], signs[4:, 4:] = 1, -1

    def make(name, text, channels=1):
        nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w", "b"], ["z"], transB=1)]
        weight = {"w": np.stack([signs] * channels).reshape(1, -1), "b": np.ones(1, np.float32)}
        path = tmp_path_factory.mktemp("quadrants") / f"{name}.onnx"
        return onnx_file(path, nodes, {"x": ["N", channels, 8, 8]}, {"z": ["N", 1]}, weight, text)

    return make


def sidecar(resize="exact", channels="L", more=""):
    return f'[input]\nkind = "image"\nsize = [8, 8]\nresize = "{resize}"\nchannels = "{channels}"\n{more}'


# -- one picture per input -----------------------------------------------------------------------------------------


def test_overlays_are_named_by_the_escaped_id_and_have_the_size_of_the_input(tmp_path):
    folder = tmp_path / "ov"
    told = explain(tmp_path / "run.h5", "--overlays", folder, inputs=[TEST / "Bag", TEST / "Coat"])
    names = sorted(path.name for path in folder.iterdir())
    wanted = sorted(f"{place.name}+{path.name}" for place in (TEST / "Bag", TEST / "Coat") for path in place.iterdir())
    assert names == wanted
    assert f"overlays: 12 in {folder}" in told.out
    for name in names:
        assert pixels(folder / name).shape == (28, 28, 3)
        told = texts(folder / name)
        assert told["id"] == name.replace("+", "/")
        assert told["method"] == "saliency"
        assert float(told["scale"]) > 0
        assert {"target", "score", "percentile", "colormap", "alpha"} <= set(told)


def test_names_stay_apart():
    ids = ["a", "a.png", "a.png.png", "b.jpg", "b.jpg.png", "c/d.png", "c+d.png", "t.csv#3", "n.npz#k.png", "é.png"]
    names = overlays.file_names(ids)
    assert len(set(names.values())) == len(ids)
    assert all(name.endswith(".png") and "/" not in name for name in names.values())
    assert names["c/d.png"] == "c+d.png"
    assert names["b.jpg"] == "b.jpg.png"
    assert overlays.file_names(["x/y.png"]) == {"x/y.png": "x+y.png"}
    assert overlays.file_names(["z" * 300 + ".png"]).popitem()[1].endswith(".png")


def test_an_overlay_shows_sign_and_place(tmp_path, quadrants):
    picture = image(tmp_path / "in/a.jpg", np.full((80, 80), 128))
    explain(
        tmp_path / "run.h5",
        "--overlays",
        tmp_path / "ov",
        "-t",
        "0",
        model=quadrants("a", sidecar()),
        inputs=picture,
        method="gradient",
    )
    drawn = pixels(tmp_path / "ov/a.jpg.png")
    assert drawn.shape == (80, 80, 3)
    assert toned(drawn, (5, 5, 35, 35)) > 100  # red
    assert toned(drawn, (45, 45, 75, 75)) < -100  # blue
    for corner in ((45, 5, 75, 35), (5, 45, 35, 75)):
        assert abs(toned(drawn, corner)) < 5


def test_what_the_crop_cut_off_a_large_photo_is_dimmed(tmp_path, quadrants):
    generator = np.random.default_rng(0)
    photo = image(tmp_path / "in/photo.jpg", generator.integers(100, 156, (1200, 1600, 3)))
    model = quadrants("crop", sidecar("shorter-side", "RGB", "crop = 0.5\n"), 3)
    explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", "-t", "0", model=model, inputs=photo, method="gradient")
    drawn = pixels(tmp_path / "ov/photo.jpg.png")
    assert drawn.shape == (1200, 1600, 3)
    box = (500, 300, 1100, 900)  # half of the shorter side, in the middle
    outside = drawn[:250].mean()
    assert outside == pytest.approx(0.4 * 128, abs=5)
    assert drawn[310:590, 810:1090].mean() > 100  # inside, where the attribution is zero
    assert toned(drawn, (box[0] + 50, box[1] + 50, 750, 550)) > 100
    assert toned(drawn, (850, 650, box[2] - 50, box[3] - 50)) < -100
    assert abs(toned(drawn, (0, 0, 1600, 250))) < 2


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_the_input_in_a_panel_has_its_own_colours(tmp_path, quadrants, channels):
    picture = image(tmp_path / "in/a.png", np.broadcast_to([250, 10, 60], (8, 8, 3)))
    model = quadrants(channels, sidecar(channels=channels), 3)
    explain(
        tmp_path / "run.h5",
        "--overlays",
        tmp_path / "ov",
        "--panel",
        "-t",
        "0",
        model=model,
        inputs=picture,
        method="gradient",
    )
    drawn = pixels(tmp_path / "ov/a.png").reshape(-1, 3)
    assert (drawn == [250, 10, 60]).all(1).sum() > 10_000
    assert not (drawn == [60, 10, 250]).all(1).any()


def test_a_rotated_photo_is_drawn_upright(tmp_path, quadrants):
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in/a.jpg", exif=exif, quality=100)
    model = quadrants("exif", sidecar(channels="RGB"), 3)
    explain(
        tmp_path / "run.h5",
        "--overlays",
        tmp_path / "ov",
        "-t",
        "0",
        model=model,
        inputs=tmp_path / "in",
        method="gradient",
    )
    drawn = pixels(tmp_path / "ov/a.jpg.png")
    assert drawn.shape == (16, 8, 3)
    assert drawn[:6, 5:].mean() > drawn[10:, :3].mean() + 100


def test_a_panel_has_a_caption_with_the_gap(done, tmp_path):
    assert attrcli("render", done / "ig.h5", "--out", tmp_path / "panel", "--panel").code == 0
    path = next((tmp_path / "panel").iterdir())
    assert pixels(path).shape[1] > 3 * 200
    told = texts(path)
    assert "of the sum" in told["gap"]
    assert told["target"] in (SAMPLES / "labels.txt").read_text().split("\n")


def test_one_scale_per_run(done, tmp_path):
    assert attrcli("render", done / "ig.h5", "--out", tmp_path / "image").code == 0
    assert attrcli("render", done / "ig.h5", "--out", tmp_path / "run", "--scale", "run").code == 0
    own = {texts(path)["scale"] for path in (tmp_path / "image").iterdir()}
    shared = {texts(path)["scale"] for path in (tmp_path / "run").iterdir()}
    assert len(own) == 12
    assert len(shared) == 1
    assert min(map(float, own)) < float(shared.pop()) < max(map(float, own))


def test_an_all_zero_map_says_so(tmp_path):
    model = linear(tmp_path / "net.onnx", np.zeros((2, 3)))
    data = table(tmp_path / "x.csv", [[1, 2, 3]])
    explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", "-t", "0", model=model, inputs=data, method="gradient")
    image_model = onnx_file(
        tmp_path / "zero.onnx",
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)],
        {"x": ["N", 1, 28, 28]}, {"z": ["N", 2]}, {"w": np.zeros((2, 784), np.float32)}, SIDECAR,
    )  # fmt: skip
    explain(tmp_path / "b.h5", "--overlays", tmp_path / "ov2", model=image_model)
    assert {texts(path)["note"] for path in (tmp_path / "ov2").iterdir()} == {"all attributions are zero"}


def test_tables_give_bar_charts(tmp_path):
    text = '[input]\nkind = "table"\ncolumns = ["b", "a"]\n'
    model = linear(tmp_path / "net.onnx", [[3.0, -1.0]], sidecar=text)
    data = table(tmp_path / "x.csv", [[1, 2], [3, 4]])
    explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", "-t", "0", model=model, inputs=data, method="gradient")
    assert sorted(path.name for path in (tmp_path / "ov").iterdir()) == ["x.csv=0.png", "x.csv=1.png"]
    drawn = pixels(tmp_path / "ov/x.csv=0.png")
    red, blue = (drawn[..., 0] - drawn[..., 2] > 60).sum(), (drawn[..., 2] - drawn[..., 0] > 60).sum()
    assert red == pytest.approx(3 * blue, rel=0.05)  # the bars are as 3 to 1


def test_maps_of_a_layer_are_drawn_over_the_input(tmp_path):
    nodes = json.loads(attrcli("inspect", CNN, "--json").out)["nodes"]
    layer = next(node for node in nodes if "max_pool" in node)
    explain(tmp_path / "run.h5", "--at", layer, "--overlays", tmp_path / "ov", model=CNN, method="gradient")
    assert rows(tmp_path / "run.h5")["attribution"].shape[2] < 28
    assert pixels(next((tmp_path / "ov").iterdir())).shape == (28, 28, 3)


# -- what is written over, and what is not -------------------------------------------------------------------------


def test_our_own_pictures_are_written_over_and_no_others(tmp_path):
    out, folder = tmp_path / "run.h5", tmp_path / "ov"
    explain(out, "--overlays", folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    explain(out, "--overlays", folder, "--panel")
    assert all(path.read_bytes() != first[path.name] for path in folder.iterdir())
    other = tmp_path / "other.h5"
    message = refused(other, "--overlays", folder, method="gradient")  # pictures of another method
    assert "gradient" in message
    assert "--force" in message
    victim = folder / min(first)
    image(victim, np.zeros((5, 5)))
    message = explain(out, "--overlays", folder, code=2).err
    assert str(victim) in message
    assert "no picture that attrcli drew" in message
    assert attrcli("render", out, "--out", folder).code == 2
    assert pixels(victim).shape == (5, 5, 3)
    assert attrcli("render", out, "--out", folder, "--force").code == 0
    assert pixels(victim).shape == (28, 28, 3)


def test_no_picture_takes_the_place_of_an_input_or_becomes_one(tmp_path):
    shutil.copytree(TEST / "Bag", tmp_path / "in")
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    for place in (tmp_path / "in", tmp_path / "in/pictures"):
        message = refused(tmp_path / "run.h5", "--overlays", place, "--force", inputs=tmp_path / "in")
        assert "lies in the folder of inputs" in message
    explain(tmp_path / "run.h5", inputs=tmp_path / "in")
    told = attrcli("render", tmp_path / "run.h5", "--out", tmp_path / "in", "--force")
    assert told.code == 2
    assert "holds inputs" in told.err
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_rows_of_array_files_are_found_again(tmp_path):
    """Pictures of rows inside a file, whose size only the model file tells."""
    model = linear(tmp_path / "net.onnx", np.eye(3))
    np.save(tmp_path / "all.npy", np.arange(6.0).reshape(2, 3))
    explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", model=model, inputs=tmp_path / "all.npy")
    assert sorted(os.listdir(tmp_path / "ov")) == ["all.npy=0.png", "all.npy=1.png"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1)).astype(np.uint8)
    np.savez(tmp_path / "pictures.npz", p=pictures)
    explain(tmp_path / "b.h5", "--overlays", tmp_path / "ov2", inputs=tmp_path / "pictures.npz")
    assert sorted(os.listdir(tmp_path / "ov2")) == [f"pictures.npz=p%5B{i}%5D.png" for i in range(3)]


def test_pictures_of_records_show_their_own_record(tmp_path):
    """Each picture is dark but for the quarter that its record lights up; names inside files never clash."""
    lit = np.zeros((4, 28, 28, 1), np.uint8)
    for number, (y, x) in enumerate([(0, 0), (0, 14), (14, 0), (14, 14)]):
        lit[number, y : y + 14, x : x + 14] = 255
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/r.npy", lit)
    np.savez(tmp_path / "in/r.npz", a=lit[3, ..., 0], r=lit[::-1])
    with h5py.File(tmp_path / "in/r.h5", "w") as file:
        file["a"], file["r"] = lit[2, ..., 0], lit[1:3]
    names = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    done = explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", inputs=names)
    assert "overlays: 12 in" in " ".join(done.out.split())
    expected = {f"r.npy={i}": i for i in range(4)} | {"r.npz=a": 3} | {f"r.npz=r%5B{i}%5D": 3 - i for i in range(4)}
    expected |= {"r.h5=a": 2, "r.h5=r%5B0%5D": 1, "r.h5=r%5B1%5D": 2}
    assert {path.stem for path in (tmp_path / "ov").iterdir()} == set(expected)
    for name, quarter in expected.items():
        grey = pixels(tmp_path / f"ov/{name}.png").min(-1)
        quarters = [grey[:14, :14], grey[:14, 14:], grey[14:, :14], grey[14:, 14:]]
        assert int(np.argmax([np.median(each) for each in quarters])) == quarter


def test_the_caption_says_what_was_asked_for(tmp_path):
    model = linear(tmp_path / "net.onnx", np.eye(3))
    data = table(tmp_path / "x.csv", [[3, 2, 1]])
    for number, (target, told) in enumerate({"predicted": "class 0", "1": "class 1", "2-1": "2-1"}.items()):
        run, folder = tmp_path / f"{number}.h5", tmp_path / f"{number}"
        explain(run, "-t", target, "--overlays", folder, model=model, inputs=data, method="gradient")
        assert texts(folder / "x.csv=0.png")["target"] == told


def test_values_of_a_two_dimensional_input_are_named_by_their_place(tmp_path, monkeypatch):
    names = []
    chart = render.bar_chart
    monkeypatch.setattr(render, "bar_chart", lambda n, *rest, **more: (names.extend(n), chart(n, *rest, **more))[1])
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["z"], transB=1)]
    weights = {"w": np.ones((2, 6), np.float32)}
    model = onnx_file(tmp_path / "n.onnx", nodes, {"x": ["N", 2, 3]}, {"z": ["N", 2]}, weights)
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    explain(tmp_path / "run.h5", "--overlays", tmp_path / "ov", model=model, inputs=tmp_path / "x.npy")
    assert names == ["[0, 0]", "[0, 1]", "[0, 2]", "[1, 0]", "[1, 1]", "[1, 2]"]


def test_limit_and_names_of_pictures(done, tmp_path):
    drawn = attrcli("render", done / "ig.h5", "--out", tmp_path / "two", "--limit", "2", "--scale", "run")
    assert drawn.out == f"overlays: 2 in {tmp_path / 'two'}\n"
    attrcli("render", done / "ig.h5", "--out", tmp_path / "all", "--scale", "run")
    first = sorted((tmp_path / "all").iterdir())[:2]
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == [path.name for path in first]
    scales = {texts(path)["scale"] for path in (*first, *(tmp_path / "two").iterdir())}
    assert len(scales) == 1  # that of the whole run
    for place in (tmp_path / "none", tmp_path / "none.png"):
        refusal = attrcli("render", done / "ig.h5", "--out", place, "--limit", "0")
        assert (refusal.code, refusal.err) == (2, "--limit 0: a whole number of at least 1")
        assert not place.exists()
    for name in ("x.jpg", "x.TIFF", "x.pdf"):
        refusal = attrcli("render", done / "ig.h5", "--out", tmp_path / name)
        assert refusal.code == 2
        assert "pictures are PNG" in refusal.err
        assert "--out FILE.png" in refusal.err
        assert not (tmp_path / name).exists()
    assert "pictures are PNG" in refused(tmp_path / "run.h5", "--overlays", tmp_path / "x.png")


def test_a_folder_whose_name_is_a_file(tmp_path):
    (tmp_path / "ov").write_text("x")
    message = refused(tmp_path / "run.h5", "--overlays", tmp_path / "ov")
    assert "there is a file of that name" in message
    assert (tmp_path / "ov").read_text() == "x"


def test_inputs_that_are_gone_or_changed_since_are_told(moved, tmp_path):
    bags = sorted((moved / "in/Bag").iterdir())
    bags[0].unlink()
    shutil.copy(bags[2], bags[1])
    done = attrcli("render", moved / "ig.h5", "--out", tmp_path / "ov", "--root", moved / "in")
    assert done.code == 3
    assert "no such file" in done.err
    assert "changed since it was explained" in done.err
    assert "--root" in done.err
    assert "overlays: 10" in done.out
    assert len(list((tmp_path / "ov").iterdir())) == 10
    done = attrcli("render", moved / "ig.h5", "--out", tmp_path / "grid.png", "--root", moved / "in")
    assert done.code == 3
    assert (tmp_path / "grid.png").exists()


def test_moved_inputs_are_found_with_root(moved, tmp_path):
    shutil.move(moved / "in", tmp_path / "elsewhere")
    assert attrcli("render", moved / "ig.h5", "--out", tmp_path / "a", "--root", tmp_path / "elsewhere").code == 0
    with h5py.File(moved / "ig.h5", "r+") as run:
        run.attrs["inputs_root"] = str(moved / "in")
    assert attrcli("render", moved / "ig.h5", "--out", tmp_path / "b").code == 3
    assert os.listdir(tmp_path / "b") == []


# -- grids ---------------------------------------------------------------------------------------------------------


def test_several_run_files_make_one_picture(done, tmp_path):
    told = attrcli("render", done / "ig.h5", done / "saliency.h5", "--out", tmp_path / "grid.png", "--limit", "10")
    assert told.code == 0
    assert "rows:    10" in told.out
    assert "columns: 2" in told.out
    drawn = pixels(tmp_path / "grid.png")
    assert drawn.shape[0] > 10 * 160
    assert drawn.shape[1] > 3 * 160
    assert texts(tmp_path / "grid.png")["methods"] == "integrated_gradients, saliency"
    again = attrcli("render", done / "ig.h5", done / "saliency.h5", "--out", tmp_path / "grid.png")
    assert again.code == 2
    assert "--force" in again.err
    assert attrcli("render", done / "ig.h5", "--out", tmp_path / "grid.png", "--force", "--scale", "run").code == 0


def test_what_a_grid_cannot_show(done, tmp_path):
    model = linear(tmp_path / "net.onnx", np.eye(2))
    explain(tmp_path / "t.h5", model=model, inputs=table(tmp_path / "x.csv", np.ones((2, 2))))
    told = attrcli("render", tmp_path / "t.h5", done / "ig.h5", "--out", tmp_path / "grid.png")
    assert told.code == 2
    assert "a grid shows images" in told.err
    told = attrcli("render", done / "ig.h5", done / "saliency.h5", "--out", tmp_path / "folder")
    assert told.code == 2
    assert ".png" in told.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--colormap", "viridis"), "diverging"),
        (("--alpha", "2"), "alpha is 2"),
        (("--percentile", "0"), "percentile"),
        (("--scale", "batch"), "scale"),
    ],
)
def test_styles_that_cannot_be(done, tmp_path, arguments, word):
    told = attrcli("render", done / "ig.h5", "--out", tmp_path / "ov", *arguments)
    assert told.code == 2
    assert word in told.err


def test_files_that_are_no_run(tmp_path):
    (tmp_path / "text.h5").write_text("x")
    for path in (MLP, tmp_path / "text.h5", tmp_path / "missing.h5"):
        told = attrcli("render", path, "--out", tmp_path / "ov")
        assert told.code == 2
        assert str(path) in told.err
    assert not (tmp_path / "ov").exists()


# -- export --------------------------------------------------------------------------------------------------------


def test_export_npz(done, tmp_path):
    told = attrcli("export", done / "ig.h5", tmp_path / "out", "--to", "npz")
    assert told.code == 0
    path = tmp_path / "out/ig.npz"
    assert told.out.split() == [str(path)]
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["attribution"], rows(done / "ig.h5")["attribution"])
        assert json.loads(str(archive["attributes"]))["method"] == "integrated_gradients"
    before = path.read_bytes()
    told = attrcli("export", done / "ig.h5", tmp_path / "out", "--to", "npz")
    assert told.code == 2
    assert "ig.npz" in told.err
    assert "--force" in told.err
    assert path.read_bytes() == before
    assert attrcli("export", done / "ig.h5", tmp_path / "out", "--to", "npz", "--force").code == 0
    assert "npz, virelay" in attrcli("export", done / "ig.h5", tmp_path / "out", "--to", "csv").err


def test_export_virelay(moved, tmp_path):
    folder = tmp_path / "project"
    told = attrcli("export", moved / "ig.h5", folder, "--to", "virelay", "--root", moved / "in")
    assert told.code == 0
    assert sorted(map(str, folder.iterdir())) == sorted(told.out.split())
    with h5py.File(folder / "ig.input.h5") as file:
        assert file["data"].shape == (12, 3, 28, 28)
        first = pixels(moved / "in" / file["sample_id"][0].decode())
        np.testing.assert_array_equal(file["data"][0].transpose(1, 2, 0), first)
    assert attrcli("export", moved / "ig.h5", folder, "--to", "virelay", "--root", moved / "in").code == 2
    next((moved / "in/Bag").iterdir()).write_bytes(b"no image")
    told = attrcli("export", moved / "ig.h5", tmp_path / "b", "--to", "virelay", "--root", moved / "in")
    assert told.code == 3
    assert not list((tmp_path / "b").glob("*.h5"))


def test_neither_a_run_file_nor_an_input_is_drawn_over(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for place in sorted(TEST.rglob("*.png"))[:2]:
        (folder / place.name).write_bytes(place.read_bytes())
    run, named = tmp_path / "run.h5", tmp_path / "run.png"
    assert attrcli("explain", CNN, folder, "-m", "gradient", "--out", run).code == 0
    named.write_bytes(run.read_bytes())
    picture = sorted(folder.iterdir())[0]
    before = {path: path.read_bytes() for path in (named, picture)}
    taken = "is a run file or an input"
    for source, out, message in ((named, named, taken), (run, picture, taken), (run, folder, "holds inputs")):
        done = attrcli("render", source, "--out", out, "--force")
        assert (done.code, message in done.err) == (2, True), done.err
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.iterdir())) == 2
