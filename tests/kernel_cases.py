"""What every accelerated fake-quantize kernel must do, on the device CLUSTERQ_TEST_DEVICE (default "cpu").

Run by `test_kernels_interpret.py` with the Triton launchers on CPU tensors, by `bench/gpu_check.sh` on a GPU with the
CUDA and the Triton kernels. Expected values come from numpy: elementwise results in the op's own arithmetic (float32,
or float64 for float64 inputs) and compared to the bit, sums in float64.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import clusterq.ops

DEVICE = os.environ.get("CLUSTERQ_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = float("inf")
NAN = float("nan")
# shape, channel axis, memory layout: flat with and without a tail, rows of a channel, channels fastest, gaps, memory
# that does not begin at 16 bytes, nothing.
LAYOUTS = [
    ((1,), None, "contiguous"),
    ((4099,), None, "contiguous"),
    ((3, 700), None, "sliced"),
    ((5, 3, 49), 0, "contiguous"),
    ((2, 6, 5, 7), 1, "contiguous"),
    ((2, 6, 5, 7), 1, "channels_last"),
    ((2, 16, 4, 4), 1, "channels_last"),
    ((2, 3, 4, 33), 2, "permuted"),
    ((37, 5), 1, "contiguous"),
    ((3, 1, 4), 1, "contiguous"),
    ((4, 3, 20), 1, "sliced"),
    ((2, 1500), 0, "contiguous"),
    ((4099,), None, "offset"),
    ((2, 3, 4, 8), 1, "offset"),
    ((37, 16), 1, "offset"),
    ((0, 4), None, "contiguous"),
    ((0, 4), 1, "contiguous"),
    ((4, 0), 0, "contiguous"),
]


def carry(t):
    """A tensor on the device, with all of its memory: repeated elements stay one, none leaves its place in 16 bytes."""
    reach = t.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = t.as_strided((max(reach, 0) if t.numel() else 0,), (1,), 0).to(DEVICE)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset() if t.numel() else 0)


class OnDevice:
    """`torch.ops.clusterq` for CPU tensors: strides, gaps and offsets go to the device, what is written back."""

    def __getattr__(self, name):
        op = getattr(torch.ops.clusterq, name)
        return op if DEVICE == "cpu" else lambda *arguments: self.call(op, arguments)

    @staticmethod
    def call(op, arguments):
        def tensors(a):
            return isinstance(a, list) and isinstance(a[0], torch.Tensor)

        moved = [[carry(t) for t in a] if tensors(a) else a for a in arguments]
        moved = [carry(a) if isinstance(a, torch.Tensor) else a for a in moved]
        results = op(*moved)
        for ours, theirs, argument in zip(arguments, moved, op.default._schema.arguments, strict=True):
            if argument.alias_info is not None:
                ours.copy_(theirs)
        if isinstance(results, torch.Tensor):
            return results.cpu()
        return tuple([t.cpu() for t in r] if isinstance(r, list) else r.cpu() for r in results)


fq = OnDevice()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def laid_out(values, layout):
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "offset":
        room = torch.empty(values.numel() + 1, dtype=values.dtype)
        room[1:] = values.reshape(-1)
        return room[1:].view(values.shape)
    if layout == "sliced":
        room = torch.full((*values.shape[:-1], values.shape[-1] + 3), 9.0, dtype=values.dtype)
        room[..., 1:-2] = values
        return room[..., 1:-2]
    return values


def make(shape, axis, layout, dtype):
    x = torch.randn(shape).mul(4).to(dtype)
    special = torch.tensor([NAN, INF, -INF, -0.0, 6.0, 0.0], dtype=dtype)
    x.view(-1)[: special.numel()] = special[: x.numel()]
    channels = 1 if axis is None else shape[axis]
    scale = (torch.rand(channels) * 0.4 + 0.1).to(wide(dtype))
    zero_point = torch.randint(-3, 4, (channels,)).to(wide(dtype))
    return laid_out(x, layout), scale, zero_point


def along(parameter, shape, axis):
    view = [1] * len(shape)
    if axis is not None:
        view[axis] = -1
    return parameter.numpy().reshape(view)


def activated(x, activation):
    v = x.to(wide(x.dtype)).numpy()
    if activation != "none":
        v = np.maximum(v, v.dtype.type(0))
    return np.minimum(v, v.dtype.type(6)) if activation == "relu6" else v


def parts(x, scale, zero_point, axis, activation):
    """x' / scale, unclamped code, scale and zero point, broadcast against x."""
    s, z = along(scale, x.shape, axis), along(zero_point, x.shape, axis)
    ratio = activated(x, activation) * (s.dtype.type(1) / s)
    return ratio, np.rint(ratio) + z, s, z


def passes(x, code, low, high, activation):
    v = x.double().numpy()
    inside = (code >= low) & (code <= high)
    if activation != "none":
        inside &= v > 0
    return inside & (v < 6) if activation == "relu6" else inside


def assert_bits(got, want, like):
    want = torch.as_tensor(want).to(got.dtype)
    assert got.dtype == like.dtype and got.shape == like.shape
    dense = torch.empty_like(like).stride() == like.stride()
    assert got.stride() == (like.stride() if dense else torch.empty(like.shape).stride())
    torch.testing.assert_close(got, want.reshape(got.shape), rtol=0, atol=0, equal_nan=True)
    if got.is_floating_point():
        assert not torch.signbit(got[got == 0]).any()


@pytest.fixture(autouse=True)
def quiet_numpy():
    with np.errstate(all="ignore"):
        yield


def test_a_kernel_serves_every_op():
    kernels = {row.op: row.kernel for row in clusterq.ops.backends() if row.device == DEVICE}
    wanted = {"triton"} if os.environ.get("CLUSTERQ_BACKEND") == "triton" else {"cuda", "triton"}
    for name in (
        "fake_quantize", "fake_quantize_backward", "fake_quantize_learned_backward", "quantize", "dequantize",
        "fake_quantize_weight", "fake_quantize_weights", "observe_fake_quantize", "fake_quantize_masked",
        "fake_quantize_masked_backward", "observe_fake_quantize_masked", "delayed_fake_quantize", "finite_range",
        "quantization_error", "pack_codes", "unpack_codes",
    ):  # fmt: skip
        assert kernels[name] in wanted, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis, layout", LAYOUTS)
def test_values_and_gradients(shape, axis, layout, dtype, poisoned):
    x, scale, zero_point = make(shape, axis, layout, dtype)
    grad = laid_out(torch.randn(shape).to(dtype), "offset" if layout == "offset" else "contiguous")
    for activation in ("none", "relu", "relu6") if dtype == torch.float32 else ("relu6",):
        arguments = (scale, zero_point, -8, 7, axis, activation)
        ratio, code, s, z = parts(x, scale, zero_point, axis, activation)
        assert_bits(fq.fake_quantize(x, *arguments), (np.clip(code, -8, 7) - z) * s, x)
        keep = passes(x, code, -8, 7, activation)
        dx = torch.where(torch.as_tensor(keep), grad, 0.0)
        torch.testing.assert_close(fq.fake_quantize_backward(grad, x, *arguments), dx, rtol=0, atol=0)
        learned = fq.fake_quantize_learned_backward(grad, x, *arguments)
        torch.testing.assert_close(learned[0], dx, rtol=0, atol=0)
        assert_sums(learned, grad, ratio, code, s, z, axis)


def assert_sums(learned, grad, ratio, code, s, z, axis):
    """dscale and dzero against float64 sums; the bound is 10 roundings of float32 on each term, 8 adds and 2 more."""
    g = grad.double().numpy()
    slope = np.where(code < -8, -8 - z, np.where(code > 7, 7 - z, code - z - ratio))
    step = np.where(np.isnan(code), 0, g * slope)
    offset = np.where((code < -8) | (code > 7), -g * s, 0)
    rest = tuple(d for d in range(g.ndim) if d != axis)
    for got, terms in ((learned[1], step), (learned[2], offset)):
        want = terms.sum(rest).reshape(-1) if axis is not None else terms.sum().reshape(1)
        size = np.abs(terms).sum(rest).reshape(-1) if axis is not None else np.abs(terms).sum().reshape(1)
        error = np.abs(got.double().numpy() - want)
        assert (error <= 10 * 2.0**-24 * size).all(), (error, size)


@pytest.mark.parametrize("shape, axis", [((20011,), None), ((2, 9001), 0), ((9001, 2), 1), ((3, 2, 3000), 1)])
def test_sums_over_many_programs(shape, axis):
    x, scale, zero_point = make(shape, axis, "contiguous", torch.float32)
    grad = torch.randn(shape)
    learned = fq.fake_quantize_learned_backward(grad, x, scale, zero_point, -8, 7, axis, "none")
    assert_sums(learned, grad, *parts(x, scale, zero_point, axis, "none"), axis)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low, high, kind", [(-8, 7, torch.int8), (0, 255, torch.uint8), (-2000, 2000, torch.int16)])
def test_codes_and_back(low, high, kind, dtype):
    for shape, axis, layout in (((3, 700), None, "contiguous"), ((2, 6, 5, 7), 1, "channels_last")):
        x, scale, zero_point = make(shape, axis, layout, dtype)
        zero_point += low + 3
        _, code, s, z = parts(x, scale, zero_point, axis, "none")
        codes = fq.quantize(x, scale, zero_point, low, high, axis)
        want = np.clip(np.where(np.isnan(code), z, code), low, high).astype(np.int64)
        assert_bits(codes, want, torch.empty_like(x, dtype=kind))
        out = torch.float64 if dtype == torch.float64 else torch.bfloat16
        assert_bits(fq.dequantize(codes, scale, zero_point, axis, out), (want - z) * s, torch.empty_like(x, dtype=out))


def test_ties_and_extremes():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, INF, -INF, NAN, -0.0, -8.5, -8.5001, 7.5])
    one, zero = torch.ones(1), torch.zeros(1)
    codes = fq.quantize(x, one, zero, -8, 7, None)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 7, -8, 7, -8, 0, 0, -8, -8, 7]
    y = fq.fake_quantize(x, one, zero, -8, 7, None, "none")
    torch.testing.assert_close(y, torch.where(x.isnan(), NAN, codes.float()), rtol=0, atol=0, equal_nan=True)
    # Infinite gradients outside the range are dropped by a select, not multiplied by 0.
    dx = fq.fake_quantize_backward(torch.full_like(x, INF), x, one, zero, -8, 7, None, "none")
    assert dx.tolist() == [INF] * 6 + [0.0] * 5 + [INF, INF, 0.0, 0.0]


def numpy_qparams(low, high, quant_min, quant_max, symmetric):
    empty = low > high
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    real = low.dtype.type
    steps = real(quant_max - quant_min)
    scale = np.maximum(-low, high) / (steps / real(2)) if symmetric else (high - low) / steps
    scale = np.where(empty | (scale < np.finfo(low.dtype).tiny), real(1), scale)
    if symmetric:
        return scale, np.full_like(scale, np.rint((quant_min + quant_max) / 2))
    zero = np.clip(quant_min - np.rint(low / scale), quant_min, quant_max)
    return scale, np.where(empty, real(min(max(0, quant_min), quant_max)), zero)


def numpy_range(x, axis, activation="none"):
    v = activated(x, activation)
    finite = np.isfinite(v)
    rest = None if axis is None else tuple(d for d in range(v.ndim) if d != axis)
    low = np.min(np.where(finite, v, INF), axis=rest, initial=INF).astype(v.dtype).reshape(-1)
    return low, np.max(np.where(finite, v, -INF), axis=rest, initial=-INF).astype(v.dtype).reshape(-1)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, axis, layout",
    [
        ((6, 3, 3, 3), 0, "contiguous"),
        ((6, 5, 3, 3), 1, "channels_last"),
        ((40, 6), 1, "contiguous"),
        ((2, 9001), 0, "contiguous"),
        ((4, 3, 20), 1, "sliced"),
        ((3, 0), 0, "contiguous"),
    ],
)
def test_weights(shape, axis, layout, dtype, symmetric, poisoned):
    w, _, _ = make(shape, axis, layout, dtype)
    if w.numel():
        w.select(axis, 1).zero_()
    y, scale, zero_point = fq.fake_quantize_weight(w, -8, 7, axis, symmetric)
    want = numpy_qparams(*numpy_range(w, axis), -8, 7, symmetric)
    torch.testing.assert_close(scale, torch.as_tensor(want[0]), rtol=0, atol=0)
    torch.testing.assert_close(zero_point, torch.as_tensor(want[1]), rtol=0, atol=0)
    _, code, s, z = parts(w, scale, zero_point, axis, "none")
    assert_bits(y, (np.clip(code, -8, 7) - z) * s, w)


@pytest.mark.parametrize("start", [(INF, -INF), (-0.5, 0.75)])
@pytest.mark.parametrize("observe", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, axis, layout",
    [
        ((4099,), None, "contiguous"),
        ((2, 6, 5, 7), 1, "contiguous"),
        ((2, 6, 5, 7), 1, "channels_last"),
        ((3, 2, 3000), 1, "contiguous"),
        ((0, 4), 1, "contiguous"),
    ],
)
def test_observer(shape, axis, layout, dtype, observe, start, poisoned):
    x, scale, _ = make(shape, axis, layout, dtype)
    symmetric, activation, momentum = observe, "relu6" if observe else "none", 0.9
    buffers = torch.full((scale.numel(), 2), NAN, dtype=scale.dtype)
    buffers[:, 0], buffers[:, 1] = start
    # Columns of one buffer: running ranges with a stride are updated in place too.
    running_min, running_max = buffers[:, 0], buffers[:, 1]
    want = buffers.numpy().copy()
    low, high = numpy_range(x, axis, activation)
    if observe and low[0] <= high[0]:
        real = want.dtype.type
        for column, now in ((0, low), (1, high)):
            mixed = real(momentum) * want[:, column] + real(1 - momentum) * now
            want[:, column] = now if start[0] == INF else mixed
    y, s, z = fq.observe_fake_quantize(
        x, running_min, running_max, 0, 15, momentum, observe, symmetric, axis, activation
    )
    torch.testing.assert_close(buffers, torch.as_tensor(want), rtol=0, atol=0)
    qparams = numpy_qparams(want[:, 0], want[:, 1], 0, 15, symmetric)
    torch.testing.assert_close(s, torch.as_tensor(qparams[0]), rtol=0, atol=0)
    torch.testing.assert_close(z, torch.as_tensor(qparams[1]), rtol=0, atol=0)
    _, code, step, zero = parts(x, s, z, axis, activation)
    assert_bits(y, (np.clip(code, 0, 15) - zero) * step, x)


def test_nothing_finite_leaves_the_range_alone():
    running_min, running_max = torch.tensor([-1.0]), torch.tensor([2.0])
    x = torch.tensor([NAN, INF, -INF])
    fq.observe_fake_quantize(x, running_min, running_max, -8, 7, 0.9, True, False, None, "none")
    assert running_min.tolist() == [-1.0] and running_max.tolist() == [2.0]


def test_parameters_of_another_size_are_refused():
    x, three = torch.ones(2, 4), torch.ones(3)
    with pytest.raises((ValueError, RuntimeError), match="3 elements"):
        fq.fake_quantize(x, three, three, -8, 7, 1, "none")
