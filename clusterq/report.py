"""What a run says about itself: a table for the terminal and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f8fa; color: #1c2733;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: .4rem 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.lead { color: #66727f; margin: 0 0 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid #e3e8ee; border-radius: 6px; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid #e3e8ee; white-space: nowrap; }
th { font-weight: 600; color: #66727f; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
td.best { font-weight: 700; color: #0b6e99; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; font-size: .9rem; }
table.facts td:first-child { color: #66727f; width: 32%; }
figure { margin: 0 0 1.4rem; background: #fff; border: 1px solid #e3e8ee; border-radius: 6px; padding: .8rem; }
figure div { overflow-x: auto; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
@media (max-width: 640px) { figure img.wide { max-width: none; width: 760px; } }
figcaption { color: #66727f; font-size: .88rem; margin-top: .5rem; }
code, pre { font: .85rem/1.45 ui-monospace, "SF Mono", Consolas, monospace; }
pre { background: #fff; border: 1px solid #e3e8ee; border-radius: 6px; padding: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details summary { cursor: pointer; color: #0b6e99; }
li { margin: .25rem 0; }
"""

# Students in a row of results, from the plainest on: key in `result.json` -> heading.
COLUMNS = {
    "rounded_minmax": "rounded min/max",
    "rounded_mse": "rounded MSE",
    "calibrated": "calibrated",
    "clusterq": "ClusterQ",
}
_RANGES = {"minmax": "ranges between the extreme values", "mse": "ranges of least squared error"}

LIMITS = (
    "Accuracies are of one run with one seed; repeat with other seeds before concluding anything from small gaps.",
    "Quantization is simulated: values lie on the integer grid while the arithmetic is floating point.",
    "The input image, residual sums, pooled features and biases stay in floating point; weights of every layer and the "
    "output of every activation function are quantized.",
    "Labels of real images were used for measuring only. Real images never reached synthesis, calibration or training.",
)


def table(result: Mapping[str, Any]) -> str:
    """The accuracies as aligned plain text, a few lines."""
    rows = [["", "FP32", *COLUMNS.values(), "time"]]
    for row in result["widths"]:
        accuracies = [_percent(row[key]) for key in COLUMNS]
        rows.append([row["bits"], _percent(result["float"]), *accuracies, f"{row['student_seconds']:.0f} s"])
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> str:
    """Two lines below the table: what was measured on, and how good the images are."""
    data, images = result["data"], result["images"]
    measured = f"top-1 in % on {data['images']} images of {data['name']}" if data else "no evaluation set was given"
    return (
        f"{measured}; seed {result['seed']}, preset {result['preset']}\n"
        f"{images['count']} images made without data, the network agrees with {images['label_accuracy']:.1f} % "
        f"of their labels; {_seconds(result['seconds'])}"
    )


def baselines(result: Mapping[str, Any]) -> list[str]:
    """One sentence per kind of rounding without training: what its column means."""
    lines = []
    for key, base in result["baselines"].items():
        name = COLUMNS[key][0].upper() + COLUMNS[key][1:]
        lines.append(
            f"{name}: no training, {_RANGES[base['ranges']]} from {base['calibration_images']} of the images; "
            f"weights {base['weights']}; activations {base['activations']}; scheme {base['scheme']}, "
            "whatever the preset."
        )
    return [*lines, "Calibrated: the student of this run before its first training step."]


def write_html(path: Path, result: Mapping[str, Any], figures: Mapping[str, str]) -> None:
    """The page of a run, with its pictures inside.

    Args:
        path: file to write; the pictures lie beside it.
        result: content of `result.json`.
        figures: file name -> caption; the name `""` stands for a picture that could not be drawn.
    """
    model = result["model"]
    widths = " and ".join(row["bits"] for row in result["widths"])
    below = "<br>".join(_text(line) for line in [*summary(result).splitlines(), *baselines(result)])
    parts = [
        f"<h1>{_text(model['model'])} in {_text(widths)}</h1>",
        f"<p class='lead'>Quantized without data by ClusterQ {_text(result['versions']['clusterq'])} on "
        f"{_text(result['created'].replace('T', ' '))}.</p>",
        _accuracies(result),
        f"<p class='lead'>{below}</p>",
        *(_picture(path.parent, name, caption) for name, caption in figures.items()),
        "<h2>What was done</h2>",
        _facts(_run_facts(result)),
        "<h2>Where</h2>",
        _facts(_machine_facts(result)),
        "<h2>Limits</h2>",
        "<ul>" + "".join(f"<li>{_text(line)}</li>" for line in (*LIMITS, *_own_limits(result))) + "</ul>",
        "<h2>To repeat it</h2>",
        f"<pre>{_text(result['command'])}</pre>",
        f"<details><summary>All settings</summary><pre>{_text(json.dumps(result['config'], indent=2))}</pre></details>",
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>ClusterQ: {_text(model['model'])} {_text(widths)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _accuracies(result: Mapping[str, Any]) -> str:
    names = [name.replace("rounded ", "rounded,<br>") for name in COLUMNS.values()]
    head = "".join(f"<th>{name}</th>" for name in ("", "FP32", *names, "time"))
    lines = []
    for row in result["widths"]:
        cells = [
            f"<td>{_text(row['bits'])}</td>",
            f"<td>{_percent(result['float'])}</td>",
            *(f"<td{' class=best' if key == 'clusterq' else ''}>{_percent(row[key])}</td>" for key in COLUMNS),
            f"<td>{row['student_seconds']:.0f} s</td>",
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class='scroll'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _picture(folder: Path, name: str, caption: str) -> str:
    if not name:
        return f"<p>{_text(caption)}</p>"
    content = (folder / name).read_bytes()
    # A PNG file begins with its width and height, big-endian, at byte 16.
    width, height = struct.unpack(">II", content[16:24])
    kind = " class='wide'" if width > 1.8 * height else ""
    data, alt = base64.b64encode(content).decode(), _text(caption)
    image = f"<img{kind} alt='{alt}' src='data:image/png;base64,{data}'>"
    return f"<figure><div>{image}</div><figcaption>{alt}</figcaption></figure>"


def _run_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, data = result["model"], result["data"]
    facts = [
        ("network", f"{model['model']}, {model['parameters']:,} parameters, {model['num_classes']} classes"),
        ("weights", f"{model['weights'] or 'from the factory'}, SHA-256 {model['weights_sha256']}"),
        ("input", f"{' x '.join(str(v) for v in model['input_shape'])}, mean {model['mean']}, std {model['std']}"),
    ]
    if data is not None:
        part = "" if data["images"] == data["of"] else f" of {data['of']}"
        digest = f", SHA-256 {data['sha256']}" if data["sha256"] else ""
        facts.append(("measured on", f"{data['name']}, {data['images']}{part} images{digest}"))
    facts += [
        ("preset, seed", f"{result['preset']}, {result['seed']}"),
        ("images", f"{result['images']['count']} from {result['images']['source']}"),
    ]
    for row in result["widths"]:
        seen = ", ".join(f"{count:,} in {phase}" for phase, count in row["samples_seen"].items())
        ends = f"first layer {row['first_layer_bits']} bit, last layer {row['last_layer_bits']} bit"
        facts.append(
            (row["bits"], f"weights {row['weight_bits']} bit, activations {row['activation_bits']} bit, {ends}")
        )
        facts.append((f"{row['bits']} samples seen", seen))
    facts.append(("wall time", ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())))
    return facts


def _machine_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = result["machine"]
    kernels: dict[str, list[str]] = {}
    for op, kernel in result["backends"].items():
        kernels.setdefault(kernel, []).append(op)
    return [
        (
            "machine",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}",
        ),
        (
            "device",
            f"{machine['device']}, {machine['cpu_capability']}" + (f", {machine['gpu']}" if machine["gpu"] else ""),
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        *((f"{kernel} kernels", ", ".join(names)) for kernel, names in kernels.items()),
    ]


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<table class='facts'>{lines}</table>"


def _own_limits(result: Mapping[str, Any]) -> Sequence[str]:
    unreached = [f"{layer['name']} ({layer['note']})" for layer in result["widths"][-1]["unreached"]]
    return (f"Not quantized: {', '.join(unreached)}.",) if unreached else ()


def _percent(accuracy: Mapping[str, float | None] | None) -> str:
    return "-" if accuracy is None or accuracy["top1"] is None else f"{accuracy['top1']:.2f}"


def _seconds(seconds: Mapping[str, float]) -> str:
    total = seconds.get("total", sum(seconds.values()))
    return f"{total:.0f} s in all" if total < 120 else f"{total / 60:.1f} min in all"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
