"""Options that several commands of the command line share, and what they say."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from clusterq.allocator import keep_freed_memory
from clusterq.config import ClusterQConfig, preset
from clusterq.settings import override

PRESETS = ("default", "paper", "gdfq")


def add_command(commands: Any, name: str, run: Any, summary: str, **settings: Any) -> argparse.ArgumentParser:
    """A command with the summary as its help; `run(options, command)` carries it out."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", **settings
    )
    command.set_defaults(run=run)
    return command


def add_trust(parser: argparse.ArgumentParser) -> None:
    """`--trust`."""
    parser.add_argument("--trust", action="store_true", help="run the Python file that the folder names as its network")


def add_model(parser: argparse.ArgumentParser, *, data: bool = True, data_required: bool = True) -> None:
    """The network, which may come from elsewhere, and with `data` the evaluation set."""
    parser.add_argument(
        "--model",
        help="builtin:resnet20 | torchvision:NAME | timm:NAME | pytorchcv:NAME | FILE.py:FACTORY (the file is run)",
    )
    parser.add_argument(
        "--weights", help="weight file (.safetensors, or a PyTorch state dict) or the library's own name"
    )
    if data:
        parser.add_argument(
            "--data",
            required=data_required,
            help="evaluation set: digits | cifar10:DIR | cifar100:DIR | FILE.npz | folder (images.zip and labels.csv, "
            "or one sub-folder per class); only measured on, never trained on",
        )
    parser.add_argument(
        "--input-size", type=int, metavar="PIXELS", help="height and width (default: what is known, or 224)"
    )
    parser.add_argument(
        "--normalization", choices=("imagenet", "cifar10", "cifar100", "none"), help="of pixels in 0..1"
    )
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="per channel, of pixels in 0..1")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="per channel, of pixels in 0..1")
    parser.add_argument("--download", action="store_true", help="allow the library to fetch its own weights")


def add_method(parser: argparse.ArgumentParser) -> None:
    """What the method does: preset, widths, settings, seed."""
    parser.add_argument("--preset", choices=PRESETS, default="default", help="starting point (default: %(default)s)")
    parser.add_argument(
        "--bits",
        nargs="+",
        metavar="WxAy",
        help="bits of weights and activations (default: W4A4, the demo W4A4 W3A3); several share one synthesis",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.FIELD=VALUE", help="change single settings"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")


def add_common(parser: argparse.ArgumentParser, *, threads: int | None = None) -> None:
    """What is measured, and `add_machine`."""
    parser.add_argument("--limit", type=int, metavar="N", help="measure on the first N images only")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images per evaluation batch (default: %(default)s)"
    )
    add_machine(parser, threads=threads)


def add_machine(parser: argparse.ArgumentParser, *, threads: int | None = None) -> None:
    """Where it runs and what is printed."""
    shown = "what torch chooses" if threads is None else threads
    parser.add_argument("--threads", type=int, metavar="N", default=threads, help=f"CPU threads (default: {shown})")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def config_of(options: argparse.Namespace) -> ClusterQConfig:
    """The settings that preset, `--set` and `--seed` give."""
    return replace(override(preset(options.preset), options.set), seed=options.seed)


def widths_of(texts: Sequence[str]) -> tuple[Any, ...]:
    """Widths of `--bits`. Raises ValueError for a width named twice."""
    from clusterq.widths import Width

    widths = [Width.parse(text) for text in texts]
    if len(set(widths)) != len(widths):
        raise ValueError("--bits names a width twice")
    return tuple(widths)


def input_of(options: argparse.Namespace) -> dict[str, Any]:
    """Of the images: items for `load_model`."""
    mean, std = options.mean, options.std
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std belong together")
    if options.normalization is not None and mean is not None:
        raise ValueError("--normalization and --mean are both given; wanted one of them")
    return {
        "input_size": options.input_size,
        "mean": None if mean is None else tuple(mean),
        "std": None if std is None else tuple(std),
        "normalization": options.normalization,
        "download": options.download,
    }


def common_of(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Of what `add_common` added; sets the number of threads."""
    require_positive(options, "limit", "batch_size")
    return {
        "limit": options.limit,
        "evaluation_batch": options.batch_size,
        "device": machine_of(options),
        "command": command,
    }


def machine_of(options: argparse.Namespace) -> str:
    """Set the number of threads; returns the device."""
    require_positive(options, "threads")
    keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device {device}: wanted cpu, cuda or cuda:NUMBER")
    if device != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: this PyTorch finds {torch.cuda.device_count()} CUDA devices")
    return device


def refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raises ValueError where one of these options is given, which would have no effect."""
    for name in names:
        value = getattr(options, name)
        # Not by `in`: to Python 0 equals False, and `--seed 0` is given.
        if not (value is None or value is False or value == []):
            raise ValueError(f"--{name.replace('_', '-')} is of no use {why}")


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Raises ValueError where one of these options is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; wanted at least 1")
