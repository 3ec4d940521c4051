"""No instruction of a higher level stands outside the functions compiled for that level, in the library as built.

What leaks is rarely a kernel: an inline function of a header that the compiler emitted inside a target region, and that
the linker then takes for the copy of every file, ends the process on a processor without that level. Instructions are
told by their encoding, functions by their names: `avx2`, `avx512` or `avx512_bf16` as namespace or function, or the
attribute in the sources.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Which instructions need which level; a level may use those below it.
LEVELS = ("default", "avx2", "avx512", "avx512_bf16")
TARGETS = {"CLUSTERQ_AVX2": "avx2", "CLUSTERQ_AVX512": "avx512", "CLUSTERQ_AVX512_BF16": "avx512_bf16"}


def level_of_instruction(code: str, text: str) -> int:
    """Index into LEVELS; `code` are its bytes in hexadecimal, `text` is mnemonic and operands."""
    mnemonic = text.split(maxsplit=1)[0]
    if "bf16" in mnemonic:
        return 3
    # In 64-bit code 62 is always EVEX, C4 and C5 are always VEX; segment and address-size prefixes may come before.
    first = next((byte for byte in code.split() if byte not in ("26", "2e", "36", "3e", "64", "65", "67")), "")
    # The mask registers of AVX-512 are moved with VEX encodings; no other mnemonic begins with k.
    if first == "62" or mnemonic.startswith("k"):
        return 2
    return 1 if first in ("c4", "c5") else 0


def without_brackets(name: str) -> str:
    """A demangled name without template arguments, parameters and clone marks."""
    name = re.sub(r" \[clone [^\]]*\]", "", name).replace("(anonymous namespace)", "{anonymous}")
    kept, depth = [], 0
    for i, letter in enumerate(name):
        arrow = letter == ">" and name[i - 1] == "-"
        if letter in "<(":
            depth += 1
        elif letter in ">)" and not arrow:
            depth -= 1
        elif depth == 0:
            kept.append(letter)
    return "".join(kept)


def level_of_function(name: str, attributed: dict[str, str]) -> int:
    """Index into LEVELS of the level that a function is compiled for."""
    # What precedes the last space is the type it returns.
    parts = without_brackets(name).removesuffix(" const").split(" ")[-1].split("::")
    found = [LEVELS.index(part) for part in parts if part in LEVELS]
    # Only where the linker cannot take one file's copy for another's.
    found += [LEVELS.index(attributed[part]) for part in parts if part in attributed and "{anonymous}" in parts]
    return max(found, default=0)


def attributed_functions(sources: Iterable[Path]) -> dict[str, str]:
    """Functions with a target attribute of their own, and its level."""
    pattern = re.compile(r"target\((CLUSTERQ_AVX\w+)\)(?:, always_inline)?\)\)\s+(?:inline |static )*\w+ (\w+)\(")
    return {name: TARGETS[target] for path in sources for target, name in pattern.findall(path.read_text())}


def scan(listing: str, attributed: dict[str, str]) -> tuple[Counter[int], dict[str, str]]:
    """Instructions per level, and of each function that exceeds its own level the first instruction that does."""
    seen: Counter[int] = Counter()
    wrong: dict[str, str] = {}
    function, own = "", 0
    for line in listing.splitlines():
        label = re.fullmatch(r"[0-9a-f]+ <(.*)>:", line)
        if label:
            function, own = label[1], level_of_function(label[1], attributed)
            continue
        fields = line.split("\t")
        if len(fields) < 3:
            continue
        level = level_of_instruction(fields[1], fields[2])
        seen[level] += 1
        if level > own:
            wrong.setdefault(function, fields[2])
    return seen, wrong


LISTING = """
0000000000001000 <{name}>:
    1000:\t{code} \t{text}
    1006:\tc3                   \tret
"""
PLAIN = "clusterq::(anonymous namespace)::row_sum(float const*, long)"
LANES = "void clusterq::(anonymous namespace)::forward_lanes<clusterq::OneGrid<float> >(float const*) [clone .isra.0]"
ZMM = ("62 f1 7c 48 10 06", "vmovups (%rsi),%zmm0")
MASK = ("c5 f8 92 c8", "kmovw  %eax,%k1")
YMM = ("c5 fc 10 06", "vmovups (%rsi),%ymm0")
SSE = ("0f 10 06", "movups (%rsi),%xmm0")
ROUND = ("62 f2 7e 48 72 c0", "vcvtneps2bf16 %zmm0,%ymm0")


@pytest.mark.parametrize(
    ("name", "instruction", "allowed"),
    [
        (PLAIN, SSE, True),
        (PLAIN, YMM, False),
        (PLAIN, MASK, False),
        (PLAIN, ZMM, False),
        # 128 bits wide, but of AVX-512 by its encoding, and behind a prefix.
        (PLAIN, ("67 62 f1 7c 08 10 46 10", "vmovups 0x100(%esi),%xmm16"), False),
        ("clusterq::bn_stats::avx512::exact(double const*)", ZMM, True),
        ("clusterq::bn_stats::avx512::exact(double const*)", ROUND, False),
        ("clusterq::bn_stats::avx512_bf16::exact(double const*)", ROUND, True),
        ("clusterq::Compiled<&(void clusterq::f<float>(float*))>::avx512(float*)", ZMM, True),
        ("clusterq::Compiled<&(void clusterq::f<float>(float*))>::avx2(float*)", YMM, True),
        ("clusterq::Compiled<&(void clusterq::f<float>(float*))>::avx2(float*)", MASK, False),
        ("clusterq::Compiled<&(void clusterq::f<float>(float*))>::portable(float*)", YMM, False),
        # The level of an argument is not that of the function.
        ("std::vector<clusterq::avx512::Panel>::push_back(clusterq::avx512::Panel&&)", ZMM, False),
        ("float const& std::max<float>(float const&, float const&)", ZMM, False),
        (LANES, ZMM, True),
        (LANES + " [clone .cold]", MASK, True),
        (LANES, ROUND, False),
        (LANES.replace("(anonymous namespace)::", ""), ZMM, False),
        (LANES.replace(" [clone .isra.0]", "::{lambda(long)#1}::operator()(long) const"), ZMM, True),
    ],
)
def test_the_gate_itself(name: str, instruction: tuple[str, str], allowed: bool) -> None:
    code, text = instruction
    seen, wrong = scan(LISTING.format(name=name, code=code, text=text), {"forward_lanes": "avx512"})
    assert sum(seen.values()) == 2
    assert wrong == ({} if allowed else {name: text})


@pytest.mark.checkout("csrc")
def test_attributes_are_read_from_the_sources() -> None:
    found = attributed_functions(ROOT.glob("csrc/cpu/*.h"))
    assert found["forward_lanes"] == found["masked_lanes"] == "avx512" and found["forward_bfloat16"] == "avx512_bf16"


@pytest.mark.checkout("csrc")
def test_no_instruction_stands_outside_its_level() -> None:
    found = importlib.util.find_spec("clusterq._C")
    if found is None or found.origin is None:
        pytest.skip("the C++ kernels are not built here")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (of binutils) is not on PATH")
    header = subprocess.run(["objdump", "-f", found.origin], capture_output=True, text=True, check=True).stdout
    if "x86-64" not in header:
        pytest.skip("the library is not for x86-64, whose levels these are")
    listing = subprocess.run(["objdump", "-d", "-C", "-w", found.origin], capture_output=True, text=True, check=True)
    seen, wrong = scan(listing.stdout, attributed_functions(ROOT.glob("csrc/cpu/*.*")))
    # Nothing to guard would mean that nothing was read.
    assert all(seen[level] > 20 for level in range(len(LEVELS))), seen
    assert not wrong, wrong
