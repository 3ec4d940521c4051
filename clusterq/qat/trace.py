"""Which layers and activation functions a network calls, in execution order: by torch.fx or from one forward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from clusterq.nn.quantizers import ActivationQuantizer

# Activation functions by the name their quantizer goes by; in-place forms compute the same values.
_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "relu": (functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    "relu6": (functional.relu6,),
    "hardtanh": (functional.hardtanh, functional.hardtanh_),
    "hardswish": (functional.hardswish,),
    "silu": (functional.silu,),
    "gelu": (functional.gelu,),
    "leaky_relu": (functional.leaky_relu, functional.leaky_relu_),
    "prelu": (functional.prelu, Tensor.prelu),
    "elu": (functional.elu, functional.elu_),
    "selu": (functional.selu, functional.selu_, torch.selu, torch.selu_),
    "celu": (functional.celu, functional.celu_, torch.celu, torch.celu_),
    "mish": (functional.mish,),
    "softplus": (functional.softplus,),
    "sigmoid": (
        functional.sigmoid,
        torch.sigmoid,
        torch.sigmoid_,
        torch.special.expit,
        Tensor.sigmoid,
        Tensor.sigmoid_,
    ),
    "hardsigmoid": (functional.hardsigmoid,),
    "tanh": (functional.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
    "logsigmoid": (functional.logsigmoid,),
    "softsign": (functional.softsign,),
    "tanhshrink": (functional.tanhshrink,),
    "hardshrink": (functional.hardshrink, torch.hardshrink, Tensor.hardshrink),
    "softshrink": (functional.softshrink,),
    "threshold": (functional.threshold, torch.threshold, torch.threshold_),
    "rrelu": (functional.rrelu, functional.rrelu_, torch.rrelu, torch.rrelu_),
    "glu": (functional.glu,),
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Tanh: "tanh",
    nn.LogSigmoid: "logsigmoid",
    nn.Softsign: "softsign",
    nn.Tanhshrink: "tanhshrink",
    nn.Hardshrink: "hardshrink",
    nn.Softshrink: "softshrink",
    nn.Threshold: "threshold",
    nn.RReLU: "rrelu",
    nn.GLU: "glu",
}
# A clamp computes relu or relu6, or else limits values for any other purpose: its bounds tell.
_CLAMPS = frozenset(
    {
        *(torch.clamp, torch.clamp_, torch.clip, torch.clip_, torch.clamp_min, torch.clamp_min_),
        *(Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_, Tensor.clamp_min, Tensor.clamp_min_),
        *(torch.clamp_max, torch.clamp_max_, Tensor.clamp_max, Tensor.clamp_max_),
    }
)
# Products and activation functions that no quantizer is made for.
_FLOAT: dict[str, tuple[Any, ...]] = {
    "conv1d": (functional.conv1d,),
    "conv2d": (functional.conv2d,),
    "conv3d": (functional.conv3d,),
    "conv_transpose1d": (functional.conv_transpose1d,),
    "conv_transpose2d": (functional.conv_transpose2d,),
    "conv_transpose3d": (functional.conv_transpose3d,),
    "linear": (functional.linear,),
    "bilinear": (functional.bilinear,),
    "matmul": (
        torch.matmul,
        operator.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.mm,
        Tensor.mm,
        torch.bmm,
        Tensor.bmm,
    ),
    "addmm": (torch.addmm, torch.baddbmm),
    "einsum": (torch.einsum,),
    "scaled_dot_product_attention": (functional.scaled_dot_product_attention,),
    "multi_head_attention": (functional.multi_head_attention_forward,),
    "softmax": (functional.softmax, torch.softmax, torch.special.softmax, Tensor.softmax),
    "log_softmax": (functional.log_softmax, torch.log_softmax, torch.special.log_softmax, Tensor.log_softmax),
    "softmin": (functional.softmin,),
    "gumbel_softmax": (functional.gumbel_softmax,),
    "maximum": (torch.maximum, Tensor.maximum),
    "minimum": (torch.minimum, Tensor.minimum),
}
NON_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softplus"})


def _by_function(table: dict[str, tuple[Any, ...]]) -> dict[Any, str]:
    return {function: kind for kind, functions in table.items() for function in functions}


_ACTIVATION_OF = _by_function(_ACTIVATIONS)
_FLOAT_OF = _by_function(_FLOAT) | {torch._C._nn.scaled_dot_product_attention: "scaled_dot_product_attention"}
_INPLACE_FUNCTIONS = frozenset(f for f in (*_ACTIVATION_OF, *_CLAMPS) if getattr(f, "__name__", "").endswith("_"))


def module_activation(module: nn.Module) -> str | None:
    """Name of the activation function a module computes, None for any other module. Hardtanh(0, 6) is relu6."""
    kind = _MODULES.get(type(module))
    if kind == "hardtanh" and isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 6.0):
        return "relu6"
    return kind


def _kind_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bool] | None:
    """Kind of a call as in `Call`, and whether a quantizer is made for it; None for any other function."""
    kind = _ACTIVATION_OF.get(function)
    if kind == "hardtanh" or function in _CLAMPS:
        kind = _relu_within(function, args, kwargs) or kind
        return (kind, True) if kind else ("clamp", False)
    if kind is not None:
        return kind, True
    kind = _FLOAT_OF.get(function)
    return None if kind is None else (kind, False)


def _relu_within(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """relu for bounds (0, none) and relu6 for (0, 6), given as numbers; None for all others."""
    name = function.__name__.rstrip("_")
    if name == "clamp_max":
        return None
    hardtanh = name == "hardtanh"
    low = args[1] if len(args) > 1 else kwargs.get("min_val" if hardtanh else "min")
    high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0) if hardtanh else kwargs.get("max")
    if not isinstance(low, (int, float)) or low != 0:
        return None
    if high is None:
        return "relu"
    return "relu6" if isinstance(high, (int, float)) and high == 6 else None


def is_non_negative(kind: str, module: nn.Module | None) -> bool:
    """Whether values of this activation function are never below zero."""
    return kind in NON_NEGATIVE or (isinstance(module, nn.Hardtanh) and module.min_val >= 0)


@dataclass
class Call:
    """One call in a forward pass.

    Attributes:
        name: of the called module, or of the module whose forward calls the function.
        kind: `"module"`, or the name of the activation function or float operation that is called.
        activation: the call computes an activation function.
        node: its place in the graph; None when the network could not be traced, and inside a BatchNorm layer, which is
            one node with the activation function it applies.
    """

    name: str
    kind: str
    activation: bool
    node: fx.Node | None = None


@dataclass
class Calls:
    """Calls in execution order.

    Attributes:
        calls: None when the network could neither be traced nor run.
        graph: of the network, None when tracing failed.
        problem: why tracing failed.
    """

    calls: list[Call] | None
    graph: fx.Graph | None = None
    problem: str | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for call in self.calls or ():
            if call.kind == "module":
                self.counts[call.name] = self.counts.get(call.name, 0) + 1


# What overwrites its first operand, beside activation functions, and the same in memory of its own.
OUT_OF_PLACE: dict[Any, Any] = {
    **{operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub},
    **{operator.itruediv: operator.truediv, "add_": "add", "mul_": "mul", "sub_": "sub", "div_": "div"},
}


class _Proxy(fx.Proxy):
    """Knows `x += y` from `x = x + y`: whoever else holds x sees the sum. fx takes one for the other."""

    def _in_place(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class LayerTracer(fx.Tracer):
    """Traces down to the layers of `torch.nn`, those derived from them, and the quantized ones."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, ActivationQuantizer)):
            return True
        return super().is_leaf_module(m, module_qualified_name)


# Tracing runs a network's own forward on stand-ins for tensors, where unsupported code fails in any of these ways.
TRACE_ERRORS = (
    fx.proxy.TraceError,
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    ArithmeticError,
)


def trace(model: nn.Module) -> fx.Graph:
    """The network's graph with its layers as nodes. Raises ValueError with the reason when it cannot be traced."""
    try:
        return LayerTracer().trace(model)
    except TRACE_ERRORS as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {type(error).__name__}: {text}"
        ) from error


def record_calls(model: nn.Module, example_input: Tensor | None = None) -> Calls:
    """Calls of the network in execution order: from its graph, else from one forward pass of `example_input`."""
    try:
        graph = trace(model)
    except ValueError as error:
        return Calls(None if example_input is None else _watch(model, example_input), problem=str(error))
    names = {module: name for name, module in model.named_modules()}
    calls: list[Call] = []
    for node in graph.nodes:
        call = _call_of(node)
        if call is not None:
            calls.append(call)
            if call.kind == "module":
                calls += _within_batch_norm(model.get_submodule(call.name), names)
    return Calls(calls, graph)


def _within_batch_norm(layer: nn.Module, names: dict[nn.Module, str]) -> Iterator[Call]:
    """Activation functions that a subclass of BatchNorm holds and so applies, as timm's BatchNormAct2d: one node."""
    if isinstance(layer, _BatchNorm):
        for module in layer.modules():
            if isinstance(module, ActivationQuantizer) or module_activation(module) is not None:
                yield Call(names[module], "module", False)


def _call_of(node: fx.Node) -> Call | None:
    if node.op == "call_module":
        return Call(str(node.target), "module", False, node)
    function: Any
    if node.op == "call_function":
        function = node.target
    elif node.op == "call_method":
        function = getattr(Tensor, str(node.target), None)
    else:
        return None
    found = _kind_of(function, node.args, node.kwargs)
    if found is None:
        return None
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return Call(stack[-1][0] if stack else "", *found, node)


def function_activation(node: fx.Node) -> bool:
    """Whether a node calls an activation function, as a function or a method."""
    call = _call_of(node)
    return call is not None and call.activation


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the call overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    # `inplace` is the only flag these functions take, except that rrelu has `training` before it.
    flags = node.args[4:] if _ACTIVATION_OF.get(node.target) == "rrelu" else node.args
    return node.target in _INPLACE_FUNCTIONS or node.kwargs.get("inplace") is True or any(a is True for a in flags)


def overwritten(node: fx.Node) -> fx.Node | None:
    """The operand that a sum, difference, product or quotient in place overwrites; None for any other call."""
    first = node.args[0] if node.args else None
    in_place = node.op in ("call_function", "call_method") and node.target in OUT_OF_PLACE
    return first if in_place and isinstance(first, fx.Node) else None


class _Watch(TorchFunctionMode):
    """Notes calls of activation functions and products that are made outside the layers of `torch.nn`."""

    def __init__(self, calls: list[Call], stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.calls = calls
        self.stack = stack

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name, module = self.stack[-1]
        if not LayerTracer().is_leaf_module(module, name):
            found = _kind_of(func, args, kwargs or {})
            if found is not None:
                self.calls.append(Call(name, *found))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _watch(model: nn.Module, example_input: Tensor) -> list[Call]:
    calls: list[Call] = []
    stack: list[tuple[str, nn.Module]] = [("", model)]
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append((name, module))
            calls.append(Call(name, "module", False))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    try:
        for name, module in model.named_modules():
            if module is not model:
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave))
        with evaluating(model), _Watch(calls, stack):
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside this context; afterwards every module has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
