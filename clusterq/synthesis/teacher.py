"""The trained network as the method sees it: frozen, without weight gradients, reporting what enters every BatchNorm.

Statistics of all layers travel side by side in one matrix: `mean [N, D]` and `var [N, D]` with one row per image and
D = sum of the channels of all BatchNorm layers in execution order. The losses are then a handful of operations whatever
the depth of the network, and the deep ("semantic") layers are the last columns.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clusterq.errors import ModelError
from clusterq.models import zero_image_logits
from clusterq.nn.statistics import replace_batch_norm
from clusterq.synthesis.input_range import InputRange, find_input_range


@dataclass(frozen=True)
class TeacherOutput:
    """One forward pass.

    Attributes:
        logits: [N, K].
        mean, var: [N, D] mean and biased variance over the pixels of every image and channel at the input of every
            BatchNorm layer; float32, differentiable with respect to the images.
    """

    logits: Tensor
    mean: Tensor
    var: Tensor


class Teacher:
    """A frozen copy of a network that reports the statistics of its BatchNorm inputs.

    The network passed in is not changed. No parameter of the copy takes a gradient, and its running statistics stay.

    Args:
        model: any module with at least one BatchNorm layer that turns images [N, C, H, W] into logits [N, K].
        input_shape: (C, H, W) of one image, any sequence.
        device: where to run; None: where the model's parameters are.

    Attributes:
        num_classes: K, found by one forward pass.
        channels: channels of every BatchNorm layer in execution order; a layer executed twice counts twice.
        running_mean, running_var: [D] what those layers remember.
        eps: [D] the layers' eps.

    Raises:
        ValueError: `input_shape` is not three positive numbers.
        ModelError: no BatchNorm layer, one without running statistics, images of this shape are not accepted, or the
            output is not [N, K].
    """

    def __init__(
        self, model: nn.Module, input_shape: Sequence[int], *, device: torch.device | str | None = None
    ) -> None:
        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.device = torch.device(device)
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ValueError(f"input_shape is {tuple(input_shape)}; wanted positive (channels, height, width)")
        channels, height, width = input_shape
        self.input_shape = (channels, height, width)
        self.model = copy.deepcopy(model).to(self.device).eval().requires_grad_(False)
        try:
            self.recorder = replace_batch_norm(self.model)
        except ValueError as error:
            raise ModelError(str(error)) from None
        self.dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        self._probe()

    def _probe(self) -> None:
        with self.recorder.record() as layers:
            logits = zero_image_logits(self.model, self.input_shape)
        if not layers:
            raise ModelError("no BatchNorm layer of the network takes part in its forward pass")
        if any(layer.mean.shape[0] != 2 for layer in layers):
            raise ModelError("a BatchNorm layer of the network sees a batch that is not the batch of images")
        self.num_classes = int(logits.shape[1])
        self.channels = tuple(layer.mean.shape[1] for layer in layers)
        self.running_mean = torch.cat([_remembered(layer.module.running_mean) for layer in layers])
        self.running_var = torch.cat([_remembered(layer.module.running_var) for layer in layers])
        self.eps = torch.cat([torch.full(layer.mean.shape[1:], layer.module.eps) for layer in layers]).to(self.device)

    @functools.cached_property
    def input_range(self) -> InputRange:
        """Where the network's images lie, told from its first BatchNorm layer; found when it is first asked for."""
        return find_input_range(self)

    @property
    def num_layers(self) -> int:
        """L: BatchNorm layers in one forward pass."""
        return len(self.channels)

    def __call__(self, images: Tensor) -> TeacherOutput:
        """Run images [N, C, H, W]; differentiable with respect to them."""
        with self.recorder.record() as layers:
            logits = self.model(images)
        if tuple(layer.mean.shape[1] for layer in layers) != self.channels:
            raise ModelError(
                f"the network ran {len(layers)} BatchNorm layers where {self.num_layers} were found at first: "
                "networks that change their path from call to call cannot be used"
            )
        mean = torch.cat([layer.mean for layer in layers], 1)
        var = torch.cat([layer.var for layer in layers], 1)
        return TeacherOutput(logits, mean.float(), var.float())

    def require_fit(self, images: Tensor, labels: Tensor) -> None:
        """Raises ValueError unless images are [N, C, H, W] of its shape and labels [N] int64 in [0, K), with N >= 1."""
        if tuple(images.shape[1:]) != self.input_shape or len(images) == 0:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; wanted [N, {self.input_shape}] with at least one image"
            )
        if labels.dtype != torch.int64:
            raise ValueError(f"labels has dtype {labels.dtype}; wanted torch.int64")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; wanted one label for each of the {len(images)} images"
            )
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < self.num_classes:
            raise ValueError(f"labels range from {low} to {high}; wanted 0 to {self.num_classes - 1}")

    @torch.no_grad()
    def label_accuracy(self, images: Tensor, labels: Tensor, *, batch_size: int = 256) -> float:
        """Fraction of images [N, C, H, W] that the network assigns to their label [N]; 0 for no images."""
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
            correct += (self.model(x.to(self.device)).argmax(1) == y.to(self.device)).sum()
        return correct.item() / max(len(labels), 1)


def _remembered(buffer: Tensor | None) -> Tensor:
    # `replace_batch_norm` has refused layers without running statistics.
    assert buffer is not None
    return buffer.detach().float()


def semantic_start(num_layers: int, start: int | None = None) -> int:
    """Index of the first layer that carries centroids: (L + 1) // 2 - 2 unless given, kept within [0, L - 1].

    Raises:
        ValueError: `start` is outside [0, num_layers - 1].
    """
    if start is None:
        return min(max((num_layers + 1) // 2 - 2, 0), num_layers - 1)
    if not 0 <= start < num_layers:
        raise ValueError(f"semantic_start is {start}; the network has BatchNorm layers 0 to {num_layers - 1}")
    return start
