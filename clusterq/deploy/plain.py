"""Quantized networks in plain PyTorch: `nn.Conv2d`, `nn.Linear`, and quantizers written with torch's own operators.

`convert` makes one of a quantized twin, with the twin's numbers and, on the CPU, its outputs bit for bit: the formula
is that of `ops.fake_quantize`. What `torch.export` captures of it has no operator of this package and runs where the
package is not installed; captured from the twin itself, each quantizer is one `clusterq::fake_quantize`, which a
backend can take for its own, and loading needs `import clusterq`.

`numbers_of` is the same network as numbers: integer codes, scales, zero points, and the tensors that stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq import ops
from clusterq.deploy._grids import Grid, activation_grid, replace_modules, weight_grid
from clusterq.errors import ModelError
from clusterq.nn.folding import NORM_PARTS, integer_norm_of, offset_of, on_grid
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, Fused
from clusterq.nn.same_padding import SamePadConv2d

if TYPE_CHECKING:
    from clusterq.method import Result

__all__ = ["ActivationGrid", "CodedWeight", "FixedQuantizer", "Numbers", "convert", "numbers_of"]


@dataclass(frozen=True)
class CodedWeight:
    """A weight as integers: value = (codes - zero_point) * scale, computed in float32, per entry of axis 0.

    Attributes:
        codes: int8 [C, ...], -2^(bits-1) to 2^(bits-1) - 1.
        scale: float32 [C], positive.
        zero_point: int8 [C], within the codes.
        bits: 2 to 8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def dequantized(self) -> Tensor:
        """float32 [C, ...]."""
        return ops.dequantize(self.codes, self.scale, self.zero_point.float(), axis=0)


@dataclass(frozen=True)
class ActivationGrid:
    """How a tensor x is quantized: (c - zero_point) * scale with c = clamp(round(x * (1 / scale)) + zero_point).

    Attributes:
        scale: float32 [1], positive.
        zero_point: whole number within the codes.
        quant_min, quant_max: smallest and largest code.
        activation: `"relu"` or `"relu6"` where the quantizer computes that first, else `"none"`.
    """

    scale: Tensor
    zero_point: int
    quant_min: int
    quant_max: int
    activation: Fused


@dataclass(frozen=True)
class Numbers:
    """A quantized network without its graph.

    Attributes:
        weights: coded weights by the name of the parameter.
        activations: grids by the name of the quantizer.
        tensors: every other parameter and buffer by name: biases, BatchNorm (without its counter of batches). In scheme
            deploy both are on the grid of the int32 sums, and a folded BatchNorm is its gain and offset alone: mean 0,
            variance 1, to be read with eps 0.
    """

    weights: Mapping[str, CodedWeight]
    activations: Mapping[str, ActivationGrid]
    tensors: Mapping[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names of the network in floating point, its weights dequantized.

        For `load_state_dict`; in scheme deploy layers whose bias went into a BatchNorm have none, and that of
        `convert`'s result is the network these fit.
        """
        return {**{name: weight.dequantized() for name, weight in self.weights.items()}, **self.tensors}


class FixedQuantizer(nn.Module):
    """An activation quantizer whose numbers no longer change, in torch's own operators; input and output float32.

    Args:
        grid: its numbers.
        function: activation function that runs before it, holding no parameters.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: ActivationGrid, function: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", torch.full((1,), float(grid.zero_point)))
        self.quant_min, self.quant_max = grid.quant_min, grid.quant_max
        self.activation: Fused = grid.activation
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if self.function is not None:
            x = self.function(x)
        if self.activation != "none":
            x = functional.relu(x) if self.activation == "relu" else functional.relu6(x)
        codes = (x * self.scale.reciprocal()).round() + self.zero_point
        return (codes.clamp(self.quant_min, self.quant_max) - self.zero_point) * self.scale

    def extra_repr(self) -> str:
        name = f", activation={self.activation}" if self.activation != "none" else ""
        return f"codes=[{self.quant_min}, {self.quant_max}]{name}"


def convert(model: nn.Module | Result) -> nn.Module:
    """The quantized network in plain PyTorch, for inference in float32; the network itself stays as it is.

    Layers are `nn.Conv2d`, `clusterq.nn.SamePadConv2d` and `nn.Linear` with dequantized weights, quantizers
    `FixedQuantizer`. No parameter requires gradients.

    Args:
        model: what `clusterq.prepare` made, with ranges, or a `Result`.

    Raises:
        ModelError: a network that is not quantized, has no ranges, or whose quantization is switched off; names the
            layer.
    """
    model = _network(model)
    return plain(model, numbers_of(model))


def numbers_of(model: nn.Module | Result) -> Numbers:
    """The numbers of a quantized network, copied to the CPU; raises as `convert` does."""
    model = _network(model)
    parts = parts_of(model)
    state = model.state_dict()
    grids = {name: weight_grid(name.removesuffix(".weight"), layer) for name, layer in parts.weights.items()}
    steps = {layer: grids[name].scale for name, layer in parts.weights.items()}
    for name, layer in parts.weights.items():
        if layer.bias is not None and layer.in_integers():
            numbers = offset_of(layer, step=steps[layer])
            state[f"{name.removesuffix('.weight')}.bias"] = on_grid(layer.bias.detach(), numbers)
    for name, norm in parts.folded.items():
        of = integer_norm_of(norm)
        assert of is not None
        state.update({f"{name}.{key}": value for key, value in _folded(norm, steps[of]).items()})
    kept = {name: state[name].detach().cpu().to(_kept_dtype(state[name]), copy=True) for name in parts.tensors}
    return Numbers(
        {name: _coded(layer, grids[name]) for name, layer in parts.weights.items()},
        {name: _fixed(name, quantizer) for name, quantizer in parts.activations.items()},
        kept,
    )


@dataclass(frozen=True)
class Parts:
    """Layers of a twin by the name of their weight, quantizers and folded BatchNorm by their own, names of the rest."""

    weights: Mapping[str, QuantizedConv2d | QuantizedLinear]
    activations: Mapping[str, ActivationQuantizer]
    folded: Mapping[str, nn.Module]
    tensors: tuple[str, ...]


def parts_of(twin: nn.Module) -> Parts:
    """What a quantized twin consists of; ModelError for a network that is none."""
    weights: dict[str, QuantizedConv2d | QuantizedLinear] = {}
    activations: dict[str, ActivationQuantizer] = {}
    folded: dict[str, nn.Module] = {}
    apart: set[str] = set()
    for name, module in twin.named_modules(remove_duplicate=False):
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            weights[f"{name}.weight"] = module
            apart |= {f"{name}.weight", f"{name}.weight_quantizer.scale", f"{name}.weight_quantizer.zero_point"}
        elif isinstance(module, ActivationQuantizer):
            activations[name] = module
            apart |= {f"{name}.{own}" for own in ("observations", "scale", "zero_point", "running_min", "running_max")}
        elif isinstance(module, _BatchNorm):
            # Nothing reads it in evaluation mode.
            apart.add(f"{name}.num_batches_tracked")
            if integer_norm_of(module) is not None:
                folded[name] = module
                apart |= {f"{name}.{key}" for key in NORM_PARTS}
    if not weights:
        raise ModelError(f"{type(twin).__name__} is not quantized; wanted what clusterq.prepare made")
    names = [name for name in twin.state_dict() if name not in apart]
    return Parts(weights, activations, folded, (*names, *(f"{name}.{key}" for name in folded for key in NORM_PARTS)))


def norm_eps(norm: Any) -> float:
    """eps with which the tensors of a BatchNorm in `Numbers` are to be read."""
    return 0.0 if integer_norm_of(norm) is not None else float(norm.eps)


def plain(model: nn.Module, numbers: Numbers) -> nn.Module:
    """The plain form of a quantized network with these numbers, which belong to its layers and quantizers."""
    model = copy.deepcopy(model).float().eval()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            replaced.setdefault(module, _plain_layer(module, numbers.weights[f"{name}.weight"]))
        elif isinstance(module, ActivationQuantizer):
            quantizer = FixedQuantizer(numbers.activations[name], module.function)
            replaced.setdefault(module, quantizer.to(module.observations.device).eval())
        elif integer_norm_of(module) is not None:
            cls: Any = nn.BatchNorm2d if isinstance(module, nn.BatchNorm2d) else nn.BatchNorm1d
            device = next(model.parameters()).device
            replaced.setdefault(module, cls(len(numbers.tensors[f"{name}.weight"]), eps=0.0, device=device).eval())
        elif getattr(module, "statistics_frozen", False):
            # Back from the class that keeps a BatchNorm in evaluation mode while everything else trains.
            module.__class__ = type(module).__mro__[1]
    replace_modules(model, replaced)
    # Of a network, not of a twin: nothing that asks for its quantization shall find it.
    if hasattr(model, "_quantization"):
        del model._quantization
    own = model.state_dict()
    for name, value in numbers.tensors.items():
        own[name].copy_(value)
    return model.requires_grad_(False)


def _network(model: nn.Module | Result) -> nn.Module:
    from clusterq.method import Result

    return model.student if isinstance(model, Result) else model


def _kept_dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.is_floating_point() else value.dtype


def _coded(layer: QuantizedConv2d | QuantizedLinear, grid: Grid) -> CodedWeight:
    codes = grid.codes(layer.weight)
    if layer.bias is not None and layer.in_integers():
        # Of channels that are constants, see `clusterq.nn.folding`.
        zeros = grid.column(codes)
        constant = (offset_of(layer, step=grid.scale).gain == 0).cpu().reshape(zeros.shape)
        codes = torch.where(constant, zeros.to(codes.dtype), codes)
    return CodedWeight(codes, grid.scale, grid.zero_point.to(torch.int8), grid.bits)


def _folded(norm: Any, step: Tensor) -> dict[str, Tensor]:
    """Gain and offset of a folded BatchNorm as the twin computes with them, by the names of a BatchNorm's tensors.

    `step`: of the weight [C] of its layer.
    """
    layer = integer_norm_of(norm)
    assert layer is not None
    numbers = offset_of(layer, norm, step)
    gain, offset = (value.detach() for value in norm.gain_and_offset())
    gain = torch.where(numbers.gain == 0, 0.0, gain)
    values = (gain, on_grid(offset, numbers), torch.zeros_like(gain), torch.ones_like(gain))
    return dict(zip(NORM_PARTS, values, strict=True))


def _fixed(name: str, quantizer: ActivationQuantizer) -> ActivationGrid:
    grid = activation_grid(name, quantizer)
    return ActivationGrid(grid.scale, int(grid.zero_point), grid.quant_min, grid.quant_max, quantizer.activation)


def _plain_layer(layer: Any, weight: CodedWeight) -> nn.Module:
    """The layer's settings, hooks and bias in the layer it was, with the weight in place of its own."""
    cls: Any = next(c for c in (SamePadConv2d, nn.Conv2d, nn.Linear) if isinstance(layer, c))
    made: nn.Module = cls.__new__(cls)
    made.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
    del made._modules["weight_quantizer"]
    for name in ("_source", "_has_norm", "_step"):
        made.__dict__.pop(name, None)
    made._parameters["weight"] = nn.Parameter(weight.dequantized().to(layer.weight.device), requires_grad=False)
    return made
