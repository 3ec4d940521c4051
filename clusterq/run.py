"""One run from start to finish: load, measure, synthesise, quantize at every width, measure again, write the folder.

The run folder holds `result.json` (every number with what is needed to repeat it), `metrics.jsonl` (loss terms per
step), the figures with `report.html`, and one checkpoint per width. It is renamed into place when all of it is on disk.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clusterq import bank, checkpoint, figures, qat, report, states
from clusterq.config import QuantizationConfig, WeightRange
from clusterq.data import evaluate, open_for
from clusterq.folders import check_writable
from clusterq.method import ClusterQ
from clusterq.models import file_sha256, load_model, runs_code
from clusterq.partial import Notify, command_to_continue
from clusterq.precision import autocasts
from clusterq.processes import Processes
from clusterq.readers import write_images
from clusterq.request import RunRequest
from clusterq.result import BASELINES, content, data_facts, end_bits, kernels, write_json
from clusterq.resume import Session
from clusterq.synthesis import GeneratorSource, StoredImages, project_statistics
from clusterq.synthesis.stored import subset
from clusterq.versions import environment
from clusterq.widths import Width

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLOTTED_IMAGES = 512

Progress = Callable[[str, int, int | None], None]


class _Run:
    """The state of one run: what was loaded, what was measured."""

    def __init__(self, request: RunRequest, progress: Progress | None, session: Session) -> None:
        self.request = request
        self.progress = progress
        self.session = session
        self.processes = session.processes
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self._running: dict[str, float] = {}
        # Of fine-tuning: the part of the run that is told to the session, such as W4A4.
        self._part = "synthesis"
        self.metrics: list[dict[str, Any]] = []
        with self.timed("load"):
            self.loaded = load_model(
                request.model,
                request.weights,
                input_size=request.input_size,
                mean=request.mean,
                std=request.std,
                normalization=request.normalization,
                download=request.download,
            )
            self.loaded.model.to(request.device)
            self.method = ClusterQ(
                self.loaded.model,
                replace(request.config, quantization=self.quantization(request.widths[0])),
                input_shape=self.loaded.input_shape,
                num_classes=self.loaded.num_classes,
                device=request.device,
                progress=False if progress is None else progress,
                after_step=lambda phase, state: session.after_step(self._part, state),
                process_group=self.processes.group,
            )
            if request.images is not None:
                images = bank.open_images(request.images, self.loaded, any_network=request.any_network)
                self.method.use_images(*images)
            self.data, self.data_facts = None, None
            if request.data is not None:
                self.data = open_for(self.loaded, request.data)
                self.data_facts = data_facts(self.data, request.data, request.limit)
        self.calibration_images = torch.empty(0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        self._running[phase] = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - self._running.pop(phase)

    def begin(self) -> None:
        """Start or continue, with what earlier processes of this run have done."""
        request = self.request
        self.session.begin(
            self._identity(),
            self._environment(),
            self._spent,
            resume=request.resume,
            overwrite=request.overwrite,
        )
        for phase, seconds in self.session.carried.get("seconds", {}).items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.start -= self.session.carried.get("total", 0.0)

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for an interrupted run to be continued."""
        request = self.request
        return {
            "model": self.loaded.facts(),
            "file": file_sha256(request.model.rsplit(":", 1)[0]) if runs_code(request.model) else None,
            "config": request.config.to_dict(),
            "widths": [str(width) for width in request.widths],
            "images": None if request.images is None else file_sha256(bank.images_file(request.images)),
            "data": self.data_facts,
            "device": torch.device(request.device).type,
        }

    def _environment(self) -> dict[str, Any]:
        """What should be the same."""
        device, config = self.request.device, self.request.config
        autocast = {name: getattr(config, name).autocast for name in ("synthesis", "finetune")}
        return {
            **environment(device),
            "processes": self.processes.size,
            "autocast": {name: autocasts(torch.device(device), value) for name, value in autocast.items()},
            "kernels": kernels(device),
        }

    def _spent(self) -> dict[str, Any]:
        """Seconds so far, those of the phases that are running included."""
        now = time.perf_counter()
        seconds = dict(self.seconds)
        for phase, start in self._running.items():
            seconds[phase] = seconds.get(phase, 0.0) + now - start
        return {"seconds": seconds, "total": now - self.start}

    def quantization(self, width: Width) -> QuantizationConfig:
        return width.of(self.request.config.quantization)

    def measure(self, model: nn.Module, label: str) -> dict[str, float | None] | None:
        """Top-1 and top-5 in percent; None without an evaluation set."""
        if self.data is None:
            return None
        call = self.progress

        def progress(done: int, total: int | None) -> None:
            if call is not None:
                call(f"evaluate {label}", done, total)
            self.session.look_alone()

        with self.timed("evaluation"):
            result = evaluate(
                model,
                self.data,
                batch_size=self.request.evaluation_batch,
                limit=self.request.limit,
                device=self.request.device,
                progress=progress,
                processes=self.processes,
            )
        return {"top1": result.top1, "top5": result.top5}

    def make_images(self) -> tuple[Tensor, Tensor]:
        session, source = self.session, self.method.source
        with self.timed("synthesis"):
            if source is None and "synthesis" in session.done:
                source = self.method.synthesize(state=session.read_kept("synthesis"))
            elif source is None:
                made = self.method.synthesize(state=session.state_of("synthesis"))
                assert not isinstance(made, StoredImages)
                source = made
                session.keep("synthesis", None, lambda folder: states.write_state(folder, made.state_dict()))
        count = self.request.config.finetune.calibration_images
        images = source.images().detach()
        # Those on which every student's ranges are set: fine-tuning begins with the same generator at every width.
        if isinstance(source, GeneratorSource) and source.stream:
            self.calibration_images = source.sample(count).images().detach()
        else:
            self.calibration_images = images[subset(len(images), count)]
        return images, source.labels()

    def width(self, width: Width, folder: Path) -> dict[str, Any]:
        """Everything about one width: the baselines, the student, its checkpoint. Returns its row of the result."""
        target, part = folder / "checkpoints" / str(width), str(width)
        if part not in self.session.done:
            target.mkdir(parents=True)
            self.session.keep(part, self._make_width(width, target), functools.partial(self._keep_width, target))
        else:
            target.mkdir(parents=True)
            if self.session.writes:
                _copy_checkpoint(self.session.kept(part), target)
            if self.method.streaming:
                self._generator.load_state_dict(self.session.read_kept(part))
        done = self.session.done[part]
        self.metrics += done["metrics"]
        if done["synthesis"]:
            self.synthesis_metrics = done["synthesis"]
        row: dict[str, Any] = done["row"]
        return row

    def _keep_width(self, target: Path, kept: Path) -> None:
        """What a finished width leaves for a process that continues the run."""
        _copy_checkpoint(target, kept)
        if self.method.streaming:
            states.write_state(kept, self._generator.state_dict())

    @property
    def _generator(self) -> GeneratorSource:
        assert isinstance(self.method.source, GeneratorSource)
        return self.method.source

    def _make_width(self, width: Width, target: Path) -> dict[str, Any]:
        """The row of a width, its metrics and those of a streaming source; writes the checkpoint into `target`."""
        once, self._part = self.session.once, str(width)
        trained_before = sum(
            self.session.done[str(w)]["seconds"] for w in self.request.widths if str(w) in self.session.done
        )
        quantization = self.quantization(width)
        row: dict[str, Any] = {
            "bits": str(width),
            "weight_bits": width.weight_bits,
            "activation_bits": width.activation_bits,
            "layer_bits": dict(quantization.layer_bits),
        }
        for name, ranges in BASELINES.items():
            row[name] = once(f"{width} {name}", functools.partial(self._rounded, width, quantization, ranges))
        with self.timed("calibration"):
            student = self.method.calibrate(quantization)
        row["calibrated"] = once(f"{width} calibrated", lambda: self.measure(student, f"{width} calibrated"))
        with self.timed("finetune"):
            result = self.method.finetune(quantization, student=student, state=self.session.state_of(str(width)))
        trained = self.seconds["finetune"] - trained_before
        row["student_seconds"] = result.seconds["calibration"] + trained
        row["clusterq"] = self.measure(result.student, f"{width} ClusterQ")
        row["samples_seen"] = result.samples_seen
        row["label_accuracy"] = 100 * result.label_accuracy
        layers = qat.report(result.student)
        row["first_layer_bits"], row["last_layer_bits"] = end_bits(layers)
        row["scheme"] = result.config.quantization.scheme
        row["layers"] = [asdict(layer) for layer in layers]
        row["unreached"] = [asdict(layer) for layer in qat.unreached(result.student)]
        row["checkpoint"] = f"checkpoints/{width}"
        checkpoint.write_checkpoint(
            result.student,
            target,
            config=result.config,
            input_shape=self.loaded.input_shape,
            num_classes=self.loaded.num_classes,
            source=self.loaded.source,
            mean=self.loaded.mean,
            std=self.loaded.std,
            extra={"top1": row["clusterq"]["top1"] if row["clusterq"] else None},
        )
        return {
            "row": row,
            "metrics": [{"phase": "finetune", "bits": str(width), **step} for step in result.metrics["finetune"]],
            "synthesis": result.metrics["synthesis"] if self.method.streaming else [],
            "seconds": trained,
        }

    def _rounded(self, width: Width, quantization: QuantizationConfig, ranges: WeightRange) -> Any:
        with self.timed("calibration"):
            asymmetric = replace(quantization, weight_symmetric=False, activation_symmetric=False, int8_symmetric=False)
            student = qat.round_only(self.loaded.model, asymmetric, self.calibration_images, ranges)
        return self.measure(student, f"{width} {ranges}")

    synthesis_metrics: list[dict[str, float]]

    def separability(self, images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Points [n, 2] and labels [n] of synthesised and, where there are any, real images."""
        teacher = self.method.teacher
        count = min(len(images), _PLOTTED_IMAGES)
        # One image alone lies where the mean of all images does.
        shown = subset(len(images), count)
        made = project_statistics(teacher, images[shown]) if count > 1 else torch.zeros(count, 2)
        points = {"synthesised": (made, labels[shown].cpu())}
        if self.data is not None:
            real, real_labels = next(self.data.batches(min(_PLOTTED_IMAGES, len(self.data))))
            if len(real) > 1:
                points["real, for comparison"] = (project_statistics(teacher, real), real_labels)
        return points


def run(
    request: RunRequest,
    progress: Progress | None = None,
    notify: Notify | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> dict[str, Any] | None:
    """Carry out a request and write its run folder.

    Args:
        request: what to do.
        progress: called with (phase, done, total or None).
        notify: called with one sentence where a user should know something.
        process_group: of `torch.distributed`; its processes share the run, and all of them make this call.

    Returns:
        The content of `result.json`; None in all processes but the first, which writes the folder.

    Raises:
        ClusterQError: see `clusterq.errors`; nothing is left behind but, with `save_every`, the state to continue from.
        RunInterrupted: SIGINT or SIGTERM; the state is saved.
    """
    processes = Processes(process_group)
    processes.first(lambda: check_writable(request.output, overwrite=request.overwrite))
    how = command_to_continue(request.output, trust=runs_code(request.model), overwrite=request.overwrite)
    session = Session(
        request.output,
        every=request.save_every,
        words=list(request.words),
        how=how,
        notify=notify or (lambda text: None),
        processes=processes,
    )
    with session:
        state = _Run(request, progress, session)
        state.begin()
        result = _carry_out(state)
        session.finish()
    return result


def _carry_out(state: _Run) -> dict[str, Any] | None:
    request, session = state.request, state.session
    with session.new_folder(request.output, overwrite=request.overwrite) as folder:
        full = session.once("float", lambda: state.measure(state.loaded.model, "FP32"))
        images, labels = state.make_images()
        source = state.method.source
        state.synthesis_metrics = list(getattr(source, "metrics", []))
        rows = [state.width(width, folder) for width in request.widths]
        state.metrics = [{"phase": "synthesis", **step} for step in state.synthesis_metrics] + state.metrics
        if state.method.streaming:
            # As training has left the generator.
            assert source is not None
            images, labels = source.images().detach(), source.labels()
        if not session.writes:
            return None
        # What follows concerns this process alone: the others have ended.
        session.processes = Processes()
        result = content(
            request,
            state.loaded,
            replace(request.config, quantization=state.quantization(request.widths[0])),
            data=state.data_facts,
            full=full,
            rows=rows,
            images=images,
            calibration_images=len(state.calibration_images),
            resumed=session.resumed,
            seconds=state.seconds,
            processes=state.processes.size,
        )
        if request.save_images:
            write_images(folder / "images.safetensors", images, labels)
        with state.timed("report"):
            session.look()
            pictures = figures.draw(
                folder,
                result,
                metrics=state.metrics,
                images=images.cpu(),
                labels=labels.cpu(),
                separability=state.separability(images, labels),
            )
        result["seconds"] = {**state.seconds, "total": time.perf_counter() - state.start}
        write_json(folder / "result.json", result)
        with open(folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in state.metrics)
        report.write_html(folder / "report.html", result, pictures)
        # The last moment at which a signal ends the run: it is complete after that.
        session.look()
    return result


def _copy_checkpoint(source: Path, target: Path) -> None:
    for name in (checkpoint.TENSORS, checkpoint.RECORD):
        shutil.copyfile(source / name, target / name)
