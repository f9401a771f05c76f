"""Layers of torch whose file depends on how it was saved: fast paths, computed weights, optimised and packed ones."""

import pytest
import torch
from nets import assert_same, build, load_script, quiet, ready, save_exported, save_scripted, save_traced
from torch import Tensor, nn

from attrcli import formats
from attrcli.errors import UnsupportedOp


def save_without_gradients(module, shape, path):
    """As a trace for deployment is made: torch then takes its fast paths."""
    with quiet(), torch.no_grad():
        torch.jit.trace(module, torch.rand(2, *shape, dtype=torch.float64), check_trace=False).save(path)
    return path


def operations(path):
    return set(formats.load(path).operations())


class Attention(nn.Module):
    """torch's module with the masks and weights that are asked for."""

    def __init__(self, masks: str, weights: bool, averaged: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.masks, self.weights, self.averaged = masks, weights, averaged

    def forward(self, x: Tensor) -> Tensor:
        padding = causal = None
        if "padding" in self.masks:
            padding = torch.cat([x[:, :1, 0] > 9, x[:, 1:, 0] > 0.4], dim=1)  # never all of them
        if "causal" in self.masks:
            causal = torch.triu(torch.ones(x.size(1), x.size(1), dtype=torch.bool), 1)
        y, weights = self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=self.weights,
            average_attn_weights=self.averaged,
        )  # fmt: skip
        return y if weights is None else y + weights.square().flatten(2).sum(2).mean(1)[:, None, None]


@pytest.mark.parametrize("masks", ["", "padding", "causal", "padding, causal"])
@pytest.mark.parametrize(("weights", "averaged"), [(False, True), (True, True), (True, False)])
def test_the_fast_path_of_attention(masks, weights, averaged, tmp_path):
    module = ready(Attention(masks, weights, averaged))
    path = save_without_gradients(module, (5, 8), tmp_path / "net.pt")
    assert "aten::_native_multi_head_attention" in operations(path)
    assert_same(build(path, (5, 8)), module, (5, 8))


class Crossed(nn.Module):
    """Keys and values that are not the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        out = self.attention.out_proj
        return torch._native_multi_head_attention(
            x, x.sin(), x.cos(), 8, 2, weight, bias, out.weight, out.bias, None, False
        )[0]


def test_the_fast_path_of_attention_between_several_inputs(tmp_path):
    module = ready(Crossed())
    path = save_without_gradients(module, (5, 8), tmp_path / "net.pt")

    def plain(x: Tensor) -> Tensor:
        return module.attention(x, x.sin(), x.cos(), need_weights=False)[0]

    assert_same(build(path, (5, 8)), plain, (5, 8))


class Padded(nn.Module):
    """torch's encoder over sequences that are padded."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.size(1)).expand(x.size(0), -1) > 3
        return self.encoder(x, src_key_padding_mask=padding)


def test_an_encoder_with_padding(tmp_path):
    module = ready(Padded(nested=False))
    path = save_without_gradients(module, (5, 8), tmp_path / "net.pt")
    assert "aten::_transformer_encoder_layer_fwd" in operations(path)
    assert_same(build(path, (5, 8)), module, (5, 8))
    nested = ready(Padded(nested=True))
    assert_same(build(save_scripted(nested, path), (5, 8)), nested, (5, 8))
    save_without_gradients(nested, (5, 8), path)
    with pytest.raises(UnsupportedOp, match=r"_nested_tensor_from_mask.*enable_nested_tensor=False"):
        build(path, (5, 8))


PARAMETRISED = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 5, 3)),
    "weight_norm over all": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 5, 3), dim=2),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 5, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="householder"),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_weights_that_are_computed(name, tmp_path):
    module, shape = ready(nn.Sequential(PARAMETRISED[name]())), (4, 6)
    if name == "orthogonal":
        with pytest.raises(UnsupportedOp, match=r"op aten.linalg_householder_product.* is not supported"):
            build(save_traced(module, shape, tmp_path / "net.pt"), shape)
        return
    assert_same(build(save_traced(module, shape, tmp_path / "net.pt"), shape), module, shape)
    assert_same(build(save_exported(module, shape, tmp_path / "net.pt2"), shape), module, shape)


LAYERS = [nn.LSTM(3, 4, 2), nn.GRU(3, 4, bidirectional=True), nn.RNN(3, 4, nonlinearity="relu")]


@pytest.mark.parametrize("layer", LAYERS, ids=["lstm", "gru", "rnn"])
def test_a_recurrent_layer_is_one_node_and_knows_no_batch(layer, tmp_path):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.layer(x.transpose(0, 1))
            return y[-1]

    module = ready(Last())
    path = save_traced(module, (6, 3), tmp_path / "net.pt")
    graph = build(path, (6, 3))
    assert sum(str(node.target).startswith(("aten.lstm", "aten.gru", "aten.rnn")) for node in graph.graph.nodes) == 1
    assert_same(graph, load_script(path), (6, 3))


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, :, 0] > -9).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.gru(packed)[1][0]


def test_packed_sequences_are_refused(tmp_path):
    path = save_scripted(ready(Packs()), tmp_path / "net.pt")
    with pytest.raises(
        UnsupportedOp, match=r"_pack_padded_sequence.* is not supported.*; exporting the model to ONNX may"
    ):
        build(path, (6, 3))


# --- made ready for something else than being explained


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.linear = torch.ao.quantization.QuantStub(), nn.Linear(4, 4)
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.linear(self.quant(x)))


def statically_quantised():
    module = Quantised().eval()
    module.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(module, inplace=True)
    module(torch.rand(4, 4))
    return torch.ao.quantization.convert(module, inplace=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_quantised_files_are_refused_by_name(frozen, tmp_path):
    with quiet():
        modules = statically_quantised(), torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval())
        for index, module in enumerate(modules):
            path = save_scripted(module, tmp_path / f"net{index}.pt", frozen=frozen)
            with pytest.raises(UnsupportedOp, match=r"net\d\.pt: quantised operations .* are not supported; .*ONNX"):
                formats.load(path)


def test_files_optimised_for_inference(tmp_path):
    """Those with convolutions hold operations of mkldnn, and not their weights: torch cannot load them either."""
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    linear = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()).eval()
    with quiet():
        for name, module in (("conv.pt", convolution), ("linear.pt", linear)):
            torch.jit.optimize_for_inference(torch.jit.script(module)).save(str(tmp_path / name))
    with pytest.raises(RuntimeError):
        load_script(tmp_path / "conv.pt")
    with pytest.raises(UnsupportedOp, match=r"operations of mkldnn.*optimize_for_inference.*before it is optimised"):
        formats.load(tmp_path / "conv.pt")
    graph = build(tmp_path / "linear.pt", (4,), dtype=torch.float32)
    x = torch.rand(3, 4)
    assert torch.allclose(graph(x)[0], linear(x), atol=1e-6)
    assert not list(graph.parameters())
