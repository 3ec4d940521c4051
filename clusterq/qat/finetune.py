"""Quantization-aware fine-tuning of a student against its teacher: loss (11) of ClusterQ.

The student trains in evaluation mode, as published: BatchNorm statistics stay as they are and dropout is off; only EMA
ranges of activations move. All randomness comes from one generator, so a seed fixes every bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.config import FinetuneConfig, QuantizationConfig
from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer
from clusterq.precision import bfloat16_autocast
from clusterq.processes import Processes
from clusterq.qat.centering import Centering
from clusterq.qat.dead_filters import DeadFilters
from clusterq.qat.distill import classification_loss, distillation_loss
from clusterq.qat.prepare import prepared_with
from clusterq.qat.trace import evaluating
from clusterq.restoring import load_optimizer, restoring, steps_done
from clusterq.synthesis.stored import MetricLog, OnStep

Progress = Callable[[int, int], None]
AfterStep = Callable[[Callable[[], dict[str, Any]]], None]

# Steps between two looks at the losses: each look waits for the device.
_CHECK_EVERY = 10
# Keeps the augmentation's random stream apart from those of image synthesis under the same seed.
_AUGMENT_STREAM = 0x61


class ImageSource(Protocol):
    """Anything that hands out training images, such as the sources in `clusterq.synthesis`."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] and labels int64 [N] of a step, counted from 0, on the device of the networks.

        Of several processes each gets its own rows, equally many.
        """
        ...


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    source: ImageSource,
    config: FinetuneConfig,
    *,
    seed: int,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    state: Mapping[str, Any] | None = None,
    after_step: AfterStep | None = None,
    processes: Processes | None = None,
    blank: Tensor | None = None,
) -> list[dict[str, float]]:
    """Trains the student in place for `config.steps` steps and leaves it in evaluation mode.

    Args:
        student: network from `clusterq.prepare`, calibrated.
        teacher: the network in floating point; gets no gradients and keeps its mode.
        source: images and labels, on the device of both networks.
        config: settings of the training.
        seed: of the augmentation.
        progress: called with (steps done, steps in all) after each step.
        on_step: called with (step, metrics) for every step, some steps later, in groups.
        state: of `Finetuner.state_dict` in an interrupted call of the same arguments: continue there.
        after_step: called after each step with a function that gives such a state.
        processes: that share the images of every step, one share each. All call this at the same time; the first one's
            student is what all begin with, and gradients, losses and EMA ranges are those of the images of all.
        blank: [1, C, H, W], an image in the middle of the network's input range, all pixels alike: such pixels move
            into an image when the augmentation shifts it, and see `clusterq.qat.centering`; None: 0.

    Returns one dictionary per step: `step`, the terms `kd` and `ce` in use, `loss`, and with a teacher in use
    `agreement`, the fraction of images to which both networks give the same class.

    Raises:
        DivergenceError: a loss became NaN or infinite; names the first step and term.
        CheckpointError: `state` does not fit.
    """
    run = Finetuner(student, teacher, source, config, seed=seed, on_step=on_step, processes=processes, blank=blank)
    if state is not None:
        with restoring():
            run.load_state_dict(state)

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if after_step is not None:
            after_step(run.state_dict)

    run.run(report)
    return run.metrics


class Finetuner:
    """A fine-tuning run that can be interrupted; arguments as `finetune`.

    `state_dict` after any step and `load_state_dict` into a new run of the same arguments: `run` then continues bit for
    bit. A streaming source keeps its own state. Whether BatchNorm's gamma and beta require gradients follows
    `config.train_batch_norm`.

    Attributes:
        step: steps done.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: ImageSource,
        config: FinetuneConfig,
        *,
        seed: int,
        on_step: OnStep | None = None,
        processes: Processes | None = None,
        blank: Tensor | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.processes.equalise_(student)
        self.student = student
        self.teacher = teacher
        self.source = source
        self.config = config
        self.step = 0
        self._log = MetricLog("fine-tuning", every=_CHECK_EVERY, on_step=on_step, processes=self.processes)
        device = next(student.parameters()).device
        self._device = device
        self._random = torch.Generator(device).manual_seed((seed * 0x100 + _AUGMENT_STREAM) & 0x7FFF_FFFF_FFFF_FFFF)
        self._optimizer = _optimizer(student, config)
        self._rate = width_factor(prepared_with(student)) if config.rate_by_width else 1.0
        self._dead = DeadFilters(student)
        self._centering = Centering(student, blank)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dictionary per step done; raises DivergenceError as `finetune`."""
        self._log.flush()
        return self._log.records

    def run(self, progress: Progress | None = None) -> None:
        """The steps that are left."""
        self.student.eval()
        ranges = [m for m in self.student.modules() if isinstance(m, ActivationQuantizer)]
        try:
            with evaluating(self.teacher), self._centering:
                for module in ranges:
                    module.training = True
                    module.process_group = self.processes.group
                while self.step < self.config.steps:
                    self.train_step()
                    if progress is not None:
                        progress(self.step, self.config.steps)
                self._log.flush()
        finally:
            self.student.eval()
            for module in ranges:
                module.process_group = None

    def train_step(self) -> None:
        """One step. Networks keep the mode they are in: `run` is what sets it."""
        config = self.config
        images, labels = self.source.batch(self.step)
        images = images.detach()
        if config.augment:
            images = random_crop_and_flip(images, self._random, self.processes, self._centering.center)
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr_factor"] * self._rate * learning_rate(config, self.step)
        with bfloat16_autocast(self._device, config.autocast):
            logits = self.student(images)
            terms: dict[str, Tensor] = {}
            total: Tensor | float = 0.0
            with torch.no_grad():
                targets = self.teacher(images) if config.kd_weight else None
        if targets is not None:
            terms["kd"] = distillation_loss(logits, targets, config.temperature, reduction=config.kd_reduction)
            total = total + config.kd_weight * terms["kd"]
        if config.ce_weight:
            terms["ce"] = classification_loss(logits, labels)
            total = total + config.ce_weight * terms["ce"]
        assert isinstance(total, Tensor)
        terms["loss"] = total
        self._optimizer.zero_grad()
        # Every process has as many images as the others: the mean over all is the mean of theirs.
        (total / self.processes.size).backward()  # type: ignore[no-untyped-call]
        self.processes.add_gradients_(self._trained)
        if config.grad_clip > 0:
            self._dead.limit_()
            nn.utils.clip_grad_norm_(self._trained, config.grad_clip)
        self._optimizer.step()
        if targets is not None:
            terms["agreement"] = (logits.detach().argmax(1) == targets.argmax(1)).float().mean()
        self._log.append(self.step, {name: term.detach() / self.processes.size for name, term in terms.items()})
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything but the source's own state: step, student, optimizer, random state, metrics."""
        return {
            "step": self.step,
            "student": {k: v.detach().clone() for k, v in self.student.state_dict().items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "random": self._random.get_state(),
            "metrics": [dict(record) for record in self.metrics],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.step = steps_done(state)
        self.student.load_state_dict(state["student"])
        load_optimizer(self._optimizer, state["optimizer"])
        self._random.set_state(state["random"].cpu())
        self._log.restore(state["metrics"])


def learning_rate(config: FinetuneConfig, step: int) -> float:
    """Learning rate of a step, counted from 0.

    Cosine from `lr` to 0 (SGDR, Loshchilov and Hutter 2017, equation 5), `lr` divided by 10 at 1/4, 1/2 and 3/4 of the
    steps, or constant.
    """
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    if config.schedule == "step":
        return float(config.lr * 0.1 ** (4 * step // config.steps))
    return config.lr


def width_factor(quantization: QuantizationConfig) -> float:
    """What a learning rate for 4 bits is multiplied by: 2 ** (4 - mean of both widths), at most 2.

    Rounding to b bits leaves an error in proportion to 2^-b, and the nearer a student begins to its teacher the smaller
    the steps that still bring it closer. Found on ResNet-20 (bench/LADDER.md), not derived.
    """
    return float(min(2.0, 2.0 ** (4 - (quantization.weight_bits + quantization.activation_bits) / 2)))


def random_crop_and_flip(
    images: Tensor, generator: torch.Generator, processes: Processes | None = None, fill: float = 0.0
) -> Tensor:
    """Each image shifted by up to 1/8 of its size each way, `fill` moving in, and mirrored left to right half the time.

    Images [N, C, H, W] -> the same shape; every image draws its own shift and flip from `generator`, which is on the
    device of the images. 1/8 is the padding of 4 at 32 pixels of He et al. 2015, section 4.2. Of `processes` each gives
    its own N images of the batch, and all draw for all of it.
    """
    processes = processes or Processes()
    count, channels, height, width = images.shape
    device, total = images.device, count * processes.size
    pad_h, pad_w = max(1, height // 8), max(1, width // 8)
    padded = functional.pad(images, (pad_w, pad_w, pad_h, pad_h), value=fill)
    rows = processes.rows(total)
    top = torch.randint(0, 2 * pad_h + 1, (total, 1), generator=generator, device=device)[rows]
    left = torch.randint(0, 2 * pad_w + 1, (total, 1), generator=generator, device=device)[rows]
    flip = torch.rand((total, 1), generator=generator, device=device)[rows] < 0.5
    columns = torch.arange(width, device=device)
    lines = (top + torch.arange(height, device=device)).view(count, 1, height, 1)
    columns = (left + torch.where(flip, columns.flip(0), columns)).view(count, 1, 1, width)
    sample = torch.arange(count, device=device).view(count, 1, 1, 1)
    return padded[sample, torch.arange(channels, device=device).view(1, channels, 1, 1), lines, columns]


def _optimizer(student: nn.Module, config: FinetuneConfig) -> torch.optim.Adam | torch.optim.SGD:
    steps: set[nn.Parameter] = set()
    for module in student.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            steps.update(module.parameters(recurse=False))
        elif isinstance(module, _BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(config.train_batch_norm)
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in steps], "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": [p for p in trained if p in steps], "weight_decay": 0.0, "lr_factor": config.scale_lr_factor},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
