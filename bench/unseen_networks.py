"""The one `default` on networks of other kinds than those it was chosen on, trained here and quantized without data.

    python bench/unseen_networks.py FOLDER [--networks NAME ...] [--threads 1] [--json FILE] [--quick]
    python bench/unseen_networks.py --render FILE

Trains the networks of `unseen/networks.py` as `unseen/train.py` says, writes their weights to FOLDER (those that lie
there are taken), makes images of each once, and quantizes it in each of --schemes. Accuracies are those on images that
neither the training nor the method saw. Per network and width:

- rounded: no training, ranges of least squared error on the synthesised images;
- calibrated: that and BatchNorm corrected;
- ClusterQ: fine-tuned on the synthesised images.

FILE is written after every network; networks that are not asked for keep what it says of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "unseen"))
import train

from clusterq import qat
from clusterq.config import ClusterQConfig, QuantizationConfig, Scheme, preset
from clusterq.data import EvaluationSet, evaluate, open_for
from clusterq.method import ClusterQ
from clusterq.models import LoadedModel, load_model
from clusterq.settings import override
from clusterq.synthesis.stored import subset
from clusterq.versions import machine, now, versions
from clusterq.widths import Width

NETWORKS = Path(__file__).resolve().parent / "unseen" / "networks.py"
WIDTHS = ("W4A4", "W3A3")
# Eight bits lose nothing on any network: shown on one.
EIGHT_BITS = "mobilenet"
QUICK = [
    "synthesis.num_images=16",
    "synthesis.batch_size=8",
    "synthesis.image_steps=2",
    "finetune.steps=2",
    "finetune.batch_size=8",
]


@dataclass(frozen=True)
class Row:
    """One student: top-1 in percent on the images to measure on; `seconds` of calibration and training."""

    scheme: str
    bits: str
    rounded: float
    calibrated: float
    clusterq: float
    seconds: float


def load(kind: train.Kind, folder: Path) -> LoadedModel:
    channels, size, _ = kind.input_shape
    weights = str(folder / f"{kind.name}.safetensors")
    mean, std = (kind.mean,) * channels, (kind.std,) * channels
    return load_model(f"{NETWORKS}:{kind.name}", weights, input_size=size, mean=mean, std=std)


def student_row(method: ClusterQ, loaded: LoadedModel, data: EvaluationSet, quantization: QuantizationConfig) -> Row:
    """Quantizes to one width and measures what comes of it."""
    assert method.source is not None
    images = method.source.images().detach()
    images = images[subset(len(images), method.config.finetune.calibration_images)]
    rounded = evaluate(qat.round_only(loaded.model, quantization, images), data).top1
    student = method.calibrate(quantization)
    calibrated = evaluate(student, data).top1
    result = method.finetune(quantization, student=student)
    seconds = result.seconds["calibration"] + result.seconds["finetune"]
    bits = str(Width(quantization.weight_bits, quantization.activation_bits))
    scheme = result.config.quantization.scheme
    return Row(scheme, bits, rounded, calibrated, evaluate(result.student, data).top1, round(seconds, 1))


def measure(kind: train.Kind, folder: Path, config: ClusterQConfig, schemes: tuple[str, ...]) -> dict[str, Any]:
    """All students of one network and what is known of their images."""
    loaded = load(kind, folder)
    data = open_for(loaded, str(folder / f"{kind.data}.npz"))
    exact = evaluate(loaded.model, data)
    method = ClusterQ(loaded.model, config, input_shape=loaded.input_shape)
    method.synthesize()
    print(f"{kind.name}: FP32 {exact.top1:.2f}, label accuracy {method.label_accuracy:.1%}", flush=True)
    rows = []
    for scheme in schemes:
        for bits in (*WIDTHS, *(("W8A8",) if kind.name == EIGHT_BITS else ())):
            width = Width.parse(bits)
            quantization = replace(
                config.quantization,
                weight_bits=width.weight_bits,
                activation_bits=width.activation_bits,
                scheme=scheme,  # type: ignore[arg-type]
            )
            rows.append(student_row(method, loaded, data, quantization))
            print(f"  {rows[-1]}", flush=True)
    return {
        "what": kind.what,
        "data": kind.data,
        "input_range": kind.input_range,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "classes": loaded.num_classes,
        "images": exact.count,
        "float": exact.top1,
        "label_accuracy": round(100 * (method.label_accuracy or 0.0), 2),
        "synthesis_seconds": round(method.seconds["synthesis"], 1),
        "rows": [asdict(row) for row in rows],
    }


def render(record: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = [
        "| network | input | classes | FP32 | scheme | bits | rounded | calibrated | ClusterQ | images + student |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in record["networks"].values():
        head = [found["what"], found["input_range"], str(found["classes"]), f"{found['float']:.2f}"]
        for row in found["rows"]:
            scores = [f"{row[name]:.2f}" for name in ("rounded", "calibrated", "clusterq")]
            time_ = f"{found['synthesis_seconds']:.0f} + {row['seconds']:.0f} s"
            lines.append("| " + " | ".join([*head, row["scheme"], row["bits"], *scores, time_]) + " |")
            head = [""] * len(head)
    return "\n".join(lines)


def main() -> None:
    kinds = {kind.name: kind for kind in train.KINDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of weights and of the images to measure on")
    parser.add_argument(
        "--networks", nargs="+", choices=kinds, default=list(kinds), metavar="NAME", help=str(set(kinds))
    )
    parser.add_argument("--schemes", nargs="+", choices=get_args(Scheme), default=["auto"])
    parser.add_argument("--data", type=Path, help="CIFAR-10's test images; default: $CLUSTERQ_DATA/cifar10/...")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.FIELD=VALUE", dest="settings")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that says nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only print the table of these results")
    options = parser.parse_args()
    if options.render is not None:
        print(render(json.loads(options.render.read_text())))
        return
    if options.folder is None:
        parser.error("FOLDER is missing")
    archive = options.data or Path(os.environ.get("CLUSTERQ_DATA", "."), "cifar10", "cifar10_test.npz")
    if not archive.is_file() and any(kinds[name].data == "cifar10" for name in options.networks):
        parser.error(f"{archive} is no file; set CLUSTERQ_DATA or give --data")
    torch.set_num_threads(options.threads)
    config = override(preset("default"), [*(QUICK if options.quick else []), *options.settings])
    config = replace(config, seed=options.seed)
    record: dict[str, Any] = {"networks": {}}
    if options.json is not None and options.json.is_file():
        record = json.loads(options.json.read_text())
    record |= {
        "command": f"python bench/unseen_networks.py FOLDER --threads {options.threads} --seed {options.seed}"
        + (" --quick" if options.quick else "")
        + (f" --set {' '.join(options.settings)}" if options.settings else ""),
        "machine": machine(),
        "versions": versions(),
    }
    for name in options.networks:
        start = time.perf_counter()
        limits = {"epochs": 1, "limit": 256} if options.quick else {"epochs": None, "limit": None}
        train.prepare(kinds[name], archive, options.folder, seed=options.seed, **limits)
        print(f"{name}: trained or there in {time.perf_counter() - start:.0f} s", flush=True)
        load_average = round(os.getloadavg()[0], 2)
        found = measure(kinds[name], options.folder, config, tuple(options.schemes))
        record["networks"][name] = {**found, "date": now(), "load_average": load_average}
        record["networks"] = {key: record["networks"][key] for key in kinds if key in record["networks"]}
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(render(record))


if __name__ == "__main__":
    main()
