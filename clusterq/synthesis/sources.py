"""Where images come from: a conditional generator trained against the teacher, or images optimised directly.

Both sources have `fit(progress, on_step)`, `batch(step)`, `images()`, `labels()`, `metrics`, `state_dict()` and
`load_state_dict()`. Labels are balanced over the classes. The same seed on the same device and version gives the same
bits.

Several processes share every batch: each holds the whole bank or generator, computes on its own rows, and has what the
others have when `fit` ends and whenever a state is taken, which all have to do together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clusterq.config import SynthesisConfig
from clusterq.processes import Processes, SharedBatchNorm2d
from clusterq.restoring import load_optimizer, steps_done
from clusterq.synthesis.generator import build_generator
from clusterq.synthesis.objective import SynthesisObjective
from clusterq.synthesis.recipes import draw_recipes, initial_images, shifted
from clusterq.synthesis.stored import MetricLog, OnStep, StoredImages, balanced_labels
from clusterq.synthesis.teacher import Teacher

Progress = Callable[[int, int], None]

# Distinct random streams from one seed.
_NOISE_STREAM, _SAMPLE_STREAM, _DIVERSITY_STREAM, _SHIFT_STREAM = 0x51, 0x52, 0x53, 0x54


def _stream(seed: int, stream: int) -> int:
    return (seed * 0x100 + stream) & 0x7FFF_FFFF_FFFF_FFFF


class GeneratorSource:
    """Images from a conditional generator (7)-(10).

    `fit` runs `config.warmup_steps` steps with cross-entropy and BN alignment, sets the centroids from the generator's
    own images of every class, and, unless `stream`, trains `config.steps` steps with the full loss and then stores
    `config.num_images` images. With `stream` the full-loss steps happen in `batch`, one before every student step.

    Args:
        teacher: the frozen network.
        config: synthesis settings.
        seed: of weights, noise, labels and sampling.
        batch_size: images per `batch` once they are stored; None: `config.batch_size`.
        stream: train on while images are drawn.
        processes: that share every batch.

    Attributes:
        generator: the network.
        objective: the loss with its centroids.
        metrics: one dictionary per step: step, ce, bns, label_accuracy and, with centroids, alignment and diversity.
        step: generator steps done.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: SynthesisConfig,
        *,
        seed: int,
        batch_size: int | None = None,
        stream: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.teacher = teacher
        self.config = config
        self.seed = seed
        self.stream = stream
        self.batch_size = batch_size or config.batch_size
        self.objective = SynthesisObjective(
            teacher, config, seed=_stream(seed, _DIVERSITY_STREAM), processes=self.processes
        )
        self.generator = build_generator(
            config.generator,
            teacher.num_classes,
            teacher.input_shape,
            config.latent_dim,
            config.generator_width,
            seed=seed,
            device=teacher.device,
        )
        if self.processes.size > 1:
            SharedBatchNorm2d.convert_(self.generator, self.processes)
        self._optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.generator_lr, betas=config.generator_betas
        )
        self._random = torch.Generator(teacher.device).manual_seed(_stream(seed, _NOISE_STREAM))
        self._log = MetricLog("image synthesis", processes=self.processes)
        self._stored: StoredImages | None = None
        self.step = 0

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Loss terms per step; waits for the device."""
        self._log.flush()
        return self._log.records

    def fit(self, progress: Progress | None = None, on_step: OnStep | None = None) -> None:
        """Train; continues where a loaded state stopped.

        Args:
            progress: called with (steps done, steps in all) after each step.
            on_step: called with (step, terms) for every step, in groups.

        Raises:
            DivergenceError: a loss term became NaN or infinite.
        """
        total = self.config.warmup_steps + (0 if self.stream else self.config.steps)
        self._log.on_step = on_step
        self._begin_classes()
        while self.step < total:
            self._train_step()
            if progress is not None:
                progress(self.step, total)
        self._log.flush()
        if not self.stream:
            self._stored = self.sample(self.config.num_images)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images and labels for student step `step`: stored ones, or with `stream` fresh ones.

        A streamed batch comes from one more training step: the `config.batch_size` images its loss was taken on.
        """
        if not self.stream:
            return self._require_stored().batch(step)
        return self._train_step()

    def sample(self, count: int) -> StoredImages:
        """`count` images from the generator as it is now, in eval mode; the same images at each call."""
        random = torch.Generator(self.teacher.device).manual_seed(_stream(self.seed, _SAMPLE_STREAM))
        labels = balanced_labels(count, self.teacher.num_classes, random)
        images = torch.cat([self._generate(part, random) for part in torch.split(labels, self.config.batch_size)])
        return StoredImages(images, labels, self.batch_size, self.seed, self.processes)

    def images(self) -> Tensor:
        """[num_images, C, H, W]: the stored images; with `stream` a sample of the generator as it is now."""
        return self._snapshot().images()

    def labels(self) -> Tensor:
        """[num_images] int64 labels of `images()`."""
        return self._snapshot().labels()

    def _snapshot(self) -> StoredImages:
        return self.sample(self.config.num_images) if self.stream else self._require_stored()

    def _require_stored(self) -> StoredImages:
        if self._stored is None:
            raise RuntimeError("the generator has not been trained: call fit() first")
        return self._stored

    def _begin_classes(self) -> None:
        if self.step == self.config.warmup_steps:
            self.objective.initialise_centroids(self._class_batches())

    def _class_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of every class, at least one each and about a batch in all, from the generator in eval mode."""
        classes = torch.arange(self.teacher.num_classes, device=self.teacher.device)
        labels = classes.repeat_interleave(max(self.config.batch_size // self.teacher.num_classes, 1))
        random = torch.Generator(self.teacher.device).manual_seed(_stream(self.seed, _SAMPLE_STREAM))
        for part in torch.split(labels, self.config.batch_size):
            yield self._generate(part, random), part

    @torch.no_grad()
    def _generate(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Images in eval mode: single images do not depend on their batch, and running statistics stay."""
        noise = torch.randn(len(labels), self.config.latent_dim, generator=random, device=self.teacher.device)
        self.generator.eval()
        with self.objective.autocast():
            images: Tensor = self.generator(noise, labels)
        self.generator.train()
        return self.teacher.input_range.apply(images.to(self.teacher.dtype))

    def _train_step(self) -> tuple[Tensor, Tensor]:
        labels = balanced_labels(self.config.batch_size, self.teacher.num_classes, self._random)
        noise = torch.randn(len(labels), self.config.latent_dim, generator=self._random, device=self.teacher.device)
        self._optimizer.param_groups[0]["lr"] = generator_rate(self.config, self.step)
        rows = self.processes.rows(len(labels))
        with torch.enable_grad():
            with self.objective.autocast():
                images = self.generator(noise[rows], labels[rows])
            images = self.teacher.input_range.apply(images.to(self.teacher.dtype))
            terms = self.objective(images, labels, use_classes=self.step >= self.config.warmup_steps)
            self._optimizer.zero_grad()
            terms.total.backward()  # type: ignore[no-untyped-call]
        self.processes.add_gradients_(self.generator.parameters())
        self._optimizer.step()
        self.objective.update_centroids(terms)
        self._log.append(self.step, terms.terms)
        self.step += 1
        self._begin_classes()
        return images.detach(), labels[rows]

    def state_dict(self) -> dict[str, Any]:
        """Everything `fit` or `batch` needs to continue bit for bit, and the metrics so far."""
        return {
            "step": self.step,
            "generator": {k: v.clone() for k, v in self.generator.state_dict().items()},
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "objective": self.objective.state_dict(),
            "random": self._random.get_state(),
            "metrics": [dict(record) for record in self.metrics],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; stored images are drawn anew by the next `fit`."""
        self.step = steps_done(state)
        self.generator.load_state_dict(state["generator"])
        load_optimizer(self._optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self._random.set_state(state["random"].cpu())
        self._log.restore(state["metrics"])


def generator_rate(config: SynthesisConfig, step: int) -> float:
    """Learning rate of a generator step, counted from 0 at the start of the warm-up.

    Constant, or `generator_lr` divided by 10 at 1/4, 1/2 and 3/4 of `warmup_steps + steps`; later steps keep the last
    rate. Without any such step there is no length to divide, and the rate is constant.
    """
    total = config.warmup_steps + config.steps
    if config.generator_schedule == "constant" or total == 0:
        return config.generator_lr
    return float(config.generator_lr * 0.1 ** min(4 * step // total, 3))


class BankSource:
    """Images optimised directly by Adam with the same losses, starting from noise.

    The bank is divided into chunks of at most `config.batch_size` images that take turns, one step each, so that the
    centroids are fed by all of them. Every chunk has a recipe of its own: see `clusterq.synthesis.recipes`. After
    `config.warmup_steps` rounds without class terms the centroids are set from the images as they are.

    Args:
        teacher: the frozen network.
        config: synthesis settings.
        seed: of noise, labels, recipes and shifts.
        batch_size: images per `batch`; None: `config.batch_size`.
        processes: that share every chunk.

    Attributes:
        objective: the loss with its centroids.
        recipes: one per chunk.
        step: chunk steps done, of `image_steps` times the number of chunks.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: SynthesisConfig,
        *,
        seed: int,
        batch_size: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.teacher = teacher
        self.config = config
        self.objective = SynthesisObjective(
            teacher, config, seed=_stream(seed, _DIVERSITY_STREAM), processes=self.processes
        )
        random = torch.Generator().manual_seed(_stream(seed, _NOISE_STREAM))
        parts = math.ceil(config.num_images / config.batch_size)
        self.recipes = draw_recipes(config, parts, random)
        sizes = [len(part) for part in torch.arange(config.num_images).tensor_split(parts)]
        noise = [
            initial_images(recipe, (size, *teacher.input_shape), random)
            for recipe, size in zip(self.recipes, sizes, strict=True)
        ]
        images = teacher.input_range.apply(torch.cat(noise).to(teacher.device, teacher.dtype))
        labels = balanced_labels(config.num_images, teacher.num_classes, random).to(teacher.device)
        self._stored = StoredImages(images, labels, batch_size or config.batch_size, seed, self.processes)
        self._shifts = torch.Generator().manual_seed(_stream(seed, _SHIFT_STREAM))
        # Views: the optimisers write straight into the bank.
        self._chunks = images.tensor_split(parts)
        self._own = [chunk[self.processes.rows(len(chunk))].requires_grad_() for chunk in self._chunks]
        self._chunk_labels = labels.tensor_split(parts)
        self._rate = config.image_lr * teacher.input_range.scale
        # As on the noise itself: gradients to it are `scale` times those to the images.
        eps = 1e-8 / teacher.input_range.scale
        self._optimizers = [torch.optim.Adam([own], lr=self._rate, eps=eps) for own in self._own]
        self._log = MetricLog("image synthesis", processes=self.processes)
        self.step = 0

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dictionary per step: step, ce, bns, label_accuracy and, with centroids, alignment and diversity."""
        self._log.flush()
        return self._log.records

    def fit(self, progress: Progress | None = None, on_step: OnStep | None = None) -> None:
        """Optimise the images; continues where a loaded state stopped.

        Arguments and errors as for `GeneratorSource.fit`.
        """
        total = self.config.image_steps * len(self._chunks)
        self._log.on_step = on_step
        while self.step < total:
            self._train_step()
            if progress is not None:
                progress(self.step, total)
        self._log.flush()
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Every process's rows of the images to all."""
        for chunk in self._chunks:
            self.processes.gather_(chunk)

    def _train_step(self) -> None:
        round_, part = divmod(self.step, len(self._chunks))
        if part == 0 and round_ == self.config.warmup_steps:
            self._exchange()
            self.objective.initialise_centroids(zip(self._chunks, self._chunk_labels, strict=True))
        optimizer = self._optimizers[part]
        if self.config.image_schedule == "cosine":
            phase = math.pi * round_ / self.config.image_steps
            optimizer.param_groups[0]["lr"] = self._rate * 0.5 * (1 + math.cos(phase))
        recipe = self.recipes[part]
        with torch.enable_grad():
            images = self._own[part]
            if recipe.shift:
                images = shifted(images, recipe.shift, self._shifts, self.teacher.input_range.center)
            terms = self.objective(
                images,
                self._chunk_labels[part],
                use_classes=round_ >= self.config.warmup_steps,
                temperature=recipe.temperature,
            )
            optimizer.zero_grad()
            terms.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self.objective.update_centroids(terms)
        self._log.append(self.step, terms.terms)
        self.step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's rows of the images [batch_size, C, H, W] and labels of student step `step`."""
        return self._stored.batch(step)

    def images(self) -> Tensor:
        """[num_images, C, H, W]."""
        return self._stored.images()

    def labels(self) -> Tensor:
        """[num_images] int64."""
        return self._stored.labels()

    def state_dict(self) -> dict[str, Any]:
        """Everything `fit` needs to continue bit for bit, by any number of processes, and the metrics so far."""
        self._exchange()
        return {
            "step": self.step,
            "images": self.images().clone(),
            "labels": self.labels().clone(),
            "optimizers": [
                self._whole(optimizer, chunk) for optimizer, chunk in zip(self._optimizers, self._chunks, strict=True)
            ],
            "objective": self.objective.state_dict(),
            "shifts": self._shifts.get_state(),
            "metrics": [dict(record) for record in self.metrics],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.step = steps_done(state)
        self._shifts.set_state(state["shifts"].cpu())
        self.images().copy_(state["images"])
        self.labels().copy_(state["labels"])
        for optimizer, chunk, saved in zip(self._optimizers, self._chunks, state["optimizers"], strict=True):
            load_optimizer(optimizer, _cut(saved, chunk, self.processes.rows(len(chunk))))
        self.objective.load_state_dict(state["objective"])
        self._log.restore(state["metrics"])

    def _whole(self, optimizer: torch.optim.Adam, chunk: Tensor) -> dict[str, Any]:
        """State of the optimizer as one process that has the whole chunk would hold it."""
        state = copy.deepcopy(optimizer.state_dict())
        for moments in state["state"].values():
            for name, own in moments.items():
                # The others are numbers, such as the count of steps.
                if own.dim() == chunk.dim():
                    moments[name] = own.new_empty(chunk.shape)
                    moments[name][self.processes.rows(len(chunk))] = own
                    self.processes.gather_(moments[name])
        return state


def _cut(state: Mapping[str, Any], chunk: Tensor, rows: slice) -> dict[str, Any]:
    """An optimizer's state for some rows of the chunk. Raises ValueError for the state of another chunk."""
    entries = {key: dict(entry) for key, entry in state["state"].items()}
    for moments in entries.values():
        for name, value in moments.items():
            if value.dim() > 0:
                if value.shape != chunk.shape:
                    raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted {tuple(chunk.shape)}")
                moments[name] = value[rows].clone()
    return {**state, "state": entries}
