"""Every setting of the method, with its default: the only place with default numbers.

All classes are frozen dataclasses of plain values; `to_dict`/`from_dict` round-trip through JSON. `preset(name)` gives
the three starting points `"default"`, `"paper"` and `"gdfq"`; `dataclasses.replace` changes single settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

WeightRange = Literal["mse", "minmax"]
ActivationRange = Literal["mse", "minmax", "ema"]
Gradient = Literal["clipped", "pass_through"]
Reduction = Literal["sum", "mean"]
Spread = Literal["std", "var"]
Assignment = Literal["teacher", "label", "nearest"]
Source = Literal["generator", "bank"]
Replay = Literal["stream", "bank"]
Optimizer = Literal["sgd", "adam"]
Schedule = Literal["cosine", "step", "constant"]
GeneratorForm = Literal["auto", "embedding", "conditional_norm"]
ImageSchedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class QuantizationConfig:
    """How the low-bit twin of a network quantizes.

    Weights are quantized per output channel, activations per tensor after every activation function (scheme `"paper"`:
    input image, residual sums and pooled features stay in floating point).

    Attributes:
        weight_bits, activation_bits: widths, 2 to 8 (any mixture, such as W4A8).
        first_layer_bits, last_layer_bits: weight width of the first and of the last Conv2d/Linear in execution order;
            None means `weight_bits`, as in the paper: all layers at the same width.
        layer_bits: weight or activation width by module name of the quantized twin, before everything else.
        weight_range: `"mse"` searches the step that minimises the squared error, `"minmax"` spans the extreme values.
        activation_range: `"mse"` and `"minmax"` are set once on calibration images, `"ema"` follows the training
            batches.
        learned_scale: train the steps (LSQ); needs `gradient="clipped"` semantics. Without it weights are re-ranged
            from their live values in every forward and activations keep their calibrated or EMA range.
        gradient: straight-through estimator of the not-learned quantizers.
        weight_symmetric, activation_symmetric: zero point fixed at the middle of the code range.
        range_momentum: weight of the old value in the EMA of `activation_range="ema"`.
        range_steps: training forwards after which EMA ranges are frozen.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_layer_bits: int | None = None
    last_layer_bits: int | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    weight_range: WeightRange = "mse"
    activation_range: ActivationRange = "mse"
    learned_scale: bool = True
    gradient: Gradient = "clipped"
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    range_momentum: float = 0.9
    range_steps: int = 800

    def __post_init__(self) -> None:
        widths = {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "first_layer_bits": self.first_layer_bits,
            "last_layer_bits": self.last_layer_bits,
            **{f"layer_bits[{k!r}]": v for k, v in self.layer_bits.items()},
        }
        for name, bits in widths.items():
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{name} is {bits}; supported widths are 2 to 8 bits")
        if not 0 <= self.range_momentum < 1:
            raise ValueError(f"range_momentum is {self.range_momentum}; wanted 0 <= range_momentum < 1")


@dataclass(frozen=True)
class SynthesisConfig:
    """How images are made from the teacher alone (equation numbers: ClusterQ, arXiv 2205.00179v1).

    Attributes:
        source: `"generator"` trains a conditional generator, `"bank"` optimises stored images directly.
        batch_size: images per synthesis step.
        warmup_steps: generator steps with CE + BN alignment only (7), before the centroids exist.
        steps: generator steps with the full loss (10) after the warm-up; for a streaming source these run during
            fine-tuning instead, one per student step.
        latent_dim, generator_lr, generator_betas: the conditional generator (GDFQ's architecture) and its Adam.
        generator: `"embedding"` (the published CIFAR form), `"conditional_norm"` (the ImageNet form), or `"auto"`: the
            latter from 64 pixels or 200 classes on.
        generator_width: channels of its first two stages.
        num_images, image_steps, image_lr: the bank: how many images, Adam steps per batch of images, learning rate.
        image_schedule: course of `image_lr` over the steps.
        ce_weight: weight of the teacher's cross-entropy to the label (8).
        bns_weight: alpha1, weight of BN-statistic alignment over the whole batch (9).
        alignment_weight: alpha2, weight of class alignment to the centroids (4).
        diversity_weight: alpha3, weight of diversity enhancement (6).
        bns_reduction, class_reduction: `"sum"` over channels, classes and layers as printed in the paper, or `"mean"`.
        spread: compare standard deviations (paper) or variances.
        decay: weight of the old value in the EMA of the centroids (5); the paper's beta is 1 - decay.
        noise_mean, noise_spread: standard deviation of the diversity targets around a centroid (6).
        noise_relative: scale both by each channel's own BN standard deviation instead of absolute units.
        semantic_start: first BN layer (execution order, from 0) that carries centroids; None: (L + 1) // 2 - 2.
        assignment: which samples form a class: `"teacher"` only those the teacher assigns to their label, `"label"`
            all, `"nearest"` those whose statistics lie nearest to their label's centroid.
        autocast: bfloat16 autocast for the forward and backward passes.
    """

    source: Source = "bank"
    batch_size: int = 128
    warmup_steps: int = 0
    steps: int = 0
    latent_dim: int = 100
    generator_lr: float = 1e-3
    generator_betas: tuple[float, float] = (0.5, 0.999)
    generator: GeneratorForm = "auto"
    generator_width: int = 128
    num_images: int = 512
    image_steps: int = 200
    image_lr: float = 0.1
    image_schedule: ImageSchedule = "cosine"
    ce_weight: float = 1.0
    bns_weight: float = 1.0
    alignment_weight: float = 0.0
    diversity_weight: float = 0.0
    bns_reduction: Reduction = "sum"
    class_reduction: Reduction = "mean"
    spread: Spread = "std"
    decay: float = 0.8
    noise_mean: float = 0.5
    noise_spread: float = 1.0
    noise_relative: bool = False
    semantic_start: int | None = None
    assignment: Assignment = "teacher"
    autocast: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "latent_dim", "num_images", "image_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; wanted 0 <= decay < 1")


@dataclass(frozen=True)
class FinetuneConfig:
    """Quantization-aware fine-tuning of the student on synthesised images, loss (11) = ce_weight * CE + kd_weight * KD.

    Attributes:
        steps, batch_size: length; 0 steps means calibration only.
        images: `"bank"` draws from stored images, `"stream"` takes each batch fresh from the generator, which trains
            one step before it.
        optimizer, lr, momentum, weight_decay, schedule: SGD is Nesterov; `"step"` divides the rate by 10 at 1/4, 1/2,
            3/4.
        scale_lr_factor: learning rate of the quantization steps as a multiple of `lr`; they take no weight decay.
        ce_weight, kd_weight: hard-label cross-entropy (12) and distillation from the teacher (13).
        temperature: T of the distillation; the loss carries T^2 and is averaged over the batch.
        grad_clip: largest gradient norm; 0 switches clipping off.
        augment: random crop (padding 4 at 32 pixels, in proportion elsewhere) and horizontal flip.
        train_batch_norm: train gamma and beta of BatchNorm; its running statistics are always frozen.
        calibration_images: images on which ranges are set before training.
        autocast: bfloat16 autocast for the forward and backward passes.
    """

    steps: int = 300
    batch_size: int = 128
    images: Replay = "bank"
    optimizer: Optimizer = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    scale_lr_factor: float = 1.0
    ce_weight: float = 0.0
    kd_weight: float = 1.0
    temperature: float = 20.0
    grad_clip: float = 0.0
    augment: bool = True
    train_batch_norm: bool = True
    calibration_images: int = 256
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; wanted 0 or more")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; wanted at least 1")


@dataclass(frozen=True)
class ClusterQConfig:
    """The whole method: quantization, synthesis, fine-tuning and the seed."""

    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    seed: int = 0
    preset: str = "default"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ClusterQConfig:
        """Inverse of `to_dict`. Raises ValueError for an unknown setting."""
        parts = {
            "quantization": _build(QuantizationConfig, data.get("quantization", {})),
            "synthesis": _build(SynthesisConfig, data.get("synthesis", {})),
            "finetune": _build(FinetuneConfig, data.get("finetune", {})),
        }
        rest = {k: v for k, v in data.items() if k not in parts}
        config: ClusterQConfig = _build(ClusterQConfig, {**rest, **parts})
        return config


def _build(cls: Any, data: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} for {cls.__name__}; known: {', '.join(sorted(known))}")
    # JSON has no tuples.
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


def preset(name: str) -> ClusterQConfig:
    """A named starting point: `"default"`, `"paper"` (the published method as printed) or `"gdfq"` (no centroids).

    `paper` and `gdfq` follow the published schedule in form, shortened to run on a CPU: `dataclasses.replace` restores
    any length. Raises ValueError for an unknown name.
    """
    if name == "default":
        return ClusterQConfig()
    if name not in ("paper", "gdfq"):
        raise ValueError(f"preset {name!r} is not one of default, paper, gdfq")
    quantization = QuantizationConfig(
        weight_range="minmax",
        activation_range="ema",
        learned_scale=False,
        gradient="pass_through",
        weight_symmetric=name == "paper",
        activation_symmetric=name == "paper",
    )
    synthesis = SynthesisConfig(
        source="generator",
        warmup_steps=100,
        steps=300,
        bns_weight=0.1,
        bns_reduction="sum",
        class_reduction="sum",
        alignment_weight=0.9 if name == "paper" else 0.0,
        diversity_weight=0.6 if name == "paper" else 0.0,
    )
    finetune = FinetuneConfig(
        images="stream", lr=1e-4, schedule="step", ce_weight=1.0, kd_weight=1.0, augment=False, weight_decay=1e-4
    )
    return ClusterQConfig(quantization, synthesis, finetune, preset=name)
