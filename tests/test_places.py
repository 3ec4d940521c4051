"""Places of calls in a graph: what moves codes, what sums them, what has no form in integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from clusterq.qat.places import Places, call_name, operands, origin, readers
from clusterq.qat.trace import trace

CASES = {
    "moving": [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x[:, :, ::2, ::2],
        lambda x: functional.pad(x, (1, 1)),
        lambda x: functional.pad(x, (1, 1), value=0.0),
        lambda x: functional.max_pool2d(x, 2),
        lambda x: x.chunk(2, dim=1),
        lambda x: functional.interpolate(x, scale_factor=2),
        lambda x: x.permute(0, 2, 3, 1),
    ],
    "add": [lambda x: x + x, lambda x: torch.add(x, x), lambda x: x.add(x), lambda x: x.add_(x)],
    "mul": [lambda x: x * x, lambda x: torch.mul(x, x), lambda x: x.mul(x)],
    "cat": [lambda x: torch.cat([x, x], 1), lambda x: torch.concat((x, x), dim=1)],
    "average": [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, dim=(2, 3)),
        lambda x: functional.avg_pool2d(x, 2),
        lambda x: functional.adaptive_avg_pool2d(x, 1),
    ],
    "function": [functional.silu, lambda x: x.sigmoid(), torch.tanh],
    "passing": [lambda x: functional.dropout(x, 0.5), lambda x: x.contiguous(), lambda x: x.clone()],
    "other": [
        lambda x: x + 1.0,
        lambda x: torch.add(x, x, alpha=2),
        lambda x: x * 2,
        lambda x: functional.pad(x, (1, 1), value=1.0),
        lambda x: functional.pad(x, (1, 1), mode="reflect"),
        lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: torch.softmax(x, 1),
        lambda x: x.exp(),
    ],
    "size": [lambda x: x.size(), lambda x: x.shape, lambda x: x.size(0) * 2],
}


class Around(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def _graph(function: object) -> fx.Graph:
    return fx.Tracer().trace(Around(function))


@pytest.mark.parametrize("place", CASES)
def test_places_of_functions(place: str):
    for number, function in enumerate(CASES[place]):
        graph = _graph(function)
        places = Places(graph, {})
        last = list(graph.nodes)[-2]
        assert places[last] == place, (place, number)


MODULES = {
    "moving": [
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.ZeroPad2d(1),
        nn.ConstantPad2d(1, 0.0),
        nn.PixelShuffle(2),
        nn.Upsample(4),
    ],
    "average": [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)],
    "passing": [nn.Identity(), nn.Dropout(), nn.Dropout2d()],
    "function": [nn.SiLU(), nn.PReLU()],
    "other": [nn.ConstantPad2d(1, 1.0), nn.Upsample(4, mode="bilinear"), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)],
}


@pytest.mark.parametrize("place", MODULES)
def test_places_of_modules(place: str):
    for module in MODULES[place]:
        net = nn.Sequential(module)
        graph = fx.Tracer().trace(net)
        assert Places(graph, dict(net.named_modules()))[list(graph.nodes)[1]] == place, module


class Constants(nn.Module):
    """Sums, products and concatenations with a parameter or buffer, moved or not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.tensor([1, 2, 3, 4]))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        x = self.shift + x
        x += self.scale
        return torch.cat([x, self.shift.view(x.size(0), -1)])


def test_constants_have_no_codes():
    net = Constants()
    graph = trace(net)
    places = Places(graph, dict(net.named_modules()))
    names = {node.name: places[node] for node in graph.nodes if node.op.startswith("call")}
    assert names == {"size": "size"} | dict.fromkeys(("view", "mul", "add", "iadd", "cat"), "other")


def test_parts_of_a_list_are_joined():
    graph = _graph(lambda x: torch.cat(x.chunk(2), 1))
    places = Places(graph, {})
    cat = list(graph.nodes)[-2]
    assert places[cat] == "cat" and places[origin(operands(cat, "cat")[0], places)] == "source"


def test_origin_readers_and_operands():
    """Readers stand behind calls that move values, origins in front of them; sizes are neither."""
    graph = _graph(lambda x: torch.cat([functional.silu(x).flatten(1).view(x.size(0), -1)] * 2, 1))
    places = Places(graph, {})
    nodes = {str(places[node]): node for node in graph.nodes}
    silu, cat = nodes["function"], nodes["cat"]
    assert [str(places[r]) for r in readers(silu, places)] == ["cat"]
    assert {origin(o, places) for o in operands(cat, "cat")} == {silu}
    assert origin(operands(cat, "cat")[0], places, moved=False) is not silu
    assert operands(nodes["size"], "size") == [] and call_name(silu) == "silu"
