"""The two networks that come with the package: CIFAR ResNet-20 and the demo's network for handwritten digits."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional


class ChannelPadShortcut(nn.Module):
    """Parameter-free shortcut of CIFAR ResNets (He et al. 2015, option A): every second pixel, zero channels added.

    [N, C, H, W] -> [N, C + 2 * padding, ceil(H / 2), ceil(W / 2)].
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else ChannelPadShortcut((out_channels - in_channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """CIFAR ResNet of 6 * `blocks` + 2 layers (He et al. 2015, section 4.2), [N, 3, 32, 32] -> [N, num_classes]."""

    def __init__(self, blocks: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.linear(self.flatten(self.pool(self.layer3(self.layer2(self.layer1(x))))))
        return out


def resnet20(num_classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-20, 272,474 parameters with 10 classes."""
    return CifarResNet(3, num_classes)


class DigitsConvNet(nn.Module):
    """The demo's network: depthwise-separable blocks with BatchNorm, [N, 1, 16, 16] -> [N, 10].

    Depthwise filters of few weights and channels of very different range (see examples/train_digits.py) make it lose
    much of its accuracy when its numbers are merely rounded to 4 or 3 bits.

    Args:
        widths: output channels of the stem and of each block. The stem halves height and width, and so does each block
            that changes the number of channels.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 16, 32, 32, 64, 64), num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.blocks = nn.Sequential(*(self._block(i, o) for i, o in itertools.pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.classifier = nn.Linear(widths[-1], num_classes)

    @staticmethod
    def _block(in_channels: int, out_channels: int) -> nn.Sequential:
        stride = 1 if in_channels == out_channels else 2
        return nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.flatten(self.pool(self.blocks(self.stem(x)))))
        return out
