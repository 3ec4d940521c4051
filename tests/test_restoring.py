"""A saved state of a training that does not fit is one sentence, whatever is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from clusterq.config import ClusterQConfig, FinetuneConfig, SynthesisConfig
from clusterq.errors import CheckpointError
from clusterq.method import ClusterQ
from clusterq.networks import DigitsConvNet

BANK = ClusterQConfig(
    synthesis=SynthesisConfig(num_images=16, batch_size=16, image_steps=4, warmup_steps=1, alignment_weight=0.1),
    finetune=FinetuneConfig(steps=3, batch_size=8, calibration_images=8),
)
STREAM = ClusterQConfig(
    synthesis=replace(BANK.synthesis, source="generator", warmup_steps=2, generator_width=8),
    finetune=replace(BANK.finetune, images="stream", optimizer="adam"),
)
# Of the source when it is half done, and of the fine-tuning.
MOMENTS = {"bank": (BANK, 2, "synthesis"), "stream": (STREAM, 1, "synthesis"), "sgd": (BANK, 2, "finetune"),
           "adam": (STREAM, 2, "finetune")}  # fmt: skip


class _Stop(Exception):
    pass


def _method(config: ClusterQConfig, after_step: Callable[..., None] | None = None) -> ClusterQ:
    torch.manual_seed(0)
    return ClusterQ(DigitsConvNet(), config, input_shape=(1, 16, 16), after_step=after_step)


def _state(config: ClusterQConfig, step: int, phase: str) -> dict[str, Any]:
    kept: list[dict[str, Any]] = []

    def after_step(name: str, state: Callable[[], dict[str, Any]]) -> None:
        if name == phase:
            kept.append(state())
            if len(kept) == step:
                raise _Stop

    method = _method(config, after_step)
    with pytest.raises(_Stop):
        method.run()
    return kept[-1]


def _mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all that is in a tree; of a list the first, of a network's tensors three."""
    if isinstance(value, dict):
        for key in value if len(value) < 20 else list(value)[:3]:
            yield (*path, key)
            yield from _mutations(value[key], (*path, key))
    elif isinstance(value, (list, tuple)) and value:
        yield (*path, 0)
        yield from _mutations(value[0], (*path, 0))


def _changed(state: Any, path: tuple[Any, ...], act: Callable[[Any, Any], None]) -> Any:
    state = copy.deepcopy(state)
    parent = state
    for key in path[:-1]:
        parent = parent[key]
    act(parent, path[-1])
    return state


def _delete(parent: Any, key: Any) -> None:
    del parent[key]


def _put(value: Any) -> Callable[[Any, Any], None]:
    def act(parent: Any, key: Any) -> None:
        parent[key] = value

    return act


ACTS = {"absent": _delete, "text": _put("x"), "none": _put(None), "tensor": _put(torch.zeros(7)), "map": _put({})}


@pytest.mark.filterwarnings("ignore:the network assigns", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_state_that_does_not_fit(moment: str) -> None:
    config, step, phase = MOMENTS[moment]
    state = _state(config, step, phase)
    method = _method(config)
    if phase == "finetune":
        method.synthesize()
    student = method.calibrate() if phase == "finetune" else None
    refused = accepted = 0

    def go_on(changed: Any) -> None:
        if phase == "synthesis":
            method.synthesize(state=changed)
        else:
            method.finetune(student=copy.deepcopy(student), state=changed)

    go_on(state)
    # The parts of a streaming source and of Adam are those of "stream".
    for path in [path for path in _mutations(state) if moment != "adam" or len(path) < 3]:
        for name, act in ACTS.items():
            try:
                changed = _changed(state, path, act)
            # A tuple, or a list with nothing left of it to change.
            except TypeError:
                continue
            try:
                go_on(changed)
            except CheckpointError as error:
                assert str(error).startswith("the saved state does not fit: ") and "\n" not in str(error), (path, name)
                refused += 1
            else:
                accepted += 1
    # Accepted are changes that make no difference to what fits, such as a learning rate, or no metrics.
    assert refused > 5 * accepted > 0, (refused, accepted)
