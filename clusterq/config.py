"""Every setting of the method, with its default: the only place with default numbers.

All classes are frozen dataclasses of plain values; `to_dict`/`from_dict` round-trip through JSON. `preset(name)` gives
the three starting points `"default"`, `"paper"` and `"gdfq"`; `dataclasses.replace` changes single settings.

Every class checks itself when it is made: a value of the wrong type or out of range, and settings that contradict each
other, raise ValueError with the setting's name, what it got and what it wanted. Ranges stand beside the types below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from clusterq.settings import LayerBits, Range, check_fields, from_json

WeightRange = Literal["mse", "minmax"]
ActivationRange = Literal["mse", "minmax", "ema"]
Gradient = Literal["clipped", "pass_through"]
Scheme = Literal["auto", "deploy", "paper"]
Reduction = Literal["sum", "mean"]
Spread = Literal["std", "var"]
Assignment = Literal["teacher", "label", "nearest"]
Source = Literal["generator", "bank"]
Replay = Literal["stream", "bank"]
Optimizer = Literal["sgd", "adam"]
Schedule = Literal["cosine", "step", "constant"]
GeneratorForm = Literal["auto", "embedding", "conditional_norm"]
ImageSchedule = Literal["cosine", "constant"]
GeneratorSchedule = Literal["step", "constant"]
DistillationReduction = Literal["batchmean", "mean"]
Autocast = bool | Literal["auto"]

Bits = Annotated[int, Range(at_least=2, at_most=8)]
Count = Annotated[int, Range(at_least=1)]
Steps = Annotated[int, Range(at_least=0)]
Index = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, at_most=2**32 - 1)]
Weight = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Momentum = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]


@dataclass(frozen=True)
class QuantizationConfig:
    """How the low-bit twin of a network quantizes.

    Weights are quantized per output channel, activations per tensor after every activation function.

    Attributes:
        weight_bits, activation_bits: widths, 2 to 8 (any mixture, such as W4A8).
        first_layer_bits, last_layer_bits: weight width of the first and of the last Conv2d/Linear in execution order;
            None means `weight_bits`, as in the paper: all layers at the same width.
        layer_bits: weight or activation width by module name of the quantized twin, before everything else; kept as
            a mapping that cannot be changed.
        weight_range: `"mse"` searches the step that minimises the squared error, `"minmax"` spans the extreme values.
        activation_range: `"mse"` and `"minmax"` are set once on calibration images, `"ema"` follows the training
            batches.
        learned_scale: train the steps (LSQ); excludes `activation_range="ema"` and `gradient="pass_through"`. Without
            it weights are re-ranged from their live values in every forward and activations keep their calibrated or
            EMA range.
        gradient: straight-through estimator of the not-learned quantizers.
        weight_symmetric, activation_symmetric: zero point fixed at the middle of the code range. Weights of 8 bits in
            scheme deploy always have it: without it codes less their zero point would not fit an int8.
        int8_symmetric: only activations that an INT8 with zero point 0 holds, as TensorRT takes them:
            `activation_symmetric`, and what would have 8 bits and is never negative has 7 (codes 0 to 127). A setting
            of its own, as no choice of the others gives that: widths follow from what reads a tensor, not from its
            sign. Weights keep their zero points, which `clusterq.export_onnx(target="tensorrt")` takes off the codes.
        correct_batch_norm: when ranges are set, change the frozen BatchNorm statistics so that quantization moves
            neither mean nor variance of what BatchNorm puts out.
        range_momentum: weight of the old value in the EMA of `activation_range="ema"`.
        range_steps: forwards after which EMA ranges are frozen; calibration counts as the first.
        scheme: `"deploy"` gives a range to every tensor that an integer kernel would read, folds BatchNorm and puts
            biases on the grid of an int32: see `clusterq.qat.deployable`. `"paper"` leaves the input image, BatchNorm,
            residual sums, pooled features and biases in floating point. `"auto"` is deploy where torch.fx can trace the
            network, else paper with a warning; the quantized twin's own settings say which.
        input_bits: width of the input image in scheme deploy.
        sum_bits: width in scheme deploy of what no layer multiplies by weights: operands of sums, of concatenations, of
            pooling and of other activation functions than ReLU, where no Conv2d or Linear reads them too.
    """

    weight_bits: Bits = 4
    activation_bits: Bits = 4
    first_layer_bits: Bits | None = None
    last_layer_bits: Bits | None = None
    layer_bits: Mapping[str, Bits] = field(default_factory=dict)
    weight_range: WeightRange = "mse"
    activation_range: ActivationRange = "mse"
    learned_scale: bool = True
    gradient: Gradient = "clipped"
    weight_symmetric: bool = False
    activation_symmetric: bool = False
    int8_symmetric: bool = False
    correct_batch_norm: bool = True
    range_momentum: Momentum = 0.9
    range_steps: Steps = 800
    scheme: Scheme = "auto"
    input_bits: Bits = 8
    sum_bits: Bits = 8

    def __post_init__(self) -> None:
        check_fields(self, "quantization")
        object.__setattr__(self, "layer_bits", LayerBits(self.layer_bits))
        if self.learned_scale:
            for name, value in (("activation_range", "ema"), ("gradient", "pass_through")):
                if getattr(self, name) == value:
                    raise ValueError(
                        f"quantization.{name} is {value!r} with quantization.learned_scale; "
                        f"wanted learned_scale=False or another {name}"
                    )


@dataclass(frozen=True)
class SynthesisConfig:
    """How images are made from the teacher alone (equation numbers: ClusterQ, arXiv 2205.00179v1).

    Attributes:
        source: `"generator"` trains a conditional generator, `"bank"` optimises stored images directly.
        batch_size: images per synthesis step.
        warmup_steps: generator steps with CE + BN alignment only (7), before the centroids exist. For the bank: rounds
            over all images, of its `image_steps`; with centroids it needs some, such as `image_steps // 4`, for the
            images start as noise, and centroids set from noise pull them back to it.
        steps: generator steps with the full loss (10) after the warm-up. With `finetune.images="stream"` these run
            during fine-tuning instead, one per student step, and `finetune.steps` takes the place of this number.
        latent_dim, generator_lr, generator_betas: the conditional generator (GDFQ's architecture) and its Adam.
        generator_schedule: course of `generator_lr`: `"step"` divides it by 10 at 1/4, 1/2 and 3/4 of the generator's
            steps, warm-up included.
        generator: `"embedding"` (the published CIFAR form), `"conditional_norm"` (the ImageNet form), or `"auto"`: the
            latter from 64 pixels or 200 classes on.
        generator_width: channels of its first two stages.
        num_images, image_steps, image_lr: the bank: how many images, Adam steps per batch of images, learning rate.
        image_schedule: course of `image_lr` over the steps.
        roughness, contrast, ce_temperature: the bank: ranges (low, high) from which every batch of images draws how its
            images start and how sure the network is to be of them; see `clusterq.synthesis.recipes.ImageRecipe`.
            White noise, no change of contrast and the plain cross-entropy (8) are 0, 0 and 1.
        shift, shifted_share: the bank: pixels by which images move at random before every look of the network, for
            this share of the batches.
        leaves_share: the bank: share of the batches whose images start from dead leaves instead of noise; see
            `clusterq.synthesis.dead_leaves`.
        ce_weight: weight of the teacher's cross-entropy to the label (8).
        bns_weight: alpha1, weight of BN-statistic alignment over the whole batch (9).
        alignment_weight: alpha2, weight of class alignment to the centroids (4).
        diversity_weight: alpha3, weight of diversity enhancement (6).
        bns_reduction, class_reduction: `"sum"` over channels, classes and layers as printed in the paper, or `"mean"`.
        spread: compare standard deviations (paper) or variances.
        deviation_limits: as long as the deviation of a layer's input lies within them, its statistics enter the losses
            as they are, beyond them as if it were the nearer of the two: the absolute units of the published losses
            mean nothing, for a layer's weights may be a thousand times as large with the same outputs. None: as
            published.
        decay: weight of the old value in the EMA of the centroids (5); the paper's beta is 1 - decay.
        noise_mean, noise_spread: standard deviation of the diversity targets around a centroid (6).
        noise_relative: scale both by each channel's own BN standard deviation instead of absolute units.
        semantic_start: first BN layer (execution order, from 0) that carries centroids; None: (L + 1) // 2 - 2.
        assignment: which samples form a class: `"teacher"` only those the teacher assigns to their label, `"label"`
            all, `"nearest"` those whose statistics lie nearest to their label's centroid.
        autocast: bfloat16 autocast for the forward and backward passes; `"auto"`: where the device has instructions
            for it (`clusterq.precision`).
    """

    source: Source = "bank"
    batch_size: Count = 128
    warmup_steps: Steps = 0
    steps: Steps = 0
    latent_dim: Count = 100
    generator_lr: Positive = 1e-3
    generator_betas: tuple[Momentum, Momentum] = (0.5, 0.999)
    generator_schedule: GeneratorSchedule = "constant"
    generator: GeneratorForm = "auto"
    generator_width: Count = 128
    num_images: Count = 1024
    image_steps: Count = 150
    image_lr: Positive = 0.1
    image_schedule: ImageSchedule = "cosine"
    roughness: tuple[Weight, Weight] = (0.0, 1.5)
    contrast: tuple[Weight, Weight] = (0.0, 0.5)
    ce_temperature: tuple[Positive, Positive] = (1.0, 4.0)
    shift: Steps = 2
    shifted_share: Share = 0.5
    leaves_share: Share = 0.0
    ce_weight: Weight = 1.0
    bns_weight: Weight = 1.0
    alignment_weight: Weight = 0.0
    diversity_weight: Weight = 0.0
    bns_reduction: Reduction = "sum"
    class_reduction: Reduction = "mean"
    spread: Spread = "std"
    deviation_limits: tuple[Positive, Positive] | None = (0.1, 4.0)
    decay: Momentum = 0.8
    noise_mean: Weight = 0.5
    noise_spread: Weight = 1.0
    noise_relative: bool = False
    semantic_start: Index | None = None
    assignment: Assignment = "teacher"
    autocast: Autocast = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "synthesis")
        for name in ("roughness", "contrast", "ce_temperature", "deviation_limits"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"synthesis.{name} is {ends}; wanted the lower end first")

    @property
    def uses_centroids(self) -> bool:
        """Whether a class term, and with it the centroids, takes part in the loss."""
        return self.alignment_weight != 0 or self.diversity_weight != 0


@dataclass(frozen=True)
class FinetuneConfig:
    """Quantization-aware fine-tuning of the student on synthesised images, loss (11) = ce_weight * CE + kd_weight * KD.

    Attributes:
        steps, batch_size: length; 0 steps means calibration only.
        images: `"bank"` draws from stored images, `"stream"` takes each batch fresh from the generator, which trains
            one step before it.
        optimizer, lr, momentum, weight_decay, schedule: SGD is Nesterov; `"step"` divides the rate by 10 at 1/4, 1/2,
            3/4.
        rate_by_width: `lr` is that of 4 bits, halved for every bit by which the mean of `weight_bits` and
            `activation_bits` is higher, up to doubled where it is lower: `clusterq.qat.finetune.width_factor`.
        scale_lr_factor: learning rate of the quantization steps as a multiple of `lr`; they take no weight decay.
        ce_weight, kd_weight: hard-label cross-entropy (12) and distillation from the teacher (13).
        temperature: T of the distillation; the loss carries T^2.
        kd_reduction: `"batchmean"` sums the divergence over the K classes and averages over the batch; `"mean"`, GDFQ's
            form, averages over both and is K times weaker.
        grad_clip: largest gradient norm; also keeps dead filters dead (`clusterq.qat.dead_filters`); 0 switches both
            off.
        augment: random crop (padding 4 at 32 pixels, in proportion elsewhere) and horizontal flip.
        train_batch_norm: train gamma and beta of BatchNorm; its running statistics are always frozen.
        calibration_images: images on which ranges are set before training.
        autocast: bfloat16 autocast for the forward and backward passes; `"auto"` as for the synthesis.
    """

    steps: Steps = 400
    batch_size: Count = 128
    images: Replay = "bank"
    optimizer: Optimizer = "sgd"
    lr: Positive = 5e-3
    rate_by_width: bool = True
    momentum: Momentum = 0.9
    weight_decay: Weight = 1e-4
    schedule: Schedule = "cosine"
    scale_lr_factor: Weight = 3.0
    ce_weight: Weight = 0.0
    kd_weight: Weight = 1.0
    temperature: Positive = 20.0
    kd_reduction: DistillationReduction = "batchmean"
    grad_clip: Weight = 5.0
    augment: bool = True
    train_batch_norm: bool = True
    calibration_images: Count = 256
    autocast: Autocast = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "finetune")
        if self.steps > 0 and self.ce_weight + self.kd_weight == 0:
            raise ValueError(
                "finetune.ce_weight and finetune.kd_weight are both 0; wanted at least one term of the loss"
            )


@dataclass(frozen=True)
class ClusterQConfig:
    """The whole method: quantization, synthesis, fine-tuning and the seed.

    Raises ValueError for parts that do not go together: streaming from a bank, a generator that takes no step before
    its images are stored, or a bank whose centroids would be set from noise or never.
    """

    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    seed: Seed = 0
    preset: str = "default"

    def __post_init__(self) -> None:
        check_fields(self, "")
        synthesis = self.synthesis
        if synthesis.source == "generator":
            if self.finetune.images == "bank" and synthesis.warmup_steps + synthesis.steps == 0:
                raise ValueError(
                    "synthesis.warmup_steps and synthesis.steps are both 0 with synthesis.source='generator' and "
                    "finetune.images='bank': the generator would not be trained; wanted at least one step, such as "
                    "synthesis.steps=300"
                )
            return
        if self.finetune.images == "stream":
            raise ValueError(
                "finetune.images is 'stream' with synthesis.source='bank'; wanted finetune.images='bank' or "
                "synthesis.source='generator'"
            )
        if synthesis.uses_centroids and not 1 <= synthesis.warmup_steps < synthesis.image_steps:
            raise ValueError(
                f"synthesis.warmup_steps is {synthesis.warmup_steps} with class terms on a bank of "
                f"{synthesis.image_steps} rounds; wanted 1 to {synthesis.image_steps - 1} rounds before the centroids "
                f"are set, such as image_steps // 4 = {synthesis.image_steps // 4}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, ready for JSON."""
        data = dataclasses.asdict(self)
        data["quantization"]["layer_bits"] = dict(self.quantization.layer_bits)
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ClusterQConfig:
        """Inverse of `to_dict`. Raises ValueError for an unknown setting or a value that does not fit."""
        data = _settings_of(ClusterQConfig, data)
        parts = {
            "quantization": _build(QuantizationConfig, data.get("quantization", {})),
            "synthesis": _build(SynthesisConfig, data.get("synthesis", {})),
            "finetune": _build(FinetuneConfig, data.get("finetune", {})),
        }
        rest = {k: v for k, v in data.items() if k not in parts}
        config: ClusterQConfig = _build(ClusterQConfig, {**rest, **parts})
        return config


def _settings_of(cls: Any, data: object) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is {data!r}; wanted a mapping of settings")
    return data


def _build(cls: Any, data: Mapping[str, Any]) -> Any:
    data = _settings_of(cls, data)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r} for {cls.__name__}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(cls, include_extras=True)
    return cls(**{name: from_json(value, hints[name]) for name, value in data.items()})


def preset(name: str) -> ClusterQConfig:
    """A named starting point: `"default"`, `"paper"` (ClusterQ as printed) or `"gdfq"` (GDFQ as released).

    `paper` follows equations (1) to (13) of arXiv 2205.00179v1: symmetric ranges, sums over layers, classes and
    channels, standard deviations, and plain KL divergence with temperature 1 and weight 1. `gdfq` follows GDFQ's code:
    asymmetric ranges, no centroids, means over layers and channels, variances, and distillation at temperature 20
    averaged over batch and classes.

    Both keep the form of the published schedule and shorten it to run on a CPU: 400 steps of the generator, the first
    100 of them warm-up, and 300 of the student beside the rest, where the publications run 400 epochs of 200 steps
    (80 000) with a warm-up of 4 to 50 epochs. Both learning rates fall by 10 at 1/4, 1/2 and 3/4 of their own steps,
    as published at epochs 100, 200 and 300 of 400; batches have 128 images, published 16 to 512. EMA ranges freeze
    after `range_steps` = 800 forwards, as in GDFQ's code, so not within 300 steps. `dataclasses.replace` restores any
    length: `synthesis.warmup_steps` and `finetune.steps` are the two to set.

    Deviation from equation (1) in `paper`: activations are quantized after the activation function, and those that are
    never negative, as after ReLU, use one-sided codes; symmetric codes would leave half of them unused.

    Raises ValueError for an unknown name.
    """
    if name == "default":
        return ClusterQConfig()
    if name not in ("paper", "gdfq"):
        raise ValueError(f"preset {name!r} is not one of default, paper, gdfq")
    paper = name == "paper"
    quantization = QuantizationConfig(
        weight_range="minmax",
        activation_range="ema",
        learned_scale=False,
        gradient="pass_through",
        weight_symmetric=paper,
        activation_symmetric=paper,
        correct_batch_norm=False,
        scheme="paper",
    )
    synthesis = SynthesisConfig(
        source="generator",
        warmup_steps=100,
        steps=300,
        generator_schedule="step",
        bns_weight=0.1,
        bns_reduction="sum" if paper else "mean",
        spread="std" if paper else "var",
        deviation_limits=None,
        class_reduction="sum",
        alignment_weight=0.9 if paper else 0.0,
        diversity_weight=0.6 if paper else 0.0,
        autocast=False,
    )
    finetune = FinetuneConfig(
        steps=300,
        images="stream",
        lr=1e-4,
        rate_by_width=False,
        schedule="step",
        ce_weight=1.0,
        kd_weight=1.0,
        temperature=1.0 if paper else 20.0,
        kd_reduction="batchmean" if paper else "mean",
        grad_clip=0.0,
        augment=False,
        weight_decay=1e-4,
        autocast=False,
    )
    return ClusterQConfig(quantization, synthesis, finetune, preset=name)
