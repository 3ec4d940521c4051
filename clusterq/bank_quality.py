"""How good the images of a bank are, by what their network says of them. No real image is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clusterq.synthesis import Teacher, semantic_start
from clusterq.synthesis.losses import to_spread

# Distances of so many images to all others at a time.
_ROWS = 256
_FEW_CLASSES = 20


@dataclass(frozen=True)
class LayerAlignment:
    """How far a BatchNorm layer's input is from what the layer remembers, averaged over its channels.

    Attributes:
        channels: of the layer.
        mean_error: |mean - running mean| in units of the running standard deviation, sqrt(running_var + eps).
        std_error: |std - running std| / running std, the running one with eps.
    """

    channels: int
    mean_error: float
    std_error: float


@dataclass(frozen=True)
class Quality:
    """What `inspect_images` finds.

    Attributes:
        counts: images of every class.
        label_accuracy: percent of the images that the network assigns to their label.
        label_confidence, top_confidence: mean probability of the label and of the network's best class, percent.
        layers: one entry per BatchNorm layer in execution order.
        within, between: see `diversity`; None where no class has two images, or no two classes have any.
        pixels: `min`, `max`, `mean`, `std` over all pixels in the network's input space, and `outside`, the percentage
            of values that no pixel in 0..1 has after normalisation (None where the normalisation is not known).
    """

    counts: list[int]
    label_accuracy: float
    label_confidence: float
    top_confidence: float
    layers: list[LayerAlignment]
    within: float | None
    between: float | None
    pixels: dict[str, float | None]

    @property
    def diversity(self) -> float | None:
        """`within / between`: 0, all images of a class are the same; 1, classes are no closer than the rest."""
        return None if self.within is None or not self.between else self.within / self.between

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "diversity": self.diversity}


@torch.no_grad()
def inspect_images(
    teacher: Teacher,
    images: Tensor,
    labels: Tensor,
    *,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    batch_size: int = 256,
) -> Quality:
    """Measure images against the network they were made from.

    Statistics of a layer are those of all images together: the mean over images and pixels, and the variance around it.

    Args:
        teacher: the frozen network.
        images: [N, C, H, W] in its input space.
        labels: [N] int64 in [0, K).
        mean, std: normalisation of pixels in 0..1, one value per channel; empty: not known.
        batch_size: images per forward pass.

    Raises:
        ValueError: no images, images of another shape, or labels that do not fit the network.
    """
    teacher.require_fit(images, labels)
    outputs = [teacher(part.to(teacher.device, teacher.dtype)) for part in torch.split(images, batch_size)]
    chances = torch.cat([output.logits.double().softmax(1) for output in outputs]).cpu()
    own = torch.cat([output.mean for output in outputs]).double().cpu()
    var = torch.cat([output.var for output in outputs]).double().cpu()
    top, best = chances.max(1)
    within, between = diversity(_features(teacher, own, var), labels.cpu())
    return Quality(
        torch.bincount(labels.cpu(), minlength=teacher.num_classes).tolist(),
        100 * float((best == labels.cpu()).double().mean()),
        100 * float(chances.gather(1, labels.cpu()[:, None]).mean()),
        100 * float(top.mean()),
        _alignment(teacher, own, var),
        within,
        between,
        _pixels(images, mean, std),
    )


def diversity(features: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """Mean distance of two different images of a class, and of two images of different classes.

    Each image is a point: the mean and the standard deviation of every channel of the network's deep BatchNorm layers
    (those that carry centroids by default), in units of what the layer remembers as that channel's deviation, every
    layer with the same total weight. Both numbers are means over all such pairs of Euclidean distances, so their
    quotient does not depend on the network's depth, width or scale. Pairs count alike: a class with more images has
    more of them.

    Args:
        features: [N, D] float64.
        labels: [N] int64.

    Returns:
        The two means; None where there is no such pair.
    """
    sums, pairs = [0.0, 0.0], [0, 0]
    for rows, classes in zip(torch.split(features, _ROWS), torch.split(labels, _ROWS), strict=True):
        # The matrix form loses what small distances are made of.
        distances = torch.cdist(rows, features, compute_mode="donot_use_mm_for_euclid_dist")
        same = classes[:, None] == labels[None]
        for kind, chosen in enumerate((same, ~same)):
            sums[kind] += float(distances[chosen].sum())
            pairs[kind] += int(chosen.sum())
    # An image is at distance 0 from itself, which is no pair.
    pairs[0] -= len(labels)
    within, between = (total / count if count else None for total, count in zip(sums, pairs, strict=True))
    return within, between


def describe(quality: Quality) -> str:
    """The findings as text for a terminal."""
    classes = len(quality.counts)
    pixels = quality.pixels
    fewest, most = min(quality.counts), max(quality.counts)
    lines = [f"{sum(quality.counts)} images, {classes} classes, {fewest} to {most} images each"]
    if classes <= _FEW_CLASSES:
        lines.append("  " + "  ".join(f"{index}: {count}" for index, count in enumerate(quality.counts)))
    else:
        lines.append(f"  without an image: {quality.counts.count(0)} classes")
    lines += [
        f"the network assigns {quality.label_accuracy:.1f} % to their label; probability of the label "
        f"{quality.label_confidence:.1f} %, of its best class {quality.top_confidence:.1f} %",
        f"diversity {_number(quality.diversity)} (distance within a class {_number(quality.within)}, between classes "
        f"{_number(quality.between)}; 0: a class repeats one image, 1: as far apart as classes are)",
        f"pixels {_number(pixels['min'])} to {_number(pixels['max'])}, mean {_number(pixels['mean'])}, std "
        f"{_number(pixels['std'])}; {_number(pixels['outside'])} % of the values beyond those of real pixels",
        "BatchNorm layer  channels  mean off by  std off by",
    ]
    for index, layer in enumerate(quality.layers):
        lines.append(f"{index:>15}  {layer.channels:>8}  {layer.mean_error:>8.3f} s  {100 * layer.std_error:>8.1f} %")
    return "\n".join([*lines, "(s: in standard deviations that the layer remembers; averages over its channels)"])


def _alignment(teacher: Teacher, mean: Tensor, var: Tensor) -> list[LayerAlignment]:
    """From mean and variance of single images [N, D], all with the same number of pixels."""
    together = mean.mean(0)
    spread = (var.mean(0) + mean.var(0, correction=0)).sqrt()
    remembered = (teacher.running_var + teacher.eps).double().sqrt().cpu()
    mean_error = (together - teacher.running_mean.double().cpu()).abs() / remembered
    std_error = (spread - remembered).abs() / remembered
    parts = zip(*(torch.split(error, list(teacher.channels)) for error in (mean_error, std_error)), strict=True)
    return [LayerAlignment(len(a), float(a.mean()), float(b.mean())) for a, b in parts]


def _features(teacher: Teacher, mean: Tensor, var: Tensor) -> Tensor:
    """[N, 2 D'] points of `diversity`."""
    first = semantic_start(teacher.num_layers)
    begin = sum(teacher.channels[:first])
    width = torch.tensor(teacher.channels[first:])
    share = (1 / (len(width) * width.double())).repeat_interleave(width)
    remembered = (teacher.running_var + teacher.eps)[begin:].double().cpu()
    scale = torch.sqrt(share / remembered)
    return torch.cat([mean[:, begin:] * scale, to_spread(var[:, begin:], "std") * scale], 1)


def _pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, float | None]:
    values = images.double()
    outside = None
    if len(mean) == len(std) == images.shape[1]:
        shift, scale = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
        pixels = values * scale + shift
        outside = 100 * float(((pixels < 0) | (pixels > 1)).double().mean())
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "outside": outside,
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
