"""Attention rollout: maps found in every spelling and format, multiplied as by hand."""

import warnings

import pytest
import torch
from grid_nets import TinyVit
from method_nets import away, batch, open_net, target
from nets import quiet, ready
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

from attrcli import methods, model
from attrcli.errors import UnsupportedOp, UsageError
from attrcli.methods._grid import upsampled
from attrcli.methods.attention_rollout import rolled_out

SHAPE = (2, 9, 13)


def rollout(maps: list[Tensor], rows: list[int], first: int, sizes, shape=SHAPE) -> Tensor:
    """By hand: half the identity, the mean of the heads, the last layer leftmost, the mean of some rows."""
    flow = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype).expand(len(maps[0]), -1, -1)
    for each in maps:
        flow = (0.5 * each.detach().mean(1) + 0.5 * torch.eye(each.shape[-1], dtype=each.dtype)) @ flow
    return upsampled(flow[:, rows].mean(1)[:, first:].reshape(-1, *sizes), shape)


def explain(net, x, folder, **options):
    opened = open_net(net, folder, tuple(x.shape[1:]))
    return methods.load("attention_rollout", options).attribute(opened, x, target(*[0] * len(x)), None)


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("how", ["fused", "open", "merged"])
def test_as_by_hand(how, tokens, tmp_path):
    torch.manual_seed(0)
    net, x = TinyVit(SHAPE, how, tokens=tokens, layers=3).double().eval(), batch(3, *SHAPE)
    result = explain(net, x, tmp_path)
    rows = [0] if tokens else list(range(12))
    assert away(result.values, rollout(net.maps(x), rows, tokens, (3, 4))) < 1e-12
    assert result.note == (f"3 attentions of {12 + tokens} tokens, {len(rows)} of them read, grid 3x4",) * 3


def save(net, x, kind, folder):
    path = folder / f"net{kind}"
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if kind == ".pt":
            torch.jit.save(torch.jit.trace(net, x), path)
        elif kind == ".pt2":
            batched = {0: torch.export.Dim("batch", min=1, max=64)}
            torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(batched,)), path)
        else:
            torch.onnx.export(net, (x,), path, dynamo=False, opset_version=17, input_names=["x"],
                              dynamic_axes={"x": {0: "n"}, }, output_names=["y"])  # fmt: skip
    return model.load(path, precision="float64")


@pytest.mark.parametrize("how", ["fused", "open", "merged"])
@pytest.mark.parametrize("kind", [".pt", ".pt2", ".onnx"])
def test_three_formats_one_answer(kind, how, tmp_path):
    torch.manual_seed(0)
    net, x = TinyVit(SHAPE, how).eval(), batch(3, *SHAPE)
    opened = save(net, x.float(), kind, tmp_path)
    values = methods.load("attention_rollout").attribute(opened, x, target(0, 1, 2), None).values
    assert away(values, rollout(net.double().maps(x), [0], 1, (3, 4))) < 1e-6  # weights went through float32


class Encoder(nn.Module):
    """torch's own encoder, whose fast path a trace without gradients takes."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=True)
        self.patches, self.batch_first = nn.Conv2d(2, 8, 3, 3), batch_first
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])

    def maps(self, x: Tensor) -> list[Tensor]:
        x, found = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patches(x).flatten(2).transpose(1, 2)], 1), []
        for layer in self.encoder.layers:
            y = x if self.batch_first else x.transpose(0, 1)
            normed = layer.norm1(y)
            found.append(layer.self_attn(normed, normed, normed, average_attn_weights=False)[1])
            y = layer(y)
            x = y if self.batch_first else y.transpose(0, 1)
        return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder(batch_first, grad, tmp_path):
    torch.manual_seed(0)
    net, x = Encoder(batch_first=batch_first).double().eval(), batch(3, *SHAPE)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that a trace writes down
        result = explain(net, x, tmp_path)
    assert away(result.values, rollout(net.maps(x), [0], 1, (3, 4))) < 1e-12


@pytest.mark.parametrize("name", ["vit", "vit_fused"])
def test_the_zoo(name, tmp_path):
    torch.manual_seed(0)
    net, x = ready(ZOO[name].make()), batch(2, 3, 16, 16)
    result = explain(net, x, tmp_path)
    maps = []
    y = net.patches(x).flatten(2).transpose(1, 2)
    y = torch.cat([net.class_token.expand(2, -1, -1), y], 1) + net.positions
    for block in net.blocks:
        inner, normed = block.attention, block.norm1(y)
        if name == "vit":
            maps.append(inner.attention(normed, normed, normed, average_attn_weights=False)[1])
        else:
            q, k, _ = inner.qkv(normed).reshape(2, 17, 3, 2, 4).permute(2, 0, 3, 1, 4)
            maps.append((q @ k.transpose(-1, -2) / 2).softmax(-1))
        y = block(y)
    assert away(result.values, rollout(maps, [0], 1, (4, 4), (3, 16, 16))) < 1e-12


def test_rows_sum_to_one_identity_and_uniform_maps():
    maps = [batch(2, 5, 5, seed=i).softmax(-1) for i in range(4)]
    assert float((rolled_out(maps).sum(-1) - 1).abs().max()) < 1e-12
    eye, uniform = torch.eye(5).double().expand(2, 5, 5), torch.full((2, 5, 5), 0.2).double()
    assert torch.equal(rolled_out([eye] * 3), eye)
    assert away(rolled_out([uniform] * 3), eye / 8 + uniform * 7 / 8) < 1e-7
    odd = [m * batch(2, 5, 1, seed=9).abs() for m in maps]  # as max, min and discard leave them: rows, not columns
    assert float((rolled_out(odd).sum(-1) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("heads", ["max", "min"])
def test_heads_and_discard(heads, tmp_path):
    torch.manual_seed(0)
    net, x = TinyVit(SHAPE, "open").double().eval(), batch(2, *SHAPE)
    flow = torch.eye(13).double()
    for maps in net.maps(x):
        fused = (maps.amax(1) if heads == "max" else maps.amin(1)).detach().clone()
        for row in range(2):  # every sample by itself
            fused[row].view(-1)[fused[row].view(-1).argsort()[: int(0.25 * 169)]] = 0
        both = fused + torch.eye(13)
        flow = both / both.sum(-1, keepdim=True) @ flow
    expected = upsampled(flow[:, 0, 1:].reshape(2, 3, 4), SHAPE)
    assert away(explain(net, x, tmp_path, heads=heads, discard=0.25).values, expected) < 1e-12


def test_every_class_has_the_same_map(tmp_path):
    torch.manual_seed(0)
    opened, x = open_net(TinyVit(), tmp_path, SHAPE), batch(2, *SHAPE)
    one, other = (methods.load("attention_rollout").attribute(opened, x, target(k, k), None).values for k in (0, 2))
    assert torch.equal(one, other)


class Gated(nn.Module):
    """A softmax over channels and one in a mixture of experts: neither is an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(2, 4, 3, 2), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean((2, 3))
        return self.head(y * self.gate(y).softmax(-1))


class Pooled(nn.Module):
    """Keys and values of every second token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(2, 8, 3, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x)
        q, k = (t.flatten(2).transpose(1, 2) for t in (y, F.max_pool2d(y, 1, 2)))
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0].mean(1))


@pytest.mark.parametrize(
    ("net", "shape", "match"),
    [
        (Gated(), SHAPE, "found no attention in the graph"),
        (Pooled(), SHAPE, r"relates 12 tokens to 4 others \(cross-attention, or pooled keys\)"),
        (ZOO["swin"].make(), (3, 16, 16), "attends within windows"),
        (
            ZOO["encoder"].make(),
            (6, 8),
            "which of the tokens of node 'scaled_dot_product_attention' are places of the input is not",
        ),
    ],
    ids=["gate", "pooled", "swin", "sequence"],
)
def test_refused(net, shape, match, tmp_path):
    with pytest.raises(UnsupportedOp, match=match):
        explain(net, batch(2, *shape), tmp_path)


@pytest.mark.filterwarnings("ignore:.*its batch is frozen at 1")
def test_refused_where_the_batch_is_frozen_at_one(tmp_path):
    net, path = TinyVit(SHAPE, "open").double().eval(), tmp_path / "net.pt2"
    with quiet():
        torch.export.save(torch.export.export(net, (batch(1, *SHAPE),)), path)
    rollout, opened = methods.load("attention_rollout", {}), model.load(path, precision="float64")
    with pytest.raises(UnsupportedOp, match=r"which of the tokens of node .* are places of the input is not known"):
        rollout.attribute(opened, batch(1, *SHAPE), target(0), None)


def test_a_share_is_below_one():
    with pytest.raises(UsageError, match=r"discard=1\.0; accepted: from 0 to below 1"):
        methods.load("attention_rollout", {"discard": 1.0})
