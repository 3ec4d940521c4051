"""Finding the calls of layers and activation functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterq.qat.trace import evaluating, module_activation, record_calls, trace


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
