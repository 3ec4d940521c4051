"""Loading the saved state of a training, which may come from anyone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from clusterq.errors import CheckpointError
from clusterq.readers import first_line


@contextmanager
def restoring() -> Iterator[None]:
    """Around the loading of a saved state.

    Raises:
        CheckpointError: the state has other parts, or tensors of another shape, than the object it is loaded into.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # The first four for parts that are absent or of another kind; ours and torch's own for values that do not fit.
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the saved state does not fit: {type(error).__name__} {first_line(error)}") from error


def steps_done(state: Mapping[str, Any]) -> int:
    """The step of a state. Raises ValueError where it is not a count."""
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}")
    return step


def load_optimizer(optimizer: torch.optim.Adam | torch.optim.SGD, state: Mapping[str, Any]) -> None:
    """Load what `optimizer.state_dict()` gave, copied: an optimizer changes the buffers it is given in place.

    Raises:
        ValueError: other settings than the optimizer's, or buffers of other names or shapes than it makes.
    """
    own, groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    if not isinstance(groups, list) or not isinstance(state["state"], dict):
        raise ValueError("the optimizer has other parts")
    for group, saved in zip(own, groups, strict=True):
        # The learning rate has a course.
        if {**group, "lr": 0} != {**saved, "lr": 0} or type(saved["lr"]) is not type(group["lr"]):
            raise ValueError("the optimizer has other settings")
    if not all(isinstance(buffers, dict) for buffers in state["state"].values()):
        raise ValueError("the optimizer has other buffers")
    optimizer.load_state_dict(copy.deepcopy(dict(state)))
    adam = isinstance(optimizer, torch.optim.Adam)
    names = ("step", "exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
    for group in optimizer.param_groups:
        # SGD without momentum keeps None.
        without = not adam and group["momentum"] == 0
        for parameter in group["params"] if optimizer.state else ():
            if not adam and not optimizer.state.get(parameter):
                # Of a parameter without gradients. SGD takes buffers of all parameters of a group or of none.
                optimizer.state[parameter]["momentum_buffer"] = None if without else torch.zeros_like(parameter)
            buffers = optimizer.state.get(parameter, {})
            shapes = {name: None if value is None else value.shape for name, value in buffers.items()}
            shape = None if without else parameter.shape
            wanted = {name: torch.Size() if name == "step" else shape for name in names}
            if shapes != wanted and shapes:
                raise ValueError("the optimizer has other buffers")
