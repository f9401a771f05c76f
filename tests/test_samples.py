"""The bundled models and images are what sample_models/README.md says, read with everything but attrcli."""

import tomllib
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor

SAMPLES = Path(__file__).parent.parent / "sample_models"
STEMS = ("fashion_mlp_init", "fashion_mlp", "fashion_cnn")
FILES = (*(f"{stem}{suffix}" for stem in STEMS for suffix in (".pt", ".onnx", ".pt2")), "fashion_cnn_scripted.pt")


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path)


@torch.no_grad()
def run(path: Path, x: np.ndarray) -> np.ndarray:
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"image": x})[0]
    if path.suffix == ".pt2":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.export.load(path).module()
        return module(torch.from_numpy(x)).numpy()
    return load_torchscript(path)(torch.from_numpy(x)).numpy()


def parameters(path: Path) -> dict[str, Tensor]:
    return dict(load_torchscript(path).named_parameters())


@pytest.fixture(scope="module")
def images() -> tuple[np.ndarray, np.ndarray]:
    """The bundled test images as model input, prepared as the sidecar says, and the classes of their folders."""
    sidecar = tomllib.loads((SAMPLES / "fashion_cnn.toml").read_text())["input"]
    labels = (SAMPLES / "labels.txt").read_text().split()
    paths = sorted((SAMPLES / "images" / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path), np.float32) for path in paths])[:, None] / np.float32(255)
    x = (pixels - np.float32(sidecar["mean"][0])) / np.float32(sidecar["std"][0])
    return x, np.array([labels.index(path.parent.name) for path in paths])


def test_the_whole_folder_is_under_6_mb() -> None:
    files = [path for path in SAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6_000_000


@pytest.mark.parametrize(("split", "per_class"), [("test", 6), ("train", 100)])
def test_images_are_small_grey_pngs_in_class_folders(split: str, per_class: int) -> None:
    labels = (SAMPLES / "labels.txt").read_text().splitlines()
    folder = SAMPLES / "images" / split
    assert len(labels) == 10
    assert sorted(path.name for path in folder.iterdir()) == sorted(labels)
    for label in labels:
        paths = list((folder / label).iterdir())
        assert len(paths) == per_class
        for path in paths:
            assert path.suffix == ".png"
            assert len(path.stem) == 5
            assert path.stem.isdigit()
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))


@pytest.mark.parametrize("name", FILES)
def test_every_model_has_a_sidecar_with_labels(name: str) -> None:
    sidecar = tomllib.loads((SAMPLES / name).with_suffix(".toml").read_text())
    assert sidecar["input"] == {
        "kind": "image",
        "size": [28, 28],
        "resize": "exact",
        "interpolation": "bilinear",
        "channels": "L",
        "range": [0.0, 1.0],
        "mean": [0.286],
        "std": [0.353],
        "layout": "NCHW",
        "dtype": "float32",
    }
    assert sidecar["output"] == {"activation": "none", "labels": "labels.txt"}
    assert (SAMPLES / sidecar["output"]["labels"]).is_file()


@pytest.mark.parametrize("name", FILES)
def test_every_file_agrees_with_onnx_runtime_at_any_batch(name: str, images: tuple[np.ndarray, np.ndarray]) -> None:
    oracle = (SAMPLES / name.replace("_scripted", "")).with_suffix(".onnx")
    for batch in (1, 3, 5, len(images[0])):
        x = images[0][:batch]
        expected = run(oracle, x)
        assert expected.shape == (batch, 10)
        np.testing.assert_allclose(run(SAMPLES / name, x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stem", ["fashion_mlp", "fashion_cnn"])
def test_bundled_images_are_mostly_classified_right(stem: str, images: tuple[np.ndarray, np.ndarray]) -> None:
    x, labels = images
    assert len(labels) == 60
    assert (run(SAMPLES / f"{stem}.onnx", x).argmax(1) == labels).mean() >= 0.8


@pytest.mark.parametrize("stem", STEMS)
def test_onnx_has_a_free_batch_and_lies_in_one_file(stem: str) -> None:
    model = onnx.load(SAMPLES / f"{stem}.onnx", load_external_data=False)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [dim.dim_value for dim in image.type.tensor_type.shape.dim][1:] == [1, 28, 28]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_cnn_is_small_and_keeps_what_makes_it_hard() -> None:
    assert sum(tensor.numel() for tensor in parameters(SAMPLES / "fashion_cnn.pt").values()) <= 100_000
    graph = onnx.load(SAMPLES / "fashion_cnn.onnx").graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("BatchNormalization") == 5
    assert ops.count("Add") == 1  # the residual connection
    assert ops.count("Relu") == 5
    pools = [{a.name: list(a.ints) for a in node.attribute} for node in graph.node if node.op_type == "MaxPool"]
    assert [(pool["kernel_shape"], pool["strides"]) for pool in pools] == [([3, 3], [2, 2])] * 2


def test_initial_mlp_has_the_same_parameters_before_training() -> None:
    trained, initial = (parameters(SAMPLES / f"{stem}.pt") for stem in ("fashion_mlp", "fashion_mlp_init"))
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        "fc1.weight": (128, 784),
        "fc1.bias": (128,),
        "fc2.weight": (64, 128),
        "fc2.bias": (64,),
        "fc3.weight": (10, 64),
        "fc3.bias": (10,),
    }
    for name, tensor in initial.items():
        bound = 1 / trained[name.replace("bias", "weight")].shape[1] ** 0.5  # of nn.Linear's uniform initialisation
        assert tensor.shape == trained[name].shape
        assert tensor.abs().max() <= bound
        assert not torch.equal(tensor, trained[name])


@pytest.mark.parametrize("name", FILES)
def test_no_file_tells_where_it_was_made(name: str) -> None:
    path = SAMPLES / name
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(entry) for entry in archive.namelist())
    else:
        content = path.read_bytes()
    assert not any(word in content for word in (b"site-packages", b"make_samples", b"/home/"))
