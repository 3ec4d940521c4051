"""The drop-in FakeQuantize modules against torch.ao's own: values, gradients, ranges, checkpoints, compilation."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

if importlib.util.find_spec("torch.ao.quantization") is None:
    pytest.skip("this torch has no torch.ao.quantization", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    from clusterq.nn import FakeQuantize, FusedMovingAvgObsFakeQuantize, LearnableFakeQuantize

pytestmark = pytest.mark.filterwarnings("ignore")

Make = Callable[[Any, Any], nn.Module]
MOVING, CHANNELS = ao.MovingAverageMinMaxObserver, ao.MovingAveragePerChannelMinMaxObserver
SIGNED = {"quant_min": -8, "quant_max": 7, "dtype": torch.qint8}
UNSIGNED = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}
# Settings that both constructors take.
KINDS: dict[str, dict[str, Any]] = {
    "moving": {"observer": MOVING, **UNSIGNED},
    "moving symmetric": {"observer": MOVING, **SIGNED, "qscheme": torch.per_tensor_symmetric},
    "min/max": {"observer": ao.MinMaxObserver, **SIGNED},
    "channels": {"observer": CHANNELS, **SIGNED, "qscheme": torch.per_channel_symmetric, "ch_axis": 0},
    "channels affine": {"observer": ao.PerChannelMinMaxObserver, **SIGNED, "qscheme": torch.per_channel_affine},
    "histogram": {"observer": ao.HistogramObserver, **UNSIGNED},
}
FUSED = ("moving", "moving symmetric", "channels")


def pair(kind: str, fused: bool = False) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (
        (FusedMovingAvgObsFakeQuantize, ao.FusedMovingAvgObsFakeQuantize) if fused else (FakeQuantize, ao.FakeQuantize)
    )
    settings = copy.deepcopy(KINDS[kind])
    return ours(**settings), theirs(**settings)


def step(module: nn.Module, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, slope)[0]


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    mine, others = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(others)
    for name, value in others.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name


@pytest.mark.parametrize(
    ("kind", "fused"), [(k, False) for k in KINDS] + [(k, True) for k in FUSED], ids=lambda v: str(v)
)
def test_training_steps_are_those_of_torch(kind: str, fused: bool) -> None:
    torch.manual_seed(1)
    ours, theirs = pair(kind, fused)
    for number in range(6):
        x, slope = torch.randn(6, 5, 4, 4) * (1 + number) + 0.3, torch.randn(6, 5, 4, 4)
        if number == 4:
            ours.disable_observer()  # type: ignore[operator]
            theirs.disable_observer()  # type: ignore[operator]
        for got, want in zip(step(ours, x, slope), step(theirs, x, slope), strict=True):
            assert torch.equal(got, want), number
        same_state(ours, theirs)
    for module in (ours, theirs):
        module.disable_fake_quant()  # type: ignore[operator]
    assert torch.equal(ours(x), x) and torch.equal(theirs(x), x)


@pytest.mark.parametrize("export", ["trained", "observer"])
def test_exported_parameters_are_those_trained_with_unless_told_otherwise(export: str) -> None:
    ours = FusedMovingAvgObsFakeQuantize(observer=MOVING, **UNSIGNED, export=export)  # type: ignore[arg-type]
    theirs = ao.FusedMovingAvgObsFakeQuantize(observer=MOVING, **UNSIGNED)
    x = torch.tensor([-1.0, 0.3, 2.0])
    ours(x), theirs(x)
    scale, zero_point = ours.calculate_qparams()
    if export == "observer":
        assert torch.equal(scale, theirs.calculate_qparams()[0])
    else:
        assert torch.equal(scale, theirs.scale) and torch.equal(zero_point.int(), theirs.zero_point.int())


@pytest.mark.parametrize(
    ("kind", "fused"), [("moving", False), ("channels", False), ("moving", True), ("channels", True)]
)
def test_checkpoints_load_both_ways(kind: str, fused: bool) -> None:
    torch.manual_seed(2)
    x, slope = torch.randn(6, 5), torch.randn(6, 5)
    for trained, fresh in (pair(kind, fused), pair(kind, fused)[::-1]):
        trained(x * 3)
        trained.disable_observer()  # type: ignore[operator]
        fresh.load_state_dict(trained.state_dict())
        same_state(trained, fresh)
        # The flags too: neither moves its range now.
        for got, want in zip(step(fresh, x, slope), step(trained, x, slope), strict=True):
            assert torch.equal(got, want)
        same_state(trained, fresh)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("grad_scaling", [False, True])
def test_learned_steps_are_those_of_torch(channels: int, grad_scaling: bool) -> None:
    torch.manual_seed(3)
    per_channel = channels > 1
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    observer = CHANNELS if per_channel else MOVING
    settings = {
        "observer": observer,
        "quant_min": -8,
        "quant_max": 7,
        "channel_len": channels if per_channel else -1,
        "use_grad_scaling": grad_scaling,
        "dtype": torch.qint8,
        "qscheme": scheme,
    }
    if per_channel:
        settings["ch_axis"] = 0
    modules = [kind(**settings) for kind in (LearnableFakeQuantize, _LearnableFakeQuantize)]
    x, slope = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    for module in modules:
        module.enable_static_estimate()
        module(x)
        module.enable_param_learning()
    same_state(*modules)
    for number in range(3):
        results = []
        for module in modules:
            leaf = (x * (1 + number)).requires_grad_()
            y = module(leaf)
            results.append((y.detach(), *torch.autograd.grad(y, (leaf, module.scale, module.zero_point), slope)))
        for got, want in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(got, want)
        for got, want in zip(results[0][2:], results[1][2:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.last = nn.ReLU(), nn.Linear(8, 4)
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.first(self.quant(x))))
        return self.dequant(self.last(x.mean((2, 3))))  # type: ignore[no-any-return]


def qconfig(activation: Any, weight: Any) -> Any:
    return ao.QConfig(
        activation=activation.with_args(observer=MOVING, quant_min=0, quant_max=127, dtype=torch.quint8),
        weight=weight.with_args(
            observer=CHANNELS, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
        ),
    )


def train(network: nn.Module) -> list[float]:
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(4):
        loss = (network(torch.randn(6, 3, 8, 8)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("flow", ["eager", "fx"])
@pytest.mark.parametrize("fused", [False, True])
def test_quantization_aware_training_of_a_network(flow: str, fused: bool) -> None:
    torch.manual_seed(4)
    base = Network().train()
    classes = (
        (FusedMovingAvgObsFakeQuantize, ao.FusedMovingAvgObsFakeQuantize) if fused else (FakeQuantize, ao.FakeQuantize)
    )
    prepared = []
    for kind in classes:
        network = copy.deepcopy(base)
        config = qconfig(kind, kind)
        if flow == "eager":
            network.qconfig = config
            ao.fuse_modules_qat(network, [["first", "norm", "relu"]], inplace=True)
            prepared.append(ao.prepare_qat(network))
        else:
            mapping = ao.QConfigMapping().set_global(config)
            prepared.append(quantize_fx.prepare_qat_fx(network, mapping, torch.randn(1, 3, 8, 8)))
    assert any(isinstance(module, classes[0]) for module in prepared[0].modules())
    assert train(prepared[0]) == train(prepared[1])
    same_state(*prepared)
    if fused:
        # What torch exports.
        for module in prepared[0].modules():
            if isinstance(module, FusedMovingAvgObsFakeQuantize):
                module.export = "observer"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this torch cannot run the converted network")
    torch.backends.quantized.engine = "fbgemm"
    convert = ao.convert if flow == "eager" else quantize_fx.convert_fx
    ours, theirs = (convert(network.eval()) for network in prepared)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["moving", "channels"])
def test_compiled_once_for_all_batch_sizes(kind: str, fused: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    ours, expected = pair(kind, fused)[0], pair(kind, fused)[0]
    shapes = [(5, n, 3) for n in (4, 6, 9, 12)]
    ours(torch.ones(shapes[0])), expected(torch.ones(shapes[0]))
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=count, fullgraph=True)
    for shape in shapes:
        x, slope = torch.randn(shape), torch.randn(shape)
        for got, want in zip(step(compiled, x, slope), step(expected, x, slope), strict=True):
            assert torch.equal(got, want)
        same_state(ours, expected)
    # One for the first size, one for any size.
    assert count.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(dtype: torch.dtype) -> None:
    for kind in ("moving", "channels"):
        module = pair(kind)[0]
        x = torch.randn(5, 4).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == dtype and torch.autograd.grad(y.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("fused", [False, True])
def test_values_that_are_not_finite_do_not_spoil_the_range(fused: bool) -> None:
    module = pair("moving", fused)[0]
    module(torch.tensor([-1.0, 2.0]))
    before = copy.deepcopy(module.state_dict())
    y = module(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5]))
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name
    assert y[0].isnan() and y[1:].isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_disabled_observer_sees_nothing(fused: bool) -> None:
    """Not even to size the buffers of its channels."""
    ours, theirs = pair("channels", fused)
    for module in (ours, theirs):
        module.disable_observer()
        module.disable_fake_quant()
        module(torch.full((4, 5), 100.0))
        module.enable_observer()
        module.enable_fake_quant()
    x = torch.ones(4, 5)
    assert torch.equal(ours(x), theirs(x))
    same_state(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_calibration_in_inference_mode(fused: bool) -> None:
    ours, theirs = pair("channels", fused)
    buffers = {name: id(buffer) for name, buffer in ours.named_buffers()}
    for module in (ours, theirs):
        with torch.inference_mode():
            module(torch.linspace(-1, 3, 20).reshape(4, 5))
    x, slope = torch.randn(4, 5), torch.randn(4, 5)
    for mine, other in zip(step(ours, x, slope), step(theirs, x, slope), strict=True):
        assert torch.equal(mine, other)
    assert {name: id(buffer) for name, buffer in ours.named_buffers()} == buffers


@pytest.mark.parametrize("kind", KINDS)
def test_built_on_the_meta_device(kind: str) -> None:
    """As large networks are: without memory, then given some and a checkpoint."""
    ours = FakeQuantize(**copy.deepcopy(KINDS[kind]))
    ours(torch.linspace(-1, 3, 20).reshape(4, 5))
    with torch.device("meta"):
        later = FakeQuantize(**copy.deepcopy(KINDS[kind]))
    assert all(buffer.is_meta for buffer in later.buffers())
    later = later.to_empty(device="cpu")
    later.load_state_dict(ours.state_dict())
    ours.disable_observer()
    later.disable_observer()
    x = torch.randn(4, 5)
    assert torch.equal(later(x), ours(x))


@pytest.mark.parametrize("fused", [False, True])
def test_traced(fused: bool) -> None:
    ours, _ = pair("moving", fused)
    x = torch.randn(4, 5)
    ours(x)
    ours.disable_observer()
    traced = torch.jit.trace(ours.eval(), x)
    y = torch.randn(7, 3)
    assert torch.equal(traced(y), ours(y))


@pytest.mark.parametrize("kind", ["moving symmetric", "channels"])
def test_symmetric_ranges_are_made_where_the_data_is(kind: str) -> None:
    """No tensor of numbers: on a GPU each is a copy that waits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    ours, _ = pair(kind, fused=True)
    ours(torch.randn(4, 5))
    with Made() as seen:
        ours(torch.randn(4, 5))
    assert "clusterq::fake_quantize" in seen.names
    copies = ("aten::lift_fresh", "aten::_local_scalar_dense")
    assert not [name for name in seen.names if name.startswith(copies)]


@pytest.mark.parametrize("learnable", [False, True])
def test_one_graph_for_every_batch_size(learnable: bool) -> None:
    """Learnable and plain, whole, with ranges that go on."""
    settings: dict[str, Any] = {"observer": MOVING, **UNSIGNED}
    module = LearnableFakeQuantize(**settings) if learnable else FakeQuantize(**settings)
    module(torch.randn(4, 5))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows in range(3, 16, 3):
        before = module.activation_post_process.max_val.clone()
        compiled(torch.full((rows, 5), 10.0 + rows))
        assert module.activation_post_process.max_val > before
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]
