"""Calls autograd Functions at the cost of the old style while they keep the new one.

A Function with `setup_context` works inside `torch.func` transforms, but each call of it binds its arguments through
`inspect`, which takes several times as long as a small kernel. So each Function gets a twin whose forward takes `ctx`,
and which is used wherever no transform is active.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

# torch.autograd.Function asks the same; torch gives it no public name. Without it every call is taken for one inside a
# transform: right, and slower.
transforming: Any = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


@functools.cache
def _twin(function: type[Function]) -> type[Function]:
    # torch gives static methods of Functions no types.
    methods: Any = function

    def forward(ctx: Any, *args: Any) -> Any:
        output = methods.forward(*args)
        methods.setup_context(ctx, args, output)
        return output

    body = {"forward": staticmethod(forward), "backward": staticmethod(methods.backward), "__doc__": function.__doc__}
    return type(function.__name__, (Function,), body)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a Function has to be called: for a gradient, or to raise that there is no forward-mode derivative."""
    # A loop and an `or` cost half of a generator in `any`, on a path that small weights feel.
    for tensor in tensors:
        if tensor.requires_grad and torch.is_grad_enabled():
            return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`; all of forward's parameters have to be given."""
    # torch.compile traces the Function itself.
    if torch.compiler.is_compiling() or transforming():
        return function.apply(*args)
    return _twin(function).apply(*args)
