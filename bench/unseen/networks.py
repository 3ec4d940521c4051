"""Small networks of seven kinds that the defaults were not chosen on: `clusterq quantize --model networks.py:NAME`.

`bench/unseen_networks.py` trains and quantizes them. Each has some 50,000 parameters and 1 to 2 million multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        out: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(y)))) + shortcut
        return out


class PostActivationBlock(nn.Module):
    """BatchNorm behind each convolution, the projection too (He et al. 2015, option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(y + self.shortcut(x))


class SamePadConv2d(nn.Conv2d):
    """Padding "same" as TensorFlow has it: with stride 2 and an even size the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads))


class AsymmetricPad(nn.Module):
    """One row of zeros below and one column on the right: TensorFlow's "same" for an even size, 3x3, stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, (0, 1, 0, 1))


class SqueezeExcite(nn.Module):
    """A gain per channel from the channels' means (Hu et al. 2018), with biases."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gain: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * gain


class InvertedResidual(nn.Module):
    """MobileNet-V2's block: expand, filter by channel, and a projection that no activation function follows.

    Args:
        activation: class of the activation function.
        eps: of BatchNorm; TensorFlow's is 1e-3.
        excite: with `SqueezeExcite`, as in EfficientNet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        activation: Callable[[], nn.Module],
        eps: float,
        excite: bool = False,
    ) -> None:
        super().__init__()
        wide = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, wide, 1, bias=False), nn.BatchNorm2d(wide, eps), activation()]
        if stride == 2:
            layers.append(AsymmetricPad())
        padding = 0 if stride == 2 else 1
        layers += [nn.Conv2d(wide, wide, 3, stride, padding, groups=wide, bias=False), nn.BatchNorm2d(wide, eps)]
        layers.append(activation())
        if excite:
            layers.append(SqueezeExcite(wide, max(in_channels // 4, 4)))
        layers += [nn.Conv2d(wide, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, eps)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, a 3x3 convolution; its output is concatenated to its input (Huang et al. 2017)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(functional.relu(self.norm(x)))], 1)


def preactivation() -> nn.Module:
    """Pre-activation ResNet, [N, 3, 32, 32] -> [N, 10]: the first convolution has no BatchNorm of its own."""
    blocks = [PreActivationBlock(12, 12, 1), PreActivationBlock(12, 24, 2), PreActivationBlock(24, 48, 2)]
    head = [nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)]
    return nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), *blocks, *head)


def mobilenet() -> nn.Module:
    """MobileNet-V2 as TensorFlow has it: ReLU6, linear bottlenecks, padding "same"; [N, 3, 32, 32] -> [N, 10]."""
    eps = 1e-3
    stem = [SamePadConv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16, eps), nn.ReLU6()]
    shapes = [(16, 16, 1, 1), (16, 24, 2, 4), (24, 24, 1, 4), (24, 40, 2, 4), (40, 40, 1, 4)]
    blocks = [InvertedResidual(*shape, nn.ReLU6, eps) for shape in shapes]
    head = [nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96, eps), nn.ReLU6()]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def vgg() -> nn.Module:
    """Convolutions with biases, BatchNorm, ReLU and max pooling, two linear layers; [N, 3, 32, 32] -> [N, 10]."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 12), (12, 24), (24, 48), (48, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))


def resnet() -> nn.Module:
    """ResNet with projections, [N, 3, 32, 32] -> [N, 10]; some of its channels die in training."""
    stem = [nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    blocks = [PostActivationBlock(12, 12, 1), PostActivationBlock(12, 24, 2), PostActivationBlock(24, 48, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def densenet() -> nn.Module:
    """Concatenations, average pooling, and BatchNorm1d in the head; [N, 3, 32, 32] -> [N, 10]."""
    stages: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False)]
    stages += [DenseLayer(16 + 6 * i, 6) for i in range(3)]
    stages += [nn.BatchNorm2d(34), nn.ReLU(), nn.Conv2d(34, 20, 1, bias=False), nn.AvgPool2d(2)]
    stages += [DenseLayer(20 + 8 * i, 8) for i in range(3)]
    stages += [nn.BatchNorm2d(44), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stages, nn.Linear(44, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def efficientnet() -> nn.Module:
    """SiLU, squeeze and excite, Hardswish in the head; [N, 3, 32, 32] -> [N, 10]."""
    eps = 1e-3
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, eps), nn.SiLU()]
    shapes = [(16, 16, 1, 1), (16, 24, 2, 4), (24, 24, 1, 4), (24, 40, 2, 4)]
    blocks = [InvertedResidual(*shape, nn.SiLU, eps, excite=True) for shape in shapes]
    head = [nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96, eps), nn.Hardswish()]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def hundred() -> nn.Module:
    """100 classes, which pair of digits: [N, 1, 16, 16] -> [N, 100]."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(128, 100))
