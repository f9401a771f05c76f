"""Architectures that answer with maps, or with several tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """U-Net's unit."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger 2015: skip connections, a learned and a bilinear way up, padding to the size of the skip."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = DoubleConv(3, width), DoubleConv(width, 8), DoubleConv(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.resize = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)
        self.merge2, self.merge1 = DoubleConv(16, 8), DoubleConv(8 + width, width)
        self.out = nn.Conv2d(width, classes, 1)

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        high, wide = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return torch.cat([skip, x], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(self._joined(self.up(x), second))
        return self.out(self.merge1(self._joined(self.resize(x), first)))


class DeepLab(nn.Module):
    """Chen 2017: dilated branches, one of them pooled and expanded; a dictionary of two maps of the input's size."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.branches = nn.ModuleList([nn.Conv2d(width, 4, 3, padding=rate, dilation=rate) for rate in (1, 2, 3)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 4, 1), nn.ReLU())
        self.project, self.head, self.aux = nn.Conv2d(16, 8, 1), nn.Conv2d(8, classes, 1), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shape = x.shape[-2:]
        low = self.stem(x)
        deep = self.deep(low)
        found: list[Tensor] = []
        for branch in self.branches:
            found.append(F.relu(branch(deep)))
        pooled = F.interpolate(self.pooled(deep), size=deep.shape[-2:], mode="bilinear", align_corners=False)
        found.append(pooled)
        y = self.head(F.relu(self.project(torch.cat(found, dim=1))))
        return {
            "out": F.interpolate(y, size=shape, mode="bilinear", align_corners=False),
            "aux": F.interpolate(self.aux(low), size=shape, mode="nearest"),
        }


class SuperResolution(nn.Module):
    """Shi 2016: sub-pixel convolution; and a bicubic copy of the input beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, padding=2, padding_mode="reflect"), nn.Conv2d(8, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.conv2(torch.tanh(self.conv1(x))))
        return (y + F.interpolate(x, scale_factor=2.0, mode="bicubic", align_corners=False)).clamp(-2, 2)


class Siamese(nn.Module):
    """Two images through one tower, a number beside them; a tuple of a similarity and both embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.PReLU(6), nn.Flatten(1), nn.Linear(6 * 49, 8))
        self.number = nn.Linear(2, 8)

    def forward(self, left: Tensor, right: Tensor, facts: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first = F.normalize(self.tower(left), dim=1)
        second = F.normalize(self.tower(right), dim=1)
        score = torch.cdist(first.unsqueeze(1), second.unsqueeze(1)).flatten(1) + (self.number(facts) * first).sum(
            1, True
        )
        return score, (first, second)


class SpatialTransformer(nn.Module):
    """Jaderberg 2015: a grid that the image itself chooses, and sampling on it."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU(True), nn.AdaptiveMaxPool2d(3), nn.Flatten())
        self.theta = nn.Linear(36, 6)
        self.classify = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SELU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(self.locate(x)).view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        return F.log_softmax(self.fc(self.classify(x).squeeze(-1).squeeze(-1)), dim=1)
