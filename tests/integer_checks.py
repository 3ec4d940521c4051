"""Codes of a network of scheme deploy, computed elsewhere in float32, against the integers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clusterq.deploy.integer import IntegerRun, Sum, Wide
from clusterq.nn.quantizers import ActivationQuantizer


def _quotient(made_of: Any, quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """What a quantizer rounds, exactly but for float64, and the error that float32 may make of it."""
    scale = quantizer.qparams()[0].double()
    if isinstance(made_of, Sum):
        parts = [c.centered.double() * c.scale.double() / scale for c in (made_of.first, made_of.second)]
        return parts[0] + parts[1], 18 * 2**-24 * (parts[0].abs() + parts[1].abs())
    assert isinstance(made_of, Wide) and made_of.size is not None
    step = made_of.unit.double() / (made_of.count * scale)
    return made_of.total.double() * step, (made_of.terms + 16) * 2**-24 * made_of.size * step


def check_codes(twin: nn.Module, x: Tensor, wanted: dict[str, list[Tensor]]) -> Tensor:
    """With equal codes in front, only a quotient within `(n + 16) * 2^-24 * a` of k + 1/2 may round the other way.

    Args:
        twin: from `prepare`, with ranges.
        x: images.
        wanted: codes of every quantizer, int64, one tensor per call, in execution order.

    Returns the logits that the integers make of these codes.
    """
    run = IntegerRun(twin, sizes=True)
    quantizers: Any = dict(twin.named_modules())
    run.forced = {name: [c - quantizers[name].qparams()[1].long() for c in calls] for name, calls in wanted.items()}
    logits = run(x)
    assert list(run.codes) == list(wanted)
    for name, calls in wanted.items():
        for found, codes, made_of in zip(run.codes[name], calls, run.wide[name], strict=True):
            other = found.long() != codes
            if bool(other.any()):
                quotient, bound = _quotient(made_of, quantizers[name])
                distance = ((quotient - 0.5) - (quotient - 0.5).round()).abs()
                assert bool((distance <= bound)[other].all()), name
    return logits
