"""Methods that give one value for each position, from the command line to pictures and exports, on colour images."""

import warnings

import h5py
import numpy as np
import pytest
import torch
from cli_runs import CNN, attrcli, explain, linear, refused, table
from grid_nets import TinyVit
from PIL import Image

from attrcli.methods import METHODS, description

SIDECAR = """[input]
kind = "image"
size = [24, 36]
resize = "exact"
channels = "RGB"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A vision transformer for images of 24 x 36, with its sidecar and three pictures."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(TinyVit((3, 24, 36)).eval(), torch.randn(2, 3, 24, 36)).save(folder / "vit.pt")
    (folder / "vit.toml").write_text(SIDECAR)
    (folder / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("method", "channels", "said"),
    [
        ("attention_rollout", 1, b"2 attentions of 97 tokens, 1 of them read, grid 8x12"),
        ("grad_cam", 1, b"node layer_norm_2, Nx97x8, grid 8x12 without 1 tokens"),
        ("guided_grad_cam", 3, b"node layer_norm_2, Nx97x8, grid 8x12 without 1 tokens"),
    ],
)
def test_colour_images_to_pictures_and_exports(method, channels, said, place, tmp_path):
    out, pictures = tmp_path / "run.h5", tmp_path / "pictures"
    explain(out, "--overlays", pictures, model=place / "vit.pt", inputs=place / "images", method=method)
    with h5py.File(out) as run:
        values = run["attribution"][:]
        assert values.shape == (3, channels, 24, 36)
        assert run["message"][:].tolist() == [said] * 3
        assert (values >= 0).all() == (channels == 1)
    assert sorted(path.name for path in pictures.iterdir()) == ["0.png", "1.png", "2.png"]
    for kind in ("npz", "virelay"):
        assert attrcli("export", out, tmp_path / kind, "--to", kind).code == 0
    assert np.array_equal(np.load(tmp_path / "npz" / "run.npz")["attribution"], values)
    with h5py.File(tmp_path / "virelay" / f"run-{method}.attribution.h5") as project:
        assert np.allclose(project["attribution"][:].sum(1), values.sum(1), rtol=0, atol=1e-5 * values.max())
    assert attrcli("render", out, "--out", tmp_path / "panels", "--panel").code == 0


def test_where_the_map_is_largest_the_picture_is_reddest(place, tmp_path):
    out, pictures = tmp_path / "run.h5", tmp_path / "pictures"
    explain(out, "--overlays", pictures, model=CNN, method="grad_cam")
    with h5py.File(out) as run:
        values, name = run["attribution"][0, 0], run["sample_id"][0].decode()
    picture = np.asarray(Image.open(pictures / name).convert("RGB")).astype(int)
    red = picture[..., 0] - picture[..., 2]
    scale = len(red) // 28
    y, x = np.unravel_index(values.argmax(), values.shape)
    assert red[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].mean() > np.quantile(red, 0.9)
    assert red.min() >= 0  # nothing is below zero, and nothing blue


def test_a_node_by_name_and_what_there_is_none_for(tmp_path):
    explain(tmp_path / "run.h5", "--at", "relu_1", model=CNN, method="layer_cam")
    with h5py.File(tmp_path / "run.h5") as run:
        assert run["message"][0] == b"node relu_1, Nx48x14x14, grid 14x14"
        assert run["attribution"].shape == (6, 1, 28, 28)
        assert run.attrs["at"] == "relu_1"
    assert "no node 'reluu'" in refused(tmp_path / "a.h5", "--at", "reluu", model=CNN, method="grad_cam")


@pytest.mark.parametrize(
    "method", [name for name in METHODS if "positions" in description(name).gives or "cam" in name]
)
def test_a_model_without_what_a_method_reads_is_exit_4(method, tmp_path):
    """An MLP on images, and on a table."""
    told = "found no attention" if method == "attention_rollout" else "no node has channels and a grid"
    assert told in refused(tmp_path / "a.h5", method=method, code=4)
    told = "found no attention" if method == "attention_rollout" else "a sample of 4 has no grid of positions"
    model, inputs = linear(tmp_path / "net.onnx", np.ones((3, 4))), table(tmp_path / "x.csv", np.ones((2, 4)))
    assert told in refused(tmp_path / "b.h5", model=model, inputs=inputs, method=method, code=4)


def test_options_that_would_have_no_effect_are_refused(tmp_path):
    out = tmp_path / "x.h5"
    message = refused(out, "--at", "relu_1", "-o", "node=relu", model=CNN, method="grad_cam")
    assert "--at relu_1 and -o node=relu say the same" in message
    message = refused(out, "-o", "grid=7x7", model=CNN, method="grad_cam")
    assert "give --at NODE, too" in message


def test_inspect_says_which_work(place):
    told = attrcli("inspect", place / "vit.pt").out
    assert "attention_rollout        works" in told
    assert "excitation_backprop      no: " in told
    assert "node 'scaled_dot_product_attention_1' is op" in told or "node 'layer_norm_3' is op" in told
