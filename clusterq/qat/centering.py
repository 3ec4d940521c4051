"""Training the first layer of a network whose images do not lie around 0.

With pixels of 0 to 255 a filter for edges has weights whose sum is 0, and a change of that sum moves all of its output
by 128 times as much. Trained on such images, BatchNorm's running mean follows; a student's statistics stand still, and
steps of the usual size throw it far off. So while it trains they follow here: the layer's output moves back by
`center * (sum of a filter's quantized weights - the sum at the start)`, which is what training on centered images
would do, and what was moved goes into the running mean in the end. Gradients know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.nn.layers import QuantizedConv2d
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.qat.trace import evaluating


class Centering:
    """Of the layer that reads the images, if a BatchNorm alone with running statistics reads what it puts out.

    Nothing at all for networks whose images lie around 0, and for those that begin in another way.

    Args:
        student: network from `clusterq.prepare`, calibrated.
        blank: [1, C, H, W], an image in the middle of the network's input range, all pixels alike; None: 0.
    """

    def __init__(self, student: nn.Module, blank: Tensor | None) -> None:
        self.center = 0.0 if blank is None else float(blank.flatten()[0])
        found = None if blank is None or self.center == 0 else _first_layer(student, blank)
        self._pair = found
        self._start = None if found is None else _sums(found[0]).detach()
        self._hook: Any = None

    def __enter__(self) -> None:
        if self._pair is not None:
            self._hook = self._pair[0].register_forward_hook(self._move_back)

    def __exit__(self, *_: object) -> None:
        if self._pair is None:
            return
        self._hook.remove()
        layer, norm = self._pair
        assert self._start is not None
        with torch.no_grad():
            sums = _sums(layer)
            for name, mean in norm.named_buffers():
                # The second is where `calibrate` starts from when it is called again.
                if name in ("running_mean", "uncorrected_mean"):
                    mean += self.center * (sums - self._start)
        self._start = sums

    def _move_back(self, layer: QuantizedConv2d, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._start is not None
        moved = self.center * (_sums(layer) - self._start)
        return output - moved[:, None, None].to(output.dtype)


def _sums(layer: QuantizedConv2d) -> Tensor:
    """[C] of the quantized weights of every output channel."""
    return layer.quantized_weight().sum((1, 2, 3))


@torch.no_grad()
def _first_layer(student: nn.Module, blank: Tensor) -> tuple[QuantizedConv2d, _BatchNorm] | None:
    """The Conv2d that reads the image, through its quantizer where it has one, and the BatchNorm that makes up for it.

    That is told by trying: what the layer puts out and the running mean moved alike leave the network's output alone,
    unless something else reads the layer too, such as a residual sum.
    """
    images: list[Tensor] = [blank]
    layers: list[tuple[QuantizedConv2d, Tensor]] = []
    norms: list[_BatchNorm] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if any(inputs[0] is image for image in images):
            if isinstance(module, ActivationQuantizer):
                images.append(output)
            elif isinstance(module, QuantizedConv2d):
                layers.append((module, output))
        elif isinstance(module, _BatchNorm) and any(inputs[0] is result for _, result in layers):
            norms.append(module)

    kinds = (QuantizedConv2d, ActivationQuantizer, _BatchNorm)
    with _in_floating_point(student):
        with _hooked([m for m in student.modules() if isinstance(m, kinds)], watch):
            expected = student(blank)
        if len(layers) != 1 or len(norms) != 1 or norms[0].running_mean is None or norms[0].running_var is None:
            return None
        layer, norm = layers[0][0], norms[0]
        assert norm.running_mean is not None and norm.running_var is not None
        kept, moved = norm.running_mean.clone(), torch.sqrt(norm.running_var + norm.eps)
        norm.running_mean += moved
        with _hooked([layer], lambda module, inputs, output: output + moved[:, None, None].to(output.dtype)):
            got = student(blank)
        norm.running_mean.copy_(kept)
    return (layer, norm) if torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())) else None


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_floating_point(student: nn.Module) -> Iterator[None]:
    quantizers = [m for m in student.modules() if isinstance(m, (ActivationQuantizer, WeightQuantizer)) and m.enabled]
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        with evaluating(student):
            yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
