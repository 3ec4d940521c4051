"""Quantized twins as ONNX files whose integer codes are the twin's.

Weights are integer initializers with DequantizeLinear per channel, activations QuantizeLinear, Clip of the codes where
they have less than 8 bits, and DequantizeLinear, with the twin's scales and zero points; the rest is float32 (opset 17;
21 for packed weights). A dequantized weight has the twin's bits. The code of an activation can differ where `x / scale`
and the twin's `x * (1 / scale)`, or sums in another order, fall on two sides of a rounding boundary.

Networks of scheme deploy (`QuantizationConfig.scheme`) become integer kernels throughout: explicit QDQ around every
layer, sum and pooling, int32 biases, and codes equal to those of `clusterq.deploy.run_integer`, bit for bit except
where a sum of two tensors lies on a rounding boundary. On processors without VNNI, onnxruntime's kernels saturate sums
of two products beyond 16 bits: weights of up to 6 bits have room, wider ones only beside activations of up to 7 bits
stored as UINT8. A convolution whose result leaves the network without a quantizer is computed in floating point from
the same numbers. `target="tensorrt"` writes them for TensorRT: INT8 with zero point 0 alone, a Clip of values in place
of one of codes, biases in float32 (`clusterq.deploy._onnx_tensorrt`); `QuantizationConfig.int8_symmetric` makes
networks that fit. TensorRT itself was not run here. onnxruntime takes the same file, and computes layers in floating
point. The rest is about scheme paper.

Runtimes compute a convolution in integers where it lies between DequantizeLinear and QuantizeLinear; onnxruntime then
rounds its bias to whole multiples of `input scale * weight scale`. BatchNorm and sums in floating point prevent it:

- `operators="integer"` writes ConvInteger and MatMulInteger wherever a layer reads codes, exact whatever follows.
  onnxruntime's ConvInteger is slower than its convolution in floating point.
- `fold_batch_norm=True` moves BatchNorm into scales and a bias. Codes stay (a negative gain turns their sign). Where a
  quantizer follows, onnxruntime takes its fast integer convolution and rounds the bias: with few bits that changes one
  code in a thousand per layer, and classes with it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clusterq.deploy._capture import capture
from clusterq.deploy._grids import Grid, activation_grid, replace_modules, weight_grid
from clusterq.errors import ModelError, OutputError, require
from clusterq.folders import write_file
from clusterq.method import Result
from clusterq.nn.folding import integer_norm_of
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer, Fused
from clusterq.qat.prepare import prepared_with, report

Operators = Literal["qdq", "integer"]
Target = Literal["onnxruntime", "tensorrt"]

__all__ = ["OnnxExport", "export_onnx"]


@dataclass(frozen=True)
class OnnxExport:
    """What an ONNX file holds.

    Attributes:
        path: the file.
        opset: version of the default operator set.
        layers: one `ExportedLayer` per quantized weight, in execution order.
        activations: names of the tensors that hold the codes of each activation quantizer, one per call; in files for
            TensorRT less their zero points.
        activation_bits: width of each activation quantizer.
        file_bytes: size of the file.
    """

    path: Path
    opset: int
    layers: tuple[Any, ...]
    activations: dict[str, tuple[str, ...]]
    activation_bits: dict[str, int]
    file_bytes: int


def export_onnx(
    model: nn.Module | Result,
    path: str | Path,
    *,
    example_input: Tensor | None = None,
    packed: bool = False,
    operators: Operators = "qdq",
    fold_batch_norm: bool = False,
    target: Target = "onnxruntime",
    overwrite: bool = False,
) -> OnnxExport:
    """Write a quantized network as an ONNX file: `input` float32 to `output`, for any batch where the network allows.

    Args:
        model: what `clusterq.prepare` made, with ranges, or a `Result`; stays as it is.
        path: file to write; appears whole or not at all.
        example_input: a batch the network can run on; a `Result` brings its own.
        packed: weights of up to four bits as INT4, two to the byte, which no CPU kernel of onnxruntime takes: it turns
            them into floating point when it runs. Warns of that.
        operators: `"qdq"`, or for scheme paper `"integer"`: see above. Weights of 8 bits with zero points stay in
            floating point.
        fold_batch_norm: for scheme paper, see above. Not where weights are packed, have 8 bits and zero points, or
            cannot change sign, or an int32 cannot hold the bias.
        target: the runtime: `"onnxruntime"` (OpenVINO takes these files too), or for scheme deploy `"tensorrt"`.
        overwrite: replace a file of that name.

    Raises:
        ValueError: unknown `operators` or `target`, `"integer"` with `packed` or `fold_batch_norm`, or either in scheme
            deploy, `"tensorrt"` with `packed` or in scheme paper.
        ModelError: a network that is not quantized, has no ranges, cannot be captured by `torch.export`, calls an
            operator that has no rule here, has numbers that integers and float32 cannot hold, or codes that the target
            cannot; names the layer.
        MissingPackageError: onnx is not installed.
        OutputError: the file exists or cannot be written.
        TypeError: `example_input` is missing.
    """
    if isinstance(model, Result):
        example_input = model.images[:2] if example_input is None else example_input
        model = model.student
    if operators not in get_args(Operators):
        raise ValueError(f"operators is {operators!r}; wanted qdq or integer")
    if target not in get_args(Target):
        raise ValueError(f"target is {target!r}; wanted onnxruntime or tensorrt")
    if target == "tensorrt" and packed:
        raise ValueError('packed is given with target "tensorrt", which multiplies weights of 8 bits')
    if operators == "integer" and (packed or fold_batch_norm):
        given = "packed" if packed else "fold_batch_norm"
        raise ValueError(f'{given} is given with operators "integer"; it belongs to "qdq"')
    if not isinstance(example_input, Tensor):
        raise TypeError("example_input is missing: a batch the network can run on")
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; choose another name or allow overwriting")
    proto, converter = build(
        model, example_input, packed=packed, operators=operators, fold_batch_norm=fold_batch_norm, target=target
    )
    if packed and any(layer.container == "INT4" for layer in converter.layers):
        warnings.warn(
            "packed weights make the file smaller, not faster: onnxruntime has no integer convolution for INT4 and "
            "computes these layers in floating point",
            UserWarning,
            stacklevel=2,
        )
    data = proto.SerializeToString()
    write_file(path, data)
    return OnnxExport(
        path,
        converter.graph.opset,
        tuple(converter.layers),
        {name: tuple(tensors) for name, tensors in converter.codes.items()},
        {name: converter.grids[name].bits for name in converter.codes},
        len(data),
    )


def build(
    model: nn.Module,
    example_input: Tensor,
    *,
    packed: bool = False,
    operators: Operators = "qdq",
    fold_batch_norm: bool = False,
    target: Target = "onnxruntime",
    quantized: bool = True,
) -> tuple[Any, Any]:
    """ModelProto and its `Converter`; `quantized=False` gives the same network in floating point, for comparison."""
    require("onnx", purpose="ONNX export", extra="export")
    from clusterq import __version__
    from clusterq.deploy._onnx_convert import Converter
    from clusterq.deploy._onnx_graph import GraphWriter, shape_of, value_info

    config = prepared_with(model)
    deploy = config.scheme == "deploy" and quantized
    if deploy and (operators != "qdq" or fold_batch_norm):
        given = 'operators "integer"' if operators != "qdq" else "fold_batch_norm"
        raise ValueError(f"{given} is for scheme paper; in scheme deploy layers are integer and BatchNorm is folded")
    if target == "tensorrt" and not deploy:
        raise ValueError(
            'target "tensorrt" is for scheme deploy: quantize with --set quantization.scheme=deploy '
            "quantization.int8_symmetric=true"
        )
    twin, grids = _frozen_twin(model, quantized=quantized)
    if target == "tensorrt":
        from clusterq.deploy._onnx_tensorrt import check_fits

        check_fits(grids[row.name] for row in report(model) if row.activation_bits is not None)
    program = capture(twin, example_input, decompose=True)
    signature = program.graph_signature
    names: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    held = {**program.constants, **dict(program.state_dict)}
    tensors = {placeholder: held[name].detach() for placeholder, name in names.items()}
    kind: type[Converter] = Converter
    extra: dict[str, Any] = {}
    if deploy:
        from clusterq.deploy._onnx_deploy import DeployConverter, integer_layers
        from clusterq.deploy._onnx_tensorrt import TensorRTConverter

        kind = TensorRTConverter if target == "tensorrt" else DeployConverter
        extra = {"integers": integer_layers(copy.deepcopy(model).cpu().float().eval(), grids)}
    converter = kind(
        GraphWriter(21 if packed else 17),
        tensors,
        names,
        grids,
        packed=packed,
        fold=fold_batch_norm,
        integer=operators == "integer",
        **extra,
    )
    nodes = list(program.graph.nodes)
    user_inputs = [node for node in nodes if node.op == "placeholder" and node.name in signature.user_inputs]
    results = [node for node in nodes[-1].args[0] if node is not None]
    if len(user_inputs) != 1:
        raise ModelError(f"the network has {len(user_inputs)} inputs; wanted one")
    # Given first, so that nothing else takes them.
    outputs = [converter.graph.name("output" if i == 0 else f"output_{i}") for i in range(len(results))]
    converter.values[user_inputs[0]] = converter.graph.name("input")
    converter.run(nodes)
    for output, node in zip(outputs, results, strict=True):
        converter.graph.nodes.append(_identity(converter.read(node), output))
    proto = converter.graph.model(
        [value_info("input", shape_of(user_inputs[0].meta["val"]))],
        [value_info(o, shape_of(node.meta["val"])) for o, node in zip(outputs, results, strict=True)],
        type(model).__name__,
        {
            "clusterq_version": __version__,
            "clusterq_operators": operators,
            "clusterq_target": target,
            "clusterq_bits": {layer.name: layer.bits for layer in converter.layers}
            | {name: converter.grids[name].bits for name in converter.codes},
            "clusterq_multipliers": {layer.name: layer.multiplier for layer in converter.layers},
            "clusterq_batch_norm_folded": [layer.name for layer in converter.layers if layer.batch_norm_folded],
            "clusterq_quantization": {"weight_bits": config.weight_bits, "activation_bits": config.activation_bits},
        },
    )
    return proto, converter


class _Grid(nn.Module):
    """A quantizer reduced to fixed numbers: the op itself, or only its activation function."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, activation: Fused, function: nn.Module | None, quantized: bool) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.float())
        self.limits = (grid.quant_min, grid.quant_max)
        self.axis = grid.axis
        self.activation: Fused = activation
        self.function = function
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        if self.function is not None:
            x = self.function(x)
        if not self.quantized:
            plain = {"none": lambda v: v, "relu": torch.relu, "relu6": nn.functional.relu6}
            y: Tensor = plain[self.activation](x)
            return y
        y = torch.ops.clusterq.fake_quantize(x, self.scale, self.zero_point, *self.limits, self.axis, self.activation)
        return y


def _frozen_twin(model: nn.Module, *, quantized: bool) -> tuple[nn.Module, dict[str, Grid]]:
    """A copy on the CPU with a `_Grid` for every quantizer, and the grids by the names of these modules."""
    twin = copy.deepcopy(model).cpu().float().eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    grids: dict[str, Grid] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(twin.named_modules()):
        if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
            grids[f"{name}.weight_quantizer"] = grid = weight_grid(name, module)
            module.weight_quantizer = _Grid(grid, "none", None, quantized)  # type: ignore[assignment]
            module._source = ()
        elif integer_norm_of(module) is not None:
            # The converter has its numbers in integers; here it marks the place.
            module.__class__ = nn.BatchNorm2d if isinstance(module, nn.BatchNorm2d) else nn.BatchNorm1d
        elif isinstance(module, ActivationQuantizer):
            grids[name] = activation_grid(name, module)
            replaced[module] = _Grid(grids[name], module.activation, module.function, quantized)
    replace_modules(twin, replaced)
    return twin, grids


def _identity(source: str, target: str) -> Any:
    onnx = require("onnx", purpose="ONNX export", extra="export")
    return onnx.helper.make_node("Identity", [source], [target], name=target)
