"""The table of an ablation: what it may say, and that every mistake in any row is found before something runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from clusterq.ablation import table
from clusterq.ablation.table import TableError, expand, read_table, section_range
from clusterq.config import ClusterQConfig, preset
from clusterq.errors import MissingPackageError
from clusterq.widths import Width

ROOT = Path(__file__).resolve().parent.parent
BASE = """
[base]
model = "builtin:digits"
data = "digits"
bits = ["W4A4", "W3A3"]
seeds = [2, 5]
threads = 2
evaluate = { choose = "first half", report = "second half" }
settings = ["finetune.steps=7", "synthesis.num_images=9"]
"""


def _read(folder: Path, text: str, name: str = "t.toml", **settings: object) -> table.Table:
    (folder / name).write_text(text)
    return read_table(folder / name, **settings)  # type: ignore[arg-type]


def test_rows_are_the_base_with_their_own_settings_on_top(tmp_path: Path) -> None:
    text = (
        BASE
        + """
[[row]]
name = "base alone"
[[row]]
name = "a list"
settings = ["finetune.steps=8", "synthesis.semantic_start=null", "synthesis.generator_betas=[0.1, 0.2]"]
bits = ["W2A8"]
[[row]]
name = "sections"
settings.synthesis = { num_images = 3, spread = "var", noise_relative = true, image_lr = 1 }
settings.quantization = { layer_bits = { fc = 8 } }
[[row]]
name = "fields"
preset = "paper"
settings = { "finetune.lr" = 0.5 }
[[row]]
name = "ceiling"
preset = "gdfq"
images = "data:0:10"
"""
    )
    read = _read(tmp_path, text)
    alone, listed, sections, fields, ceiling = read.rows
    assert (read.name, read.seeds, read.threads, read.weights) == ("t", (2, 5), 2, None)
    assert read.sections == {"choose": "first half", "report": "second half", "all": "all"}
    assert alone.widths == (Width(4, 4), Width(3, 3)) and listed.widths == (Width(2, 8),)
    assert (alone.config.finetune.steps, alone.config.synthesis.num_images) == (7, 9)
    assert alone.config.preset == "default" and alone.images is None and alone.assignments == ()
    assert listed.config.finetune.steps == 8 and listed.config.synthesis.semantic_start is None
    assert listed.config.synthesis.generator_betas == (0.1, 0.2)
    made = sections.config.synthesis
    assert (made.num_images, made.spread, made.noise_relative) == (3, "var", True)
    assert made.image_lr == 1.0 and isinstance(made.image_lr, float)
    assert sections.config.quantization.layer_bits == {"fc": 8}
    assert fields.config.finetune.lr == 0.5 and fields.config.synthesis == _with(preset("paper"), num_images=9)
    # A generator that trains beside the student has nothing to do with stored real images.
    assert ceiling.images == "0:10" and ceiling.config.finetune.images == "bank"


def _with(config: ClusterQConfig, **synthesis: object) -> object:
    return replace(config.synthesis, **synthesis)  # type: ignore[arg-type]


def test_the_command_comes_last(tmp_path: Path) -> None:
    text = BASE + "[[row]]\nname = 'a'\nsettings = ['finetune.steps=8']\n"
    read = _read(tmp_path, text, assignments=["finetune.steps=1"], seeds=[9])
    assert read.rows[0].config.finetune.steps == 1 and read.seeds == (9,)
    assert (read.base, read.last) == (("finetune.steps=7", "synthesis.num_images=9"), ("finetune.steps=1",))


ROW = "[[row]]\nname = 'fine'\n[[row]]\nname = 'r'\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (BASE, ["at least one [[row]]"]),
        ("[base]\n[[row]]\nname = 'r'", ["[base]: model is missing"]),
        (BASE + "speed = 3\n" + ROW, ["[base]: no key 'speed'; wanted model, weights"]),
        (BASE + ROW + "bit = ['W4A4']", ["row 2 (r)", "no key 'bit'"]),
        (BASE + ROW + "settings = ['synthesis.nothing=1']", ["row 2 (r)", "no setting 'nothing'"]),
        (BASE + ROW + "settings = { synthesis = { decay = 2.0 } }", ["row 2 (r)", "synthesis.decay is 2.0; wanted"]),
        (BASE + ROW + "settings = { synthesis = 2 }", ["row 2 (r)", "wanted a table of the fields of section"]),
        (BASE + ROW + "settings = 2", ["row 2 (r)", "wanted a list of 'section.field=value'"]),
        (BASE + ROW + "settings = ['synthesis.alignment_weight=1']", ["row 2 (r)", "warmup_steps is 0"]),
        (BASE + ROW + "bits = ['W9A4']", ["row 2 (r)", "wanted WxAy"]),
        (BASE + ROW + "bits = ['W4A4', 'W4A4']", ["row 2 (r)", "different widths"]),
        (BASE + ROW + "bits = 'W4A4'", ["row 2 (r)", "wanted a list"]),
        (BASE + ROW + "preset = 'best'", ["row 2 (r)", "preset 'best' is not one of"]),
        (BASE + ROW + "images = 'real'", ["row 2 (r)", "wanted 'data:SECTION'"]),
        (BASE + ROW + "images = 'data:some'", ["section 'some': wanted 'first half'"]),
        (BASE + ROW + "[[row]]\nname = 'r'", ["two rows are called 'r'"]),
        (BASE + "[[row]]\nbits = ['W4A4']", ["row 1: name is missing"]),
        (BASE + ROW.replace("'r'", "'a|b'"), ["without '|'"]),
        (BASE.replace("seeds = [2, 5]", "seeds = [2, 2]") + ROW, ["different whole numbers"]),
        (BASE.replace("seeds = [2, 5]", "seeds = [true]") + ROW, ["seeds is True; wanted a whole number"]),
        (BASE.replace("threads = 2", "threads = 0") + ROW, ["threads is 0"]),
        (BASE.replace(', report = "second half"', "") + ROW, ["report is missing; choosing and reporting"]),
        (BASE.replace("second half", "5:5") + ROW, ["section '5:5'"]),
        (BASE.replace("choose", "tune") + ROW, ["no key 'tune'; wanted choose, report, all"]),
        (BASE + "mean = [0.5]\n" + ROW, ["mean and std belong together"]),
        ("[base\n", ["t.toml is not a TOML file"]),
        (BASE + "weights = 2020-01-01\n" + ROW, ["datetime.date(2020, 1, 1) is a date; wanted text"]),
        (BASE + "weights = 10:20:30\n" + ROW, ["is a time; wanted text"]),
        (BASE + ROW + "settings = { finetune = { lr = nan } }", ["a number is nan; wanted a finite one"]),
        (BASE + "mean = [inf]\nstd = [1.0]\n" + ROW, ["a number is inf; wanted a finite one"]),
        (BASE + f"input_size = {'9' * 400}\n" + ROW, ["more than 64 bits"]),
        (BASE + f"input_size = {'9' * 5000}\n" + ROW, ["t.toml is not a TOML file"]),
        (BASE + f"input_size = {'[' * 40}{']' * 40}\n" + ROW, ["t.toml is nested too deeply"]),
        (BASE + f"input_size = {'[' * 20000}{']' * 20000}\n" + ROW, ["t.toml is nested too deeply"]),
        (BASE + f"input_size = [{'1,' * 100_001}]\n" + ROW, ["t.toml has more than 100000 values"]),
        (BASE + ROW + f"settings = {{ 'finetune.{'x' * (1 << 20)}' = 1 }}", ["has more than 1048576 bytes"]),
        (BASE.replace("second half", "1:" + "9" * 5000) + ROW, ["wanted 'first half', 'second half'"]),
        ("[base]\n[table]\n" + ROW, ["wanted one [base] and one or more [[row]]"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(TableError) as raised:
        _read(tmp_path, text)
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sections() -> None:
    assert section_range("all", 11) == (0, 11)
    assert section_range("first half", 11) == (0, 5) and section_range("second half", 11) == (5, 11)
    assert section_range("3:7", 11) == (3, 7)
    for bad in ("3:12", "7:3", "half", ":4", "-1:4"):
        with pytest.raises(TableError, match="section"):
            section_range(bad, 11)


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PLACE", "/a b")
    assert expand("${SOME_PLACE}/net.pt") == "/a b/net.pt"
    with pytest.raises(TableError, match="NO_SUCH_PLACE is not set"):
        expand("${NO_SUCH_PLACE}/net.pt")


def test_yaml_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    text = """
base: {model: "builtin:digits", data: digits, evaluate: {choose: first half, report: second half}}
row:
  - {name: a, settings: {finetune: {steps: 3}}, bits: [W3A3]}
"""
    (row,) = _read(tmp_path, text, "t.yaml").rows
    assert row.config.finetune.steps == 3 and row.widths == (Width(3, 3),)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: [", "t.yaml is not a YAML file"),
        ("base: 2020-01-01", "is a date; wanted text"),
        ("base: {1: 2}", "a key of a table is 1"),
        ("base: 2020-99-99", "t.yaml is not a YAML file"),
        ('base: "\\ud800"', "half a pair of surrogates"),
        ("base: " + "[" * 5000 + "]" * 5000, "t.yaml is nested too deeply"),
        ("base: &a [*a]", "t.yaml is nested too deeply"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
        ), "t.yaml has more than 100000 values"),
    ],
)  # fmt: skip
def test_yaml_that_no_table_is_made_of(tmp_path: Path, text: str, part: str) -> None:
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    with pytest.raises(TableError) as raised:
        _read(tmp_path, text, "t.yaml")
    assert part in str(raised.value) and "\n" not in str(raised.value)


def test_parsers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install pyyaml, or write the table as \.toml"):
        _read(tmp_path, "base: {}", "t.yaml")
    # Python 3.10 has no tomllib.
    monkeypatch.setattr(table, "sys", SimpleNamespace(version_info=(3, 10), maxsize=sys.maxsize))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(MissingPackageError, match="needs the package 'tomli'"):
        _read(tmp_path, BASE)
    tomllib = pytest.importorskip("tomllib")
    monkeypatch.setitem(sys.modules, "tomli", tomllib)
    assert _read(tmp_path, BASE + ROW).seeds == (2, 5)
    with pytest.raises(TableError, match="ends in"):
        _read(tmp_path, BASE, "t.json")


@pytest.mark.checkout("bench")
def test_table_of_the_class_terms_can_be_read() -> None:
    read = read_table(ROOT / "bench" / "ablations" / "cifar10_terms.toml")
    synthesis = [row.config.synthesis for row in read.rows]
    assert {s.assignment for s in synthesis} == {"teacher", "label", "nearest"}
    assert {s.source for s in synthesis} == {"bank", "generator"}
    assert {s.spread for s in synthesis} == {"std", "var"}
    assert {s.class_reduction for s in synthesis} == {"sum", "mean"}
    assert {s.noise_relative for s in synthesis if s.diversity_weight} == {True, False}
    assert len({s.semantic_start for s in synthesis}) >= 3 and len({s.decay for s in synthesis}) >= 3
    assert len({s.alignment_weight for s in synthesis}) >= 5
    # Ceilings learn from images that the report does not use.
    (ceiling,) = [row for row in read.rows if row.images is not None]
    assert section_range(ceiling.images or "", 10000)[1] <= section_range(read.sections["report"], 10000)[0]
