"""Make every file of this folder: two small classifiers of Fashion-MNIST, their sidecars, and some images.

    python sample_models/make_samples.py [--data FOLDER] [--out FOLDER]

The data is the Debian package dataset-fashion-mnist: read from /usr/share/datasets when it is installed, else fetched
with apt-get into a temporary folder, for which root is not needed. The same machine and versions make the same weights.

Fashion-MNIST is (c) 2017 Zalando SE, MIT licence; the notice is in the README.md that this script writes.
"""

import argparse
import gzip
import io
import logging
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from attrcli.training import fit

LABELS = ("T-shirt_top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle_boot")
MEAN, STD = 0.2860, 0.3530
SEED = 0
THREADS = 2  # sums are split by thread, so the weights depend on it
TRAIN_PER_CLASS, TEST_PER_CLASS = 100, 6
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"

SIDECAR = f"""\
[input]
kind = "image"
size = [28, 28]
resize = "exact"
interpolation = "bilinear"
channels = "L"
range = [0.0, 1.0]
mean = [{MEAN:.4f}]
std = [{STD:.4f}]
layout = "NCHW"
dtype = "float32"

[output]
activation = "none"
labels = "labels.txt"
"""

README = """\
# Sample models and images

Written by `make_samples.py`; do not edit. Remake everything with

```
python sample_models/make_samples.py
```

| model | files | parameters | accuracy on the 10,000 test images | on the {test_images} in `images/test` |
|---|---|---:|---:|---:|
{rows}

- `fashion_mlp`: fully connected ReLU net 784-128-64-10. `fashion_mlp_init`: the weights that its training began from.
- `fashion_cnn`: convolutions with batch norm (not folded in any file), overlapping max pooling (3x3, stride 2), a
  residual block, global average pooling; one ReLU module used three times and two functional calls.
- Input `image`, float32 (N, 1, 28, 28) with N free: pixels scaled to 0..1, minus {mean}, divided by {std}; the
  `.toml` beside each model says the same. Output `logits`, (N, 10), in the order of `labels.txt`.
- `.pt` is TorchScript, traced (`_scripted`: compiled from source); `.onnx` has opset {opset}; `.pt2` is a
  `torch.export` program.
- Trained on all 60,000 training images with `attrcli.training.fit`, seed {seed}, torch {torch}.
- `images/test/<class>/<index>.png`: the first {test_per_class} test images of each class.
  `images/train/<class>/<index>.png`: the first {train_per_class} training images of each class ({train_images} in all).
  The index is the position in the data set.

## Splice-site nets

`splice_donor` (N, 18, 4) and `splice_acceptor` (N, 4, 53), as `.pt`, `.onnx` and `.pt2`, are Donor and Acceptor
of MMSplice 2.4.0 (Cheng et al. 2019, Genome Biology 20:48), rebuilt from the weights in its wheel by `make_splice.py`,
which checks them against a forward pass in numpy. 18,049 and 4,833 parameters; channels in the order ACGT; a donor site
begins at position 5 (GT), an acceptor site ends at position 49 (AG), counted from 0; unknown letters are zeros. Output:
the probability of a site. `sequences/donor.fasta` and `acceptor.fasta` hold 20 sites each, `controls.fasta` 10 others
without a site; all are drawn from letter frequencies, none is from a genome.

MMSplice: the MIT License. Copyright (c) 2018 Jun Cheng; the permission notice is the one below.

## Licence of the data

The images are from [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist).

The MIT License (MIT). Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


class FashionMlp(nn.Module):
    """Fully connected ReLU net 784-128-64-10 on (N, 1, 28, 28) images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, 10)."""
        x = F.relu(self.fc1(image.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class FashionCnn(nn.Module):
    """A small residual net that has what trips importers and rules: see `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._conv(1, 32)
        self.widen = self._conv(32, 48)
        self.block1 = self._conv(48, 48)
        self.block2 = self._conv(48, 48)
        self.head = self._conv(48, 64)
        self.classifier = nn.Linear(64, 10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    @staticmethod
    def _conv(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, image: Tensor) -> Tensor:
        """Logits (N, 10); one ReLU module and one overlapping pooling are reused, two ReLUs are function calls."""
        x = self.pool(self.relu(self.stem(image)))
        x = self.pool(self.relu(self.widen(x)))
        x = F.relu(x + self.block2(self.relu(self.block1(x))))
        x = F.relu(self.head(x))
        return self.classifier(x.mean((2, 3)))


# --- data ---------------------------------------------------------------------------------------------------------


@contextmanager
def data_folder(given: Path | None) -> Iterator[Path]:
    """The folder with the four files of the data set: given, installed, or fetched and gone again at the end."""
    if given is not None or INSTALLED.is_dir():
        yield given or INSTALLED
        return
    with tempfile.TemporaryDirectory() as folder:
        for command in (["apt-get", "download", PACKAGE], ["apt-get", "update"], ["apt-get", "download", PACKAGE]):
            if not list(Path(folder).glob("*.deb")):
                _run(command, folder)
        for package in Path(folder).glob("*.deb"):
            _run(["dpkg", "-x", package.name, "."], folder)
        found = Path(folder) / INSTALLED.relative_to("/")
        if not found.is_dir():
            raise SystemExit(
                f"make_samples.py: no {INSTALLED}, and apt-get could not download {PACKAGE}; "
                f"install that package, or give the folder that holds its files with --data"
            )
        yield found


def _run(command: list[str], folder: str) -> None:
    """Run quietly; what counts is whether the file is there afterwards."""
    try:
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,) of the split "train" or "t10k"."""
    images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz", header=16).reshape(-1, 1, 28, 28)
    labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz", header=8)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _read_idx(path: Path, header: int) -> np.ndarray:
    try:
        return np.frombuffer(bytearray(gzip.decompress(path.read_bytes())), np.uint8, offset=header)
    except (OSError, EOFError, ValueError) as error:
        raise SystemExit(f"make_samples.py: cannot read {path}: {error}") from error


def write_images(images: Tensor, labels: Tensor, per_class: int, folder: Path) -> Tensor:
    """Write the first `per_class` images of each class as grey PNGs named by index; return all their indices."""
    indices = torch.cat([(labels == label).nonzero()[:per_class, 0] for label in range(len(LABELS))])
    for index in indices.tolist():
        path = folder / LABELS[labels[index]] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index, 0].numpy()).save(path, optimize=True)
    return indices


def normalise(images: Tensor) -> Tensor:
    """Pixels 0..255 to model input, in the order of operations that the sidecar prescribes."""
    return (images.float() / 255 - MEAN) / STD


# --- training -----------------------------------------------------------------------------------------------------


def augment(images: Tensor) -> Tensor:
    """Mirror each image with probability 1/2 and shift the batch by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    row, column = torch.randint(0, 5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2))[:, :, row : row + 28, column : column + 28]


def plain_loss(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(module(normalise(images)), labels)


def augmented_loss(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy on mirrored and shifted images."""
    return plain_loss(module, augment(images), labels)


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions, in percent."""
    right = [
        (module(normalise(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return 100 * int(sum(right)) / len(labels)


# --- files --------------------------------------------------------------------------------------------------------


def save_torchscript(module: torch.jit.ScriptModule, path: Path) -> None:
    """Save without the source positions of torch's and this script's files, which differ between machines."""
    buffer, stripped = io.BytesIO(), io.BytesIO()
    torch.jit.save(module, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(stripped, "w") as target:
        for entry in source.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                target.writestr(entry, source.read(entry))
    stripped.seek(0)
    torch.jit.save(torch.jit.load(stripped), path)


def save_onnx(module: nn.Module, example: Tensor, path: Path, names: tuple[str, str] = ("image", "logits")) -> None:
    """Export with a free batch and with batch norm kept, and drop the exporter's notes on source positions."""
    torch.onnx.export(
        module,
        (example,),
        path,
        dynamo=True,
        optimize=False,  # the optimiser folds batch norm
        external_data=False,
        input_names=[names[0]],
        output_names=[names[1]],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    model = onnx.load(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def save_pt2(module: nn.Module, example: Tensor, path: Path) -> None:
    """Export with a free batch of at least 1, without source positions."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def save_all(module: nn.Module, stem: str, folder: Path, images: Tensor, *, scripted: bool = False) -> list[str]:
    """Write the model in every format with its sidecars, check each file against `module`, return the names."""
    example = images[:2].clone()  # a file keeps the whole storage of its example, so not a view of all images
    save_torchscript(torch.jit.trace(module, example), folder / f"{stem}.pt")
    save_onnx(module, example, folder / f"{stem}.onnx")
    save_pt2(module, example, folder / f"{stem}.pt2")
    names = [f"{stem}.pt", f"{stem}.onnx", f"{stem}.pt2"]
    if scripted:
        save_torchscript(torch.jit.script(module), folder / f"{stem}_scripted.pt")
        names.append(f"{stem}_scripted.pt")
    for name in names:
        check(module, folder / name, images)
        (folder / name).with_suffix(".toml").write_text(SIDECAR)
    return names


@torch.no_grad()
def check(module: nn.Module, path: Path, images: Tensor) -> None:
    """Raise SystemExit unless the file, loaded again, gives the outputs of `module` at three batch sizes."""
    run = load(path)
    for batch in (1, 3, 5):
        expected = module(images[:batch])
        difference = float((run(images[:batch]) - expected).abs().max() / expected.abs().max())
        if not difference <= 1e-5:
            raise SystemExit(f"make_samples.py: {path} at batch {batch} differs from the module by {difference:.1e}")


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """The model in a file, as a function."""
    if path.suffix == ".pt":
        return torch.jit.load(path)
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])


# --- all of it ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Read the data, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four *-ubyte.gz files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write (default: here)")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit's own
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")  # torch.export's own
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # would say four times that torchvision is absent
    started = time.monotonic()

    with data_folder(arguments.data) as folder:
        train, test = read_split(folder, "train"), read_split(folder, "t10k")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "labels.txt").write_text("\n".join(LABELS) + "\n")
    write_images(*train, TRAIN_PER_CLASS, out / "images" / "train")
    bundled = write_images(*test, TEST_PER_CLASS, out / "images" / "test")
    example = normalise(test[0][bundled])
    rows: list[str] = []

    def write(module: nn.Module, stem: str, scripted: bool = False) -> None:
        names = save_all(module.eval(), stem, out, example, scripted=scripted)
        shares = accuracy(module, *test), accuracy(module, *(array[bundled] for array in test))
        parameters = sum(parameter.numel() for parameter in module.parameters())
        files = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {stem} | {files} | {parameters:,} | {shares[0]:.2f} % | {shares[1]:.1f} % |")
        print(f"{stem}: {parameters:,} parameters, test accuracy {shares[0]:.2f} %", flush=True)

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:

        def train_model(module: nn.Module, stem: str, loss: Callable[..., Tensor], epochs: int, lr: float) -> None:
            task = progress.add_task(f"training {stem}", total=None)
            fit(
                module,
                train,
                loss,
                epochs=epochs,
                lr=lr,
                seed=SEED,
                weight_decay=0.01,
                on_step=lambda step, steps, _: progress.update(task, completed=step, total=steps),
            )

        mlp = FashionMlp()
        write(mlp, "fashion_mlp_init")
        train_model(mlp, "fashion_mlp", plain_loss, epochs=12, lr=3e-3)
        write(mlp, "fashion_mlp")
        cnn = FashionCnn()
        train_model(cnn, "fashion_cnn", augmented_loss, epochs=12, lr=6e-3)
        write(cnn, "fashion_cnn", scripted=True)

    readme = README.format(
        rows="\n".join(rows),
        mean=MEAN,
        std=STD,
        seed=SEED,
        torch=torch.__version__,
        opset=onnx.load(out / "fashion_cnn.onnx").opset_import[0].version,
        test_images=TEST_PER_CLASS * len(LABELS),
        train_images=f"{TRAIN_PER_CLASS * len(LABELS):,}",
        test_per_class=TEST_PER_CLASS,
        train_per_class=TRAIN_PER_CLASS,
    )
    (out / "README.md").write_text(readme)
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
