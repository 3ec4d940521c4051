"""The whole method: a trained network in, images made from it alone, a low-bit student out.

    method = ClusterQ(network, "default", input_shape=(3, 32, 32))
    result = method.run()                                  # result.student is the quantized network
    other = method.finetune(QuantizationConfig(weight_bits=3, activation_bits=3))  # same images, other bits

Images depend on the network alone, never on the student, so they are made once and serve every bit width.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clusterq import qat
from clusterq.config import ClusterQConfig, QuantizationConfig
from clusterq.config import preset as named_preset
from clusterq.divergence import first_nonfinite
from clusterq.errors import DivergenceError, ModelError
from clusterq.processes import Processes
from clusterq.progress import ConsoleProgress
from clusterq.restoring import restoring
from clusterq.synthesis import BankSource, GeneratorSource, StoredImages, Teacher
from clusterq.synthesis.stored import OnStep, subset

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ImageSource = BankSource | GeneratorSource | StoredImages
PhaseProgress = Callable[[str, int, int], None]
PhaseStep = Callable[[str, int, Mapping[str, float]], None]
PhaseState = Callable[[str, Callable[[], dict[str, Any]]], None]

# Labels count as near chance below this part of the way from chance, 1 / K, to all correct.
_NEAR_CHANCE = 0.1


@dataclass
class Result:
    """What `ClusterQ.run` and `ClusterQ.finetune` hand back.

    Attributes:
        student: the quantized network in evaluation mode.
        config: the settings it was made with, widths included.
        label_accuracy: fraction of the images that the teacher assigns to their label. Near chance, which is warned
            of, their labels say nothing about them: cross-entropy misleads and only distillation can use them.
        images, labels: [N, C, H, W] and [N]; with streaming a sample of the generator as fine-tuning left it.
        metrics: phase (`"synthesis"`, `"finetune"`) -> one dictionary of loss terms per step.
        seconds: wall time per phase: `"synthesis"`, `"calibration"`, `"finetune"`. Generator steps of a streaming
            source belong to fine-tuning.
        samples_seen: images through the teacher's loss (`"synthesis"`) and through the student (`"finetune"`).
    """

    student: nn.Module
    config: ClusterQConfig
    label_accuracy: float
    images: Tensor
    labels: Tensor
    metrics: dict[str, list[dict[str, float]]]
    seconds: dict[str, float]
    samples_seen: dict[str, int]


class ClusterQ:
    """Data-free quantization of one network.

    Args:
        model: a trained network with BatchNorm layers, images [N, C, H, W] -> logits [N, K]. It is not changed.
        config: settings, or the name of a preset: `"default"`, `"paper"`, `"gdfq"`.
        input_shape: (C, H, W) of an image, any sequence.
        num_classes: K; None: found by one forward pass. Given, it is checked.
        device: where everything runs; None: where the model's parameters are.
        progress: True for a progress bar with the time left per phase, or a function called with
            (phase, steps done, steps in all).
        on_step: called with (phase, step, loss terms) for every step, in groups of some steps.
        after_step: called after every step of `"synthesis"` and `"finetune"` with (phase, function); the function gives
            a state from which `synthesize(state=)` or `finetune(state=)` of a new object continues bit for bit.
        process_group: of `torch.distributed`, whose processes share every batch; all of them make this object and call
            its methods with the same arguments at the same time, and all get the same result. `"default"` of one
            process and of several differ in the order in which numbers are added. None: no other process takes part.

    Attributes:
        model: a copy of the network.
        teacher: the frozen network with reported statistics.
        source: where the images come from, None before `synthesize`.
        seconds: wall time of the phases done so far.
        label_accuracy: fraction of the stored images that the teacher assigns to their label; None until it has been
            found (by `synthesize`, of images made earlier by `finetune`), and always for a streaming generator.

    Raises:
        ModelError: the network cannot be used (no BatchNorm, wrong input shape) or has another number of classes.
        ValueError: unknown preset, or batches that the processes cannot share.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ClusterQConfig | str = "default",
        *,
        input_shape: Sequence[int],
        num_classes: int | None = None,
        device: torch.device | str | None = None,
        progress: bool | PhaseProgress = False,
        on_step: PhaseStep | None = None,
        after_step: PhaseState | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.config = named_preset(config) if isinstance(config, str) else config
        self.processes = Processes(process_group)
        _require_shares(self.config, self.processes.size)
        # Of its own: students are copied from it later, whatever happens to the caller's network until then.
        self.model = copy.deepcopy(model)
        self.teacher = Teacher(model, input_shape, device=device)
        if num_classes is not None and num_classes != self.teacher.num_classes:
            raise ModelError(f"num_classes is {num_classes}; the network puts out {self.teacher.num_classes} classes")
        self.source: ImageSource | None = None
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._on_step = on_step
        self._after_step = after_step
        # A streaming generator as the warm-up left it: where every fine-tuning run starts from.
        self._warm_generator: dict[str, Any] | None = None
        self.label_accuracy: float | None = None

    @property
    def streaming(self) -> bool:
        """Whether fine-tuning draws fresh images from a generator in training."""
        return isinstance(self.source, GeneratorSource) and self.source.stream

    def synthesize(self, *, state: Mapping[str, Any] | None = None) -> ImageSource:
        """Make the images (of a streaming source: run the warm-up). Repeating it gives the same bits.

        Args:
            state: what `after_step` or the source's `state_dict()` gave: continue there, with the same settings.

        Warns (UserWarning) when the network assigns hardly more of the images to their labels than chance would: less
        than a tenth of the way from 1 / K to 1. Images of a streaming source are checked by `finetune`.

        Raises:
            DivergenceError: a loss term became NaN or infinite.
            CheckpointError: `state` does not fit.
        """
        config, seed = self.config.synthesis, self.config.seed
        batch_size = self.config.finetune.batch_size
        source: BankSource | GeneratorSource
        if config.source == "bank":
            source = BankSource(self.teacher, config, seed=seed, batch_size=batch_size, processes=self.processes)
        else:
            stream = self.config.finetune.images == "stream"
            if stream:
                # One full-loss step of the generator goes with every student step: the length of its schedule.
                config = replace(config, steps=self.config.finetune.steps)
            source = GeneratorSource(
                self.teacher, config, seed=seed, batch_size=batch_size, stream=stream, processes=self.processes
            )
        if state is not None:
            with restoring():
                source.load_state_dict(state)
        with self._phase("synthesis", source.state_dict) as (progress, on_step):
            try:
                source.fit(progress, on_step)
            except DivergenceError as error:
                raise _located(error, self.teacher.model, source) from error
        self.source = source
        self._warm_generator = source.state_dict() if self.streaming else None
        self.label_accuracy = None if self.streaming else self._check_labels(source.images(), source.labels())
        return source

    def use_images(self, images: Tensor, labels: Tensor) -> StoredImages:
        """Take images made earlier instead of synthesising them.

        Args:
            images: [N, C, H, W] in the network's input space.
            labels: [N] int64 in [0, K).

        Raises:
            ValueError: no images, a shape, labels that are not int64, or a label that does not fit the network.
        """
        self.teacher.require_fit(images, labels)
        device = self.teacher.device
        source = StoredImages(
            images.to(device, self.teacher.dtype),
            labels.to(device),
            self.config.finetune.batch_size,
            self.config.seed,
            self.processes,
        )
        self.source = source
        self._warm_generator = None
        self.label_accuracy = None
        self.seconds["synthesis"] = 0.0
        return source

    def calibrate(self, quantization: QuantizationConfig | None = None) -> nn.Module:
        """A student with ranges set and BatchNorm corrected on the images, no training.

        Args:
            quantization: widths and quantizers; None: those of the configuration.

        Returns:
            The student in evaluation mode.
        """
        quantization = quantization or self.config.quantization
        source = self._rewound_source()
        example = torch.zeros(1, *self.teacher.input_shape, device=self.teacher.device, dtype=self.teacher.dtype)
        count = self.config.finetune.calibration_images
        with self._phase("calibration"):
            model = copy.deepcopy(self.model).to(self.teacher.device)
            student = qat.prepare(model, quantization, example_input=example)
            if isinstance(source, GeneratorSource) and source.stream:
                images = source.sample(count).images()
            else:
                images = source.images()
            qat.calibrate(student, images[subset(len(images), count)].detach(), quantization)
        return student.eval()

    def finetune(
        self,
        quantization: QuantizationConfig | None = None,
        *,
        student: nn.Module | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Result:
        """Calibrate and train a student on the images, which are made first if they are not there yet.

        May be called again with other widths: the images are the same, those of a streaming generator too. Warns
        (UserWarning) as `synthesize` does, of images that it has not checked.

        Args:
            quantization: widths and quantizers; None: those of the configuration.
            student: what `calibrate` gave for the same quantization, trained in place; None: calibrate one.
            state: what `after_step` gave in an interrupted call: continue there, with the same settings and images.

        Raises:
            ValueError: `student` was prepared with another quantization.
            DivergenceError: a loss became NaN or infinite.
            CheckpointError: `state` does not fit.
        """
        config = self.config if quantization is None else replace(self.config, quantization=quantization)
        if student is None:
            student = self.calibrate(config.quantization)
        elif not qat.is_prepared_with(student, config.quantization):
            raise ValueError("student was prepared with another quantization than the one to fine-tune for")
        config = replace(config, quantization=qat.prepared_with(student))
        source = self._rewound_source()
        finetune = config.finetune
        trained = None
        if state is not None:
            with restoring():
                trained = state["finetuner"]
                if self.streaming and isinstance(source, GeneratorSource):
                    source.load_state_dict(state["source"])

        def after_step(finetuner: Callable[[], dict[str, Any]]) -> None:
            def everything() -> dict[str, Any]:
                own = source.state_dict() if isinstance(source, GeneratorSource) and source.stream else None
                return {"finetuner": finetuner(), "source": own}

            if self._after_step is not None:
                self._after_step("finetune", everything)

        with self._phase("finetune") as (progress, on_step):
            try:
                metrics = qat.finetune(
                    student, self.teacher.model, source, finetune, seed=config.seed, progress=progress,
                    on_step=on_step, state=trained, after_step=after_step, processes=self.processes,
                    blank=self._blank(),
                )  # fmt: skip
            except DivergenceError as error:
                raise _located(error, student, source) from error
        images, labels = source.images(), source.labels()
        accuracy = self.label_accuracy
        if accuracy is None:
            accuracy = self._check_labels(images, labels)
            self.label_accuracy = None if self.streaming else accuracy
        synthesis = [] if isinstance(source, StoredImages) else source.metrics
        size = config.synthesis.batch_size if self.streaming else finetune.batch_size
        return Result(
            student=student.eval(),
            config=config,
            label_accuracy=accuracy,
            images=images,
            labels=labels,
            metrics={"synthesis": list(synthesis), "finetune": metrics},
            seconds=dict(self.seconds),
            samples_seen={"synthesis": self.samples_synthesised(), "finetune": finetune.steps * size},
        )

    def run(self) -> Result:
        """`synthesize`, then `finetune`."""
        self.synthesize()
        return self.finetune()

    def _blank(self) -> Tensor:
        """[1, C, H, W], an image in the middle of the network's input range."""
        center = self.teacher.input_range.center
        return torch.full((1, *self.teacher.input_shape), center, device=self.teacher.device, dtype=self.teacher.dtype)

    def _rewound_source(self) -> ImageSource:
        source = self.source or self.synthesize()
        if self._warm_generator is not None and isinstance(source, GeneratorSource):
            source.load_state_dict(self._warm_generator)
        return source

    def _check_labels(self, images: Tensor, labels: Tensor) -> float:
        """Label accuracy of images [N, C, H, W]; warns where it is near chance."""
        accuracy = self.teacher.label_accuracy(images, labels)
        chance = 1 / self.teacher.num_classes
        if accuracy < chance + _NEAR_CHANCE * (1 - chance):
            warnings.warn(
                f"the network assigns {accuracy:.1%} of the images to their label, near chance ({chance:.1%}): "
                "cross-entropy to such labels misleads; synthesise longer, or train with finetune.ce_weight=0",
                stacklevel=3,
            )
        return accuracy

    def samples_synthesised(self) -> int:
        """Images that went through the teacher's loss so far; 0 for stored ones."""
        if isinstance(self.source, GeneratorSource):
            return self.source.step * self.config.synthesis.batch_size
        if isinstance(self.source, BankSource):
            return self.config.synthesis.image_steps * self.config.synthesis.num_images
        return 0

    @contextmanager
    def _phase(
        self, phase: str, state: Callable[[], dict[str, Any]] | None = None
    ) -> Iterator[tuple[Callable[[int, int], None] | None, OnStep | None]]:
        """Times a phase and gives its (progress, on_step) callbacks; with `state`, progress calls `after_step` too."""
        start = time.perf_counter()
        on_step = None if self._on_step is None else functools.partial(self._on_step, phase)
        with ExitStack() as stack:
            report: PhaseProgress | None = None
            if self._progress is True:
                report = stack.enter_context(ConsoleProgress())
            elif callable(self._progress):
                report = self._progress
            bound = None if report is None else functools.partial(report, phase)
            yield self._reporting(phase, bound, state), on_step
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        self.seconds[phase] = time.perf_counter() - start

    def _reporting(
        self, phase: str, progress: Callable[[int, int], None] | None, state: Callable[[], dict[str, Any]] | None
    ) -> Callable[[int, int], None] | None:
        after_step = self._after_step
        if after_step is None or state is None:
            return progress

        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total)
            after_step(phase, state)

        return report


def _require_shares(config: ClusterQConfig, size: int) -> None:
    if size == 1:
        return
    synthesis, finetune = config.synthesis, config.finetune
    sizes = {"finetune.batch_size": finetune.batch_size}
    if finetune.images == "stream":
        sizes = {"synthesis.batch_size": synthesis.batch_size}
    for name, batch in sizes.items():
        if batch % size:
            raise ValueError(f"{name} is {batch}; wanted a multiple of the {size} processes")
    smallest = synthesis.batch_size
    if synthesis.source == "bank":
        smallest = synthesis.num_images // math.ceil(synthesis.num_images / synthesis.batch_size)
    if smallest < size:
        raise ValueError(
            f"image synthesis has batches of {smallest} images; wanted one for each of the {size} processes"
        )


def _located(error: DivergenceError, network: nn.Module, source: ImageSource) -> DivergenceError:
    """The same error, with the layer where numbers stop being finite if one image of the source still shows it."""
    place = ""
    # A source or a network that fails now (out of memory, an error of the device) leaves the error as it is.
    with contextlib.suppress(RuntimeError):
        images = (source.sample(1) if isinstance(source, GeneratorSource) else source).images().detach()
        # One that is itself not finite, if there is one.
        worst = int((~torch.isfinite(images)).flatten(1).any(1).int().argmax())
        place = first_nonfinite(network, images[worst : worst + 1])
    return DivergenceError(f"{error}; {place}") if place else error


def quantize(
    model: nn.Module,
    *,
    input_shape: Sequence[int],
    weight_bits: int = 4,
    activation_bits: int = 4,
    preset: str | ClusterQConfig = "default",
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> nn.Module:
    """Quantize a trained network without data, in one call.

    Args:
        model: a trained network with BatchNorm layers, images [N, C, H, W] -> logits [N, K]. It is not changed.
        input_shape: (C, H, W) of an image, any sequence.
        weight_bits, activation_bits: widths, 2 to 8.
        preset: `"default"`, `"paper"`, `"gdfq"`, or a whole configuration whose widths are replaced.
        num_classes, device, progress: see `ClusterQ`.

    Returns:
        The quantized network in evaluation mode, with the call signature of `model`.

    Warns:
        UserWarning: the network assigns hardly more of the synthesised images to their labels than chance would;
            cross-entropy to such labels, as in `"paper"` and `"gdfq"`, misleads the training. See
            `ClusterQ.synthesize`.

    Raises:
        ModelError: the network cannot be used.
        ValueError: unknown preset or unsupported width.
        DivergenceError: a loss became NaN or infinite.
    """
    config = named_preset(preset) if isinstance(preset, str) else preset
    quantization = replace(config.quantization, weight_bits=weight_bits, activation_bits=activation_bits)
    method = ClusterQ(
        model,
        replace(config, quantization=quantization),
        input_shape=input_shape,
        num_classes=num_classes,
        device=device,
        progress=progress,
    )
    return method.run().student
