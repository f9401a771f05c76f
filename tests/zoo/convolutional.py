"""Convolutional architectures, small: each with the structure of its family."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vgg(nn.Module):
    """Simonyan 2014: a plain stack, ReLU in place, a classifier of linear layers with dropout."""

    def __init__(self, widths: tuple[int, ...] = (6, 8, 10), classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in widths:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 4, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(True), nn.Dropout(),
            nn.Linear(12, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class Bottleneck(nn.Module):
    """One functional ReLU used three times, the shortcut added in place."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != 2 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            shortcut = self.downsample(x)
        y += shortcut
        return F.relu(y)


class ResNet(nn.Module):
    """He 2016, with bottlenecks."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Bottleneck(width, width, 1), Bottleneck(2 * width, width, 1))
        self.layer2 = nn.Sequential(Bottleneck(2 * width, 8, 2), Bottleneck(16, 8, 1))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layer2(self.layer1(x)), (1, 1)), 1))


class DenseLayer(nn.Module):
    """Reads all features so far, joined, as its transition does."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return F.dropout(self.conv2(self.relu(self.norm2(x))), p=0.1, training=self.training)


class DenseNet(nn.Module):
    """Huang 2017: a growing list of features."""

    def __init__(self, growth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.block1 = nn.ModuleList([DenseLayer(8 + i * growth, growth) for i in range(3)])
        self.transition = nn.Sequential(
            nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2, 2)
        )
        self.block2 = nn.ModuleList([DenseLayer(10 + i * growth, growth) for i in range(2)])
        self.norm, self.classifier = nn.BatchNorm2d(18), nn.Linear(18, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


Sizes = int | tuple[int, int]


class ConvNorm(nn.Module):
    """Inception's unit: convolution, batch norm with its own epsilon, ReLU in place."""

    def __init__(
        self, inputs: int, width: int, size: int | tuple[int, int], padding: int | tuple[int, int] = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of several kernel sizes, one of them factorised, joined along the channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = ConvNorm(inputs, 4, 1)
        self.branch7 = nn.Sequential(
            ConvNorm(inputs, 4, 1), ConvNorm(4, 4, (1, 7), (0, 3)), ConvNorm(4, 6, (7, 1), (3, 0))
        )
        self.branch3 = nn.Sequential(ConvNorm(inputs, 4, 1), ConvNorm(4, 6, 3, 1))
        self.pool = ConvNorm(inputs, 4, 1)

    def _branches(self, x: Tensor) -> list[Tensor]:
        pooled = self.pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return [self.branch1(x), self.branch7(x), self.branch3(x), pooled]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._branches(x), 1)


class Inception(nn.Module):
    """Szegedy 2016: the input rescaled channel by channel, an auxiliary head that only training runs."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 6, 3)
        self.mixed1, self.mixed2 = Mixed(6), Mixed(20)
        self.aux, self.fc = nn.Linear(20, classes), nn.Linear(20, classes)
        self.dropout = nn.Dropout()

    def _rescaled(self, x: Tensor) -> Tensor:
        red = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
        green = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
        blue = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
        return torch.cat((red, green, blue), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(self._rescaled(x)), kernel_size=3, stride=2)
        x = self.mixed1(x)
        if self.training:
            return self.aux(x.mean((2, 3)))
        x = F.adaptive_avg_pool2d(self.mixed2(x), (1, 1))
        return self.fc(torch.flatten(self.dropout(x), 1))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that reads their means."""

    def __init__(self, width: int, inner: int, hard: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.act: nn.Module = nn.ReLU(inplace=True) if hard else nn.SiLU(inplace=True)
        self.gate: nn.Module = nn.Hardsigmoid(inplace=True) if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1))))) * x


class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, squeeze and excite, project; stochastic depth does nothing in inference."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int, hard: bool, drop: float = 0.1) -> None:
        super().__init__()
        inner, act = 2 * inputs, nn.Hardswish if hard else nn.SiLU
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), act(inplace=True)),
            nn.Sequential(
                nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
                nn.BatchNorm2d(inner, eps=0.001, momentum=0.01),
                act(inplace=True),
            ),
            SqueezeExcite(inner, 4, hard),
            nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.connected, self.drop = stride == 1 and inputs == width, drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.connected:
            if self.training:
                y = y * (torch.rand(x.size(0), 1, 1, 1) > self.drop)
            y += x
        return y


class MobileNet(nn.Module):
    """Howard 2019 with hard-swish, or Tan 2019 with SiLU: inverted residuals with squeeze and excitation."""

    def __init__(self, hard: bool, classes: int = 5) -> None:
        super().__init__()
        act = nn.Hardswish if hard else nn.SiLU
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), act())
        self.blocks = nn.Sequential(
            InvertedResidual(6, 6, 3, 1, hard), InvertedResidual(6, 8, 5, 2, hard), InvertedResidual(8, 8, 5, 1, hard)
        )
        self.head = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act(inplace=True))
        self.classifier = nn.Sequential(
            nn.Linear(16, 12), act(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(12, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean([2, 3]))


class ShuffleUnit(nn.Module):
    """Half of the channels pass by; then all are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1), nn.ReLU(inplace=True), nn.Conv2d(half, half, 3, 1, 1, groups=half),
            nn.BatchNorm2d(half), nn.Conv2d(half, half, 1), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, self.branch(second)), dim=1)
        n, channels, height, width = x.size()
        return x.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, channels, height, width)


class ShuffleNet(nn.Module):
    """Ma 2018: channel split and channel shuffle."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(inplace=True))
        self.units, self.fc = nn.Sequential(ShuffleUnit(8), ShuffleUnit(8)), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean([2, 3]))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W), by moving them last and back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, an MLP with channels last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width) * 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(self.act(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Liu 2022."""

    def __init__(self, width: int = 6, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, 4), LayerNorm2d(width, eps=1e-6))
        self.stage1 = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))
        self.down = nn.Sequential(LayerNorm2d(width, eps=1e-6), nn.Conv2d(width, 2 * width, 2, 2))
        self.stage2, self.norm = ConvNeXtBlock(2 * width), nn.LayerNorm(2 * width, eps=1e-6)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stage2(self.down(self.stage1(self.stem(x)))).mean([-2, -1])))


class StandardisedConv2d(nn.Conv2d):
    """Its weights standardised per output channel in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BigTransfer(nn.Module):
    """Kolesnikov 2020: pre-activation blocks of group norm and standardised convolutions."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(StandardisedConv2d(3, width, 7, 2, 3, bias=False), nn.ConstantPad2d(1, 0.0))
        self.pool = nn.MaxPool2d(3, 2, padding=0)
        self.norm1, self.conv1 = nn.GroupNorm(4, width), StandardisedConv2d(width, width, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), StandardisedConv2d(width, width, 3, 1, 1, bias=False)
        self.norm, self.head = nn.GroupNorm(2, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(y)))
        return self.head(F.relu(self.norm(x)).mean(dim=(2, 3), keepdim=True))[..., 0, 0]


class WaveNet(nn.Module):
    """van den Oord 2016, on signals: dilated causal convolutions, gated, with skip connections."""

    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, width, 1)
        self.dilations = (1, 2, 4)
        self.gates = nn.ModuleList([nn.Conv1d(width, 2 * width, 2, dilation=d) for d in self.dilations])
        self.mixes = nn.ModuleList([nn.Conv1d(width, 2 * width, 1) for _ in self.dilations])
        self.norm, self.pool, self.fc = nn.BatchNorm1d(width), nn.AdaptiveAvgPool1d(3), nn.Linear(3 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = torch.zeros_like(x)
        for dilation, gate, mix in zip(self.dilations, self.gates, self.mixes):  # noqa: B905
            signal, opening = gate(F.pad(x, (dilation, 0))).chunk(2, 1)
            kept, skip = mix(torch.tanh(signal) * torch.sigmoid(opening)).split(x.size(1), dim=1)
            x, skips = x + kept, skips + skip
        return self.fc(self.pool(F.elu(self.norm(skips))).flatten(1))
