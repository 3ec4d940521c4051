"""The command line: `clusterq demo|quantize|synthesize|ablate|evaluate|export|bench|doctor`.

Exit codes: 0 done, 1 a self-check of `doctor` failed, 2 the request cannot be carried out (one sentence on standard
error, nothing half-written), 130 or 143 interrupted by SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import clusterq
from clusterq.cli_options import (
    add_command,
    add_common,
    add_method,
    add_model,
    add_trust,
    common_of,
    config_of,
    input_of,
    widths_of,
)
from clusterq.config import preset
from clusterq.errors import CheckpointError, ClusterQError, RunInterrupted
from clusterq.progress import ConsoleProgress
from clusterq.readers import read_json
from clusterq.settings import describe as describe_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to those of the process. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    if options.command is None:
        options = _parser().parse_args(["doctor"])
    try:
        code: int = options.run(options, shlex.join(["clusterq", *words]))
    except RunInterrupted as stop:
        if not stop.told:
            print(f"clusterq: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt as stop:
        print(f"clusterq: interrupted, {getattr(stop, 'how_to_continue', 'nothing was written')}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    # PyTorch reports a device out of memory, a kernel that cannot run and the like as RuntimeError.
    except (ClusterQError, ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if os.environ.get("CLUSTERQ_TRACEBACK") == "1":
            raise
        if getattr(error, "told", False):
            return 2
        kept = getattr(error, "how_to_continue", None)
        print(f"clusterq: error: {_sentence(error)}{f'; {kept}' if kept else ''}", file=sys.stderr)
        return 2
    return code


def _sentence(error: Exception) -> str:
    """One line; of an error that was not raised for the user, its kind and where to learn more as well."""
    text = str(error).strip()
    if isinstance(error, (ClusterQError, ValueError, OSError)):
        return " ".join(text.split()) or type(error).__name__
    first = text.splitlines()[0] if text else "no message"
    return f"{type(error).__name__}: {first} (CLUSTERQ_TRACEBACK=1 shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clusterq",
        description="Data-free quantization of convolutional networks to 2-8 bits.",
        epilog="CLUSTERQ_TRACEBACK=1 shows where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"clusterq {clusterq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_quantize(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_bench(commands)
    # They take their options from here.
    from clusterq import cli_method

    cli_method.add_commands(commands)
    doctor = add_command(commands, "doctor", _doctor, "versions, kernel of every op, self-checks")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _add_demo(commands: Any) -> None:
    demo = add_command(
        commands, "demo", _demo, "quantize the network of handwritten digits that comes with the package"
    )
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="run folder, replaced (default: %(default)s)"
    )
    add_method(demo)
    # Two threads gain nothing on images of 16x16 pixels and lose much on a busy machine.
    add_common(demo, threads=1)


def _add_quantize(commands: Any) -> None:
    quantize = add_command(
        commands,
        "quantize",
        _quantize,
        "make low-bit versions of a trained network without data",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings for --set, with the values of preset default:\n  "
        + "\n  ".join(describe_settings(preset("default"))),
    )
    add_model(quantize, data_required=False)
    quantize.add_argument("--output", type=Path, help="run folder to make (default: runs/MODEL-BITS)")
    quantize.add_argument("--overwrite", action="store_true", help="replace the run folder when it exists")
    quantize.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue the interrupted run of this folder; RUN alone: as begun",
    )
    quantize.add_argument(
        "--save-every",
        type=float,
        metavar="SECONDS",
        help="save the run's state so often, in at most 1 %% of its time (default: 60)",
    )
    add_trust(quantize)
    quantize.add_argument(
        "--images", type=Path, metavar="BANK", help="bank of `synthesize`, or images.safetensors of a run: no synthesis"
    )
    quantize.add_argument("--any-network", action="store_true", help="accept a bank made for another network")
    quantize.add_argument("--save-images", action="store_true", help="store the images in the run folder")
    add_method(quantize)
    add_common(quantize)


def _add_evaluate(commands: Any) -> None:
    evaluate = add_command(
        commands, "evaluate", _evaluate, "top-1 and top-5 of a quantized network on disk or of one in floating point"
    )
    evaluate.add_argument(
        "checkpoint", nargs="?", type=Path, help="folder RUN/checkpoints/W4A4 or a packed one; without it: --model"
    )
    add_model(evaluate)
    add_trust(evaluate)
    add_common(evaluate)


def _add_export(commands: Any) -> None:
    export = add_command(
        commands, "export", _export, "write a quantized network for other runtimes and compare what it gives"
    )
    export.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="run folder, or one of its checkpoints")
    export.add_argument(
        "--format",
        choices=("onnx", "safetensors", "pt2"),
        default="onnx",
        help="onnx: run in onnxruntime; safetensors: folder with codes at their true width and plain tensors; pt2: "
        "torch.export program that runs without this package (default: %(default)s)",
    )
    export.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="default: model.onnx, packed or model.pt2 in the checkpoint's folder",
    )
    export.add_argument("--overwrite", action="store_true", help="replace the file when it exists")
    export.add_argument("--bits", metavar="WxAy", help="which checkpoint of a run with several")
    export.add_argument(
        "--packed", action="store_true", help="onnx: store up to 4 bits as INT4: a smaller file, not faster"
    )
    export.add_argument(
        "--operators",
        choices=("qdq", "integer"),
        default="qdq",
        help="onnx, qdq: QuantizeLinear/DequantizeLinear; integer: ConvInteger, MatMulInteger (default: %(default)s)",
    )
    export.add_argument("--fold-batch-norm", action="store_true", help="onnx, qdq: BatchNorm into scales and biases")
    export.add_argument(
        "--target",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="onnx, scheme deploy: tensorrt wants networks quantized with quantization.int8_symmetric=true "
        "(default: %(default)s)",
    )
    export.add_argument("--model", help="of a checkpoint whose network came from a Python file: FILE.py:FACTORY")
    add_trust(export)
    export.add_argument("--data", help="evaluation set to compare classes on (default: random images)")
    add_common(export)


def _add_bench(commands: Any) -> None:
    bench = add_command(commands, "bench", _bench, "run the benchmarks of a source checkout")
    bench.add_argument("suite", nargs="*", help="suites to run, such as fake_quant (default: all)")


def _demo(options: argparse.Namespace, command: str) -> int:
    from clusterq import result
    from clusterq.request import RunRequest

    if options.output.exists() and not _is_run(options.output, result.FORMAT):
        raise ValueError(f"{options.output} exists and is not a run folder; choose another --output")
    request = RunRequest(
        model="builtin:digits",
        weights=None,
        data="digits",
        output=options.output,
        overwrite=True,
        widths=widths_of(options.bits or ["W4A4", "W3A3"]),
        config=config_of(options),
        **common_of(options, command),
    )
    return _carry_out(request, options)


def _quantize(options: argparse.Namespace, command: str) -> int:
    from clusterq.request import RunRequest
    from clusterq.resume import SAVE_EVERY
    from clusterq.trust import continued

    words = shlex.split(command)[1:]
    if options.resume is not None:
        output = Path(options.resume) if options.resume else options.output
        if options.output is not None and output != options.output:
            raise ValueError(
                f"--output {options.output} beside --resume {options.resume}: a run is continued into its own folder; "
                "leave it out"
            )
        if options.model is None:
            options, words = continued(options, _parser().parse_args)
            command = shlex.join(["clusterq", *words])
        options.output = output
    if options.model is None:
        raise ValueError("nothing to quantize: give --model, or --resume RUN")
    if options.save_every is not None and not 0 <= options.save_every < float("inf"):
        raise ValueError(f"--save-every is {options.save_every}; wanted seconds, 0 or more")
    widths = widths_of(options.bits or ["W4A4"])
    name = re.sub(r"[^\w.-]+", "-", options.model.rsplit("/", 1)[-1])
    request = RunRequest(
        model=options.model,
        weights=options.weights,
        data=options.data,
        output=options.output or Path("runs", "-".join([name, *map(str, widths)])),
        overwrite=options.overwrite,
        widths=widths,
        config=config_of(options),
        images=options.images,
        any_network=options.any_network,
        save_images=options.save_images,
        resume=options.resume is not None,
        save_every=SAVE_EVERY if options.save_every is None else options.save_every,
        words=tuple(words),
        **input_of(options),
        **common_of(options, command),
    )
    return _carry_out(request, options)


def _carry_out(request: Any, options: argparse.Namespace) -> int:
    from clusterq import report
    from clusterq.processes import Processes, joined
    from clusterq.run import run

    with joined(request.device) as (group, device):
        first = Processes(group).rank == 0
        with ConsoleProgress(quiet=options.quiet or not first) as progress:
            result = run(
                replace(request, device=device),
                progress,
                lambda text: print(f"clusterq: {text}", file=sys.stderr) if first else None,
                process_group=group,
            )
    if result is None:
        return 0
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"\n{report.table(result)}\n\n{report.summary(result)}\n{request.output / 'report.html'}")
    return 0


def _evaluate(options: argparse.Namespace, command: str) -> int:
    from clusterq import data
    from clusterq.libraries import named_normalization
    from clusterq.models import load_model, own_transform
    from clusterq.stored import open_quantized

    device = common_of(options, command)["device"]
    if options.checkpoint is not None:
        model, record = open_quantized(options.checkpoint, options.model, trust=options.trust)
        if options.weights is not None or options.input_size is not None:
            raise ValueError("a checkpoint has its own weights and input size; leave out --weights and --input-size")
        given = input_of(options)
        mean, std = given["mean"] or record.mean, given["std"] or record.std
        if given["normalization"] is not None:
            mean, std = named_normalization(given["normalization"], record.input_shape[0])
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != record.input_shape[0]:
                raise ValueError(
                    f"{name} has {len(values)} values; the network takes {record.input_shape[0]} channels: "
                    "give --normalization, or --mean and --std"
                )
        transform = None
        if record.source is not None:
            transform = own_transform(record.source, model, record.input_shape, mean, std)
        images = data.open_data(options.data, input_shape=record.input_shape, mean=mean, std=std, transform=transform)
        data.check_fits(images, record.num_classes)
        name = str(options.checkpoint)
    elif options.model is not None:
        loaded = load_model(options.model, options.weights, **input_of(options))
        model, images, name = loaded.model, data.open_for(loaded, options.data), options.model
    else:
        raise ValueError("nothing to evaluate: give a checkpoint folder, or --model with --weights")
    with ConsoleProgress(quiet=options.quiet) as progress:
        result = data.evaluate(
            model.to(device),
            images,
            batch_size=options.batch_size,
            limit=options.limit,
            progress=lambda done, total: progress("evaluate", done, total),
        )
    if options.json:
        print(json.dumps({"model": name, "data": images.name, **asdict(result)}))
    else:
        top5 = "" if result.top5 is None else f", top-5 {result.top5:.2f} %"
        print(f"{name}: top-1 {result.top1:.2f} %{top5} on {result.count} images of {images.name}")
    return 0


def _export(options: argparse.Namespace, command: str) -> int:
    from clusterq import export, forms
    from clusterq.stored import ExportRequest

    common_of(options, command)
    names = ("bits", "output", "model", "trust", "limit", "batch_size", "overwrite")
    request = ExportRequest(options.source, evaluation=options.data, **{name: getattr(options, name) for name in names})
    given = {name: getattr(options, name) for name in ("packed", "operators", "fold_batch_norm", "target")}
    if options.format != "onnx":
        result = forms.export_torch(request, options.format, **given)
        print(export.as_json(result) if options.json else forms.describe(result))
        return 0
    result = export.export_checkpoint(request, threads=torch.get_num_threads(), **given)
    print(export.as_json(result) if options.json else export.describe(result))
    return 0


def _bench(options: argparse.Namespace, command: str) -> int:
    folder = Path(clusterq.__file__).resolve().parent.parent / "bench"
    suites = [path.stem.removeprefix("bench_") for path in sorted(folder.glob("bench_*.py"))]
    if not suites:
        raise ValueError("the benchmarks are part of the source checkout, not of the installed package")
    for name in options.suite:
        if name not in suites:
            raise ValueError(f"no benchmark suite {name!r}; there are {', '.join(suites)}")
    chosen = ["--suite", *options.suite] if options.suite else []
    return subprocess.run([sys.executable, str(folder / "report.py"), *chosen], check=False).returncode


def _doctor(options: argparse.Namespace, command: str) -> int:
    from clusterq.diagnosis import describe, doctor

    diagnosis = doctor()
    print(json.dumps(asdict(diagnosis), indent=2) if options.json else describe(diagnosis))
    return 0 if diagnosis.healthy else 1


def _is_run(folder: Path, result_format: str) -> bool:
    try:
        result = read_json(folder / "result.json", CheckpointError)
    except (OSError, CheckpointError):
        return False
    return isinstance(result, dict) and result.get("format") == result_format
