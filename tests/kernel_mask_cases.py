"""Kernels that save a bit mask, delay a range or reduce, against the references of `clusterq.ops` on the CPU.

Bit for bit: values, codes, masks, ranges. Run as `kernel_cases.py` is; what the references do is tested against float64
in `test_fake_quant*.py`.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from clusterq.ops import _fake_quant_mask_reference as masks
from clusterq.ops import _fake_quant_reference as reference
from clusterq.ops import _library, packing

sys.path.insert(0, os.path.dirname(__file__))
import op_contract
from kernel_cases import DTYPES, INF, NAN, fq, laid_out, make, wide

RULES = ("codes", "real", "activation")
# shape, channel axis, memory layout. Sizes around a byte of a mask; rows of 8 and not of 8 elements; channels last.
MASKED = [
    *(((n,), None, "contiguous") for n in (0, 1, 7, 8, 9, 31, 33, 4099)),
    ((3, 700), None, "sliced"),
    ((2, 6, 5, 7), None, "channels_last"),
    ((2, 6, 5, 7), 1, "contiguous"),
    ((2, 6, 5, 7), 1, "channels_last"),
    ((2, 16, 3, 3), 1, "channels_last"),
    ((5, 3, 3, 3), 0, "contiguous"),
    ((3, 3), 1, "contiguous"),
    ((2, 3, 40), 1, "contiguous"),
    ((4, 3, 20), 1, "sliced"),
    ((2, 1500), 0, "contiguous"),
    ((4099,), None, "offset"),
    ((2, 3, 40), 1, "offset"),
    ((1, 3), 0, "contiguous"),
    ((0, 4), 1, "contiguous"),
    ((4, 0), 0, "contiguous"),
]
# More than one tile of a program, more than one program of a channel, with and without bytes that straddle rows.
LARGE = [((17001,), None), ((2, 2, 4104), 1), ((2, 2, 4101), 1), ((150, 72), 1), ((140, 70), 1)]


def same(got, want, signs=True):
    """Equal bits, strides included; NaN equals NaN, and +0 does not equal -0 (ends of a range: `signs` False)."""
    got, want = (got, want) if isinstance(got, (tuple, list)) else ((got,), (want,))
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride() or ours.numel() <= 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        if signs and ours.is_floating_point():
            assert torch.equal(torch.signbit(ours[ours == 0]), torch.signbit(theirs[theirs == 0]))


def choices(dtype):
    """Every rule and activation for float32, two for the other dtypes."""
    both = [(activation, rule) for activation in ("none", "relu", "relu6") for rule in RULES]
    return both if dtype == torch.float32 else [("none", "codes"), ("relu6", "real")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis, layout", MASKED)
def test_mask_and_its_backward(shape, axis, layout, dtype, poisoned):
    x, scale, zero_point = make(shape, axis, layout, dtype)
    for activation, rule in choices(dtype):
        arguments = (x, scale, zero_point, -8, 7, axis, activation, rule)
        want = masks.fake_quantize_masked(*arguments)
        same(fq.fake_quantize_masked(*arguments), want)
    grad = torch.randn(shape).to(dtype)
    grad.view(-1)[:2] = INF
    stride = list(want[0].stride())
    for incoming in (grad, torch.empty_strided(shape, stride, dtype=dtype).copy_(grad), laid_out(grad, "offset")):
        same(
            fq.fake_quantize_masked_backward(incoming, want[1], stride),
            masks.fake_quantize_masked_backward(incoming, want[1], stride),
        )


def test_edges_of_the_rules():
    x = torch.tensor([-8.5, -8.51, -8.0, -8.01, 7.49, 7.5, 7.0, 7.01, INF, -INF, NAN, 0.0, -0.0, 6.0])
    one, zero = torch.ones(1), torch.zeros(1)
    for rule in RULES:
        for activation in ("none", "relu6"):
            arguments = (x, one, zero, -8, 7, None, activation, rule)
            same(fq.fake_quantize_masked(*arguments), masks.fake_quantize_masked(*arguments))


@pytest.mark.parametrize("mode", ["running", "moving", "delayed"])
@pytest.mark.parametrize("start", [(INF, -INF), (-0.5, 0.75)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis, layout", MASKED[3:])
def test_running_ranges(shape, axis, layout, dtype, start, mode, poisoned):
    x, scale, _ = make(shape, axis, layout, dtype)
    every = choices(dtype)
    picked = every if shape == (31,) else [every[(len(shape) + shape[0] + 4 * (start[0] < 0)) % len(every)]]
    for activation, rule in picked:
        compare_ranges(mode, x, scale.numel(), start, axis, activation, rule)


@pytest.mark.parametrize("mode", ["moving", "delayed"])
@pytest.mark.parametrize("shape, axis", LARGE)
def test_ranges_over_many_programs(shape, axis, mode):
    x, scale, _ = make(shape, axis, "contiguous", torch.float32)
    compare_ranges(mode, x, scale.numel(), (-0.5, 0.75), axis, "none", "codes")


@pytest.mark.parametrize("mode", ["moving", "delayed"])
@pytest.mark.parametrize("shape, axis", LARGE)
def test_programs_that_walk_several_tiles(shape, axis, mode, monkeypatch):
    kernels = pytest.importorskip("clusterq.kernels._observe")
    monkeypatch.setattr(kernels, "RANGE_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "RANGE_SPLITS", 2)
    x, scale, _ = make(shape, axis, "contiguous", torch.float32)
    compare_ranges(mode, x, scale.numel(), (-0.5, 0.75), axis, "relu", "activation")
    same(fq.finite_range(x, axis, "none"), reference.finite_range(x, axis, "none"), signs=False)


def compare_ranges(mode, x, channels, start, axis, activation, rule):
    symmetric = rule == "real"
    results = []
    for ops in (fq, None):
        buffers = torch.full((channels, 2), NAN, dtype=wide(x.dtype))
        buffers[:, 0], buffers[:, 1] = start
        ends = (buffers[:, 0], buffers[:, 1])
        if mode == "delayed":
            op = ops.delayed_fake_quantize if ops else masks.delayed_fake_quantize
            got = op(x, *ends, 0, 15, 0.9, symmetric, axis, activation, rule)
        else:
            settings = (0, 15, 0.9, mode == "moving", symmetric, axis, activation, rule)
            op = ops.observe_fake_quantize_masked if ops else masks.observe_fake_quantize_masked
            got = op(x, *ends, *settings)
            if ops:
                again = buffers.clone()
                again[:, 0], again[:, 1] = start
                plain = fq.observe_fake_quantize(x, again[:, 0], again[:, 1], *settings[:-1])
                same((*plain, again), (*got[:3], buffers))
        results.append((*got, buffers))
    ours, theirs = results
    same(ours[0], theirs[0])
    same(ours[1:], tuple(t.contiguous() for t in theirs[1:]), signs=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis, layout", [*MASKED, ((2, 2, 4101), 1, "contiguous")])
def test_finite_range(shape, axis, layout, dtype, poisoned):
    x, _, _ = make(shape, axis, layout, dtype)
    for activation in ("none", "relu6"):
        same(fq.finite_range(x, axis, activation), reference.finite_range(x, axis, activation), signs=False)


def test_range_of_nothing_finite():
    x = torch.tensor([[NAN, INF], [-INF, 1.0]])
    same(fq.finite_range(x, 0, "none"), (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0])))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_together(dtype, symmetric, axis, poisoned):
    shapes = [((6, 3, 3, 3), "contiguous"), ((5, 4, 3, 3), "channels_last"), ((3, 0), "contiguous")]
    shapes += [((4, 20), "sliced"), ((1, 8), "contiguous")]
    # Few long channels on either axis: thousands of channels would take the interpreter minutes.
    long = [(1, 9001), (3, 4104)]
    shapes += [(shape if axis == 0 else shape[::-1], "contiguous") for shape in long]
    weights = [make(shape, 0, layout, dtype)[0] for shape, layout in shapes]
    got = fq.fake_quantize_weights(weights, -8, 7, axis, symmetric)
    want = reference.fake_quantize_weights(weights, -8, 7, axis, symmetric)
    same(got[0], want[0])
    same(got[1:], want[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, axis, layout",
    [
        ((0,), None, "contiguous"),
        ((9001,), None, "contiguous"),
        ((2, 6, 5, 7), 1, "channels_last"),
        ((3, 2, 3000), 1, "contiguous"),
        ((4, 3, 20), 1, "sliced"),
        ((4, 0), 0, "contiguous"),
    ],
)
def test_errors_of_candidates(shape, axis, layout, dtype, poisoned):
    x, scale, _ = make(shape, axis, layout, dtype)
    scales = (torch.rand(3, scale.numel()) * 0.2 + 0.05).to(wide(dtype))
    zero_points = torch.randint(0, 16, scales.shape).to(wide(dtype))
    got = fq.quantization_error(x, scales, zero_points, 0, 15, axis)
    want = reference.quantization_error(x, scales, zero_points, 0, 15, axis)
    assert got.dtype == torch.float64
    # The terms are equal to the bit; their float64 sums differ in order alone.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    again = fq.quantization_error(x, scales, zero_points, 0, 15, axis)
    assert torch.equal(got, again)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "shape", [(0,), (1,), (7,), (8,), (9,), (31,), (33,), (4096,), (3, 3), (2, 3, 8), (5, 6), (70, 65), (3, 0), (0, 5)]
)
def test_packing(shape, signed, bits, poisoned):
    codes = torch.randint(-128 if signed else 0, 128 if signed else 256, shape, dtype=torch.int16)
    codes = codes.to(torch.int8 if signed else torch.uint8)
    packed = packing._pack(codes, bits)
    same(fq.pack_codes(codes, bits), packed)
    same(fq.unpack_codes(packed, bits, shape[-1], signed), packing._unpack(packed, bits, shape[-1], signed))
    if len(shape) == 2 and codes.numel() > 0:
        turned = laid_out(codes.t().contiguous(), "contiguous").t()
        same(fq.pack_codes(turned, bits), packed)
        # Storage that does not begin at a word.
        same(fq.pack_codes(codes.view(-1)[1:], bits), packing._pack(codes.view(-1)[1:], bits))
        wanted = packing._unpack(packed.view(-1)[1:], bits, (packed.numel() - 1) * 8 // bits, signed)
        same(fq.unpack_codes(packed.view(-1)[1:], bits, wanted.numel(), signed), wanted)


def copied(arguments):
    """Fresh memory with the same strides where an op may write, so that two runs do not see each other."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


ACCELERATED = [
    (i, entry) for i, entry in zip(op_contract.IDS, op_contract.CASES, strict=True) if _library._ops[entry[0]].triton
]
# How many of an op's outputs equal those of the reference bit for bit. The others are sums, which differ in the order
# of their terms; `kernel_cases.py` and `statistics_kernel_cases.py` hold them to float64.
EXACT = {"fake_quantize_learned_backward": 1, "quantization_error": 0} | {
    name: 0 for name, op in _library._ops.items() if (op.triton or "").startswith(("bn_stats:", "alignment:"))
}


@pytest.mark.parametrize("layout", op_contract.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, case", [entry for _, entry in ACCELERATED], ids=[i for i, _ in ACCELERATED])
def test_arguments_of_any_stride(name, case, dtype, layout, poisoned):
    """Masks, scales and ranges with gaps, repeated rows: what the dispatcher may hand over, against the reference."""
    op = _library._ops[name]
    for shape in (None, *op_contract.empty_shapes(case)):
        arguments = case.arguments(dtype=dtype) if shape is None else case.arguments(shape, dtype)
        ours, theirs = (op_contract.laid_out(name, copied(arguments), layout) for _ in range(2))
        got, want = getattr(fq, name)(*ours), op.reference(*theirs)
        if name == "fake_quantize_weights":
            got, want = ((*r[0], *r[1:]) for r in (got, want))
        got, want = ((r,) if isinstance(r, torch.Tensor) else r or () for r in (got, want))
        exact = EXACT.get(name, len(want))
        same(got[:exact], want[:exact], signs=False)
        torch.testing.assert_close(got[exact:], want[exact:], equal_nan=True)
        for a, b in zip(op_contract.tensors(ours), op_contract.tensors(theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
