"""The synthesis loss (10) as one object: teacher, centroids and noise behind a call on (images, labels)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterq.config import SynthesisConfig
from clusterq.ops import Alignment, AlignmentTargets, ClassTargets
from clusterq.precision import bfloat16_autocast
from clusterq.processes import Processes
from clusterq.synthesis.centroid_bank import CentroidBank
from clusterq.synthesis.losses import ClassStatistics, class_slots, correct_mask, diversity_targets, to_spread
from clusterq.synthesis.teacher import Teacher, TeacherOutput, semantic_start


def statistics_unit(teacher: Teacher, limits: tuple[float, float] | None) -> Tensor | None:
    """[D] what the statistics of every channel are measured in, the same for all channels of a layer; None: all in 1.

    A layer's deviation is the root of the mean of `running_var + eps` over its channels. In these units it lies within
    the limits; see `deviation_limits` of `clusterq.config.SynthesisConfig`.
    """
    if limits is None:
        return None
    squares = torch.split(teacher.running_var.double() + teacher.eps.double(), list(teacher.channels))
    deviations = torch.stack([part.mean() for part in squares]).sqrt().cpu()
    units = deviations / deviations.clamp(*limits)
    if bool((units == 1).all()):
        return None
    return units.float().repeat_interleave(torch.tensor(teacher.channels)).to(teacher.device)


@dataclass(frozen=True)
class LossTerms:
    """One evaluation of the loss.

    Attributes:
        total: scalar to differentiate: for the images of this process, and for a parameter where it is summed over all.
        terms: the unweighted terms ce, bns, alignment, diversity (those in use) and label_accuracy; detached scalars
            on the device, of which the sum over the processes is meant.
        statistics: class statistics of the batch for the moving average of the centroids; None without centroids.
    """

    total: Tensor
    terms: dict[str, Tensor]
    statistics: ClassStatistics | None


class SynthesisObjective:
    """`L = ce * CE (8) + alpha1 * BNS (9) + alpha2 * alignment (4) + alpha3 * diversity (6)`.

    Args:
        teacher: the frozen network.
        config: weights and switches. With alpha2 = alpha3 = 0 no centroids are kept.
        seed: of the diversity noise.
        processes: that share the images of a batch.

    Attributes:
        bank: the centroids, None where the configuration does not use them.
        first_layer: first BatchNorm layer that carries centroids.
    """

    def __init__(
        self, teacher: Teacher, config: SynthesisConfig, *, seed: int, processes: Processes | None = None
    ) -> None:
        self.teacher = teacher
        self.config = config
        self.processes = processes or Processes()
        device = teacher.device
        self._unit = statistics_unit(teacher, config.deviation_limits)
        mean, var = self._in_units(teacher.running_mean, teacher.running_var)
        self.first_layer = semantic_start(teacher.num_layers, config.semantic_start)
        self._offset = sum(teacher.channels[: self.first_layer])
        self._targets = AlignmentTargets(
            teacher.channels,
            mean,
            var,
            reduction=config.bns_reduction,
            spread=config.spread,
            weight=config.bns_weight,
            first=self.first_layer,
            class_reduction=config.class_reduction,
        )
        semantic = teacher.channels[self.first_layer :]
        running_mean, running_var = mean[self._offset :], var[self._offset :]
        running_spread = to_spread(running_var, config.spread)
        self._noise_scale: Tensor | float = to_spread(running_var, "std") if config.noise_relative else 1.0
        # Coordinates of `nearest`: units of each channel's own deviation, every layer with the same total weight.
        width = torch.tensor(semantic)
        share = (1 / (len(semantic) * width)).repeat_interleave(width).to(device)
        _, eps = self._in_units(mean, teacher.eps)
        norm = torch.sqrt(share / (running_var + eps[self._offset :]))
        self._center = torch.cat([running_mean, running_spread])
        self._scale = torch.cat([norm, norm])
        self._noise = torch.Generator(device).manual_seed(seed)
        self.bank: CentroidBank | None = None
        if config.uses_centroids:
            self.bank = CentroidBank(teacher.num_classes, sum(semantic), config.decay, device=device)

    def autocast(self) -> torch.autocast:
        """Context of the forward passes: bfloat16 where the configuration says so."""
        return bfloat16_autocast(self.teacher.device, self.config.autocast)

    def __call__(
        self, images: Tensor, labels: Tensor, *, use_classes: bool = True, temperature: float = 1.0
    ) -> LossTerms:
        """Evaluate on images [N, C, H, W] with labels [N] int64. `use_classes=False` is the warm-up loss (7).

        Of several processes each gives its own rows of the images, and all the labels of all N.

        With a temperature T the cross-entropy (8) is taken of logits / T and carries T^2, as distillation does.
        """
        config = self.config
        output = self._look(images)
        own = labels[self.processes.rows(len(labels))]
        share = self.processes.share(len(labels))
        ce = F.cross_entropy(output.logits.float() / temperature, own) * temperature**2 * share
        correct = correct_mask(output.logits, own)
        statistics = None
        if use_classes and self.bank is not None:
            result, statistics = self._class_alignment(self.bank, output, labels, correct)
        else:
            result = self._targets(output.mean, output.var, group=self.processes.group)
        total = config.ce_weight * ce + result.total
        # What follows is known to every process; only the logits are of its own images.
        everywhere = {"bns": result.batch}
        everywhere |= dict(zip(("alignment", "diversity"), result.classes.unbind(0), strict=False))
        terms = {"ce": ce.detach()}
        terms |= {name: value.detach() / self.processes.size for name, value in everywhere.items()}
        terms["label_accuracy"] = correct.float().mean() * share
        return LossTerms(total, terms, statistics)

    def _look(self, images: Tensor) -> TeacherOutput:
        """The teacher's forward pass, its statistics in units of their layers."""
        with self.autocast():
            output = self.teacher(images)
        mean, var = self._in_units(output.mean, output.var)
        return TeacherOutput(output.logits, mean, var)

    def _in_units(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        if self._unit is None:
            return mean, var
        return mean / self._unit, var / self._unit.square()

    def update_centroids(self, terms: LossTerms) -> None:
        """Moving average of the centroids (5) with the statistics of an evaluation; after its backward pass."""
        if self.bank is not None and terms.statistics is not None:
            self.bank.update_(terms.statistics)

    @torch.no_grad()
    def initialise_centroids(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set all centroids from the teacher's statistics of (images, labels) batches that cover the classes."""
        if self.bank is None:
            return
        rows = []
        for images, labels in batches:
            output = self._look(images)
            correct = correct_mask(output.logits, labels)
            if self.config.assignment == "label":
                correct = torch.ones_like(correct)
            rows.append((output.mean[:, self._offset :], output.var[:, self._offset :], labels, correct))
        mean, var, labels, correct = (torch.cat(part) for part in zip(*rows, strict=True))
        self.bank.initialise_(mean, var, labels, correct, spread=self.config.spread)

    def _class_alignment(
        self, bank: CentroidBank, output: TeacherOutput, labels: Tensor, correct: Tensor
    ) -> tuple[Alignment, ClassStatistics]:
        """All terms on statistics, and those of the classes. Labels of all images, the rest of this process's own."""
        config = self.config
        rows = self.processes.rows(len(labels))
        slot, classes = class_slots(labels, self.teacher.num_classes)
        # A class seen for the first time has no centroid to compare with, only one to start.
        centroid_mean, centroid_spread, exists = bank.lookup(classes)
        noisy_mean, noisy_spread = diversity_targets(
            centroid_mean,
            centroid_spread,
            config.noise_mean * self._noise_scale,
            config.noise_spread * self._noise_scale,
            self._noise,
        )
        goals = ClassTargets(
            slot[rows],
            torch.stack([centroid_mean, noisy_mean]),
            torch.stack([centroid_spread, noisy_spread]),
            (config.alignment_weight, config.diversity_weight),
            mask=self._class_mask(output, labels[rows], correct),
            known=exists,
            average=config.class_reduction == "mean",
        )
        result = self._targets(output.mean, output.var, goals, group=self.processes.group)
        return result, ClassStatistics(classes, result.images, result.class_mean, result.class_spread)

    def _class_mask(self, output: TeacherOutput, labels: Tensor, correct: Tensor) -> Tensor | None:
        """[N] bool, the images that form the classes; None for all."""
        if self.config.assignment == "teacher":
            return correct
        if self.config.assignment == "nearest":
            mean, var = output.mean[:, self._offset :], output.var[:, self._offset :]
            return self._near_own_centroid(mean, var, labels, correct)
        return None

    def _near_own_centroid(self, mean: Tensor, var: Tensor, labels: Tensor, correct: Tensor) -> Tensor:
        assert self.bank is not None
        spread = to_spread(var, self.config.spread)
        index = self.bank.nearest(mean, spread, center=self._center, scale=self._scale)
        # Where the label has no centroid yet, the teacher's opinion starts one.
        return torch.where(self.bank.initialised[labels], index == labels, correct)

    def state_dict(self) -> dict[str, Any]:
        """Centroids and the state of the noise."""
        state: dict[str, Any] = {"noise": self._noise.get_state()}
        if self.bank is not None:
            state["bank"] = self.bank.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._noise.set_state(state["noise"].cpu())
        if self.bank is not None:
            self.bank.load_state_dict(state["bank"])
