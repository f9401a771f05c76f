"""LRP through attention against gradients of a copy that is held; all of the zoo runs or is refused by name."""

import math

import pytest
import torch
import zoo
from lrp_nets import lrp
from method_nets import FORMATS, architecture, away, batch, images, predicted, sample, target
from nets import ready, save_traced
from torch import Tensor, nn
from torch.nn import functional as F

from attrcli import model as models
from attrcli.errors import UnsupportedOp

EPSILON = 1e-13


# -- attention: AttnLRP is gradient x input of a net in which some things are held constant


class Quarter(torch.autograd.Function):
    """The identity, whose gradient is divided."""

    @staticmethod
    def forward(ctx, x, divisor):
        ctx.divisor = divisor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.divisor, None


class Block(nn.Module):
    """Layer norm, attention with a mask and a residual, a gated layer; `held` for the gradient x input form."""

    def __init__(self, fused: bool, held: str | None = None) -> None:
        super().__init__()
        self.fused, self.held = fused, held
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.last = nn.Linear(8, 12), nn.Linear(12 * 5, 3)
        self.register_buffer("mask", torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf))

    def normalised(self, x: Tensor, norm: nn.Module) -> Tensor:
        if self.held is None:
            return norm(x)
        z = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        spread = (z.detach().square().mean(-1, keepdim=True) + (norm.eps or torch.finfo(x.dtype).eps)).sqrt()
        return z / spread * norm.weight + (norm.bias if isinstance(norm, nn.LayerNorm) else 0)

    def attended(self, y: Tensor) -> Tensor:
        q, k, v = (layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.held is None and self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        if self.held == "attnlrp":
            q, k, v = Quarter.apply(q, 4), Quarter.apply(k, 4), Quarter.apply(v, 2)
        weights = (q @ k.transpose(-1, -2) / 2 + self.mask).softmax(-1)
        return (weights.detach() if self.held == "cp" else weights) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attended(self.normalised(x, self.norm)).transpose(1, 2).flatten(2))
        z = self.up(self.normalised(x, self.rms))
        made = F.gelu(z) if self.held is None else z * (F.gelu(z) / z).detach()
        return self.last(made.flatten(1))


@pytest.mark.parametrize("attention", ["attnlrp", "cp"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "open"])
def test_attention_is_gradient_times_input_of_a_net_that_is_held(attention, fused, tmp_path):
    torch.manual_seed(0)
    net = ready(Block(fused))
    model = models.load(save_traced(net, (5, 8), tmp_path / "net.pt"), precision="float64")
    x, to = batch(3, 5, 8), target(0, 1, 2)
    result = lrp(model, x, to, composite="epsilon", epsilon=EPSILON, attention=attention)
    net.held, leaf = attention, x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(leaf)[range(3), range(3)].sum(), leaf)
    assert away(result.values, grad * x) < 1e-8
    score = model.scores(x, to)
    assert float((result.values.flatten(1).sum(1) + result.remainder - score).abs().max()) < 1e-9


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)], ids=["group", "instance"])
def test_other_norms_hold_their_spread(norm, tmp_path):
    torch.manual_seed(0)
    net = ready(nn.Sequential(nn.Conv1d(2, 4, 2), norm, nn.Flatten(), nn.Linear(4 * 6, 3)))
    model = models.load(save_traced(net, (2, 7), tmp_path / "net.pt"), precision="float64")
    x, to = batch(3, 2, 7), target(0, 1, 2)
    values = lrp(model, x, to, composite="epsilon", epsilon=EPSILON, attention="cp").values
    leaf = x.clone().requires_grad_()
    h = net[0](leaf).reshape(3, 2 if isinstance(norm, nn.GroupNorm) else 4, -1)
    z = h - h.mean(2, keepdim=True)
    y = (z / (z.detach().square().mean(2, keepdim=True) + norm.eps).sqrt()).reshape(3, 4, 6)
    score = net[3]((y * norm.weight[:, None] + norm.bias[:, None]).flatten(1))[range(3), range(3)]
    (grad,) = torch.autograd.grad(score.sum(), leaf)
    assert away(values, grad * x) < 1e-8


# -- every architecture, every format

SKIPPED = {"deeplab"}  # a trace of dictionaries is refused by torch
REFUSED = {  # what no option has a rule for
    "spatial_transformer": "grid_sampler_2d",
    "siamese": "linalg_vector_norm",
    "lstm": "lstm",
    "lstm_projected": "lstm",
    "gru": "gru",
    "gru_sequence_first": "gru",
    "conv_gru": "gru",
    "elman": "rnn_tanh",
    "cell_loop": "logsumexp",
}
ATTENTIVE = {  # what is refused without the option
    "convnext": "layer_norm",
    "big_transfer": "group_norm",
    "unet": "instance_norm",
    "vit": "layer_norm",
    "vit_fused": "layer_norm",
    "swin": "layer_norm",
    "mixer": "layer_norm",
    "encoder": "scaled_dot_product_attention",
    "encoder_norm_first": "layer_norm",
    "encoder_sequence_first": "scaled_dot_product_attention",
    "translator": "scaled_dot_product_attention",
}


def architectures() -> list[str]:
    whole = [name for name, arch in zoo.ZOO.items() if not next(iter(arch.inputs.values())).words]
    return [name for name in whole if name not in SKIPPED]


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_runs_or_is_refused_by_name(name):
    model, x, to = architecture(name)
    for options in ({}, {"composite": "epsilon_alpha2_beta1", "attention": "attnlrp"}, {"attention": "cp"}):
        refused = REFUSED.get(name) or (None if options else ATTENTIVE.get(name))
        if refused is not None:
            with pytest.raises(UnsupportedOp, match=rf"node '.*{refused}.*: lrp .*integrated_gradients"):
                lrp(model, x, to, **options)
            continue
        result, score = lrp(model, x, to, **options), model.scores(x, to)
        missed = (result.values.flatten(1).sum(1) + result.remainder - score).abs()
        assert bool((missed < 1e-9 * (score.abs() + result.values.abs().flatten(1).sum(1))).all())
        assert bool(result.values.flatten(1).any(1).all())
        alone = lrp(model, x[1:2], to.take(torch.tensor([1])), **options)
        assert away(alone.values, result.values[1:2]) < 1e-7
        assert float((alone.remainder - result.remainder[1:2]).abs()) < 1e-7 * float(1 + score[1].abs())


@pytest.mark.parametrize("net", ["fashion_mlp", "fashion_cnn"])
@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1"])
def test_three_formats_agree_on_relevance_and_remainder(net, composite):
    x, to = images(torch.float64)[0][:5], target(*predicted(net)[:5].tolist())
    found = []
    for suffix in FORMATS:
        model = models.load(sample(net, suffix).path, precision="float64")
        model.bounds = (x.amin().reshape(1, 1, 1), x.amax().reshape(1, 1, 1))
        found.append(lrp(model, x, to, composite=composite))
    for other in found[1:]:
        assert away(other.values, found[0].values) < 1e-10
        assert away(other.remainder[:, None], found[0].remainder[:, None]) < 1e-10
