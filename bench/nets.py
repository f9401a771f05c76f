"""The networks of the benchmarks, random weights: a ResNet-18, the same tuned by hand, and a ResNet-50."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = None
        if stride != 1 or inside != out:
            self.down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.down is None else self.down(x)))


class ResNet18(nn.Module):
    """11.7 million parameters, 1,000 classes, input (N, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
        widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.Sequential(*(Block(*width) for width in widths))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.pool(self.relu(self.bn(self.conv(x))))).mean((2, 3)))


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.down = None
        if stride != 1 or inside != 4 * width:
            self.down = nn.Sequential(nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + (x if self.down is None else self.down(x))).relu()


class ResNet50(nn.Module):
    """25.6 million parameters, 1,000 classes, input (N, 3, 224, 224)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool, blocks, inside = nn.MaxPool2d(3, 2, 1), [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inside, width, stride if i == 0 else 1))
                inside = 4 * width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(2048, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.pool(self.bn(self.conv(x)).relu())).mean((2, 3)))


def resnet18() -> nn.Module:
    """The network in eval mode, with batch statistics that are not trivial; seeded."""
    return _seeded(ResNet18)


def resnet50() -> nn.Module:
    """The same of the larger one."""
    return _seeded(ResNet50)


def _seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
    return net


def by_hand(net: nn.Module) -> nn.Module:
    """A copy with batch norm folded, channels last and parameters frozen: the fastest eager form known here."""
    import copy

    net = copy.deepcopy(net).eval()
    net.conv, net.bn = fuse_conv_bn_eval(net.conv, net.bn), nn.Identity()
    for block in net.blocks:
        block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
        if block.down is not None:
            block.down = fuse_conv_bn_eval(*block.down)
    return net.requires_grad_(False).to(memory_format=torch.channels_last)


def save(net: nn.Module, example: torch.Tensor, folder: "object") -> dict[str, str]:
    """Save as TorchScript, ONNX and .pt2, batch norm not folded; return the paths by format."""
    import logging
    import warnings
    from pathlib import Path

    folder = Path(str(folder))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, example).save(folder / "net.pt")
        batch = torch.export.Dim("batch", min=1)
        program = torch.onnx.export(
            net, (example,), dynamo=True, optimize=False, verbose=False, input_names=["image"],
            output_names=["logits"], dynamic_shapes=({0: batch},),
        )  # fmt: skip
        program.save(folder / "net.onnx", external_data=False)
        exported = torch.export.export(net, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(exported, folder / "net.pt2")
    return {"torchscript": str(folder / "net.pt"), "onnx": str(folder / "net.onnx"), "pt2": str(folder / "net.pt2")}
