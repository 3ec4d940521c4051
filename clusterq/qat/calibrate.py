"""Setting the ranges of a quantized network from images, before or without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from clusterq.config import QuantizationConfig, WeightRange
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.qat.correct import BatchNormCorrection
from clusterq.qat.prepare import prepare, prepared_with
from clusterq.qat.trace import evaluating

# Values of the images in one pass. The search for a range may hold many times an activation, the passes that correct
# BatchNorm a few activations only: 256 images of 224 pixels and their largest layers are some gigabytes.
_INPUT_VALUES, _CORRECTION_VALUES = 1 << 22, 1 << 26


def calibrate(
    student: nn.Module,
    images: Tensor,
    config: QuantizationConfig | None = None,
    *,
    batch_size: int | None = None,
) -> None:
    """Sets weight and activation ranges of a network from `prepare` in place, then corrects its BatchNorm statistics.

    Ranges are set in one pass over the images in floating point, where each activation quantizer takes its range from
    what reaches it: the values that the quantized network is to imitate. Where the images go through in several
    batches, a range of least squared error is the average over the batches, a min/max range spans all of them. Two
    further passes, in floating point and quantized, correct BatchNorm: see `clusterq.qat.correct`. They take all images
    at once, or the first ones only where 64 million input values or `batch_size` is less.

    Calibrating again gives the same as calibrating once: BatchNorm starts from the statistics before its correction.

    Args:
        student: network from `clusterq.prepare`; its mode is kept.
        images: [N, C, H, W], N >= 1, as the network wants them; moved batch by batch to the device of the network.
        config: `weight_range` and `activation_range` say how (`"ema"` starts from min/max), `correct_batch_norm`
            whether BatchNorm is corrected; None: as prepared.
        batch_size: images per pass; default: all that fit 4 million input values, 64 million for BatchNorm.

    Raises ValueError when there are no images, when images or activations are NaN or infinite, and for a network from
    `clusterq.load` whose BatchNorm was corrected before it was saved. Warns of activation quantizers that no image
    reaches.
    """
    if len(images) == 0:
        raise ValueError("images is empty; wanted at least one image to calibrate on")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values")
    config = config or prepared_with(student)
    device = next(student.parameters()).device
    size = images[0].numel()
    correction = BatchNormCorrection(student) if config.correct_batch_norm else None
    for layer in student.modules():
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
            layer.weight_quantizer.method = config.weight_range
            layer.weight_quantizer.initialise(layer.weight)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    with evaluating(student), torch.no_grad():
        with ExitStack() as stack:
            stack.enter_context(_switched_off(student, WeightQuantizer))
            for quantizer in quantizers.values():
                stack.enter_context(quantizer.calibrating(config.activation_range))
            for batch in torch.split(images, batch_size or max(1, _INPUT_VALUES // size)):
                student(batch.to(device))
        if correction is not None:
            together = images[: batch_size or max(1, _CORRECTION_VALUES // size)].to(device)
            with _switched_off(student, WeightQuantizer, ActivationQuantizer), correction.observing():
                student(together)
            with correction.correcting():
                student(together)
    idle = [name for name, quantizer in quantizers.items() if quantizer.observations == 0]
    if idle:
        warnings.warn(f"no image reached these activation quantizers: {', '.join(idle)}", UserWarning, stacklevel=2)


@contextmanager
def _switched_off(model: nn.Module, *kinds: type[WeightQuantizer] | type[ActivationQuantizer]) -> Iterator[None]:
    """Quantizers of these kinds off inside this context."""
    enabled = {module: module.enabled for module in model.modules() if isinstance(module, kinds)}
    for quantizer in enabled:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, value in enabled.items():
            quantizer.enabled = value


def round_only(model: nn.Module, config: QuantizationConfig, images: Tensor, ranges: WeightRange = "mse") -> nn.Module:
    """The network rounded to the widths of `config`, no training and no correction: the baseline of every result.

    Args:
        model: network in floating point.
        config: widths and symmetry; its kinds of ranges are replaced by `ranges`.
        images: [N, C, H, W] to set activation ranges on.
        ranges: `"minmax"` or `"mse"`, for weights and activations.
    """
    config = replace(
        config, weight_range=ranges, activation_range=ranges, learned_scale=False, correct_batch_norm=False
    )
    student = prepare(model, config, example_input=images[:1].to(next(model.parameters()).device))
    calibrate(student, images)
    return student
