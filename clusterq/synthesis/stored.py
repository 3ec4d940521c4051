"""Images that stay as they are: the product of every source, and what fine-tuning draws from for any bit width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clusterq.errors import DivergenceError
from clusterq.processes import Processes

OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass
class StoredImages:
    """A fixed set of images with labels, drawn in epochs without replacement.

    Which images a step gets depends on `seed` and the step number alone, so a resumed run continues bit for bit.

    Attributes:
        stored_images: [N, C, H, W].
        stored_labels: [N] int64.
        batch_size: images per step; may exceed N.
        seed: of the order.
        processes: that share every step's images.
    """

    stored_images: Tensor
    stored_labels: Tensor
    batch_size: int
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.stored_labels.shape != self.stored_images.shape[:1]:
            raise ValueError(
                f"stored_labels has shape {tuple(self.stored_labels.shape)}; wanted one label for each of the "
                f"{self.stored_images.shape[0]} images"
            )
        if len(self.stored_labels) == 0:
            raise ValueError("stored_images is empty; wanted at least one image")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; wanted at least 1")

    def images(self) -> Tensor:
        """[N, C, H, W] in the network's input space."""
        return self.stored_images

    def labels(self) -> Tensor:
        """[N] int64."""
        return self.stored_labels

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of the images [batch_size, C, H, W] and labels [batch_size] of step `step`, from 0."""
        total = len(self.stored_labels)
        begin, end = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        for epoch in range(begin // total, (end - 1) // total + 1):
            first = max(begin - epoch * total, 0)
            parts.append(self._order(epoch)[first : min(end - epoch * total, total)])
        index = torch.cat(parts)[self.processes.rows(self.batch_size)]
        return self.stored_images[index], self.stored_labels[index]

    def _order(self, epoch: int) -> Tensor:
        """[N] int64 on the device of the images: one transfer per epoch, none per step."""
        if epoch not in self._orders:
            # A batch spans the end of one epoch and the start of the next; older orders are not needed again.
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            order = torch.randperm(len(self.stored_labels), generator=generator)
            self._orders[epoch] = order.to(self.stored_images.device)
        return self._orders[epoch]


def subset(total: int, count: int) -> Tensor:
    """[min(count, total)] int64 on the CPU: which of `total` images stand for all, always the same.

    Drawn at random, in ascending order: images of a bank come in batches of several kinds, each in an order of classes
    that a regular step would miss some of.
    """
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:count].sort().values


def balanced_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Labels [count] int64 on the generator's device: every class floor or ceil of count / num_classes times.

    Which classes get the extra image, and in which order the classes come, is random.
    """
    order = torch.randperm(num_classes, generator=generator, device=generator.device)
    return order[torch.arange(count, device=generator.device) % num_classes]


class MetricLog:
    """Loss terms of all steps, moved off the device in groups so that no single step waits for it.

    Args:
        phase: named in the error of a diverged run.
        every: steps per group.
        on_step: called with (step, terms) for every step, a group at a time.
        processes: of whose terms the sum is meant.

    Attributes:
        records: one dictionary per step: `step` and the terms as floats.
    """

    def __init__(
        self, phase: str, *, every: int = 20, on_step: OnStep | None = None, processes: Processes | None = None
    ) -> None:
        self.phase = phase
        self.processes = processes or Processes()
        self.every = every
        self.on_step = on_step
        self.records: list[dict[str, float]] = []
        self._pending: list[tuple[int, dict[str, Tensor]]] = []

    def append(self, step: int, terms: dict[str, Tensor]) -> None:
        """Keep the detached scalars of a step. Raises DivergenceError as `flush` does, at most `every` steps late."""
        self._pending.append((step, terms))
        if len(self._pending) >= self.every:
            self.flush()

    def restore(self, records: Sequence[Mapping[str, float]]) -> None:
        """Continue from the records of an earlier run; what is pending is dropped.

        Raises:
            ValueError: a value that is not a number.
        """
        if not all(type(value) in (int, float) for record in records for value in record.values()):
            raise ValueError("a loss term that is not a number")
        self._pending = []
        self.records = [dict(record) for record in records]

    def flush(self) -> None:
        """Convert what is pending.

        Raises:
            DivergenceError: a term is NaN or infinite; names the first step and term.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        own = torch.stack([value.float() for _, terms in pending for value in terms.values()])
        values = iter(self.processes.add_(own).tolist())
        for step, terms in pending:
            record: dict[str, Any] = {name: next(values) for name in terms}
            for name, value in record.items():
                if not abs(value) < float("inf"):
                    raise DivergenceError(
                        f"{self.phase} diverged: the loss term {name!r} became {value} at step {step}; "
                        "lower its weight or the learning rate"
                    )
            self.records.append({"step": step, **record})
            if self.on_step is not None:
                self.on_step(step, record)
