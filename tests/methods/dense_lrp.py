"""An LRP of its own, in dense algebra: every linear op is a matrix, read off by a Jacobian; every rule is written out.

Knows nothing of the package. One sample at a time, float64, the epsilon of every denominator given.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sign(z: Tensor) -> Tensor:
    return torch.where(z < 0, -1.0, 1.0).to(z)


def shares(contributions: Tensor, bias: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """R_i = sum over j of c_ji R_j / (sum_i c_ji + b_j + epsilon sign)."""
    z = contributions.sum(1) + bias
    return (contributions / (z + epsilon * sign(z))[:, None]).t() @ relevance


def matrix(op: Callable[[Tensor], Tensor], a: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix (outputs, inputs) and the offset of an affine op on a sample."""
    jacobian = torch.autograd.functional.jacobian(op, a)
    flat = jacobian.reshape(-1, a.numel())
    return flat, (op(a).reshape(-1) - flat @ a.reshape(-1))


def linear(
    rule: str,
    op: Callable[[Tensor], Tensor],
    a: Tensor,
    relevance: Tensor,
    *,
    epsilon: float,
    gamma: float = 0.25,
    box: tuple[Tensor, Tensor] | None = None,
    connected: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One rule for an affine op; `connected` is the op with all weights one and no bias, for the flat rule."""
    w, b = matrix(op, a)
    x, r = a.reshape(-1), relevance.reshape(-1)
    c, none = w * x, torch.zeros_like(b)
    up, down = c.clamp(min=0), c.clamp(max=0)
    if rule == "epsilon":
        result = shares(c, b, r, epsilon)
    elif rule == "zplus":
        result = shares(up, b.clamp(min=0), r, epsilon)
    elif rule == "alpha2beta1":
        result = 2 * shares(up, b.clamp(min=0), r, epsilon) - shares(down, b.clamp(max=0), r, epsilon)
    elif rule == "gamma":
        z = c.sum(1) + b
        high = shares(c + gamma * up, b + gamma * b.clamp(min=0), torch.where(z > 0, r, 0), epsilon)
        result = high + shares(c + gamma * down, b + gamma * b.clamp(max=0), torch.where(z < 0, r, 0), epsilon)
    elif rule == "flat":
        assert connected is not None
        result = shares(matrix(connected, a)[0], none, r, epsilon)
    elif rule == "wsquare":
        result = shares(w * w, b * b, r, epsilon)
    else:
        assert rule == "zbox"
        assert box is not None
        low, high_ = (end.expand_as(a).reshape(-1) for end in box)
        result = shares(c - w.clamp(min=0) * low - w.clamp(max=0) * high_, none, r, epsilon)
    return result.reshape(a.shape)


def ones(module: nn.Module) -> nn.Module:
    """A copy of a layer with all weights one and no bias."""
    made = copy.deepcopy(module)
    nn.init.ones_(made.weight)
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


COMPOSITES = {  # convolution, dense, first convolution, first dense
    "epsilon": ("epsilon", "epsilon", "epsilon", "epsilon"),
    "epsilon_plus": ("zplus", "epsilon", "zplus", "epsilon"),
    "epsilon_plus_flat": ("zplus", "epsilon", "flat", "flat"),
    "epsilon_plus_wsquare": ("zplus", "epsilon", "wsquare", "wsquare"),
    "epsilon_gamma": ("gamma", "epsilon", "gamma", "epsilon"),
    "epsilon_gamma_box": ("gamma", "epsilon", "zbox", "epsilon"),
    "epsilon_alpha2_beta1": ("alpha2beta1", "epsilon", "alpha2beta1", "epsilon"),
    "epsilon_alpha2_beta1_flat": ("alpha2beta1", "epsilon", "flat", "flat"),
    "deep_taylor": ("zplus", "zplus", "zbox", "zbox"),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def sequential(
    layers: Sequence[nn.Module],
    x: Tensor,
    index: int,
    composite: str,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    box: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, float]:
    """Relevance (of x's shape) of one sample through a chain of layers, and the score that it starts from."""
    values = [x[None]]
    for layer in layers:
        values.append(layer(values[-1]))
    relevance = torch.zeros_like(values[-1])
    relevance[0, index] = values[-1][0, index]
    score, first = float(values[-1][0, index]), next(i for i, layer in enumerate(layers) if isinstance(layer, LAYERS))
    for i, layer in reversed(list(enumerate(layers))):
        a = values[i]
        if isinstance(layer, LAYERS):
            place = (1 if isinstance(layer, nn.Linear) else 0) + (2 if i == first else 0)
            rule, alike = COMPOSITES[composite][place], ones(layer)
            relevance = linear(rule, layer, a, relevance, epsilon=epsilon, gamma=gamma, box=box, connected=alike)
        elif isinstance(layer, POOLS):
            relevance = linear("epsilon", layer, a, relevance, epsilon=epsilon)
        elif isinstance(layer, nn.MaxPool2d):
            _, at = F.max_pool2d(a, layer.kernel_size, layer.stride, layer.padding, 1, layer.ceil_mode, True)
            spread = torch.zeros_like(a).flatten(2)
            relevance = spread.scatter_add(2, at.flatten(2), relevance.flatten(2)).reshape(a.shape)
        elif isinstance(layer, nn.Flatten):
            relevance = relevance.reshape(a.shape)
        else:
            assert isinstance(layer, nn.ReLU | nn.Dropout | nn.Identity), layer
    return relevance[0], score
