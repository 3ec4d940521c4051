"""An ONNX graph under construction: nodes, initializers and names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clusterq.errors import require
from clusterq.ops.packing import pack_codes

onnx = require("onnx", purpose="ONNX export", extra="export")

# IR version that goes with an operator set: readers refuse a newer one than they know.
_IR_VERSION = {17: 8, 21: 10}


class GraphWriter:
    """Collects what makes up a model; every name is given once.

    Args:
        opset: 17 or 21.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self._names: dict[str, int] = {}

    def name(self, base: str) -> str:
        """`base`, or `base_1`, `base_2` where it is taken."""
        count = self._names.get(base)
        self._names[base] = 1 if count is None else count + 1
        return base if count is None else self.name(f"{base}_{count}")

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Adds a node with one output, named after it; returns the name of the output."""
        name = self.name(output)
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def node_with(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Adds a node with several outputs."""
        names = [self.name(output) for output in outputs]
        self.nodes.append(onnx.helper.make_node(op, list(inputs), names, name=names[0], **attributes))
        return names

    def tensor(self, value: Tensor | np.ndarray[Any, Any], base: str) -> str:
        """Adds an initializer."""
        name = self.name(base)
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        self.initializers[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def integers(self, values: Sequence[int], base: str) -> str:
        """Adds an initializer int64 [len(values)]."""
        return self.tensor(np.array(values, dtype=np.int64), base)

    def packed(self, codes: Tensor, base: str) -> str:
        """Adds an INT4 initializer with the shape of `codes`, int8, two codes to the byte."""
        name = self.name(base)
        packed = pack_codes(codes.reshape(-1).contiguous(), 4)
        self.initializers[name] = onnx.helper.make_tensor(
            name, onnx.TensorProto.INT4, list(codes.shape), packed.numpy().tobytes(), raw=True
        )
        return name

    def stored_bytes(self, *names: str) -> int:
        """Bytes that initializers take in the file."""
        return sum(len(self.initializers[name].raw_data) for name in names)

    def _prune(self, wanted: set[str]) -> None:
        """Leaves out what no output needs."""
        kept = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in wanted}

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], name: str, metadata: Mapping[str, Any]) -> Any:
        """The ModelProto, checked."""
        from clusterq import __version__

        self._prune({output.name for output in outputs})
        graph = onnx.helper.make_graph(self.nodes, name, list(inputs), list(outputs), list(self.initializers.values()))
        model = onnx.helper.make_model(
            graph,
            producer_name="clusterq",
            producer_version=__version__,
            opset_imports=[onnx.helper.make_opsetid("", self.opset)],
            ir_version=_IR_VERSION[self.opset],
        )
        entries = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        onnx.helper.set_model_props(model, entries)
        onnx.checker.check_model(model, full_check=True)
        return model


def value_info(name: str, shape: Sequence[int | str]) -> Any:
    """Name and shape of a float32 input or output of a graph; a dimension that varies by its name."""
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape))


def shape_of(value: Tensor) -> list[int | str]:
    """Shape of an exported tensor, with `"batch"` for the dimension that varies."""
    return [size if isinstance(size, int) else "batch" for size in (_static(s) for s in value.shape)]


def _static(size: Any) -> int | None:
    if isinstance(size, torch.SymInt):
        return size.node.maybe_as_int()
    return int(size)
