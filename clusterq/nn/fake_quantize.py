"""Drop-in `FakeQuantize` modules for torch.ao.quantization, on clusterq's ops.

    from torch.ao.quantization import QConfig, MovingAverageMinMaxObserver
    import clusterq
    activation = clusterq.nn.FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)

Each class is a subclass of torch's class of that name, with its constructor, buffers, parameters and state_dict keys;
checkpoints load both ways. Outputs, ranges, scales and gradients to x are torch's bit for bit on finite float32 inputs
(learned gradients to rounding: torch sums in float32, these in float64). What is different, on purpose:

- a NaN or an infinity does not move the range of its tensor or channel; torch's fused class never recovers from one;
- `_LearnableFakeQuantize` per tensor rounds a negative zero point toward +inf in its backward (-1 counts as 0): here
  forward and backward use the same zero point;
- NaN stays NaN, infinities saturate in every layout, and a gradient outside the code range is 0 whatever it was;
- bfloat16 and float16 inputs work and keep their dtype, under autocast too;
- `FusedMovingAvgObsFakeQuantize.calculate_qparams` returns what was trained with, not what the observer would have
  chosen; `export="observer"` in the constructor does as torch does;
- forward reads the flags from host copies and waits for no device. Call `read_flags()` after writing into
  `observer_enabled` or `fake_quant_enabled` other than by the methods or `load_state_dict`.

`torch.compile(fullgraph=True)` works with the four min/max observers; per-channel buffers are born empty, so that the
first call, best an eager one, costs a compilation of its own. A second derivative raises RuntimeError.
Observers other than min/max, moving-average and their per-channel forms are called as they are.
"""

from __future__ import annotations

from typing import Any, Literal

try:
    from torch.ao import quantization as _ao
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
except ImportError as error:  # A torch that has dropped torch.ao.quantization.
    raise ImportError(
        "this torch has no torch.ao.quantization, which FakeQuantize, FusedMovingAvgObsFakeQuantize and "
        "LearnableFakeQuantize of clusterq.nn are subclasses of; clusterq.deploy.torchao has those for torchao"
    ) from error

from clusterq.nn._learnable import LearnableObserved
from clusterq.nn._observed import FusedObserved, Observed, checked_export

__all__ = ["FakeQuantize", "FusedMovingAvgObsFakeQuantize", "LearnableFakeQuantize"]


class FakeQuantize(Observed, _ao.FakeQuantize):
    """`torch.ao.quantization.FakeQuantize`: an observer and fake-quantization; see the module.

    With qscheme `per_channel_affine_float_qparams` torch's own op is called: clusterq's op has whole zero points.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._watch()


class FusedMovingAvgObsFakeQuantize(FusedObserved, _ao.FusedMovingAvgObsFakeQuantize):  # type: ignore[misc]
    """`torch.ao.quantization.FusedMovingAvgObsFakeQuantize`, any axis and floating-point dtype; see the module.

    Args:
        export: what `calculate_qparams` returns: `"trained"`, scale and zero point of the training steps, or
            `"observer"`, what torch's class returns. The rest are torch's.
    """

    def __init__(self, *args: Any, export: Literal["trained", "observer"] = "trained", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.export = checked_export(export)
        self._watch()


class LearnableFakeQuantize(LearnableObserved, _LearnableFakeQuantize):  # type: ignore[misc]
    """`torch.ao.quantization._learnable_fake_quantize._LearnableFakeQuantize`: LSQ and LSQ+; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._watch()
