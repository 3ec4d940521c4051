"""What every public function of `clusterq.ops` owes its callers, without exception: it compiles whole with dynamic
shapes, its gradient is a true derivative where it claims one, and an argument it cannot use is named.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from clusterq import ops
from clusterq.op_cases import positive, values

Arguments = dict[str, Any]
F64 = torch.float64


def images(n: int, dtype: torch.dtype) -> Tensor:
    return values((n, 3, n + 2, 4), dtype)


def batch_norm(n: int, dtype: torch.dtype) -> Arguments:
    weight, mean = positive((3,), dtype, 1), values((3,), dtype, 3)
    return {
        "x": images(n, dtype),
        "weight": weight,
        "bias": values((3,), dtype, 2),
        "running_mean": mean,
        "running_var": weight.clone(),
        "eps": 1e-5,
    }


def grid(n: int, dtype: torch.dtype) -> Arguments:
    scale = 0.2 * positive((3,), dtype)
    return {"scale": scale, "zero_point": 5 + values((3,), dtype), "quant_min": 0, "quant_max": 15, "axis": 1}


def search(n: int, dtype: torch.dtype) -> Arguments:
    return {"x": values((5 * n, 4), dtype), "centroids": values((n + 3, 4), dtype, 1), "precision": "exact"}


def average(n: int, dtype: torch.dtype) -> Arguments:
    return {
        "centroids": values((n + 3, 4), dtype, 1),
        "cluster_size": positive((n + 3,)),
        "x": values((5 * n, 4), dtype),
        "decay": 0.9,
        "weights": positive((5 * n,), dtype),
        "mode": "codebook",
        "running_sum": values((n + 3, 4), torch.promote_types(dtype, torch.float32), 2),
        "smoothing": 1e-3,
        "dead_below": None,
        "deterministic": True,
        "process_group": None,
    }


def instances(n: int, dtype: torch.dtype) -> Arguments:
    return {"mean": values((n, 3), dtype), "var": positive((n, 3), dtype)}


def classes(n: int) -> Arguments:
    return {"labels": torch.arange(n) % 3, "num_classes": 3, "mask": torch.arange(n) != 1}


def shares(n: int, dtype: torch.dtype) -> Arguments:
    return {"mask": torch.arange(n) != 1, "weights": positive((n,), dtype, 7)}


# All arguments of every public function, for a size n.
FUNCTIONS: dict[str, Callable[[int, torch.dtype], Arguments]] = {
    "fake_quantize": lambda n, dtype: (
        {"x": images(n, dtype)}
        | grid(n, dtype)
        | {"gradient": "learned", "activation": "relu", "semantics": "aten", "save": "auto", "grad_factor": 0.5}
    ),
    "quantize": lambda n, dtype: {"x": images(n, dtype)} | grid(n, dtype),
    "dequantize": lambda n, dtype: {
        "codes": (images(n, dtype) * 4).to(torch.int8),
        "scale": 0.2 * positive((3,)),
        "zero_point": values((3,)),
        "axis": 1,
        "dtype": dtype,
    },
    "fake_quantize_weight": lambda n, dtype: {
        "w": images(n, dtype),
        "bits": 4,
        "axis": 0,
        "symmetric": False,
        "gradient": "clipped",
        "return_qparams": True,
    },
    "observe_fake_quantize": lambda n, dtype: {
        "x": images(n, dtype),
        "running_min": -positive((3,), dtype),
        "running_max": positive((3,), dtype, 1),
        "bits": 4,
        "momentum": 0.9,
        "observe": True,
        "symmetric": False,
        "signed": False,
        "axis": 1,
        "gradient": "clipped",
        "activation": "none",
        "save": "mask",
        "delayed": False,
        "process_group": None,
    },
    "fake_quantize_weights": lambda n, dtype: {
        "weights": [images(n, dtype), values((n, 11), dtype)],
        "bits": 4,
        "axis": 0,
        "symmetric": False,
        "gradient": "clipped",
    },
    "finite_range": lambda n, dtype: {"x": images(n, dtype), "axis": 1, "activation": "relu"},
    "pack_codes": lambda n, dtype: {"codes": (images(n, dtype) * 4).to(torch.int8), "bits": 4},
    "unpack_codes": lambda n, dtype: {
        "packed": torch.arange(4 * n, dtype=torch.uint8).reshape(4, n),
        "bits": 4,
        "length": 2 * n - 1,
        "signed": True,
    },
    "range_to_qparams": lambda n, dtype: {
        "low": values((n,), dtype),
        "high": positive((n,), dtype),
        "quant_min": 0,
        "quant_max": 15,
        "symmetric": False,
    },
    "mse_range": lambda n, dtype: {
        "x": images(n, dtype),
        "quant_min": 0,
        "quant_max": 15,
        "axis": 1,
        "symmetric": False,
        "candidates": 5,
    },
    "instance_statistics": lambda n, dtype: {"x": images(n, dtype)},
    "instance_statistics_list": lambda n, dtype: {"xs": [images(n, dtype), values((n, 11), dtype)]},
    "batch_norm_statistics": lambda n, dtype: {"x": images(n, dtype), "correction": 1} | shares(n, dtype),
    "class_statistics": lambda n, dtype: {"x": images(n, dtype)} | classes(n) | shares(n, dtype),
    "batch_norm_with_statistics": batch_norm,
    "batch_norm_with_instance_statistics": batch_norm,
    "merge_instance_statistics": lambda n, dtype: instances(n, dtype) | {"spatial": n + 2, "correction": 1},
    "merge_class_statistics": lambda n, dtype: instances(n, dtype) | classes(n),
    "nearest_centroid": search,
    "two_nearest_centroids": search,
    "undecided_rows": lambda n, dtype: {name: search(n, dtype)[name] for name in ("x", "centroids")},
    "update_centroids_": lambda n, dtype: average(n, dtype) | {"index": torch.arange(5 * n) % (n + 3)},
    "assign_and_update_": lambda n, dtype: average(n, dtype) | {"precision": "exact"},
}
# What a gradient flows to; a straight-through estimator is no derivative and is checked in test_fake_quant_gradients.
STRAIGHT_THROUGH = {
    "fake_quantize": ("x", "scale", "zero_point"),
    "fake_quantize_weight": ("w",),
    "fake_quantize_weights": ("weights",),
    "observe_fake_quantize": ("x",),
}
TRUE_DERIVATIVE = {
    "instance_statistics": ("x",),
    "instance_statistics_list": ("xs",),
    "batch_norm_statistics": ("x",),
    "class_statistics": ("x",),
    "batch_norm_with_statistics": ("x", "weight", "bias"),
    "batch_norm_with_instance_statistics": ("x", "weight", "bias"),
    "merge_instance_statistics": ("mean", "var"),
    "merge_class_statistics": ("mean", "var"),
    "nearest_centroid": ("x", "centroids"),
    "two_nearest_centroids": ("x", "centroids"),
}
NO_GRADIENT = {
    "quantize",
    "dequantize",
    "finite_range",
    "pack_codes",
    "unpack_codes",
    "range_to_qparams",
    "mse_range",
    "undecided_rows",
    "update_centroids_",
    "assign_and_update_",
}
LEAVES = STRAIGHT_THROUGH | TRUE_DERIVATIVE


def test_every_public_function_is_here_with_every_argument() -> None:
    # The alignment loss takes layers; test_alignment compiles it, checks its derivative and its arguments. k-means has
    # to wait for a number to stop by.
    apart = {"Backend", "backends", "Alignment", "AlignmentTargets", "ClassTargets", "alignment_loss"}
    apart |= {"KMeansResult", "kmeans"}
    public = set(ops.__all__) - apart
    assert public == set(FUNCTIONS) == LEAVES.keys() | NO_GRADIENT
    for name, make in FUNCTIONS.items():
        assert set(inspect.signature(getattr(ops, name)).parameters) == set(make(2, torch.float32)), name


def tensors(value: Any) -> list[Tensor]:
    """Of a value, or of a sequence of values and sequences, in order."""
    if isinstance(value, Tensor):
        return [value]
    nested = isinstance(value, Iterable) and not isinstance(value, str)
    return [t for part in value for t in tensors(part)] if nested else []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_whole_for_any_size(name: str) -> None:
    function, leaves = getattr(ops, name), LEAVES.get(name, ())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    # No two dimensions are equal: equal ones are traced as one.
    for n in (5, 8):
        runs = []
        for run in (function, compiled):
            arguments = FUNCTIONS[name](n, torch.float32)
            wanted = [t.requires_grad_() for leaf in leaves for t in tensors(arguments[leaf])]
            outputs = tensors(run(**arguments))
            differentiable = [t for t in outputs if t.requires_grad]
            slopes = [values(t.shape, t.dtype, 5) for t in differentiable]
            grads = torch.autograd.grad(differentiable, wanted, slopes) if leaves else ()
            assert len(grads) == len(wanted)
            # Arguments too, for those that are changed in place.
            runs.append([*outputs, *grads, *tensors(arguments.values())])
        assert len(runs[0]) == len(runs[1])
        for eager, traced in zip(*runs, strict=True):
            assert eager.stride() == traced.stride() and torch.equal(eager, traced)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0, "another size was compiled again"


# One per family; of the fake-quantize ops one is in test_fake_quant_registration.
@pytest.mark.compiler
@pytest.mark.parametrize("name", ["batch_norm_with_statistics", "nearest_centroid"])
def test_inductor_compiles_forward_and_backward(name: str) -> None:
    """Between operations that it makes kernels of, and for an input whose strides it must hand on as they are."""
    function, leaves = getattr(ops, name), LEAVES[name]
    torch._dynamo.reset()

    def step(x: Tensor, rest: Arguments) -> list[Tensor]:
        return [t * 2 for t in tensors(function(x=x + 1, **rest))]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor")
    for n in (5, 8):
        runs = []
        for run in (step, compiled):
            arguments = FUNCTIONS[name](n, torch.float32)
            if arguments["x"].dim() == 4:
                arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
            wanted = [arguments[leaf].requires_grad_() for leaf in leaves]
            outputs = run(arguments.pop("x"), arguments)
            differentiable = [t for t in outputs if t.requires_grad]
            assert differentiable
            slopes = [values(t.shape, t.dtype, 5) for t in differentiable]
            runs.append([*outputs, *torch.autograd.grad(differentiable, wanted, slopes)])
        for eager, made in zip(*runs, strict=True):
            assert made.dtype == eager.dtype
            torch.testing.assert_close(made, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRUE_DERIVATIVE)
def test_gradient_is_the_true_derivative(name: str) -> None:
    arguments = FUNCTIONS[name](3, F64)
    leaves = TRUE_DERIVATIVE[name]

    def function(*moved: Tensor) -> list[Tensor]:
        # One argument may be a list of leaves.
        given = [list(moved)] if isinstance(arguments[leaves[0]], list) else moved
        outputs = getattr(ops, name)(**{**arguments, **dict(zip(leaves, given, strict=True))})
        return [t for t in outputs if t.is_floating_point()]

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for leaf in leaves for t in tensors(arguments[leaf])])


def unusable(value: Any, optional: bool) -> Iterator[Any]:
    """What cannot stand in the place of `value`."""
    if isinstance(value, Tensor):
        yield from ("x", [1.0], value.to(torch.complex64), value.to_sparse())
    elif isinstance(value, str):
        yield "nope"
    elif isinstance(value, bool):
        return
    elif isinstance(value, int):
        yield from (1.5, "1", True, -(10**9))
    elif isinstance(value, float):
        yield from ("1", None, float("nan"), float("inf"), -1.0)
    elif isinstance(value, torch.dtype):
        yield torch.int8
    if not optional and isinstance(value, (Tensor, int)):
        yield None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_argument_that_cannot_be_used_is_named(name: str) -> None:
    function = getattr(ops, name)
    good = FUNCTIONS[name](3, torch.float32)
    for argument, value in good.items():
        if isinstance(value, bool):
            continue
        optional = argument in ("axis", "mask", "weight", "bias", "weights") and name != "fake_quantize_weight"
        for bad in unusable(value, optional):
            arguments = FUNCTIONS[name](3, torch.float32) | {argument: bad}
            with pytest.raises((TypeError, ValueError), match=rf"\b{argument} (is|has) "):
                function(**arguments)
                pytest.fail(f"{name} takes {argument}={bad!r}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensor_on_another_device_is_named(name: str) -> None:
    good = FUNCTIONS[name](3, torch.float32)
    names = [argument for argument, value in good.items() if isinstance(value, Tensor)]
    for argument in names if len(names) > 1 else ():
        arguments = good | {argument: good[argument].to("meta")}
        # Of two that disagree either may be named.
        with pytest.raises(ValueError, match=rf"^({'|'.join(map(re.escape, names))}) is on (meta|cpu); wanted"):
            getattr(ops, name)(**arguments)
