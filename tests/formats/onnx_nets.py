"""Small networks and their export to ONNX."""

import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8))
        self.one = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        x = (x + self.one(x)).relu()
        x = (self.down(x) + self.two(x)).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class Windows(nn.Module):
    """A shifted window with padding: where shape arithmetic of exporters is at its worst."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        _, high, wide, channels = x.shape
        x = nn.functional.pad(x, (0, 0, 0, (3 - wide % 3) % 3, 0, (3 - high % 3) % 3))
        count, rows, columns, _ = x.shape
        y = torch.roll(x, (-1, -1), (1, 2))
        y = y.view(count, rows // 3, 3, columns // 3, 3, channels).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, channels)
        y = (y @ y.transpose(1, 2)).softmax(-1) @ self.mix(y)
        y = y.view(count, rows // 3, columns // 3, 3, 3, channels).permute(0, 1, 3, 2, 4, 5)
        y = torch.roll(y.reshape(count, rows, columns, channels), (1, 1), (1, 2))
        return self.head((x + y)[:, :high, :wide].mean((1, 2)))


FOLDER = TemporaryDirectory()


@cache
def exported(kind: type[nn.Module], *, dynamo: bool) -> tuple[nn.Module, Path]:
    """A network and its file, made once for all tests: the exporters are slow."""
    torch.manual_seed(0)
    network, path = kind().eval(), Path(FOLDER.name) / f"{kind.__name__}-{dynamo}.onnx"
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    example = torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(network, (example,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
        else:
            axes = {"x": {0: "batch"}}
            names = {"input_names": ["x"], "dynamic_axes": axes}
            torch.onnx.export(network, (example,), str(path), dynamo=False, opset_version=14, **names)
    return network, path
