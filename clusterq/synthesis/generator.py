"""Conditional generators of GDFQ and ClusterQ: noise and a class label in, an image in the network's input space out.

Two forms, both ending in tanh and a BatchNorm without affine parameters, so that pixels leave with mean 0 and variance
1 as those of a normalised image:

- `EmbeddingGenerator` (CIFAR): the label's embedding multiplies the noise vector; three BatchNorm layers are ordinary.
- `ConditionalNormGenerator` (ImageNet): the label only selects gamma and beta of the inner BatchNorm layers.

Both upsample twice by 2 from a quarter of the image. A height or width that 4 does not divide is rounded up to the next
multiple of 4 and the image is cut out of the middle, before the last BatchNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterq.config import GeneratorForm

# The inner BatchNorm layers of the published generators carry 0.8 in the place of eps (not of momentum).
_INNER_EPS = 0.8


class CategoricalConditionalBatchNorm2d(nn.Module):
    """BatchNorm whose gamma and beta are looked up by class: `y = gamma[label] * normalise(x) + beta[label]`.

    Args:
        num_classes: number of rows of the gamma table (initially 1) and the beta table (initially 0).
        num_features: channels C.
        eps: added to the variance.
    """

    def __init__(self, num_classes: int, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps=eps, affine=False)
        self.gamma = nn.Embedding(num_classes, num_features)
        self.beta = nn.Embedding(num_classes, num_features)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """x [N, C, H, W], labels [N] int64 -> [N, C, H, W]."""
        gamma = self.gamma(labels)[:, :, None, None]
        beta = self.beta(labels)[:, :, None, None]
        return torch.addcmul(beta, gamma, self.norm(x))


class ConditionalGenerator(nn.Module):
    """What both forms share: sizes, the crop, and the last layers.

    Attributes:
        num_classes, latent_dim: K and length d of a noise vector.
        image_shape: (C, H, W) of an image.
    """

    def __init__(self, num_classes: int, image_shape: tuple[int, int, int], latent_dim: int, width: int) -> None:
        super().__init__()
        channels, height, width_px = image_shape
        for name, value in (("num_classes", num_classes), ("latent_dim", latent_dim), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; wanted at least 1")
        if min(image_shape) < 1:
            raise ValueError(f"image_shape is {image_shape}; wanted positive (channels, height, width)")
        self.num_classes = num_classes
        self.latent_dim = latent_dim
        self.image_shape = image_shape
        self.width = width
        self.base = (-(-height // 4), -(-width_px // 4))
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, max(width // 2, 1), 3, padding=1)
        self.conv3 = nn.Conv2d(max(width // 2, 1), channels, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def _finish(self, x: Tensor) -> Tensor:
        """Features after the last inner BatchNorm [N, width // 2, 4h, 4w] -> images [N, C, H, W]."""
        x = torch.tanh(self.conv3(F.leaky_relu(x, 0.2)))
        _, height, width = self.image_shape
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        image: Tensor = self.norm3(x[:, :, top : top + height, left : left + width])
        return image


class EmbeddingGenerator(ConditionalGenerator):
    """CIFAR form of GDFQ.

    Embedding(y) * z, Linear, BN, up x2, conv, BN, LeakyReLU 0.2, up x2, conv, BN, LeakyReLU 0.2, conv, tanh, BN.

    Args:
        num_classes: K.
        image_shape: (C, H, W).
        latent_dim: length of z.
        width: channels of the first two stages; the third has half of them.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], latent_dim: int = 100, width: int = 128
    ) -> None:
        super().__init__(num_classes, image_shape, latent_dim, width)
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.linear = nn.Linear(latent_dim, width * self.base[0] * self.base[1])
        self.norm0 = nn.BatchNorm2d(width)
        self.norm1 = nn.BatchNorm2d(width, eps=_INNER_EPS)
        self.norm2 = nn.BatchNorm2d(max(width // 2, 1), eps=_INNER_EPS)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise [N, latent_dim] from N(0, 1), labels [N] int64 -> images [N, C, H, W]."""
        x = self.linear(self.embedding(labels) * noise)
        x = self.norm0(x.view(-1, self.width, *self.base))
        x = self.norm1(self.conv1(F.interpolate(x, scale_factor=2.0)))
        x = self.norm2(self.conv2(F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2.0)))
        return self._finish(x)


class ConditionalNormGenerator(ConditionalGenerator):
    """ImageNet form of GDFQ: Linear on z alone; the label enters through the inner conditional BatchNorm layers.

    Same arguments and the same order of layers as `EmbeddingGenerator`.
    """

    def __init__(
        self, num_classes: int, image_shape: tuple[int, int, int], latent_dim: int = 100, width: int = 128
    ) -> None:
        super().__init__(num_classes, image_shape, latent_dim, width)
        self.linear = nn.Linear(latent_dim, width * self.base[0] * self.base[1])
        self.norm0 = CategoricalConditionalBatchNorm2d(num_classes, width)
        self.norm1 = CategoricalConditionalBatchNorm2d(num_classes, width, eps=_INNER_EPS)
        self.norm2 = CategoricalConditionalBatchNorm2d(num_classes, max(width // 2, 1), eps=_INNER_EPS)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """noise [N, latent_dim] from N(0, 1), labels [N] int64 -> images [N, C, H, W]."""
        x = self.norm0(self.linear(noise).view(-1, self.width, *self.base), labels)
        x = self.norm1(self.conv1(F.interpolate(x, scale_factor=2.0)), labels)
        x = self.norm2(self.conv2(F.interpolate(F.leaky_relu(x, 0.2), scale_factor=2.0)), labels)
        return self._finish(x)


def build_generator(
    form: GeneratorForm,
    num_classes: int,
    image_shape: tuple[int, int, int],
    latent_dim: int,
    width: int,
    *,
    seed: int,
    device: torch.device,
) -> ConditionalGenerator:
    """A generator with reproducible initial weights; the random states of all devices are left as they were.

    Args:
        form: `"embedding"`, `"conditional_norm"`, or `"auto"`: the ImageNet form from 64 pixels or 200 classes on.
        num_classes, image_shape, latent_dim, width: see `EmbeddingGenerator`.
        seed: of the initial weights, which are drawn on the CPU whatever the device.
        device: where the generator lives.

    Raises:
        ValueError: unknown form, or a size below 1.
    """
    if form not in ("auto", "embedding", "conditional_norm"):
        raise ValueError(f"form is {form!r}; wanted 'auto', 'embedding' or 'conditional_norm'")
    if form == "auto":
        form = "conditional_norm" if max(image_shape[1:]) >= 64 or num_classes >= 200 else "embedding"
    cls = ConditionalNormGenerator if form == "conditional_norm" else EmbeddingGenerator
    # Not torch.manual_seed, which would seed the generators of all accelerators as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        generator = cls(num_classes, image_shape, latent_dim, width)
    return generator.to(device)
