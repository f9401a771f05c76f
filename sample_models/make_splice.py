"""Make the splice-site nets of this folder, their sidecars, and the sequences: from the weights in mmsplice's wheel.

    pip download --no-deps mmsplice==2.4.0
    python sample_models/make_splice.py mmsplice-2.4.0-py2.py3-none-any.whl [--out FOLDER]

The nets are Donor and Acceptor of MMSplice (Cheng et al. 2019, Genome Biology 20:48), rebuilt in torch from the Keras
files and checked against a forward pass written in numpy. MMSplice is (c) 2018 Jun Cheng, MIT licence: see README.md.

The sequences are drawn, with a seed, from letter frequencies near those that Shapiro and Senapathy 1987 published for
splice sites; none is from a genome.
"""

import argparse
import io
import logging
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
from make_samples import check, save_onnx, save_pt2, save_torchscript
from torch import Tensor, nn

SEED = 0
EPSILON = 1e-3  # of Keras's batch norm
SITES, CONTROLS = 20, 10
BACKGROUND = (0.3, 0.2, 0.2, 0.3)

# Frequencies of A, C, G, T at the positions of a site, by its place from the first letter.
DONOR = {  # 5 letters of exon, then 13 of intron
    2: (0.35, 0.35, 0.19, 0.11),
    3: (0.60, 0.13, 0.13, 0.14),
    4: (0.09, 0.03, 0.80, 0.08),
    5: (0, 0, 1, 0),
    6: (0, 0, 0, 1),
    7: (0.59, 0.03, 0.35, 0.03),
    8: (0.71, 0.08, 0.12, 0.09),
    9: (0.08, 0.05, 0.81, 0.06),
    10: (0.16, 0.18, 0.21, 0.45),
}
ACCEPTOR = {  # 50 letters of intron, then 3 of exon
    **dict.fromkeys(range(30, 46), (0.10, 0.33, 0.10, 0.47)),
    47: (0.05, 0.65, 0.01, 0.29),
    48: (1, 0, 0, 0),
    49: (0, 0, 1, 0),
    50: (0.25, 0.15, 0.50, 0.10),
}

SIDECAR = """\
[input]
kind = "sequence"
alphabet = "ACGT"
size = [{length}]
unknown = "zero"
layout = "{layout}"
dtype = "float32"

[output]
activation = "sigmoid"
labels = ["none", "{name}"]
"""


class Donor(nn.Module):
    """Three dense layers on (N, 18, 4), as Keras has it: 5 letters of exon, 13 of intron."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.dense1, self.dense2, self.dense3 = (_dense(weights, name) for name in ("dense1", "dense2", "dense_1"))
        self.norm1, self.norm2 = (_norm(weights, f"batch_normalization_{number}") for number in (1, 2))

    def forward(self, sequence: Tensor) -> Tensor:
        """Probability of a donor site, (N, 1)."""
        x = torch.relu(self.norm1(self.dense1(sequence.flatten(1))))
        x = torch.relu(self.norm2(self.dense2(x)))
        return torch.sigmoid(self.dense3(x))


class Acceptor(nn.Module):
    """Two convolutions and a dense layer on (N, 4, 53): 50 letters of intron, 3 of exon."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.convolution1, self.convolution2 = (_convolution(weights, name) for name in ("convSpliceSite", "conv1by1"))
        self.norm1, self.norm2 = (_norm(weights, f"batch_normalization_{number}") for number in (1, 2))
        self.dense = _dense(weights, "denseSS")

    def forward(self, sequence: Tensor) -> Tensor:
        """Probability of an acceptor site, (N, 1)."""
        x = self.norm1(torch.relu(self.convolution1(sequence)))
        x = self.norm2(torch.relu(self.convolution2(x)))
        return torch.sigmoid(self.dense(x.transpose(1, 2).flatten(1)))  # Keras flattens position by position


def _filled(layer: nn.Module, **values: np.ndarray) -> nn.Module:
    layer.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in values.items()}, strict=False)
    return layer


def _dense(weights: dict[str, np.ndarray], name: str) -> nn.Module:
    kernel = weights[f"{name}/kernel"]
    return _filled(nn.Linear(*kernel.shape), weight=kernel.T, bias=weights[f"{name}/bias"])


def _convolution(weights: dict[str, np.ndarray], name: str) -> nn.Module:
    kernel = weights[f"{name}/kernel"]  # (k, in, out)
    layer = nn.Conv1d(kernel.shape[1], kernel.shape[2], kernel.shape[0], padding="same")
    return _filled(layer, weight=kernel.transpose(2, 1, 0), bias=weights[f"{name}/bias"])


def _norm(weights: dict[str, np.ndarray], name: str) -> nn.Module:
    parts = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    values = {ours: weights[f"{name}/{theirs}"] for ours, theirs in parts.items()}
    return _filled(nn.BatchNorm1d(len(values["weight"]), eps=EPSILON), **values)


def read_weights(wheel: Path, name: str) -> dict[str, np.ndarray]:
    """The weights of one of MMSplice's Keras files, by layer/part."""
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(f"mmsplice/models/{name}.h5"))
    found = {}
    with h5py.File(content) as file:

        def keep(path: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                layer, *_, part = path.split("/")
                found[f"{layer}/{part.removesuffix(':0')}"] = item[...]

        file["model_weights"].visititems(keep)
    return found


# --- what the nets must give, by numpy alone and in Keras's own layout, (N, L, 4) -----------------------------------


def by_hand(name: str, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Probabilities (N, 1) of Donor or Acceptor on (N, L, 4), float64."""

    def dense(x: np.ndarray, layer: str) -> np.ndarray:
        return x @ weights[f"{layer}/kernel"].astype(np.float64) + weights[f"{layer}/bias"]

    def norm(x: np.ndarray, layer: str) -> np.ndarray:
        gamma, beta, mean, variance = (
            weights[f"{layer}/{part}"].astype(np.float64)
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta

    x = x.astype(np.float64)
    if name == "Donor":
        x = np.maximum(norm(dense(x.reshape(len(x), -1), "dense1"), "batch_normalization_1"), 0)
        x = np.maximum(norm(dense(x, "dense2"), "batch_normalization_2"), 0)
        return 1 / (1 + np.exp(-dense(x, "dense_1")))
    kernel = weights["convSpliceSite/kernel"].astype(np.float64)
    half = len(kernel) // 2
    padded = np.pad(x, ((0, 0), (half, half), (0, 0)))
    windows = np.stack([padded[:, at : at + len(kernel)] for at in range(x.shape[1])], 1)
    x = norm(np.maximum(np.einsum("nlki,kio->nlo", windows, kernel) + weights["convSpliceSite/bias"], 0),
             "batch_normalization_1")  # fmt: skip
    x = x @ weights["conv1by1/kernel"][0].astype(np.float64) + weights["conv1by1/bias"]
    x = norm(np.maximum(x, 0), "batch_normalization_2")
    return 1 / (1 + np.exp(-dense(x.reshape(len(x), -1), "denseSS")))


# --- sequences ------------------------------------------------------------------------------------------------------


def drawn(generator: np.random.Generator, length: int, site: dict[int, tuple[float, ...]]) -> str:
    """A sequence with the letters of a site in the middle of others."""
    shares = [np.array(site.get(place, BACKGROUND)) for place in range(length)]
    return "".join(generator.choice(list("ACGT"), p=share / share.sum()) for share in shares)


def fasta(names: list[str], sequences: list[str]) -> str:
    """The text of a FASTA file."""
    return "".join(f">{name}\n{sequence}\n" for name, sequence in zip(names, sequences, strict=True))


def encoded(sequences: list[str]) -> Tensor:
    """One-hot, (N, 4, L), in the order ACGT."""
    return torch.tensor([[[float(letter == base) for letter in text] for base in "ACGT"] for text in sequences])


def main() -> None:
    """Read the weights, build and check the nets, write them and the sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="mmsplice-2.4.0-py2.py3-none-any.whl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write (default: here)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit's own
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")  # torch.export's own
    warnings.filterwarnings("ignore", message="Using padding='same'")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    out: Path = arguments.out
    (out / "sequences").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    for name, kind, length, site in (("Donor", Donor, 18, DONOR), ("Acceptor", Acceptor, 53, ACCEPTOR)):
        weights = read_weights(arguments.wheel, name)
        net, stem = kind(weights).eval(), f"splice_{name.lower()}"
        texts = [drawn(generator, length, site) for _ in range(SITES)]
        (out / "sequences" / f"{name.lower()}.fasta").write_text(
            fasta([f"{name.lower()}_{number:02d}" for number in range(SITES)], texts)
        )
        x = encoded(texts)
        inputs = x.transpose(1, 2).contiguous() if name == "Donor" else x
        with torch.no_grad():
            found, expected = net(inputs).numpy(), by_hand(name, weights, x.transpose(1, 2).numpy())
        if not np.abs(found - expected).max() < 1e-5:
            raise SystemExit(f"make_splice.py: {name} in torch is not what Keras computes: {found - expected}")
        example = inputs[:2].clone()
        save_torchscript(torch.jit.trace(net, example), out / f"{stem}.pt")
        save_onnx(net, example, out / f"{stem}.onnx", ("sequence", "probability"))
        save_pt2(net, example, out / f"{stem}.pt2")
        for suffix in (".pt", ".onnx", ".pt2"):
            check(net, out / f"{stem}{suffix}", inputs)
        layout = "NLC" if name == "Donor" else "NCL"
        (out / f"{stem}.toml").write_text(SIDECAR.format(length=length, layout=layout, name=name.lower()))
        print(f"{stem}: numpy and torch differ by {np.abs(found - expected).max():.1e}; median {np.median(found):.3f}")
    controls = [drawn(generator, 53, {}) for _ in range(CONTROLS)]
    names = [f"control_{number:02d}" for number in range(CONTROLS)]
    (out / "sequences" / "controls.fasta").write_text(fasta(names, controls))


if __name__ == "__main__":
    main()
