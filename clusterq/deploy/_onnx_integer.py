"""Convolutions and matrix products on codes: ConvInteger and MatMulInteger, then one affine map per channel.

The integer operators are exact, so that only the map rounds: `sum * (input scale * weight scale * gain) + bias`, where
gain and bias include the BatchNorm behind a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from clusterq.deploy import _onnx_aten
from clusterq.deploy._grids import Grid
from clusterq.deploy._onnx_aten import aten
from clusterq.deploy._onnx_codes import StoredWeight

if TYPE_CHECKING:
    from clusterq.deploy._onnx_convert import Converter

# Operators that give the same codes as the tensor they take, in another order or fewer of them.
_PASSING = {
    aten.max_pool2d.default,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.dropout.default,
}


def codes_of(c: Converter, node: Any) -> tuple[Grid, str] | None:
    """Grid and codes of a tensor that comes from an activation quantizer, None for any other."""
    if not isinstance(node, fx.Node):
        return None
    if node in c.coded:
        return c.coded[node]
    if node.target not in _PASSING:
        return None
    source: Any = node.args[0]
    found = codes_of(c, source)
    if found is None:
        return None
    grid, codes = found
    # The same operator once more, on codes; what of the first remains unused is left out of the file.
    value = c.values[source]
    c.values[source] = codes
    try:
        result = grid, _onnx_aten.convert(c, node)
    finally:
        c.values[source] = value
    c.coded[node] = result
    return result


def product(
    c: Converter,
    node: fx.Node,
    op: str,
    layer: str,
    source: tuple[Grid, str],
    weight: StoredWeight,
    gain: Tensor | None,
    bias: Tensor | None,
    **attributes: Any,
) -> tuple[str, list[str]]:
    """ConvInteger or MatMulInteger and its map.

    Args:
        c, node: where and for which call.
        op, layer: the operator, and the name of the layer.
        source: grid and codes of the input.
        weight: without zero points.
        gain, bias: float64 [C] each, or None for 1 and 0.

    Returns the name of the result and the names of the initializers that hold the layer.
    """
    grid, codes = source
    # Unsigned around 128, for which every version of onnxruntime has kernels.
    stored = (weight.codes.to(torch.int16) + 128).to(torch.uint8)
    stored = stored.t() if op == "MatMulInteger" else stored
    name = c.graph.tensor(stored.contiguous(), f"{layer}/weight_codes")
    middle = c.graph.tensor(np.array(128, dtype=np.uint8), f"{layer}/weight_zero_point")
    zero = c.graph.tensor(np.array(grid.zero_point.item() + c.offset(grid), dtype=np.uint8), c.label(node, "x_zero"))
    total = c.graph.node(op, [codes, name, zero, middle], c.label(node, "sum"), **attributes)
    value = c.graph.node("Cast", [total], c.label(node, "cast"), to=1)
    factor = grid.scale.double() * weight.scale.double()
    factor = factor if gain is None else factor * gain
    scale = c.graph.tensor(factor.float(), c.label(node, "scale"))
    shift = torch.zeros_like(factor) if bias is None else bias
    offset = c.graph.tensor(shift.float(), c.label(node, "bias"))
    if op == "MatMulInteger":
        y = c.graph.node("Mul", [value, scale], c.label(node, "scaled"))
        return c.graph.node("Add", [y, offset], c.label(node, "linear")), [name, scale, offset]
    # An affine map per channel in one pass over the data.
    mean = c.graph.tensor(torch.zeros_like(factor).float(), c.label(node, "zeros"))
    var = c.graph.tensor(torch.ones_like(factor).float(), c.label(node, "ones"))
    y = c.graph.node("BatchNormalization", [value, scale, offset, mean, var], c.label(node, "conv"), epsilon=0.0)
    return y, [name, scale, offset, mean, var]
