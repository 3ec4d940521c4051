"""Fake-quantize ops against all that is used instead, on the CPU: float32 and bfloat16, NCHW and channels_last.

    python bench/bench_fake_quant.py [--threads 2] [--repeats 11] [--group NAME ...] [--quick] [--json FILE]
    pytest bench/bench_fake_quant.py --benchmark-only

Ours is the public function throughout. Peers, in the same process: torch's fixed, learnable and fused-observer ops;
`eager`, the usual composition of torch's round and clamp; `compiled`, torch.compile of it (not with `--quick`);
torchao; Brevitas. `clone` is the floor of a forward: one read and one write of as many bytes. Results are compared
before anything is timed (`fake_quant_peers.assert_same`); a peer that cannot do a case is left out of it with a line.
On a machine that does other work, a figure of 2 threads is the wait for the slower one: use `--threads 1`, whose ratios
suffer less.

Memory is the peak that forward and backward hold beyond x and the incoming gradient, results included: 8 bytes for each
element of float32 are output and gradient themselves. Where `nothing else keeps x`, x is made inside the call and
dropped after the forward, so that a peer which saves less than x gains by it; x is then part of the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from fake_quant_peers import Grid, able, assert_same, can_compile, compose, installed, peers
from harness import OURS, Bar, Call, Case, MemoryCase, main
from torch import Tensor

from clusterq import ops

OP = torch.ops.clusterq
ACTIVATIONS, SMALL_ACTIVATIONS = ((64, 64, 56, 56), (128, 16, 32, 32)), ((4, 16, 14, 14), (8, 8, 16, 16))
WEIGHTS, SMALL_WEIGHTS = ((512, 512, 3, 3), (64, 16, 3, 3)), ((64, 32, 3, 3), (64, 16, 3, 3))
DTYPES = (torch.float32, torch.bfloat16)


def detail(x: Tensor) -> str:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}{' channels_last' * last}"


def activations(quick: bool) -> Iterator[Tensor]:
    for shape in SMALL_ACTIVATIONS if quick else ACTIVATIONS:
        for dtype in DTYPES:
            x = torch.randn(shape).to(dtype)
            yield x
            yield x.contiguous(memory_format=torch.channels_last)


def weights(quick: bool) -> Iterator[Tensor]:
    for shape in SMALL_WEIGHTS if quick else WEIGHTS:
        for dtype in DTYPES:
            yield torch.randn(shape).to(dtype)


def grid_for(x: Tensor, axis: int | None, *, centred: bool = False) -> Grid:
    """Steps of 0.2 to 0.3, which clip values beyond 1.6 to 2.4. `centred`: zero points 0.

    torch's learnable ops round other zero points one way in the forward and another in the backward.
    """
    channels = 1 if axis is None else x.size(axis)
    zero_point = torch.zeros(channels) if centred else torch.randint(-4, 4, (channels,)).float()
    return Grid(torch.rand(channels) * 0.1 + 0.2, zero_point, axis)


def compared(case: Case, step: float, share: float = 1e-4) -> Case:
    """The case, once every contestant but the floor has computed what ours computes."""
    ours = case.contestants[OURS]()
    for name in case.peers:
        if name not in ("clone", "empty op"):
            try:
                parts = 1 if name == "torchao" else 4
                assert_same(ours, case.contestants[name](), step, exact=name == "torch", parts=parts, share=share)
            except AssertionError as error:
                raise AssertionError(f"{case.name} {case.detail}: {name}: {error}") from error
    return case


def forward_case(x: Tensor, grid: Grid, name: str, bar: Bar | None = None, *, compiled: bool = False) -> Case:
    scale, zero_point = grid.scale, grid.zero_point
    calls: dict[str, Call] = {
        OURS: lambda: ops.fake_quantize(x, scale, zero_point, grid.low, grid.high, axis=grid.axis)
    }
    for peer, function in peers(grid, learned=False, compiled=compiled).items():
        calls[peer] = lambda function=function: function(x, scale, zero_point)
    calls["clone"] = lambda: x.clone()
    kept, note = able(calls, f"{name} {detail(x)}")
    return compared(Case(name, detail(x), kept, bar, note), scale.max().item())


def gradient_calls(
    x: Tensor, grid: Grid, *, learned: bool, compiled: bool, owned: bool = False, parameter: bool = False
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of every contestant: output, gradient of x and, if `learned`, those of the parameters.

    Args:
        owned: x is made in each call and nothing but autograd keeps it.
        parameter: x is a leaf, as a weight is; else the output of a layer, whose gradient goes no further here.
    """
    leaf = x.detach().clone().requires_grad_()
    if not parameter:
        leaf = leaf.clone()
    grad = torch.randn_like(x)
    scale, zero_point = (p.clone().requires_grad_(learned) for p in (grid.scale, grid.zero_point))
    wanted = (leaf, scale, zero_point) if learned else (leaf,)
    gradient = "learned" if learned else "clipped"

    def ours(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return ops.fake_quantize(x, scale, zero_point, grid.low, grid.high, axis=grid.axis, gradient=gradient)

    def both(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            y = function(leaf.clone() if owned else leaf, scale, zero_point)
            return (y.detach(), *torch.autograd.grad(y, wanted, grad))

        return call

    functions = {OURS: ours, **peers(grid, learned=learned, compiled=compiled)}
    return {name: both(function) for name, function in functions.items()}


def gradient_case(x: Tensor, grid: Grid, name: str, bar: Bar | None = None, **options: Any) -> Case:
    kept, note = able(gradient_calls(x, grid, **options), f"{name} {detail(x)}")
    return compared(Case(name, detail(x), kept, bar, note), grid.scale.max().item())


def memory_case(x: Tensor, grid: Grid, name: str, **options: Any) -> Case:
    kept, note = able(gradient_calls(x, grid, **options), f"{name} {detail(x)}")
    return compared(MemoryCase(name, detail(x), kept, None, note, elements=x.numel()), grid.scale.max().item())


def weight_case(w: Tensor, *, compiled: bool) -> Case:
    """Range of every channel and quantization by it. Brevitas has no minimum and maximum on such a grid."""

    def parameters(w: Tensor) -> tuple[Tensor, Tensor]:
        low, high = w.float().flatten(1).aminmax(dim=1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / 15
        return scale, (-8 - (low / scale).round()).clamp(-8, 7)

    def theirs() -> Tensor:
        scale, zero_point = parameters(w)
        return torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), 0, -8, 7)

    def eager(w: Tensor) -> Tensor:
        scale, zero_point = (p.reshape(-1, *[1] * (w.dim() - 1)) for p in parameters(w))
        return compose(w, scale, zero_point, -8, 7)

    calls: dict[str, Call] = {
        OURS: lambda: ops.fake_quantize_weight(w, 4),
        "torch": theirs,
        "eager": lambda: eager(w),
    }
    if compiled and can_compile():
        torch._dynamo.reset()
        function = torch.compile(eager, dynamic=False, fullgraph=True)
        calls["compiled"] = lambda: function(w)
    name = "weights, min/max and forward"
    if installed("torchao") and w.dtype == torch.float32:
        calls["torchao"] = _torchao_weight(w)
    elif installed("torchao"):
        print(f"  left out of {name} {detail(w)}: torchao (its scales are those of a range in {w.dtype})", flush=True)
    kept, note = able(calls, f"{name} {detail(w)}")
    # A bfloat16 weight divided by a fifteenth of a difference of two of them is a tie now and then.
    return compared(Case(name, detail(w), kept, Bar("eager", 5.0), note), parameters(w)[0].max().item(), share=5e-3)


def _torchao_weight(w: Tensor) -> Call:
    from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine

    block = (1, *w.shape[1:])

    def call() -> Tensor:
        scale, zero_point = choose_qparams_affine(
            w, MappingType.ASYMMETRIC, block, torch.int8, -8, 7, scale_dtype=torch.float32
        )
        return _fake_quantize_affine(w, block, scale, zero_point, torch.int8, -8, 7)

    return call


def observe_case(x: Tensor, *, compiled: bool) -> Case:
    """Moving range and quantization by it. torchao's observers call torch's op; Brevitas has no moving min/max."""

    def start() -> tuple[Tensor, Tensor]:
        return torch.tensor([-1.0]), torch.tensor([1.0])

    (ours_low, ours_high), (eager_low, eager_high), (low, high) = start(), start(), start()
    on, enabled, scale, zero_point = torch.ones(1), torch.ones(1), torch.ones(1), torch.zeros(1).int()

    def eager(x: Tensor, running_low: Tensor, running_high: Tensor) -> Tensor:
        smallest, largest = (v.float() for v in x.aminmax())
        running_low.mul_(0.9).add_(0.1 * smallest)
        running_high.mul_(0.9).add_(0.1 * largest)
        step = (running_high.clamp(min=0) - running_low.clamp(max=0)) / 255
        return compose(x, step, -(running_low.clamp(max=0) / step).round(), 0, 255)

    calls: dict[str, Call] = {
        OURS: lambda: ops.observe_fake_quantize(x, ours_low, ours_high, 8),
        "torch": lambda: torch.fused_moving_avg_obs_fake_quant(
            x, on, enabled, low, high, scale, zero_point, 0.1, 0, 255, 0
        ),
        "eager": lambda: eager(x, eager_low, eager_high),
    }
    pairs = {"torch": (low, high), "eager": (eager_low, eager_high)}
    if compiled and can_compile():
        torch._dynamo.reset()
        function, pairs["compiled"] = torch.compile(eager, dynamic=False, fullgraph=True), start()
        calls["compiled"] = lambda: function(x, *pairs["compiled"])
    name = "observe and forward per tensor"
    # One call each from the same range, then the ranges are compared.
    kept, note = able(calls, f"{name} {detail(x)}")
    for peer in set(pairs) & set(kept):
        for ours, theirs in zip((ours_low, ours_high), pairs[peer], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # The second call of each has the same range again. Scales differ in the last bit, which moves ties.
    y = ops.observe_fake_quantize(x, ours_low, ours_high, 8)[0]
    step = (ours_high - ours_low).item() / 255
    for peer in set(kept) - {OURS}:
        assert_same(y, kept[peer](), step, exact=False, share=1e-3)
    return Case(name, detail(x), kept, Bar("torch", 8.0) if "torch" in kept else None, note)


def search_case(x: Tensor) -> Case:
    """80 candidates at once; the eager peer tries 4 of them only."""
    scales, offsets = (torch.arange(1, 81) / 80 * 0.3)[:, None], torch.full((80, 1), 8.0)

    def eager() -> Tensor:
        return torch.stack([(compose(x, scales[m], offsets[m], 0, 15) - x).square().sum() for m in range(0, 80, 20)])

    contestants = {
        OURS: lambda: OP.quantization_error(x, scales, offsets, 0, 15, None),
        "eager, 4 of them": eager,
    }
    torch.testing.assert_close(contestants[OURS]()[::20, 0].float(), eager(), rtol=1e-3, atol=1e-3)
    return Case("squared error, 80 candidates", detail(x), contestants)


def overhead_case(w: Tensor) -> Case:
    """What a call costs that computes next to nothing: the public function without a gradient, and the op alone.

    `empty op` has the arguments of ours, parsed and dispatched alike, and returns x (csrc/cpu/empty.cpp). It is left
    out, with a line, where nothing is compiled.
    """
    scale, zero_point = torch.rand(len(w)) * 0.1 + 0.2, torch.zeros(len(w))
    variant = f"{OURS} op"
    calls: Mapping[str, Call] = {
        OURS: lambda: ops.fake_quantize(w, scale, zero_point, -8, 7, axis=0),
        variant: lambda: OP.fake_quantize(w, scale, zero_point, -8, 7, 0, "none"),
        "torch": lambda: torch.fake_quantize_per_channel_affine(w, scale, zero_point.int(), 0, -8, 7),
        "empty op": lambda: torch.ops.clusterq_bench.empty(w, scale, zero_point, -8, 7, 0, "none"),
    }
    name = "a call without gradient"
    kept, note = able(calls, f"{name} {detail(w)}")
    bar = Bar("empty op", 12.0, "at most x microseconds over") if "empty op" in kept else None
    return compared(Case(name, detail(w), kept, bar, note, ours=(OURS, variant)), scale.max().item())


def forward(quick: bool) -> Iterator[Case]:
    for x in activations(quick):
        for axis, name in ((None, "forward per tensor"), (1, "forward per channel")):
            yield forward_case(x, grid_for(x, axis), name, Bar("clone", 0.9), compiled=not quick)


def gradients(quick: bool, learned: bool) -> Iterator[Case]:
    kind, bar = ("learned", Bar("torch", 8.0)) if learned else ("clipped", Bar("torch", 3.0))
    options = {"learned": learned, "compiled": not quick}
    for x in activations(quick):
        yield gradient_case(
            x, grid_for(x, None, centred=learned), f"forward+backward per tensor, {kind}", bar, **options
        )
        yield gradient_case(x, grid_for(x, 1, centred=learned), f"forward+backward per channel, {kind}", bar, **options)
    for w in weights(quick):
        grid = grid_for(w, 0, centred=learned)
        yield gradient_case(w, grid, f"forward+backward of weights, {kind}", **options, parameter=True)


def clipped(quick: bool) -> Iterator[Case]:
    return gradients(quick, learned=False)


def learned(quick: bool) -> Iterator[Case]:
    return gradients(quick, learned=True)


def observer(quick: bool) -> Iterator[Case]:
    for x in activations(quick):
        yield observe_case(x, compiled=not quick)


def weight(quick: bool) -> Iterator[Case]:
    for number, w in enumerate(weights(quick)):
        # Both dtypes of the large shape: the small one is over before torch has begun, see `overhead`.
        bar = Bar("torch", 50.0) if number < len(DTYPES) else None
        yield forward_case(w, grid_for(w, 0), "forward of weights", bar, compiled=not quick)
        yield weight_case(w, compiled=not quick)


def overhead(quick: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        yield overhead_case(torch.randn(WEIGHTS[1]).to(dtype))


def memory(quick: bool) -> Iterator[Case]:
    """The small activation: bytes for each element hardly depend on the size."""
    for dtype in DTYPES:
        x = torch.randn((SMALL_ACTIVATIONS if quick else ACTIVATIONS)[1]).to(dtype)
        for kind in ("clipped", "learned"):
            grid = grid_for(x, None, centred=kind == "learned")
            options = {"learned": kind == "learned", "compiled": not quick}
            yield memory_case(x, grid, f"memory of forward+backward, {kind}", **options)
            yield memory_case(x, grid, f"memory, nothing else keeps x, {kind}", **options, owned=True)


def search(quick: bool) -> Iterator[Case]:
    yield search_case(torch.randn((4, 16, 14, 14) if quick else (16, 64, 56, 56)))


GROUPS: Mapping[str, Callable[[bool], Iterator[Case]]] = {
    f.__name__: f for f in (forward, clipped, learned, observer, weight, overhead, memory, search)
}


def cases(quick: bool, groups: Sequence[str] = tuple(GROUPS)) -> Iterator[Case]:
    for group in groups:
        yield from GROUPS[group](quick)


@pytest.mark.parametrize("contestant", ["clusterq", "torch"])
@pytest.mark.parametrize("name", ["forward", "weights", "learned"])
def test_fake_quantize(benchmark: Any, name: str, contestant: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(ACTIVATIONS[0]), torch.randn(WEIGHTS[0])
    build: Mapping[str, Callable[[], Case]] = {
        "forward": lambda: forward_case(x, grid_for(x, 1), "forward"),
        "weights": lambda: weight_case(w, compiled=False),
        "learned": lambda: gradient_case(x, grid_for(x, 1, centred=True), "learned", learned=True, compiled=False),
    }
    build[name]().benchmark(benchmark, contestant)


if __name__ == "__main__":
    main(
        "fake_quant",
        __doc__,
        cases,
        ops=(
            "fake_quantize",
            "fake_quantize_backward",
            "fake_quantize_learned_backward",
            "fake_quantize_masked",
            "fake_quantize_masked_backward",
            "fake_quantize_weight",
            "observe_fake_quantize",
            "quantization_error",
        ),
        choice="group",
        choices=tuple(GROUPS),
    )
