"""DeepLIFT against its authors' package, by frozen numbers: an oracle from elsewhere that is no dependency.

`deeplift_golden.npz` holds, for each net, the multipliers of RULES in order, (rules, 4, *shape). They were made by
deeplift 0.6.13.0 from PyPI (Shrikumar, Greenside, Kundaje) on TensorFlow 2.21 through tf.compat.v1, its float32 read as
float64: its layers (Dense, Conv1D, Conv2D, BatchNormalization, AvgPool1D, MaxPool1D, Flatten, ReLU, Tanh, Sigmoid,
Softmax) with these weights, explained at the last layer before a softmax or a sigmoid, in the modes Rescale,
RevealCancel and DeepLIFT_GenomicsDefault (where there is a convolution, and where it does not refuse). Its
contributions were these multipliers times the differences. Where a part of RevealCancel is 0, it takes 1e-7 for it:
hence TINY.

Not compared is what differs by intent: its max pools where the winner is another at the baseline, which do not sum to
delta; a ReLU that rests on its kink at the baseline (no biases, zeros), where its 1e-7 is above 0 for the negative part
as well; tanh and sigmoid where nothing differs, whose slope it takes at f(z) in place of z; an activation behind
another one without a linear op between, which shares out the parts of the first.

The hypothetical contributions, means over given baselines, are those of tangermeme 1.6.0 (deep_lift_shap) in float64.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from method_nets import away, open_net, target
from torch import nn

from attrcli import methods, sequences

GOLDEN = np.load(Path(__file__).with_name("deeplift_golden.npz"))
RULES = ("rescale", "revealcancel", "genomics")
EXACT, TINY = 1e-12, 1e-6

NETS: dict[str, tuple[int, tuple[int, ...], str]] = {
    "mlp 1": (6, (6,), "dense 5, relu, dense 3"),
    "mlp 2": (8, (6,), "dense 6, relu, dense 5, relu, dense 3"),
    "mlp 3": (10, (6,), "dense 6, relu, dense 6, relu, dense 5, relu, dense 3"),
    "mlp 1, no biases": (7, (6,), "matrix 5, relu, matrix 3"),
    "mlp 2, no biases": (9, (6,), "matrix 6, relu, matrix 5, relu, matrix 3"),
    "mlp 3, no biases": (11, (6,), "matrix 6, relu, matrix 6, relu, matrix 5, relu, matrix 3"),
    "mlp, smooth": (14, (6,), "dense 6, tanh, dense 5, sigmoid, dense 3"),
    "mlp, batch norm": (12, (6,), "dense 6, norm, relu, dense 5, norm, tanh, dense 3"),
    "mlp, softmax": (15, (6,), "dense 6, relu, dense 5, relu, dense 3, softmax"),
    "mlp, sigmoid": (13, (6,), "dense 6, relu, dense 5, relu, dense 1, sigmoid"),
    "cnn": (0, (4, 9), "conv 5 3, relu, flatten, dense 5, relu, dense 3"),
    "cnn, softmax": (5, (4, 9), "conv 4 3, norm, relu, conv 3 3, relu, flatten, dense 5, relu, dense 3, softmax"),
    "cnn, sigmoid": (4, (4, 9), "conv 5 3, relu, average 2, flatten, dense 5, relu, dense 1, sigmoid"),
    "cnn, max pool": (2, (4, 9), "conv 5 3, relu, max 2, flatten, dense 5, relu, dense 3"),
    "cnn, pool first": (3, (4, 9), "conv 5 3, average 2, relu, flatten, dense 5, relu, dense 3"),
    "cnn, 2d": (1, (2, 4, 5), "conv 3 2, relu, conv 3 2, relu, flatten, dense 5, relu, dense 3"),
}
"""Of each net the seed, the shape of an input, and the layers."""


def layers(name: str) -> list[tuple[str, list[np.ndarray]]]:
    """The layers of a net with their weights, as torch has them, from NumPy's frozen generator."""
    seed, shape, text = NETS[name]
    draw, made = np.random.RandomState(seed), []
    for layer in text.split(", "):
        kind, *sizes = layer.split()
        numbers = [int(size) for size in sizes]
        weights: list[np.ndarray] = []
        if kind in ("dense", "matrix"):
            weights = [draw.randn(numbers[0], shape[0]) / shape[0] ** 0.5]
            shape = (numbers[0],)
        elif kind == "conv":
            kernel = (numbers[1],) * (len(shape) - 1)
            weights = [draw.randn(numbers[0], shape[0], *kernel) / (shape[0] * numbers[1]) ** 0.5]
            shape = (numbers[0], *(size - numbers[1] + 1 for size in shape[1:]))
        elif kind in ("average", "max"):
            shape = (shape[0], *(size // numbers[0] for size in shape[1:]))
        elif kind == "flatten":
            shape = (int(np.prod(shape)),)
        elif kind == "norm":
            weights = [*draw.randn(3, shape[0]) / 2, draw.rand(shape[0]) + 0.5]  # scale, offset, mean, variance
        if kind in ("dense", "conv"):
            weights.append(draw.randn(numbers[0]) / 2)
        made.append((layer, weights))
    return made


def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Four inputs and their baselines: letters for convolutions over one dimension, else numbers of both signs.

    The baseline of letters is the same letters in another order, for max pools the frequencies of letters. Of the
    numbers the third equals its baseline in places, and the second has zeros for one; but not where there are no
    biases, since all ReLUs would be at their kink.
    """
    seed, shape, text = NETS[name]
    draw = np.random.RandomState(100 + seed)
    if len(shape) == 2:
        letters = draw.randint(4, size=(4, shape[1]))
        shuffled = np.stack([draw.permutation(row) for row in letters])
        x, baseline = (np.eye(4)[each].transpose(0, 2, 1) for each in (letters, shuffled))
        if "max" in text:
            baseline[:] = np.array([[0.3], [0.2], [0.2], [0.3]])
        return x, baseline
    x, baseline = draw.randn(2, 4, *shape)
    if "matrix" not in text:
        baseline[1] = 0
    baseline[2].flat[::3] = x[2].flat[::3]
    return x, baseline


def shuffles(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of a net, and five shuffled baselines of each, (4, 5, *shape)."""
    x, draw = inputs(name)[0], np.random.RandomState(1)
    return x, np.stack([np.stack([row[:, draw.permutation(row.shape[1])] for _ in range(5)]) for row in x])


def net(name: str) -> nn.Sequential:
    """The net in torch."""
    dims, made = len(NETS[name][1]) - 1, []
    for layer, weights in layers(name):
        kind, *sizes = layer.split()
        if kind in ("dense", "matrix"):
            module: nn.Module = nn.Linear(*weights[0].shape[::-1], bias=kind == "dense")
        elif kind == "conv":
            module = (nn.Conv1d, nn.Conv2d)[dims - 1](*weights[0].shape[1::-1], int(sizes[1]))
        elif kind == "norm":
            module = (nn.BatchNorm1d, nn.BatchNorm1d)[dims](len(weights[0]))
        else:
            module = {
                "relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softmax": lambda: nn.Softmax(1),
                "flatten": nn.Flatten, "average": lambda: nn.AvgPool1d(2), "max": lambda: nn.MaxPool1d(2),
            }[kind]()  # fmt: skip
        module.double()
        held = [each for key, each in module.state_dict().items() if key != "num_batches_tracked"]
        for tensor, weight in zip(held, weights, strict=True):
            tensor.copy_(torch.from_numpy(weight))
        made.append(module)
    return nn.Sequential(*made)


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name in NETS for rule in RULES[: len(GOLDEN[name])]])
def test_multipliers_are_those_of_the_package(name, rule, tmp_path):
    x, baseline = (torch.from_numpy(each) for each in inputs(name))
    model = open_net(net(name), tmp_path, NETS[name][1])
    index = [0] * 4 if "sigmoid" in name else [0, 1, 2, 0]
    result = methods.load("deeplift", {"rule": rule}).attribute(model, x, target(*index), baseline)
    expected = torch.from_numpy(GOLDEN[name][RULES.index(rule)])
    assert away(result.multipliers, expected) < (EXACT if rule == "rescale" else TINY)
    assert away(result.values, expected * (x - baseline)) < (EXACT if rule == "rescale" else TINY)


@pytest.mark.parametrize("name", ["cnn", "cnn, pool first"])
def test_hypothetical_contributions_are_those_of_tangermeme(name, tmp_path):
    given, references = shuffles(name)
    x, model, hypothetical = torch.from_numpy(given), open_net(net(name), tmp_path, NETS[name][1]), []
    for baseline in torch.from_numpy(references).unbind(1):
        multipliers = methods.load("deeplift").attribute(model, x, target(1, 1, 1, 1), baseline).multipliers
        hypothetical.append(sequences.hypothetical(multipliers, baseline))
    expected = torch.from_numpy(GOLDEN[f"{name}, hypothetical"])
    assert away(torch.stack(hypothetical).mean(0), expected) < EXACT
