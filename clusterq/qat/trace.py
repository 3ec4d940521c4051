"""Which layers and activation functions a network calls, in execution order: by torch.fx or from one forward pass."""

from __future__ import annotations

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
    "sigmoid": (functional.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_),
    "hardsigmoid": (functional.hardsigmoid,),
    "tanh": (functional.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
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
}
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
    "matmul": (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm),
    "addmm": (torch.addmm, torch.baddbmm),
    "einsum": (torch.einsum,),
    "scaled_dot_product_attention": (functional.scaled_dot_product_attention,),
    "multi_head_attention": (functional.multi_head_attention_forward,),
    "softmax": (functional.softmax, torch.softmax, Tensor.softmax),
    "log_softmax": (functional.log_softmax, torch.log_softmax, Tensor.log_softmax),
}
NON_NEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "softplus"})


def _by_function(table: dict[str, tuple[Any, ...]]) -> dict[Any, str]:
    return {function: kind for kind, functions in table.items() for function in functions}


_ACTIVATION_OF = _by_function(_ACTIVATIONS)
_FLOAT_OF = _by_function(_FLOAT) | {torch._C._nn.scaled_dot_product_attention: "scaled_dot_product_attention"}
_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "prelu")
_FLOAT_METHODS = ("matmul", "mm", "bmm", "softmax", "log_softmax")
_INPLACE_FUNCTIONS = frozenset(
    f for fs in _ACTIVATIONS.values() for f in fs if getattr(f, "__name__", "").endswith("_")
)


def module_activation(module: nn.Module) -> str | None:
    """Name of the activation function a module computes, None for any other module. Hardtanh(0, 6) is relu6."""
    kind = _MODULES.get(type(module))
    if kind == "hardtanh" and isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 6.0):
        return "relu6"
    return kind


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
        node: its place in the graph; None when the network could not be traced.
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


class LayerTracer(fx.Tracer):
    """Traces down to the layers of `torch.nn`, those derived from them, and the quantized ones."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, ActivationQuantizer)):
            return True
        return super().is_leaf_module(m, module_qualified_name)


# Tracing runs a network's own forward on stand-ins for tensors, where unsupported code fails in any of these ways.
_TRACE_ERRORS = (
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
    except _TRACE_ERRORS as error:
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
    found = (_call_of(node) for node in graph.nodes)
    return Calls([call for call in found if call is not None], graph)


def _call_of(node: fx.Node) -> Call | None:
    if node.op == "call_module":
        return Call(str(node.target), "module", False, node)
    if node.op == "call_function":
        activation, other = _ACTIVATION_OF.get(node.target), _FLOAT_OF.get(node.target)
        if getattr(node.target, "__name__", "") == "matmul":
            other = "matmul"
    elif node.op == "call_method":
        name = str(node.target)
        activation = name.rstrip("_") if name in _METHODS else None
        other = name if name in _FLOAT_METHODS else None
    else:
        return None
    kind = activation or other
    if kind is None:
        return None
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return Call(stack[-1][0] if stack else "", kind, activation is not None, node)


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the call overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    # Positional or by keyword, `inplace` is the only flag these functions take.
    return node.target in _INPLACE_FUNCTIONS or any(a is True for a in (*node.args, *node.kwargs.values()))


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
            kind = _ACTIVATION_OF.get(func) or _FLOAT_OF.get(func)
            if kind is not None:
                self.calls.append(Call(name, kind, func in _ACTIVATION_OF))
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
