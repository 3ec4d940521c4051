"""What each call in a network's graph does to a tensor of integer codes: the common ground of scheme deploy.

source     the input image
layer      a quantized Conv2d or Linear: int32 sums
norm       BatchNorm folded into the layer in front of it
quantizer  codes, after ReLU, ReLU6 or a function of the quantizer's own where it has one
passing    leaves values as they are: dropout in evaluation mode, identity
moving     gives the same codes in another order, fewer of them, or zeros beside them: max pooling, flatten, padding
add, mul, cat, average
           sums, products, concatenations, and average pooling of codes: wide until a quantizer follows
function   an activation function on codes: a table
size       not a tensor: shapes and numbers made of them
result     what the network returns
other      has no form in integers here
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from clusterq.nn.folding import integer_norm_of
from clusterq.nn.layers import QuantizedConv2d, QuantizedLinear
from clusterq.nn.quantizers import ActivationQuantizer
from clusterq.qat.trace import function_activation, module_activation, overwritten

Place = Literal[
    "source",
    "layer",
    "norm",
    "quantizer",
    "passing",
    "moving",
    "add",
    "mul",
    "cat",
    "average",
    "function",
    "size",
    "result",
    "other",
]

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_PASSING_MODULES = (nn.Identity, *_DROPOUT)
_MOVING_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
)
_AVERAGE_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_METHODS: dict[str, Place] = {
    **dict.fromkeys(("contiguous", "clone", "detach"), "passing"),
    **dict.fromkeys(("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"), "moving"),
    **dict.fromkeys(("chunk", "split", "narrow", "select", "view_as", "unflatten"), "moving"),
    **dict.fromkeys(("size", "dim", "numel", "stride"), "size"),
    "mean": "average",
    "add": "add",
    "add_": "add",
    "mul": "mul",
    "mul_": "mul",
}
# Results that may lie in the memory of what they were made of.
_VIEWS = {
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "narrow"),
    *("select", "view_as", "unflatten", "contiguous", "detach", "getitem", "dropout", "dropout2d"),
    *("feature_alpha_dropout", "stochastic_depth"),
}
_FUNCTIONS: dict[Any, Place] = {
    **dict.fromkeys((functional.dropout, functional.dropout2d, functional.feature_alpha_dropout), "passing"),
    **dict.fromkeys((functional.max_pool2d, torch.max_pool2d, functional.adaptive_max_pool2d), "moving"),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze), "moving"),
    **dict.fromkeys((torch.unsqueeze, torch.chunk, torch.split, torch.narrow, torch.select), "moving"),
    **dict.fromkeys((functional.pixel_shuffle, functional.channel_shuffle, functional.pixel_unshuffle), "moving"),
    **dict.fromkeys((torch.add, operator.add, operator.iadd), "add"),
    **dict.fromkeys((torch.mul, operator.mul, operator.imul), "mul"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
    **dict.fromkeys((functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.mean), "average"),
    operator.getitem: "moving",
}


def call_name(node: fx.Node) -> str:
    """Readable: the module that is called, or the function and the module whose forward calls it."""
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    prefix = f"{stack[-1][0]}." if stack and stack[-1][0] else ""
    return prefix + str(getattr(node.target, "__name__", node.target)).strip("_")


class Places:
    """Places of all nodes of one graph.

    Args:
        graph: of a network from `clusterq.prepare`, or of one on the way there.
        modules: its modules by name.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._places: dict[fx.Node, Place] = {}
        # Parameters, buffers, and what is made of them alone: they have no codes.
        self._constants: set[fx.Node] = set()
        for node in graph.nodes:
            self.note(node)

    def __getitem__(self, node: fx.Node) -> Place:
        return self._places[node]

    def note(self, node: fx.Node) -> None:
        """Find the place of a node, new or changed; those it reads are known."""
        if self._is_constant(node):
            self._constants.add(node)
        self._places[node] = self._find(node)

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method"):
            return node.op == "get_attr"
        reads = [read for read in node.all_input_nodes if self._places[read] != "size"]
        return bool(reads) and all(read in self._constants for read in reads)

    def _find(self, node: fx.Node) -> Place:
        if node.op == "placeholder":
            return "source"
        if node.op == "output":
            return "result"
        if node.op == "get_attr":
            return "other"
        if node.op == "call_module":
            return _module_place(self.modules[str(node.target)])
        if any(self._places[read] == "size" for read in node.all_input_nodes[:1]) or node.target is getattr:
            return "size"
        if node.op == "call_method":
            place: Place = _METHODS.get(str(node.target), "other")
            function: Any = getattr(Tensor, str(node.target), None)
        else:
            function = node.target
            place = _FUNCTIONS.get(function, "other")
        if node in self._constants:
            return place if place == "size" else "other"
        if place == "other" and getattr(function, "__name__", "") == "stochastic_depth":
            return "passing"
        if place == "other" and function_activation(node):
            return "function"
        if function in (functional.pad, torch._C._nn.pad) and _pads_zeros(node):
            return "moving"
        if function is functional.interpolate and node.kwargs.get("mode", "nearest") == "nearest":
            return "moving"
        both = len([a for a in node.args[:2] if isinstance(a, fx.Node)]) == 2
        if place in ("add", "mul") and not (both and not node.kwargs):
            return "other"
        if place in ("add", "mul", "cat") and any(a in self._constants for a in operands(node, place)):
            return "other"
        # What else lies in that memory changes too.
        overwrites = overwritten(node)
        if overwrites is not None and self.is_view(overwrites):
            return "other"
        return place

    def is_view(self, node: fx.Node) -> bool:
        """Whether a tensor may lie in the memory of another that the network reads, too."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return self[node] == "passing" or isinstance(module, (nn.Flatten, nn.Unflatten))
        return self[node] in ("passing", "moving") and str(getattr(node.target, "__name__", node.target)) in _VIEWS


def _module_place(module: nn.Module) -> Place:
    if isinstance(module, (QuantizedConv2d, QuantizedLinear)):
        return "layer"
    if isinstance(module, ActivationQuantizer):
        return "quantizer"
    if isinstance(module, _BatchNorm):
        return "norm" if integer_norm_of(module) is not None else "other"
    if isinstance(module, _PASSING_MODULES) or type(module).__name__ == "StochasticDepth":
        return "passing"
    if isinstance(module, nn.Upsample):
        return "moving" if module.mode == "nearest" else "other"
    if isinstance(module, nn.ConstantPad2d) and module.value != 0:
        return "other"
    if isinstance(module, (*_MOVING_MODULES, nn.ConstantPad2d)):
        return "moving"
    if isinstance(module, _AVERAGE_MODULES):
        return "average"
    return "other" if module_activation(module) is None else "function"


def _pads_zeros(node: fx.Node) -> bool:
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    zero = value is None or (isinstance(value, (int, float)) and value == 0)
    return bool(mode == "constant" and zero)


def operands(node: fx.Node, place: Place) -> list[fx.Node]:
    """The tensors a node reads, without the sizes it may read beside them."""
    if place in ("add", "mul"):
        return [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if place == "cat":
        tensors: Any = node.args[0] if node.args else node.kwargs["tensors"]
        return [tensors] if isinstance(tensors, fx.Node) else list(tensors)
    if place in ("size", "source"):
        return []
    if place == "result":
        return list(node.all_input_nodes)
    return node.all_input_nodes[:1]


def readers(node: fx.Node, places: Places) -> Iterator[fx.Node]:
    """Whatever reads the values of a node, behind calls that only pass them on or move them."""
    for user in node.users:
        if places[user] in ("passing", "moving"):
            yield from readers(user, places)
        elif places[user] != "size":
            yield user


def origin(node: fx.Node, places: Places, *, moved: bool = True) -> fx.Node:
    """The call that made the values of a node, behind calls that pass them on and, with `moved`, that move them."""
    while places[node] == "passing" or (moved and places[node] == "moving"):
        node = operands(node, places[node])[0]
    return node
