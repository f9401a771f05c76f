import json
import os

import h5py
import numpy as np
import pytest
from store_runs import ATTRIBUTES, batch, fill, make, names

from attrcli.errors import InputError, UsageError
from attrcli.export import export
from attrcli.store import Layout, RunFile, RunWriter, Status

IDS = names(6)
FILES = ["run.input.h5", "run-gradient.attribution.h5", "label-map.json", "project.yaml"]


def layout(channels, size=(8, 9)):
    return Layout((channels, *size), (5,), ("channel", "y", "x"))


def images(channels, size=(8, 9)):
    """A reader of pictures that are all different."""

    def read(ids):
        return np.stack(
            [np.random.default_rng(IDS.index(name)).integers(0, 256, (*size, channels), "u1") for name in ids]
        )

    return read


def mixed_run(path, channels=3):
    """Six rows: the third failed, the last has no label."""
    with RunWriter.open(path, IDS, layout(channels), ATTRIBUTES) as writer:
        columns = batch(IDS, layout(channels))
        columns["label"][:] = [0, 1, 2, 3, 4, 65535]
        writer.write(slice(None), columns, [1, 1, 2, 1, 1, 1], ["", "", "broken image", "", "", ""])
        writer.finish()
    return path


@pytest.fixture
def run(tmp_path):
    return mixed_run(tmp_path / "run.h5")


# Any format ---------------------------------------------------------------------------------------------------------


def test_an_unknown_format_names_the_choices(run, tmp_path):
    with pytest.raises(UsageError, match="--to parquet: not a format; choose one of npz, virelay"):
        export(run, "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_a_run_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        export(tmp_path / "none.h5", "npz", tmp_path)


@pytest.mark.parametrize("to", ["npz", "virelay"])
def test_existing_files_are_overwritten_only_with_force(run, tmp_path, to):
    out = tmp_path / "deep" / "out"
    made = export(run, to, out, images=images(3))
    assert sorted(made) == sorted(out.iterdir())
    made[-1].write_text("mine")
    with pytest.raises(UsageError, match=rf"already holds .*{made[-1].name}.*--force"):
        export(run, to, out, images=images(3))
    assert made[-1].read_text() == "mine"
    assert export(run, to, out, images=images(3), force=True) == made
    assert made[-1].read_bytes() != b"mine"


def test_a_file_in_place_of_the_folder_is_named(run, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match=r"cannot write .*out: file exists"):
        export(run, "npz", tmp_path / "out")


# npz ----------------------------------------------------------------------------------------------------------------


def test_npz_holds_every_dataset_and_the_attributes(run, tmp_path):
    [path] = export(run, "npz", tmp_path / "out")
    assert path.name == "run.npz"
    with np.load(path, allow_pickle=False) as arrays, RunFile(run) as expected:
        assert set(arrays) == {*expected.columns, "attributes"}
        for name in expected.columns:
            np.testing.assert_array_equal(arrays[name], expected.read(name))
        assert arrays["sample_id"].tolist() == IDS
        assert arrays["status"].tolist() == [1, 1, 2, 1, 1, 1]
        assert arrays["message"][2] == "broken image"
        assert np.isnan(arrays["attribution"][2]).all()
        assert json.loads(str(arrays["attributes"])) == expected.attributes


def test_npz_of_a_run_in_progress_and_of_a_table(tmp_path):
    table = Layout((7,), (), ("feature",))
    with RunWriter.open(tmp_path / "table.h5", IDS, table, ATTRIBUTES) as writer:
        fill(writer, limit=1)
    [path] = export(tmp_path / "table.h5.part", "npz", tmp_path)
    assert path.name == "table.npz"
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["attribution"][:4], batch(IDS, table)["attribution"][:4].astype("f4"))
        assert np.isnan(arrays["attribution"][4:]).all()


# ViRelAy ------------------------------------------------------------------------------------------------------------


def test_virelay_files_hold_the_ok_rows_in_one_order(run, tmp_path):
    made = export(run, "virelay", tmp_path / "out", images=images(3))
    assert [path.name for path in made] == FILES
    good = [name for name in IDS if name != IDS[2]]
    with h5py.File(made[0]) as inputs, h5py.File(made[1]) as maps, RunFile(run) as source:
        assert "index" not in maps
        for file in (inputs, maps):
            assert [text.decode() for text in file["sample_id"]] == good
            assert file["label"][...].tolist() == [0, 1, 3, 4, 65535]
        assert inputs["data"].dtype == np.uint8
        np.testing.assert_array_equal(inputs["data"][...].transpose(0, 2, 3, 1), images(3)(good))
        keep = source.status == Status.OK
        for name in ("attribution", "prediction"):
            assert maps[name].dtype == np.float32
            np.testing.assert_array_equal(maps[name][...], source.read(name)[keep])


def test_virelay_makes_three_channels_of_one_and_keeps_the_sum(tmp_path):
    run = mixed_run(tmp_path / "grey.h5", channels=1)
    inputs, maps, *_ = export(run, "virelay", tmp_path / "out", images=images(1))
    with h5py.File(inputs) as pixels, h5py.File(maps) as exported, RunFile(run) as source:
        assert pixels["data"].shape == exported["attribution"].shape == (5, 3, 8, 9)
        np.testing.assert_array_equal(pixels["data"][:, 2], pixels["data"][:, 0])
        expected = source.read("attribution")[source.status == Status.OK][:, 0]
        np.testing.assert_allclose(exported["attribution"][...].sum(1), expected, rtol=1e-6)


def test_virelay_label_map_covers_outputs_labels_and_unlabelled_rows(run, tmp_path):
    *_, label_map, _ = export(run, "virelay", tmp_path / "out", images=images(3), labels=["T-shirt", "trouser"])
    rows = json.loads(label_map.read_text())
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4, 65535]
    assert [row["name"] for row in rows] == ["T-shirt", "trouser", "class 2", "class 3", "class 4", "unlabelled"]
    assert len({row["word_net_id"] for row in rows}) == 6


@pytest.mark.parametrize(
    ("target", "strategy"), [("predicted", "predicted_label"), ("label", "true_label"), (3, "target 3")]
)
def test_virelay_project_says_what_was_explained(tmp_path, target, strategy):
    run = make(tmp_path / "run.h5", IDS, ATTRIBUTES | {"target": target, "model": "cnn.onnx"}, layout(3))
    *_, path = export(run, "virelay", tmp_path / "out", images=images(3), name="fashion")
    project = json.loads(path.read_text())["project"]
    assert project["name"] == "fashion-gradient"
    assert project["model"] == "cnn.onnx"
    assert project["attributions"]["attribution_strategy"] == strategy
    assert project["attributions"]["sources"] == ["fashion-gradient.attribution.h5"]
    assert project["dataset"]["path"] == "fashion.input.h5"


@pytest.mark.parametrize(
    "shape",
    [Layout((7,), (5,), ("feature",)), Layout((4, 6), (5,), ("base", "position")), layout(2), layout(3, (2, 9))],
)
def test_virelay_refuses_what_is_not_an_image(tmp_path, shape):
    run = make(tmp_path / "run.h5", IDS, layout=shape)
    with pytest.raises(UsageError, match=r"ViRelAy shows images only.*--to npz"):
        export(run, "virelay", tmp_path / "out", images=images(3))
    assert not (tmp_path / "out").exists()


def test_virelay_needs_images_and_a_good_row(tmp_path):
    with RunWriter.open(tmp_path / "run.h5", IDS, layout(3), ATTRIBUTES) as writer:
        writer.write(slice(None), {}, Status.ERROR, "no")
        writer.finish()
    with pytest.raises(UsageError, match="needs the images"):
        export(tmp_path / "run.h5", "virelay", tmp_path / "out")
    with pytest.raises(UsageError, match="no row is ok"):
        export(tmp_path / "run.h5", "virelay", tmp_path / "out", images=images(3))


def test_virelay_leaves_nothing_when_an_image_is_gone_or_unfit(run, tmp_path):
    def gone(ids):
        raise FileNotFoundError(2, "No such file", ids[0])

    for read, error in ((gone, InputError), (images(4), ValueError), (images(3, (9, 8)), ValueError)):
        with pytest.raises(error):
            export(run, "virelay", tmp_path / "out", images=read)
        assert os.listdir(tmp_path / "out") == []


@pytest.mark.filterwarnings("ignore:.*mode.*parameter:DeprecationWarning")  # Pillow 11 about ViRelAy's own call
@pytest.mark.parametrize("channels", [1, 3])
def test_virelay_serves_the_project(tmp_path, channels):
    server = pytest.importorskip("virelay.server", reason="virelay is not installed")
    from virelay.model import Workspace

    run = mixed_run(tmp_path / "run.h5", channels)
    *_, project = export(run, "virelay", tmp_path / "out", images=images(channels))
    workspace = Workspace()
    workspace.add_project(str(project))
    client = server.Server(workspace).app.test_client()
    try:
        assert client.get("/api/projects").json[0]["name"] == "run-gradient"
        assert client.get("/api/projects/0").json["analysisMethods"] == []
        good = [row for row in range(6) if row != 2]
        label = ["class 0", "class 1", "class 3", "class 4", "unlabelled"]
        with RunFile(run) as source:
            for place, row in enumerate(good):
                sample = client.get(f"/api/projects/0/dataset/{place}").json
                assert [entry["name"] for entry in sample["labels"]] == [label[place]]
                pixels = workspace.get_project("run-gradient").get_sample(place).data
                np.testing.assert_array_equal(pixels, np.broadcast_to(images(channels)([IDS[row]])[0], (8, 9, 3)))
                shown = client.get(f"/api/projects/0/attributions/{place}?imageMode=overlay").json
                assert [entry["name"] for entry in shown["labels"]] == [label[place]]
                np.testing.assert_array_equal(np.float32(shown["prediction"]), source["prediction"][row])
                heat = workspace.get_project("run-gradient").get_attribution(place).data
                np.testing.assert_allclose(heat.sum(-1), source["attribution"][row].sum(0), rtol=1e-5, atol=1e-6)
                urls = [f"/api/projects/0/dataset/{place}/image", *shown["urls"].values()]
                urls += [url.replace("superimpose=True", "superimpose=False") for url in shown["urls"].values()]
                assert len(urls) == 17
                for url in urls:
                    answer = client.get(url)
                    assert (answer.status_code, answer.mimetype) == (200, "image/jpeg")
                    answer.close()
            assert client.get("/api/projects/0/attributions/5").status_code == 404
    finally:
        workspace.close()
