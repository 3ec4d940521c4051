"""Networks for the tests of scheme deploy: every place a tensor can have between integer kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.networks import ChannelPadShortcut


def randomise(model: nn.Module) -> nn.Module:
    """BatchNorm statistics and gains of both signs that are not those of a fresh layer; evaluation mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(-0.3, 1.5)
                module.bias.normal_(0, 0.2)
    return model.eval()


class Block(nn.Module):
    """A residual block with or without a projection, its sum in place."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(out)
        self.short: nn.Module = nn.Identity()
        if stride > 1:
            self.short = ChannelPadShortcut((out - channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.relu(y)


class Residual(nn.Module):
    """Max pooling, residual sums with both kinds of shortcut, pooling by mean, two Linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block1 = Block(4, 4)
        self.block2 = Block(4, 6, 2)
        self.fc1 = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.stem(x)))
        x = self.block2(self.block1(x)).mean((2, 3))
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


class Inverted(nn.Module):
    """Linear bottlenecks whose outputs feed sums and convolutions, ReLU6, depthwise layers, adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6())
        self.blocks = nn.ModuleList(self._block() for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 5))

    @staticmethod
    def _block() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.classifier(self.head(x))


class Dense(nn.Module):
    """BatchNorm in front of ReLU and convolution, concatenations, average pooling with a window."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, 1, 1, bias=False) for i in range(2))
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(functional.relu(norm(x)))], 1)
        x = functional.avg_pool2d(functional.relu(self.norms[2](x)), 2)
        return self.head(functional.adaptive_avg_pool2d(x, 1)).flatten(1)


class Gated(nn.Module):
    """Hardswish and SiLU as tables, a gate of squeeze and excitation, two branches joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish())
        self.squeeze = nn.Conv2d(6, 3, 1)
        self.excite = nn.Conv2d(3, 6, 1)
        self.left = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU())
        self.right = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)))))
        x = x * gate
        x = torch.cat([self.left(x), functional.silu(self.right(x))], dim=1)
        return self.fc(x.mean([2, 3]))


NETWORKS = (Residual, Inverted, Dense, Gated)
