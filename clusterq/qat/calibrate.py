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
from clusterq.qat.prepare import prepare
from clusterq.qat.trace import evaluating

# Activations of one pass are held whole, a multiple of this in memory: large images go through in parts.
_INPUT_VALUES = 1 << 22


def calibrate(
    student: nn.Module,
    images: Tensor,
    config: QuantizationConfig | None = None,
    *,
    batch_size: int | None = None,
) -> None:
    """Sets weight and activation ranges of a network from `prepare` in place, then corrects its BatchNorm statistics.

    One pass over the images in floating point, where each activation quantizer takes its range from what reaches it:
    the values that the quantized network is to imitate. (Ranges set on inputs that are quantized already follow the
    errors of the layers before: ResNet-20 at W3A3 loses 8 points by it.) Where the images go through in several
    batches, a range of least squared error is the average over the batches, a min/max range spans all of them. A second
    pass, quantized, corrects BatchNorm: see `clusterq.qat.correct`.

    Args:
        student: network from `clusterq.prepare`; its mode is kept.
        images: [N, C, H, W], N >= 1, as the network wants them; moved batch by batch to the device of the network.
        config: `weight_range` and `activation_range` say how (`"ema"` starts from min/max), `correct_batch_norm`
            whether there is a second pass; None: ranges as prepared, and BatchNorm corrected.
        batch_size: images per pass; default: all that fit 4 million input values.

    Raises ValueError when there are no images, or images or activations that are NaN or infinite. Warns of activation
    quantizers that no image reaches.
    """
    if len(images) == 0:
        raise ValueError("images is empty; wanted at least one image to calibrate on")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values")
    device = next(student.parameters()).device
    batch_size = batch_size or max(1, _INPUT_VALUES // images[0].numel())
    for layer in student.modules():
        if isinstance(layer, (QuantizedConv2d, QuantizedLinear)):
            if config is not None:
                layer.weight_quantizer.method = config.weight_range
            layer.weight_quantizer.initialise(layer.weight)
    quantizers = {name: m for name, m in student.named_modules() if isinstance(m, ActivationQuantizer)}
    correction = BatchNormCorrection(student)
    with evaluating(student), torch.no_grad():
        with ExitStack() as stack:
            stack.enter_context(_float_weights(student))
            stack.enter_context(correction.observing())
            for quantizer in quantizers.values():
                stack.enter_context(quantizer.calibrating(config.activation_range if config is not None else None))
            for batch in torch.split(images, batch_size):
                student(batch.to(device))
        if config is None or config.correct_batch_norm:
            with correction.correcting():
                for batch in torch.split(images, batch_size):
                    student(batch.to(device))
    idle = [name for name, quantizer in quantizers.items() if quantizer.observations == 0]
    if idle:
        warnings.warn(f"no image reached these activation quantizers: {', '.join(idle)}", UserWarning, stacklevel=2)


@contextmanager
def _float_weights(model: nn.Module) -> Iterator[None]:
    """Weight quantizers off inside this context."""
    enabled = {m: m.enabled for m in model.modules() if isinstance(m, WeightQuantizer)}
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
    calibrate(student, images, config)
    return student
