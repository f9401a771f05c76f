"""What a file is, told by its content, and how to save it properly; whatever is damaged is a ModelError of one line."""

import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from nets import quiet
from torch import nn

from attrcli import formats
from attrcli.errors import ModelError
from attrcli.formats.detect import identify

SAMPLES = Path(__file__).parents[2] / "sample_models"


class Net(nn.Sequential):
    """A class of the user's own."""


class Opens:
    """A pickle of this creates a file when it is loaded."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize(
    ("file", "kind"), [("fashion_cnn.pt", "torchscript"), ("fashion_mlp.pt2", "pt2"), ("fashion_cnn.onnx", "onnx")]
)
def test_the_suffix_does_not_count(file, kind, tmp_path):
    for suffix in (".pt", ".onnx", ".bin", ""):
        copy = tmp_path / f"model{suffix}"
        copy.write_bytes((SAMPLES / file).read_bytes())
        assert identify(copy) == kind
        assert formats.load(copy).format == kind


def torch_saved(value, *, legacy=False):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def hdf5():
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["model_weights"] = np.zeros(3)
    return buffer.getvalue()


def safetensors():
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


FOREIGN = {
    "whole module": (lambda: torch_saved(Net(nn.Linear(2, 2))), "whole pickled module, class .*Net.*torch.jit.trace"),
    "state dict": (lambda: torch_saved(nn.Linear(2, 2).state_dict()), "state dict: weights only.*torch.onnx.export"),
    "legacy module": (lambda: torch_saved(Net(nn.Linear(2, 2)), legacy=True), "whole pickled module, class .*Net"),
    "legacy state dict": (lambda: torch_saved(nn.Linear(2, 2).state_dict(), legacy=True), "state dict: weights only"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a pickle .plain data.; attrcli never unpickles"),
    "scikit-learn": (lambda: pickle.dumps(Path("x")), "a pickle .*pathlib"),
    "keras h5": (hdf5, "HDF5 file .Keras.*tf2onnx.convert --keras"),
    "keras": (lambda: zipped(**{"config.json": "{}", "model.weights.h5": "x"}), "Keras model.*tf2onnx"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite.*tf2onnx --tflite"),
    "safetensors": (safetensors, "safetensors file holds weights only.*torch.jit.trace"),
    "gguf": (lambda: b"GGUF\3\0\0\0" + bytes(40), "GGUF file holds weights only"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "empty": (lambda: b"", "the file is empty"),
    "aoti": (lambda: zipped(**{"m/archive_format": "pt2", "m/data/aotinductor/m/x.so": "x"}), "AOTInductor"),
    "other zip": (lambda: zipped(**{"a.txt": "x"}), "neither TorchScript nor .pt2"),
    "tar": (tarred, "not a TorchScript, ONNX or .pt2 file"),
    "text": (lambda: b"hello", "not a TorchScript, ONNX or .pt2 file"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(30), "not a TorchScript, ONNX or .pt2 file"),
    "old pt2": (lambda: zipped(**{"serialized_exported_program.json": "{}", "version": "1"}), "older than 2.8"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_named_with_the_way_out(name, tmp_path):
    make, message = FOREIGN[name]
    path = tmp_path / "model.pt"
    with quiet():
        path.write_bytes(make())
    with pytest.raises(ModelError, match=rf"model\.pt: .*{message}") as caught:
        formats.load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_directories_and_missing_files(tmp_path):
    with pytest.raises(ModelError, match="is a directory"):
        formats.load(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(ModelError, match=r"TensorFlow SavedModel.*tf2onnx.convert --saved-model"):
        formats.load(tmp_path)
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        formats.load(tmp_path / "missing.pt")
    (tmp_path / "graph.pb").write_bytes(b"\n\x05hello")
    with pytest.raises(ModelError, match=r"TensorFlow graph.*--graphdef"):
        formats.load(tmp_path / "graph.pb")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_users_pickle_is_never_run(legacy, tmp_path):
    path, file = tmp_path / "model.pt", tmp_path / "written"
    path.write_bytes(torch_saved(Opens(file), legacy=legacy))
    with pytest.raises(ModelError, match="never unpickles"):
        formats.load(path)
    assert not file.exists()


@pytest.mark.parametrize("file", ["fashion_cnn_scripted.pt", "fashion_mlp.pt2", "fashion_cnn.onnx"])
def test_truncated_files_are_model_errors(file, tmp_path):
    data = (SAMPLES / file).read_bytes()
    path = tmp_path / file
    for size in (1, 3, 10, 100, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ModelError, match=file) as caught:
            formats.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["fashion_cnn_scripted.pt", "fashion_mlp.pt2"])
def test_changed_bytes_are_model_errors(file, tmp_path):
    """Zip archives carry a checksum of every entry, so that whatever is loaded is what was saved."""
    data = (SAMPLES / file).read_bytes()
    draw = random.Random(file)
    path = tmp_path / file
    failed = 0
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(3):
            near_end = draw.random() < 0.5
            changed[draw.randrange(len(data) - 3000 if near_end else 0, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            formats.load(path)
        except ModelError as error:
            failed += "\n" not in str(error)
    assert failed >= 40


@pytest.mark.parametrize("file", ["fashion_cnn.pt", "fashion_cnn.pt2", "fashion_mlp.pt2"])
def test_an_archive_that_is_cut_short_is_not_taken_for_one_that_lies_in_it(file, tmp_path):
    """A .pt2 holds its sample inputs as an archive of torch.save, whose list is the last when the .pt2's is gone."""
    data = (SAMPLES / file).read_bytes()
    for lost in (1, 22, 2000, len(data) // 100, len(data) // 2):
        (tmp_path / "model.bin").write_bytes(data[:-lost])
        with pytest.raises(ModelError, match=r"model\.bin: a damaged or truncated archive \("):
            identify(tmp_path / "model.bin")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_random_bytes_are_model_errors(size, tmp_path):
    draw = random.Random(size)
    path = tmp_path / "model.pt"
    for first in (b"", b"PK\x03\x04", b"\x08", b"\x80\x02", b"\n"):
        path.write_bytes(first + draw.randbytes(size))
        with pytest.raises(ModelError, match=r"model\.pt"):
            formats.load(path)
