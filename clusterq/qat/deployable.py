"""Scheme deploy: every tensor that an integer kernel reads has a range, and nothing is left for floating point.

What `prepare` does beyond scheme paper:

- The input image gets a quantizer of `input_bits`.
- So does whatever a layer, a sum, a product, a concatenation, a pooling or a table of an activation function reads
  without having a range yet: outputs of layers that no ReLU follows (linear bottlenecks, the operands of residual
  sums), and the results of sums, concatenations and average pooling. ReLU and ReLU6 behind any of these take its
  quantizer into them. The width is `activation_bits` where a Conv2d or Linear reads the tensor, `sum_bits` where none
  does or only a BatchNorm that is not folded. Activation functions that only concatenations read have `sum_bits` too,
  for they are rounded once more there.
- Max pooling, flatten, slices, padding with zeros and their like keep the codes they get.
- BatchNorm behind a layer is folded: its gain belongs to the steps of the weight, its offset becomes an int32 bias, see
  `clusterq.nn.folding`. Its parameters stay where they were and train as before. Other BatchNorm gets a depthwise
  convolution of size 1 in front of it, whose weights are 1 and stay 1, and is folded into that.
- Biases lie on the grid of the int32 sums.

The result of the network, int32 sums of its last layer, is the only thing that leaves in floating point. Whatever has
no form in integers is named by `unreached`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.errors import ModelError
from clusterq.nn.folding import attach_norm
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer
from clusterq.ops._fake_quant_checks import code_range
from clusterq.qat.places import Place, Places, call_name, operands, origin, readers
from clusterq.qat.support import unsupported_layer
from clusterq.qat.trace import OUT_OF_PLACE, is_non_negative, overwritten, trace

if TYPE_CHECKING:
    from clusterq.qat.prepare import _Conversion

_READS_CODES = ("layer", "add", "mul", "cat", "average", "function", "moving", "quantizer", "result")


def separate_norms(student: nn.Module) -> None:
    """BatchNorm without a layer in front of it that it can be folded into gets a depthwise convolution, in place.

    Layers that are BatchNorm and activation function in one, as timm's BatchNormAct2d, become a sequence of both.

    Raises ModelError for a network that torch.fx cannot trace.
    """
    for parent in list(student.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and hasattr(child, "act") and hasattr(child, "drop"):
                parent._modules[name] = _split(child)
    graph = _traced(student)
    modules = dict(student.named_modules())
    folded = {norm for _, norm in _foldable(graph, modules)}
    counts = _counts(graph)
    for node in graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d) and norm not in folded and counts[node.target] == 1 and _plain(norm):
            owner, _, last = str(node.target).rpartition(".")
            both = nn.Sequential(_depthwise(norm), norm).train(norm.training)
            setattr(student.get_submodule(owner), last, both)


def complete(conversion: _Conversion) -> None:
    """The ranges, folded BatchNorm and biases that scheme deploy has more than scheme paper, in place."""
    graph, student = conversion.calls.graph, conversion.student
    if graph is None:
        raise ModelError(f"scheme deploy needs a graph: {conversion.calls.problem}")
    modules = dict(student.named_modules())
    for layer, norm in _foldable(graph, modules):
        attach_norm(norm, layer)
        names = {module: name for name, module in modules.items()}
        _note(conversion, names[layer], f"{names[norm]} folded in")
    places = Places(graph, modules)
    for node in graph.nodes:
        _out_of_place(node, places)
    for node in list(graph.nodes):
        if places[node] in _READS_CODES:
            for source in _without_range(node, places, modules):
                bits = _bits(conversion, source, places, modules)
                settings = {"bits": bits, "non_negative": _non_negative(source, places, modules)}
                new = conversion.insert(source, _name(source), _label(source, modules), settings)
                modules[str(new.target)] = student.get_submodule(str(new.target))
                places.note(new)
    for node in graph.nodes:
        if places[node] == "quantizer" and {places[r] for r in readers(node, places)} == {"cat"}:
            _widen(conversion, str(node.target), modules[str(node.target)])
    _link(conversion, graph, places, modules)
    _name_the_rest(conversion, graph, places, modules)
    order = {str(node.target): index for index, node in enumerate(graph.nodes) if node.op == "call_module"}
    conversion.rows.sort(key=lambda row: order.get(row.name, len(order)))
    conversion.graph_edited = True


def _traced(student: nn.Module) -> fx.Graph:
    try:
        return trace(student)
    except ValueError as error:
        raise ModelError(f"scheme deploy needs a graph: {error}") from error


def _counts(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_module")


def _plain(norm: _BatchNorm) -> bool:
    own = type(norm).forward is not _BatchNorm.forward
    return not own and norm.running_mean is not None and norm.running_var is not None


def _foldable(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[Any, Any]]:
    """Layers and the BatchNorm that alone reads their output, each called once."""
    counts = _counts(graph)
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _BatchNorm):
            continue
        norm, source = modules[str(node.target)], node.all_input_nodes[0]
        if source.op != "call_module" or len(source.users) != 1:
            continue
        layer = modules[str(source.target)]
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or not isinstance(norm, _BatchNorm) or not _plain(norm):
            continue
        # BatchNorm1d behind a Linear of three dimensions has its channels elsewhere.
        fits = norm.num_features == len(layer.weight) and _shared(layer, modules) == 1 and _can_be_quantized(layer)
        if fits and counts[node.target] == counts[source.target] == 1:
            yield layer, norm


def _can_be_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, (QuantizedConv2d, QuantizedLinear)) or unsupported_layer(layer) == ""


def _shared(layer: nn.Module, modules: dict[str, nn.Module]) -> int:
    weight = layer._parameters.get("weight")
    return sum(module._parameters.get("weight") is weight for module in modules.values())


def _split(norm: Any) -> nn.Module:
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    plain._parameters, plain._buffers = norm._parameters, norm._buffers
    return nn.Sequential(plain, norm.drop, norm.act).train(norm.training)


def _depthwise(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The identity as a convolution.

    Were the gain its weight, that would train instead of gamma, and on inputs of a deviation s make steps s^2 as large.
    """
    mean = norm.running_mean
    assert mean is not None
    channels = norm.num_features
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device=mean.device, dtype=mean.dtype)
    nn.init.ones_(conv.weight)
    conv.weight.requires_grad_(False)
    conv.normalises = True  # type: ignore[assignment]
    return conv


def _out_of_place(node: fx.Node, places: Places) -> None:
    """A sum in place as one that is not: later readers of the operand it overwrites read the sum already.

    Left in place, and then without a form in integers, are those that overwrite what a tensor read later is a view of,
    or is seen through.
    """
    first = overwritten(node)
    # A buffer that counts calls goes on counting.
    if first is None or first.op == "get_attr":
        return
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    if all(order[user] <= order[node] for alias in _aliases(first, node, places) for user in alias.users):
        node.target = OUT_OF_PLACE[node.target]
        places.note(node)


def _aliases(first: fx.Node, but: fx.Node, places: Places) -> list[fx.Node]:
    """A tensor and those that may share its memory, except through the node `but`."""
    while places.is_view(first):
        first = first.all_input_nodes[0]
    found = [first]
    for node in found:
        found += [user for user in node.users if user is not but and places.is_view(user)]
    return found


def _without_range(node: fx.Node, places: Places, modules: dict[str, nn.Module]) -> Iterator[fx.Node]:
    """What a node reads in codes, made by a call that gives none yet."""
    place = places[node]
    if place == "quantizer":
        quantizer = modules[str(node.target)]
        if isinstance(quantizer, ActivationQuantizer) and quantizer.function is None:
            return
    if place == "moving" and all(places[reader] == "result" for reader in readers(node, places)):
        return
    for operand in operands(node, place):
        source = origin(operand, places)
        made: Place = places[source]
        if made in ("quantizer", "size") or (place == "result" and made in ("layer", "norm", "other")):
            continue
        yield source


def _bits(conversion: _Conversion, source: fx.Node, places: Places, modules: dict[str, nn.Module]) -> int:
    config = conversion.config
    if places[source] == "source":
        return config.input_bits
    layers = [reader for reader in readers(source, places) if places[reader] == "layer"]
    # A BatchNorm that became a layer reads sums as others do.
    own = any(not hasattr(modules[str(layer.target)], "normalises") for layer in layers)
    return config.activation_bits if own else config.sum_bits


def _non_negative(node: fx.Node, places: Places, modules: dict[str, nn.Module]) -> bool:
    place = places[node]
    if place in ("passing", "moving", "add", "mul", "cat", "average"):
        return all(_non_negative(operand, places, modules) for operand in operands(node, place))
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, ActivationQuantizer):
        return module.non_negative
    return place == "function" and is_non_negative(str(getattr(node.target, "__name__", node.target)), module)


def _name(node: fx.Node) -> str:
    return "input_quantizer" if node.op == "placeholder" else f"{call_name(node)}_quantizer"


def _label(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op != "call_module":
        return call_name(node).rpartition(".")[2]
    cls = type(modules[str(node.target)])
    return {"IntegerBatchNorm2d": "BatchNorm2d", "IntegerBatchNorm1d": "BatchNorm1d"}.get(
        cls.__name__, cls.__name__.removeprefix("Quantized")
    )


def _widen(conversion: _Conversion, name: str, module: nn.Module) -> None:
    assert isinstance(module, ActivationQuantizer)
    if name in conversion.config.layer_bits:
        return
    module.bits = conversion.code_bits(conversion.config.sum_bits, non_negative=module.non_negative)
    module.quant_min, module.quant_max = code_range(module.bits, signed=module.symmetric)
    conversion.rows = [
        replace(row, activation_bits=module.bits) if row.name == name else row for row in conversion.rows
    ]


def _note(conversion: _Conversion, name: str, text: str) -> None:
    conversion.rows = [
        replace(row, note=f"{row.note}; {text}" if row.note else text) if row.name == name else row
        for row in conversion.rows
    ]


def _link(conversion: _Conversion, graph: fx.Graph, places: Places, modules: dict[str, nn.Module]) -> None:
    """Tells every layer whose codes it reads."""
    sources: dict[str, set[nn.Module]] = {}
    for node in graph.nodes:
        if places[node] == "layer":
            made = origin(operands(node, "layer")[0], places)
            sources.setdefault(str(node.target), set()).add(modules[str(made.target)])
    for name, found in sources.items():
        layer, quantizer = modules[name], next(iter(found))
        assert isinstance(layer, (QuantizedConv2d, QuantizedLinear))
        if len(found) == 1 and isinstance(quantizer, ActivationQuantizer):
            layer._source = (quantizer,)
        else:
            _unreached(conversion, name, "bias", "the layer is called on tensors of different ranges")


def _name_the_rest(conversion: _Conversion, graph: fx.Graph, places: Places, modules: dict[str, nn.Module]) -> None:
    for node in graph.nodes:
        if places[node] == "other":
            name = call_name(node) if node.op == "call_module" else call_name(node).rpartition(".")[0]
            _unreached(conversion, name, _label(node, modules), "no form in integers")


def _unreached(conversion: _Conversion, name: str, kind: str, note: str) -> None:
    from clusterq.qat.prepare import Row

    if not any((row.name, row.kind) == (name, kind) for row in conversion.unreached):
        conversion.unreached.append(Row(name, kind, note=note))
