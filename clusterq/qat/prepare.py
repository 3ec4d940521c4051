"""Turning a network into its quantized twin: layers swapped, a quantizer after every activation function.

Every `nn.Conv2d` and `nn.Linear` that the network calls gets a quantized weight. Every call of an activation function
gets a quantizer of its own, whether it is a module, a function or a tensor method: ReLU, ReLU6, Hardtanh, Hardswish,
SiLU, GELU, LeakyReLU, PReLU, ELU, SELU, CELU, Mish, Softplus, Sigmoid (of gates too), Hardsigmoid, Tanh, LogSigmoid,
Softsign, Tanhshrink, Hardshrink, Softshrink, Threshold, RReLU, GLU. A clamp from 0 up counts as ReLU, one from 0 to 6
as ReLU6, with their gradient (0 at the bounds). In scheme paper the input image, BatchNorm, residual sums, pooled
features and biases stay in floating point; what scheme deploy does with them tells `clusterq.qat.deployable`. What
should have been quantized and could not be is named by `unreached` and in a warning: also softmax and its kin,
`maximum`, `minimum`, and clamps to other bounds.
"""

from __future__ import annotations

import copy
import difflib
import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.config import QuantizationConfig
from clusterq.errors import ModelError
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationMode, ActivationQuantizer, WeightQuantizer, set_quantization
from clusterq.qat import deployable
from clusterq.qat.support import recognise_convolutions, unsupported_layer, unsupported_other
from clusterq.qat.trace import Call, Calls, is_in_place, is_non_negative, module_activation, overwritten, record_calls


@dataclass(frozen=True)
class Row:
    """One layer or call of an activation function.

    Attributes:
        name: module name in the quantized network; of an unreached function, the module whose forward calls it.
        kind: class of the layer, or name of the function.
        weight_bits, activation_bits: widths; None where there is nothing to quantize, or it stays in floating point.
        note: where it differs from the rest, or why it was not reached.
    """

    name: str
    kind: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    note: str = ""


def prepare(model: nn.Module, config: QuantizationConfig, *, example_input: Tensor | None = None) -> nn.Module:
    """The quantized twin of a network, in evaluation mode; the network itself stays as it is.

    The twin keeps the class of the network, the names of its parameters, and parameters shared between layers. Where
    activation functions are called as functions, or one module is called at several places, it becomes a subclass whose
    forward is the traced graph. All parameters require gradients, BatchNorm statistics stay frozen through `.train()`.
    In scheme deploy a BatchNorm2d without a layer in front of it becomes `NAME.1`, behind a layer `NAME.0` of its own,
    whose parameters do not train. Ranges are set by `clusterq.qat.calibrate`, or else by the first training batch.

    Args:
        model: any network, ideally one that torch.fx can trace.
        config: widths and kinds of ranges.
        example_input: a batch the network can run on; gives the execution order and names what is out of reach where
            torch.fx cannot trace the network.

    Raises:
        ModelError: the network has no Conv2d or Linear, is quantized already, or cannot be traced in scheme deploy.
        ValueError: `config.layer_bits` has a name that is neither a quantized layer nor an activation quantizer.
    """
    if any(isinstance(m, (QuantizedConv2d, QuantizedLinear)) for m in model.modules()):
        raise ModelError("the network is quantized already; prepare wants the network in floating point")
    student = copy.deepcopy(model).eval()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    recognise_convolutions(student)
    calls = record_calls(student, example_input)
    if config.scheme == "auto":
        config = replace(config, scheme="paper" if calls.graph is None else "deploy")
        if calls.graph is None:
            warnings.warn(f"{calls.problem}: quantized in scheme paper, not deploy", UserWarning, stacklevel=2)
    if config.scheme == "deploy":
        deployable.separate_norms(student)
        calls = record_calls(student, example_input)
    conversion = _Conversion(student, config, calls)
    conversion.run()
    if config.scheme == "deploy":
        deployable.complete(conversion)
    conversion.finish(example_input)
    freeze_batch_norm_statistics(student)
    student._quantization = (tuple(conversion.rows), tuple(conversion.unreached), config)  # type: ignore[assignment]
    if conversion.unreached:
        names = "; ".join(f"{row.name or 'network'} {row.kind} ({row.note})" for row in conversion.unreached)
        warnings.warn(f"these stay in floating point: {names}", UserWarning, stacklevel=2)
    return student


def report(prepared: nn.Module) -> list[Row]:
    """Quantized layers and activation quantizers of a network from `prepare`, in execution order."""
    return list(_quantization(prepared)[0])


def unreached(prepared: nn.Module) -> list[Row]:
    """Everything in a network from `prepare` that would be quantized but stays in floating point, with the reason."""
    return list(_quantization(prepared)[1])


def prepared_with(prepared: nn.Module) -> QuantizationConfig:
    """The settings that `prepare` made this network with; scheme `"auto"` has become what it chose."""
    return _quantization(prepared)[2]


def is_prepared_with(prepared: nn.Module, config: QuantizationConfig) -> bool:
    """Whether `prepare(network, config)` gives such a network."""
    own = prepared_with(prepared)
    return own == (replace(config, scheme=own.scheme) if config.scheme == "auto" else config)


def _quantization(prepared: nn.Module) -> tuple[tuple[Row, ...], tuple[Row, ...], QuantizationConfig]:
    rows: Any = getattr(prepared, "_quantization", None)
    if rows is None:
        raise ModelError(f"{type(prepared).__name__} does not come from clusterq.prepare")
    return rows  # type: ignore[no-any-return]


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Keeps every BatchNorm of a network in evaluation mode, also through `.train()`; gamma and beta stay trainable."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
            if not getattr(module, "statistics_frozen", False):
                cls: Any = type(module)
                module.__class__ = _frozen(cls)


@functools.cache
def _frozen(cls: Any) -> Any:
    def train(self: nn.Module, mode: bool = True) -> Any:
        cls.train(self, mode)
        # Not what it holds: the quantizer behind the activation function of timm's BatchNormAct2d follows the mode.
        self.training = False
        return self

    # Tracers take a module for a layer by the package its class says it is from.
    members = {"train": train, "statistics_frozen": True, "__module__": cls.__module__}
    return type(f"Frozen{cls.__name__}", (cls,), members)


class _Conversion:
    """One network on its way to its quantized twin."""

    def __init__(self, student: nn.Module, config: QuantizationConfig, calls: Calls) -> None:
        self.student = student
        self.config = config
        self.calls = calls
        self.modules = dict(student.named_modules())
        self.rows: list[Row] = []
        self.unreached: list[Row] = []
        self.swaps: dict[nn.Module, nn.Module] = {}
        self.used_bits: set[str] = set()
        self.graph_edited = False

    def run(self) -> None:
        calls = self.calls.calls
        if calls is None:
            calls = [Call(name, "module", False) for name in self.modules if name]
            self.calls.counts.update({call.name: 1 for call in calls})
        self._name_unsupported()
        layers = [c.name for c in calls if c.kind == "module" and unsupported_layer(self.modules[c.name]) == ""]
        if not layers:
            raise ModelError(f"{type(self.student).__name__} has no Conv2d or Linear that can be quantized")
        if self.calls.graph is not None:
            self._follow_in_place(calls)
        # A BatchNorm that became a layer is neither the first nor the last one.
        own = [name for name in layers if not hasattr(self.modules[name], "normalises")] or layers
        seen: set[str] = set()
        for call in calls:
            module = self.modules[call.name] if call.kind == "module" else None
            if module is None:
                self._function(call)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                if call.name not in seen and unsupported_layer(module) == "":
                    self._layer(call.name, module, first=call.name == own[0], last=call.name == own[-1])
            elif (kind := module_activation(module)) is not None:
                self._module_activation(call, module, kind, repeated=call.name in seen)
            seen.add(call.name)
        for parent in self.modules.values():
            for name, child in parent._modules.items():
                if child in self.swaps:
                    parent._modules[name] = self.swaps[child]

    def finish(self, example_input: Tensor | None) -> None:
        """Checks names of `layer_bits`, makes an edited graph the forward, and looks for what was missed."""
        self._check_names()
        if self.graph_edited:
            self._adopt_graph()
        self._check_reached(example_input)

    def _check_reached(self, example_input: Tensor | None) -> None:
        """Looks whether the twin calls all it should: layers also held in a plain list are called past the swap.

        The traced graph calls by name and does not have this problem, so it becomes the twin's forward.
        """
        set_quantization(self.student, weights=False, activations=False)
        found = record_calls(self.student, example_input)
        set_quantization(self.student)
        if found.calls is None and self.calls.graph is None:
            return
        missing = {row.name for row in self.rows} - {call.name for call in found.calls or ()}
        if missing and self.calls.graph is not None:
            self._adopt_graph()
        elif missing:
            why = "called through a reference that is not a submodule"
            lost = [row for row in self.rows if row.name in missing]
            self.rows = [row for row in self.rows if row.name not in missing]
            self.unreached += [replace(row, weight_bits=None, activation_bits=None, note=why) for row in lost]

    def _bits(self, name: str, default: int) -> int:
        if name in self.config.layer_bits:
            self.used_bits.add(name)
        return self.config.layer_bits.get(name, default)

    def _check_names(self) -> None:
        for name in sorted(set(self.config.layer_bits) - self.used_bits):
            known = [row.name for row in self.rows]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
            raise ValueError(f"layer_bits names {name!r}, which is not quantized; close matches: {', '.join(near)}")

    def _name_unsupported(self) -> None:
        for name, module in self.modules.items():
            called = self.calls.counts.get(name, 0) > 0
            kind = type(module).__name__
            why = unsupported_layer(module)
            if why == "" and not called:
                why = "never called"
            elif why is None and module_activation(module) is not None:
                why = "" if called else "never called"
            elif why is None:
                why = unsupported_other(module)
            if why:
                self.unreached.append(Row(name, kind, note=why))

    def _layer(self, name: str, module: nn.Conv2d | nn.Linear, *, first: bool, last: bool) -> None:
        config = self.config
        bits, note = config.weight_bits, ""
        if last:
            bits, note = config.last_layer_bits or bits, "last layer"
        if first:
            bits, note = config.first_layer_bits or bits, "first layer"
        if self.calls.calls is None:
            note += " (in order of definition)" if note else ""
        bits = self._bits(name, bits)
        # Integer kernels take codes less their zero points, of either sign where BatchNorm is folded: -127 to 127.
        int8 = config.scheme == "deploy" and bits == 8
        quantizer = WeightQuantizer(
            bits,
            len(module.weight),
            mode="learned" if config.learned_scale else "live",
            method=config.weight_range,
            # Symmetric codes would not hold the 1 of a separate BatchNorm exactly: 3 steps of 2 / 7 in three bits.
            symmetric=(config.weight_symmetric and not hasattr(module, "normalises")) or int8,
            gradient=config.gradient,
            narrow=int8,
        )
        if hasattr(module, "normalises"):
            # All weights are 1, and exactly so on their grid; what trains is the BatchNorm behind it.
            quantizer.requires_grad_(False)
        if isinstance(module, nn.Conv2d):
            self.swaps[module] = QuantizedConv2d.from_float(module, quantizer)
        else:
            self.swaps[module] = QuantizedLinear.from_float(module, quantizer)
        self.rows.append(Row(name, type(module).__name__, weight_bits=bits, note=note))

    def code_bits(self, bits: int, *, non_negative: bool) -> int:
        """The width of a tensor that is to have `bits`: an INT8 around 0 has 7 for what is never negative."""
        return min(bits, 7) if self.config.int8_symmetric and non_negative else bits

    def _quantizer(
        self, name: str, label: str, note: str = "", bits: int | None = None, *, non_negative: bool, **settings: Any
    ) -> ActivationQuantizer:
        config = self.config
        mode: ActivationMode = (
            "learned" if config.learned_scale else "ema" if config.activation_range == "ema" else "fixed"
        )
        bits = self.code_bits(self._bits(name, bits or config.activation_bits), non_negative=non_negative)
        self.rows.append(Row(name, label, activation_bits=bits, note=note))
        quantizer = ActivationQuantizer(
            bits,
            mode=mode,
            symmetric=config.activation_symmetric or config.int8_symmetric,
            non_negative=non_negative,
            gradient=config.gradient,
            method=config.activation_range,
            momentum=config.range_momentum,
            range_steps=config.range_steps,
            **settings,
        )
        parameter = next(self.student.parameters())
        return quantizer.to(parameter.device).eval()

    def _module_activation(self, call: Call, module: nn.Module, kind: str, *, repeated: bool) -> None:
        label = type(module).__name__
        fused = kind in ("relu", "relu6")
        settings: dict[str, Any] = {"non_negative": is_non_negative(kind, module)}
        if next(module.parameters(), None) is not None:
            # Its parameters keep their names: the quantizer comes behind it.
            if call.node is None:
                if not repeated:
                    note = _UNTRACED if self.calls.graph is None else _INSIDE
                    self.unreached.append(Row(call.name, label, note=note))
                return
            self.insert(call.node, call.name + "_quantizer", label, settings)
        elif not repeated:
            settings |= {"activation": kind} if fused else {"function": module}
            shared = call.node is None and self.calls.counts[call.name] > 1
            why = self.calls.problem or _INSIDE
            note = f"one quantizer for {self.calls.counts[call.name]} calls: {why}" if shared else ""
            self.swaps[module] = self._quantizer(call.name, label, note, **settings)
        elif call.node is not None:
            settings |= {"activation": kind} if fused else {"function": module}
            self.insert(call.node, call.name, label, settings, instead=True)

    def _function(self, call: Call) -> None:
        if call.node is None or not call.activation:
            other = "no quantizer for these bounds" if call.kind == "clamp" else "called as a function"
            note = _UNTRACED if call.activation else other
            self.unreached.append(Row(call.name, call.kind, note=note))
            return
        fused = call.kind in ("relu", "relu6")
        settings: dict[str, Any] = {"non_negative": is_non_negative(call.kind, None)}
        settings |= {"activation": call.kind} if fused else {}
        prefix = f"{call.name}." if call.name else ""
        self.insert(call.node, prefix + call.kind, call.kind, settings, instead=fused)

    def insert(
        self, node: fx.Node, base: str, label: str, settings: dict[str, Any], *, instead: bool = False
    ) -> fx.Node:
        """A quantizer behind a node, or in its place, under the first free name `base`, `base_1`, ..."""
        owner, _, last = base.rpartition(".")
        parent = self.student.get_submodule(owner)
        free, count = last, 0
        while hasattr(parent, free):
            count += 1
            free = f"{last}_{count}"
        name = f"{owner}.{free}" if owner else free
        parent.add_module(free, self._quantizer(name, label, **settings))
        graph = node.graph
        with graph.inserting_after(node):
            new = graph.call_module(name, (_input_of(node) if instead else node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if instead:
            graph.erase_node(node)
        self.graph_edited = True
        return new

    def _follow_in_place(self, calls: list[Call]) -> None:
        """What works in place also changes what later readers of its input see: they read its output from now on.

        Activation functions do, and sums, differences, products and quotients.
        """
        assert self.calls.graph is not None
        order = {node: index for index, node in enumerate(self.calls.graph.nodes)}
        activations = {
            call.node
            for call in calls
            if call.activation or (call.kind == "module" and module_activation(self.modules[call.name]) is not None)
        }
        for node in order:
            overwrites = node in activations and is_in_place(node, self.modules)
            source = _input_of(node) if overwrites else overwritten(node)
            if source is None:
                continue
            later = [user for user in source.users if order[user] > order[node]]
            for user in later:
                user.replace_input_with(source, node)
            self.graph_edited |= bool(later)

    def _adopt_graph(self) -> None:
        assert self.calls.graph is not None
        self.calls.graph.lint()
        cls = type(self.student)
        traced = type(fx.GraphModule(self.student, self.calls.graph, cls.__name__)).forward
        members = {"forward": traced, "__module__": cls.__module__, "__doc__": cls.__doc__}
        self.student.__class__ = type(f"Traced{cls.__name__}", (cls,), members)


_UNTRACED = "called as a function in a network that torch.fx cannot trace"
_INSIDE = "called inside a BatchNorm layer"


def _input_of(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source
