"""Who else fake-quantizes: torch's ops, the eager composition, torch.compile of it, torchao and Brevitas.

Every peer is a function (x, scale, zero_point) -> y that autograd can differentiate, on the grid of a `Grid`. torchao
and Brevitas are optional: what is not installed, has no compiler or cannot do a case is left out, and a line says so.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import Call
from torch import Tensor

# Gradients below 5, codes to 8.
LARGEST_TERM = 40.0

FakeQuantizer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Round(torch.autograd.Function):
    """Rounding with a straight-through gradient; adding a detached difference instead would miss whole numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def compose(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The usual eager form, in the dtype of x; parameters broadcast against x.

    Autograd makes of it the clipped gradient for x and, where they need one, LSQ's for scale and zero point. Values
    that round to an outermost code pass the gradient, so the clamp sits before the rounding, just inside the next tie:
    torch.clamp gives no gradient at its own limits.
    """
    half = 0.5 - 2.0**-23 * max(-low, high)
    code = Round.apply(torch.clamp(x / scale + zero_point, low - half, high + half))
    return ((code - zero_point) * scale).to(x.dtype)


@dataclass(frozen=True)
class Grid:
    """Codes [low, high] of one scale and zero point (`axis` None) or one for each channel.

    Attributes:
        scale, zero_point: float32, [1] or [C]; zero points are whole.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int | None = None
    low: int = -8
    high: int = 7

    def shape(self, x: Tensor) -> list[int]:
        """Of parameters that broadcast against x."""
        return [1 if self.axis is None or i != self.axis else -1 for i in range(x.dim())]

    def eager(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        shape = self.shape(x)
        return compose(x, scale.reshape(shape), zero_point.reshape(shape), self.low, self.high)


def peers(grid: Grid, *, learned: bool, compiled: bool) -> dict[str, FakeQuantizer]:
    """All that are installed. `compiled` costs some ten seconds a case."""
    found: dict[str, FakeQuantizer] = {"torch": _torch(grid, learned), "eager": grid.eager}
    if compiled and can_compile():
        # One code object serves all cases, and torch keeps few versions of one.
        torch._dynamo.reset()
        found["compiled"] = torch.compile(grid.eager, dynamic=False, fullgraph=True)
    if installed("torchao"):
        found["torchao"] = _torchao(grid)
    if installed("brevitas"):
        found["Brevitas"] = _brevitas(grid)
    return found


def _torch(grid: Grid, learned: bool) -> FakeQuantizer:
    low, high, axis = grid.low, grid.high, grid.axis
    if learned and axis is None:
        return lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, low, high, 1.0)
    if learned:
        return lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, axis, low, high, 1.0)
    whole = grid.zero_point.int()
    if axis is None:
        # Numbers instead of tensors: the faster of torch's two forms.
        step, offset = grid.scale.item(), int(whole)
        return lambda x, s, z: torch.fake_quantize_per_tensor_affine(x, step, offset, low, high)
    return lambda x, s, z: torch.fake_quantize_per_channel_affine(x, s, whole, axis, low, high)


def _torchao(grid: Grid) -> FakeQuantizer:
    """The primitive behind torchao's QAT modules; those themselves take only matrices, per token, row or group.

    Its gradient is that of torch.clamp on codes, 0 at the outermost ones, so only its output is compared.
    """
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    def quantizer(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        block = tuple(1 if i == grid.axis else size for i, size in enumerate(x.shape))
        return _fake_quantize_affine(x, block, scale, zero_point, torch.int8, grid.low, grid.high)

    return quantizer


def _brevitas(grid: Grid) -> FakeQuantizer:
    """The integer quantizer inside Brevitas' layers, with its clipped gradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from brevitas.core.quant import IntQuant

    quantize = IntQuant(narrow_range=False, signed=grid.low < 0, input_view_impl=torch.nn.Identity())
    bits = torch.tensor(float((grid.high - grid.low + 1).bit_length() - 1))

    def quantizer(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        shape = grid.shape(x)
        return quantize(scale.reshape(shape), zero_point.reshape(shape), bits, x).to(x.dtype)

    return quantizer


@functools.cache
def installed(name: str) -> bool:
    """Whether an optional peer can be imported; says so once where it cannot."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        print(f"  left out everywhere: {name} is not installed", flush=True)
    return found


@functools.cache
def can_compile() -> bool:
    """Whether inductor can build for the CPU here; says so once where it cannot."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(16))
    except Exception as error:  # inductor's own, the compiler's, the linker's
        print(f"  left out everywhere: compiled, torch.compile does not work here ({_first_line(error)})", flush=True)
        return False
    return True


def able(contestants: Mapping[str, Call], title: str) -> tuple[dict[str, Call], str]:
    """Those whose call works, and a note on the others. Ours must work."""
    kept, refused = {}, []
    for name, call in contestants.items():
        try:
            call()
        except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if name.startswith("clusterq"):
                raise
            refused.append(name)
            print(f"  left out of {title}: {name} ({_first_line(error)})", flush=True)
        else:
            kept[name] = call
    return kept, f"without {', '.join(refused)}" if refused else ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error).strip() else repr(error)


def assert_same(ours: Any, theirs: Any, step: float, *, exact: bool, share: float = 1e-4, parts: int = 4) -> None:
    """Raise AssertionError unless a peer's result is ours: one tensor, or output, gradient of x, those of parameters.

    `parts` is how many of them are compared. Not `exact`: x / s and x * (1 / s) may round a tie to different codes, so
    that `share` of the elements may be a step away (or lose their gradient). Gradients of parameters are sums, which
    peers add up in float32; one in 20 of them may lack a term that is on a tie at the end of the range.
    """
    pairs = list(zip(_tensors(ours), _tensors(theirs), strict=True))
    for position, (mine, other) in enumerate(pairs[:parts]):
        if mine.dtype != other.dtype or mine.shape != other.shape:
            raise AssertionError(f"{other.dtype} {list(other.shape)}, ours is {mine.dtype} {list(mine.shape)}")
        mine, other = mine.float(), other.float()
        if position > 1:
            allowed = 1e-2 * other.abs() + max(1.0, 1e-3 * mine.abs().max().item())
            lost = (mine - other).abs() > allowed
            ties = 0 if exact else max(1, mine.numel() // 20)
            if int(lost.sum()) > ties or ((mine - other).abs() > allowed + LARGEST_TERM).any():
                raise AssertionError(f"{int(lost.sum())} of {mine.numel()} gradients of a parameter differ")
        elif exact:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        else:
            apart = (mine - other).abs() > 1e-6 + 1e-5 * other.abs()
            if int(apart.sum()) > max(3, share * mine.numel()):
                raise AssertionError(f"{int(apart.sum())} of {mine.numel()} elements differ")
            if position == 0 and ((mine - other).abs() > 1.01 * step + 0.01 * other.abs() + 1e-6).any():
                raise AssertionError("an element is more than a step away")


def _tensors(result: Any) -> Iterable[Tensor]:
    return result if isinstance(result, (tuple, list)) else (result,)
