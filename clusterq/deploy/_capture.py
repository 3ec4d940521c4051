"""A network's graph by `torch.export`, with the size of the batch left free where the network allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clusterq.errors import ModelError
from clusterq.qat.trace import TRACE_ERRORS


def capture(network: nn.Module, example_input: Tensor, *, decompose: bool = False) -> Any:
    """The `torch.export.ExportedProgram` of a network in evaluation mode.

    Args:
        network: on the CPU, float32.
        example_input: a batch the network can run on.
        decompose: without in-place operators, for converters.

    Raises:
        ModelError: `torch.export` cannot capture it.
    """
    x = example_input.detach().cpu().float()
    # A batch of one would be taken for a constant.
    x = torch.cat([x, x]) if x.shape[0] == 1 else x[:2]
    try:
        with torch.no_grad():
            program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            return program.run_decompositions({}) if decompose else program
    except TRACE_ERRORS as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{type(network).__name__} cannot be captured by torch.export: {type(error).__name__}: {text}"
        ) from error
