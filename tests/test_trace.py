"""Finding the calls of layers and activation functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.qat.trace import evaluating, is_in_place, module_activation, record_calls, trace


class Branching(nn.Module):
    """Cannot be traced: its forward looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        if x.sum() >= 0:
            x = self.act(self.second(x))
        return torch.tanh(functional.linear(x.relu(), self.first.weight))


def test_calls_come_in_execution_order_from_graph_and_from_running() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    assert [c.name for c in record_calls(network).calls or []] == ["0", "1", "2", "3"]
    watched = record_calls(Branching(), torch.randn(2, 3))
    assert watched.graph is None and "Branching cannot be traced" in (watched.problem or "")
    kinds = [(c.name, c.kind, c.activation) for c in watched.calls or []]
    assert kinds == [
        ("first", "module", False),
        ("act", "module", False),
        ("second", "module", False),
        ("act", "module", False),
        ("", "relu", True),
        ("", "linear", False),
        ("", "tanh", True),
    ]
    assert watched.counts == {"first": 1, "act": 2, "second": 1}


def test_without_trace_and_example_nothing_is_known() -> None:
    assert record_calls(Branching()).calls is None


def test_watching_leaves_no_hooks_and_keeps_modes() -> None:
    network = Branching().train()
    network.first.eval()
    record_calls(network, torch.randn(2, 3))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())
    assert network.training and not network.first.training


def test_trace_names_the_reason() -> None:
    with pytest.raises(ValueError, match=r"Branching cannot be traced by .*: TraceError"):
        trace(Branching())


def test_hardtanh_between_zero_and_six_is_relu6() -> None:
    assert module_activation(nn.Hardtanh(0, 6)) == "relu6"
    assert module_activation(nn.Hardtanh()) == "hardtanh"
    assert module_activation(nn.BatchNorm2d(2)) is None


def test_evaluating_restores_mixed_modes_after_an_error() -> None:
    network = nn.Sequential(nn.ReLU(), nn.Dropout()).train()
    network[1].eval()
    with pytest.raises(KeyError), evaluating(network):
        assert not network.training
        raise KeyError
    assert network.training and not network[1].training


class Calling(nn.Module):
    """Calls one function on the output of a layer; with `look`, in a way that cannot be traced."""

    def __init__(self, function: Callable[[Tensor], Tensor], look: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)
        self.function = function
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.look and y.sum() == 12345:
            return x
        return self.function(y)


CLAMPS: dict[str, tuple[Callable[..., Any], tuple[str, bool]]] = {
    "clamp method": (lambda x: x.clamp(min=0), ("relu", True)),
    "clamp method in place": (lambda x: x.clamp_(0, None), ("relu", True)),
    "clip method": (lambda x: x.clip(0), ("relu", True)),
    "clip method to 6": (lambda x: x.clip_(0.0, 6.0), ("relu6", True)),
    "clamp function": (lambda x: torch.clamp(x, 0, 6), ("relu6", True)),
    "clamp keywords": (lambda x: torch.clamp(input=x, max=6, min=0), ("relu6", True)),
    "clamp in place": (lambda x: torch.clamp_(x, 0), ("relu", True)),
    "clip function": (lambda x: torch.clip(x, min=0.0), ("relu", True)),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), ("relu", True)),
    "clamp_min method": (lambda x: x.clamp_min_(min=0), ("relu", True)),
    "hardtanh": (lambda x: functional.hardtanh(x, 0, 6), ("relu6", True)),
    "hardtanh keywords": (lambda x: functional.hardtanh(x, min_val=0, max_val=6), ("relu6", True)),
    "hardtanh to 1": (lambda x: functional.hardtanh(x, 0), ("hardtanh", True)),
    "hardtanh of both signs": (lambda x: functional.hardtanh(x, -2, 2), ("hardtanh", True)),
    "both signs": (lambda x: x.clamp(-1, 1), ("clamp", False)),
    "small minimum": (lambda x: torch.clamp(x, min=1e-6), ("clamp", False)),
    "maximum only": (lambda x: torch.clip(x, max=6), ("clamp", False)),
    "clamp_max": (lambda x: x.clamp_max(0), ("clamp", False)),
    "bounds of 0 and 1": (lambda x: x.clamp(0, 1), ("clamp", False)),
    "tensor bound": (lambda x: x.clamp(min=x.detach().mean()), ("clamp", False)),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(())), ("maximum", False)),
    "minimum method": (lambda x: x.minimum(torch.zeros(())), ("minimum", False)),
}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("look", [False, True], ids=["traced", "watched"])
def test_bounds_of_a_clamp_tell_what_it_is(name: str, look: bool) -> None:
    function, want = CLAMPS[name]
    found = record_calls(Calling(function, look), torch.randn(2, 2, 3, 3))
    assert (found.graph is None) is look
    assert [(c.kind, c.activation) for c in found.calls or [] if c.kind != "module"] == [want]


# Every activation function of torch.nn.functional that has no bounds of its own to look at.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "leaky_relu": functional.leaky_relu,
    "prelu": lambda x: functional.prelu(x, torch.ones(1)),
    "elu": functional.elu,
    "selu": functional.selu,
    "celu": functional.celu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "sigmoid": functional.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
    "tanh": functional.tanh,
    "logsigmoid": functional.logsigmoid,
    "softsign": functional.softsign,
    "tanhshrink": functional.tanhshrink,
    "hardshrink": functional.hardshrink,
    "softshrink": functional.softshrink,
    "threshold": lambda x: functional.threshold(x, 0.1, 0.0),
    "rrelu": functional.rrelu,
    "glu": lambda x: functional.glu(x, 1),
}
FLOAT: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: functional.softmax(x, 1),
    "log_softmax": lambda x: functional.log_softmax(x, 1),
    "softmin": lambda x: functional.softmin(x, 1),
    "gumbel_softmax": functional.gumbel_softmax,
    "matmul": lambda x: x @ x,
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *FLOAT])
@pytest.mark.parametrize("look", [False, True], ids=["traced", "watched"])
def test_functions_are_known_by_name(name: str, look: bool) -> None:
    found = record_calls(Calling({**FUNCTIONS, **FLOAT}[name], look), torch.randn(2, 2, 3, 3))
    assert (found.graph is None) is look
    calls = [(c.kind, c.activation) for c in found.calls or [] if c.kind != "module"]
    assert calls == [(name, name in FUNCTIONS)]


def test_modules_are_known_by_the_name_of_their_function() -> None:
    modules = {
        "logsigmoid": nn.LogSigmoid(), "softsign": nn.Softsign(), "tanhshrink": nn.Tanhshrink(),
        "hardshrink": nn.Hardshrink(), "softshrink": nn.Softshrink(), "threshold": nn.Threshold(0.1, 0),
        "rrelu": nn.RReLU(), "glu": nn.GLU(1),
    }  # fmt: skip
    assert {kind: module_activation(module) for kind, module in modules.items()} == {kind: kind for kind in modules}


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda x: functional.rrelu(x, 0.1, 0.3, True), False),
        (lambda x: functional.rrelu(x, training=True), False),
        (lambda x: functional.rrelu(x, 0.1, 0.3, False, True), True),
        (lambda x: functional.rrelu(x, inplace=True), True),
        (lambda x: functional.threshold(x, 0.1, 0.0, True), True),
        (lambda x: torch.clamp(x, 0), False),
        (lambda x: torch.clamp_(x, 0), True),
        (lambda x: x.clamp_(0), True),
    ],
)
def test_in_place_calls(function: Callable[[Tensor], Tensor], want: bool) -> None:
    network = Calling(function)
    found = record_calls(network)
    node = (found.calls or [])[-1].node
    assert node is not None and is_in_place(node, dict(network.named_modules())) is want
