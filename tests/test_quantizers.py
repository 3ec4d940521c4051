"""Ranges, learned steps and state of the activation and weight quantizers."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clusterq.nn.quantizers import ActivationQuantizer, WeightQuantizer, set_quantization


def levels(y: torch.Tensor) -> int:
    return len(torch.unique(y))


def test_moving_range_is_right_from_the_first_step() -> None:
    # Feeding the bias-corrected average back as the raw one makes a constant 1.0 come out as 5.26 at the second step
    # and in the thousands by the 21st.
    quantizer = ActivationQuantizer(4, mode="ema", activation="relu").train()
    x = torch.ones(2, 3)
    for _ in range(30):
        torch.testing.assert_close(quantizer(x), x)
        torch.testing.assert_close(quantizer.running_max, torch.ones(1))
        torch.testing.assert_close(quantizer.running_min, torch.ones(1))


def test_moving_range_follows_its_momentum() -> None:
    quantizer = ActivationQuantizer(8, mode="ema", momentum=0.75).train()
    low, high = 0.0, 0.0
    for step, (a, b) in enumerate([(-1.0, 2.0), (-3.0, 1.0), (0.5, 5.0)]):
        quantizer(torch.tensor([a, b]))
        low, high = (a, b) if step == 0 else (0.75 * low + 0.25 * a, 0.75 * high + 0.25 * b)
        assert quantizer.running_min.item() == pytest.approx(low)
        assert quantizer.running_max.item() == pytest.approx(high)


def test_moving_range_stands_still_after_its_steps_and_in_evaluation() -> None:
    quantizer = ActivationQuantizer(8, mode="ema", range_steps=2).train()
    for high in (1.0, 2.0, 50.0, 70.0):
        quantizer(torch.tensor([0.0, high]))
    assert quantizer.running_max.item() == pytest.approx(0.9 * 1.0 + 0.1 * 2.0)
    assert quantizer.observations.item() == 2
    fresh = ActivationQuantizer(8, mode="ema").train()
    fresh(torch.tensor([0.0, 1.0]))
    fresh.eval()(torch.tensor([0.0, 9.0]))
    assert fresh.running_max.item() == 1.0


def test_a_nan_does_not_poison_the_moving_range() -> None:
    quantizer = ActivationQuantizer(8, mode="ema").train()
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer(torch.tensor([float("nan"), float("nan")]))
    quantizer(torch.tensor([0.0, 1.0]))
    assert quantizer.running_max.item() == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["learned", "fixed", "ema"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_at_most_two_to_the_bits_values(mode: str, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, 6).to(dtype)
    for activation in ("none", "relu", "relu6"):
        quantizer = ActivationQuantizer(bits, mode=mode, activation=activation).train()  # type: ignore[arg-type]
        y = quantizer(x)
        assert y.dtype == dtype and y.shape == x.shape
        assert 2 < levels(y) <= 2**bits
        if activation != "none":
            assert y.min() >= 0


def test_symmetric_and_asymmetric_codes() -> None:
    x = torch.tensor([-1.0, 0.0, 3.0])
    symmetric = ActivationQuantizer(4, mode="fixed", symmetric=True).train()
    symmetric(x)
    scale, zero_point, low, high = symmetric.qparams()
    assert (low, high) == (-8, 7) and zero_point.item() == 0
    assert scale.item() == pytest.approx(2 * 3.0 / 15)  # equation (1) of the paper
    asymmetric = ActivationQuantizer(4, mode="fixed").train()
    asymmetric(x)
    scale, zero_point, low, high = asymmetric.qparams()
    assert (low, high) == (0, 15) and zero_point.item() == 4
    assert scale.item() == pytest.approx(4.0 / 15)
    # A rectifier's output has no negative half to spend codes on.
    relu = ActivationQuantizer(4, mode="fixed", symmetric=True, activation="relu").train()
    relu(x)
    assert relu.qparams()[2:] == (0, 15) and relu.qparams()[0].item() == pytest.approx(3.0 / 15)


def test_learned_activation_step_has_the_gradient_of_lsq() -> None:
    torch.manual_seed(1)
    quantizer = ActivationQuantizer(3, activation="relu")
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64) * 2
    with quantizer.calibrating("minmax"):
        quantizer(torch.linspace(-1, 2.0, 50))
    quantizer.double()
    y = quantizer(x.requires_grad_())
    upstream = torch.randn_like(y)
    y.backward(upstream)
    step = quantizer.scale.detach()
    ratio = x.detach().clamp(min=0) / step
    inside = ratio.round() <= 7
    slope = torch.where(inside, ratio.round() - ratio, torch.full_like(ratio, 7.0))
    expected = (upstream * slope).sum() / math.sqrt(2 * 5 * 5 * 7)
    torch.testing.assert_close(quantizer.scale.grad, expected.reshape(1))
    torch.testing.assert_close(x.grad, torch.where(inside & (x.detach() > 0), upstream, 0.0))


def test_learned_weight_steps_have_the_gradient_of_lsq() -> None:
    torch.manual_seed(2)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    quantizer = WeightQuantizer(3, 3).double()
    quantizer.initialise(weight)
    with torch.no_grad():
        quantizer.scale.mul_(0.5)
    y = quantizer(weight)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    ratio = weight.detach() / quantizer.scale.detach().view(3, 1, 1, 1)
    r = ratio.round()
    slope = torch.where(r < -4, torch.full_like(r, -4.0), torch.where(r > 3, torch.full_like(r, 3.0), r - ratio))
    expected = (upstream * slope).sum((1, 2, 3)) / math.sqrt(4 * 3 * 3 * 3)
    torch.testing.assert_close(quantizer.scale.grad, expected)
    assert (r > 3).any() and (r < -4).any()


def test_step_gradient_under_autocast_is_summed_in_float32() -> None:
    torch.manual_seed(3)
    x = torch.randn(8, 16, 32, 32).bfloat16()
    upstream = torch.randn_like(x)
    quantizer = ActivationQuantizer(4, activation="relu").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(x)
    y.backward(upstream)
    assert y.dtype == torch.bfloat16 and quantizer.scale.grad is not None
    step = quantizer.scale.detach()
    # bfloat16 has few values, many of them next to a tie: codes as float32 arithmetic rounds them.
    code = (x.float().clamp(min=0) * (1 / step)).round().double()
    ratio = x.double().clamp(min=0) / step.double()
    slope = torch.where(code <= 15, code - ratio, torch.full_like(ratio, 15.0))
    expected = (upstream.double() * slope).sum() / math.sqrt(16 * 32 * 32 * 15)
    assert quantizer.scale.grad.dtype == torch.float32
    assert quantizer.scale.grad.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_that_was_carried_below_zero_still_quantizes_and_turns_its_gradient() -> None:
    x = torch.rand(100) * 3
    outputs, gradients = [], []
    for sign in (1.0, -1.0):
        quantizer = ActivationQuantizer(3, activation="relu").train()
        quantizer(x)
        with torch.no_grad():
            quantizer.scale.mul_(sign)
        y = quantizer(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(quantizer.scale.grad)
        assert (quantizer.qparams()[0] > 0).all()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], -gradients[1])


def test_calibration_by_squared_error_beats_min_max_on_heavy_tails() -> None:
    torch.manual_seed(4)
    x = torch.randn(20000) ** 3
    errors = {}
    for method in ("mse", "minmax"):
        quantizer = ActivationQuantizer(4, mode="fixed")
        with quantizer.calibrating(method):  # type: ignore[arg-type]
            quantizer(x)
        errors[method] = (quantizer(x) - x).square().mean().item()
    assert errors["mse"] < 0.5 * errors["minmax"]


def test_calibration_over_several_batches() -> None:
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 5.0]), torch.tensor([-2.0, 0.5])]
    quantizer = ActivationQuantizer(8, mode="fixed")
    with quantizer.calibrating("minmax"):
        for batch in batches:
            quantizer(batch)
    assert quantizer.qparams()[0].item() == pytest.approx(7.0 / 255)
    alone = []
    for batch in batches[:2]:
        single = ActivationQuantizer(8, mode="fixed", activation="relu")
        with single.calibrating("mse"):
            single(batch)
        alone.append(single.qparams()[0])
    both = ActivationQuantizer(8, mode="fixed", activation="relu")
    with both.calibrating("mse"):
        for batch in batches[:2]:
            both(batch)
    torch.testing.assert_close(both.qparams()[0], (alone[0] + alone[1]) / 2)


def test_calibration_refuses_values_that_are_not_finite() -> None:
    quantizer = ActivationQuantizer(4)
    with quantizer.calibrating("minmax"), pytest.raises(ValueError, match="NaN or infinity"):
        quantizer(torch.tensor([0.0, float("inf")]))


def test_all_zero_values_get_a_usable_step() -> None:
    for mode in ("learned", "fixed", "ema"):
        quantizer = ActivationQuantizer(4, mode=mode, activation="relu")  # type: ignore[arg-type]
        with quantizer.calibrating("mse"):
            assert torch.equal(quantizer(torch.zeros(5)), torch.zeros(5))
        assert torch.isfinite(quantizer(torch.ones(5))).all()
    weight = torch.zeros(2, 3)
    for mode in ("learned", "live"):
        assert torch.equal(WeightQuantizer(4, 2, mode=mode)(weight), weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["learned", "fixed", "ema"])
def test_without_a_range_evaluation_says_so(mode: str) -> None:
    quantizer = ActivationQuantizer(4, mode=mode).eval()  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer(torch.randn(3))
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer.qparams()


@pytest.mark.parametrize("mode", ["learned", "fixed", "ema"])
def test_state_round_trip(mode: str) -> None:
    x = torch.randn(50)
    first = ActivationQuantizer(4, mode=mode).train()  # type: ignore[arg-type]
    first(x)
    second = ActivationQuantizer(4, mode=mode).eval()  # type: ignore[arg-type]
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), first.eval()(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    weight = torch.randn(3, 8)
    one, two = WeightQuantizer(4, 3), WeightQuantizer(4, 3)
    one.initialise(weight)
    two.load_state_dict(one.state_dict())
    other = torch.randn(3, 8)
    assert torch.equal(two(other), one(other))


@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("mode", ["learned", "live"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_take_few_values_per_channel(method: str, mode: str, symmetric: bool) -> None:
    torch.manual_seed(5)
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-2, 1, 6).view(6, 1, 1, 1)
    quantizer = WeightQuantizer(3, 6, mode=mode, method=method, symmetric=symmetric)  # type: ignore[arg-type]
    y = quantizer(weight)
    scale, zero_point, low, high = quantizer.qparams(weight)
    for channel in range(6):
        assert 2 < levels(y[channel]) <= 8
        relative = (y[channel] - weight[channel]).norm() / weight[channel].norm()
        assert relative < 0.35
    codes = y / scale.view(6, 1, 1, 1) + zero_point.view(6, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.min() >= low - 1e-3 and codes.max() <= high + 1e-3
    if symmetric:
        assert (zero_point == 0).all()


def test_live_weights_follow_and_pass_the_gradient() -> None:
    weight = torch.randn(2, 10, requires_grad=True)
    quantizer = WeightQuantizer(4, 2, mode="live", method="minmax", symmetric=False, gradient="pass_through")
    with torch.no_grad():
        before = quantizer.qparams(weight)[0]
        weight.mul_(3)
        torch.testing.assert_close(quantizer.qparams(weight)[0], before * 3)
    upstream = torch.randn(2, 10)
    quantizer(weight).backward(upstream)
    torch.testing.assert_close(weight.grad, upstream)


def test_switched_off_quantizers_compute_in_floating_point() -> None:
    network = nn.Sequential(ActivationQuantizer(2, activation="relu6"), WeightQuantizer(2, 3)).eval()
    x = torch.randn(3, 20) * 5
    set_quantization(network, weights=False, activations=False)
    assert torch.equal(network(x), x.clamp(0, 6))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="bits is 9"):
        ActivationQuantizer(9)
    with pytest.raises(ValueError, match="bits is 1"):
        WeightQuantizer(1, 3)
    with pytest.raises(ValueError, match="mode is 'static'"):
        ActivationQuantizer(4, mode="static")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'kl'"):
        WeightQuantizer(4, 3, method="kl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most one"):
        ActivationQuantizer(4, activation="relu", function=nn.SiLU())


def test_a_compiled_moving_range_compiles_once_and_counts() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    quantizer = ActivationQuantizer(4, mode="ema", range_steps=6).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quantizer, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for rows in (4, 6, 9, 12, 17, 23):
        compiled(torch.randn(rows, 5))
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0] and quantizer.observations.item() == 6
    # What counts the steps on the device is read here.
    quantizer.train()
    before = quantizer.running_max.clone()
    compiled(torch.full((4, 5), 100.0))
    assert torch.equal(quantizer.running_max, before) and quantizer.observations.item() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("convert", [False, True])
def test_moving_range_of_every_dtype(dtype: torch.dtype, convert: bool) -> None:
    quantizer = ActivationQuantizer(8, mode="ema").train()
    if convert:
        quantizer = quantizer.to(dtype)
    x = torch.tensor([0.0, 1.0, 255.0], dtype=dtype)
    assert quantizer(x).dtype == dtype
    quantizer(2 * x)
    # In 16 bits the average of 255 and 510 would not be 280.5.
    assert quantizer.running_max.item() == pytest.approx(0.9 * 255 + 0.1 * 510, abs=1e-4)


def test_averaged_copies_take_over_what_was_learned() -> None:
    """`AveragedModel` copies parameters and buffers one by one, past `load_state_dict`."""
    from torch.optim.swa_utils import AveragedModel

    x, w = torch.randn(8, 5), torch.randn(4, 3)
    for quantizer, value in ((ActivationQuantizer(4), x), (WeightQuantizer(4, 4), w)):
        averaged = AveragedModel(quantizer, use_buffers=True)
        quantizer.train()(value)
        quantizer.scale.data.mul_(3)
        averaged.update_parameters(quantizer)
        y = averaged.eval()(value)
        assert torch.equal(averaged.module.scale, quantizer.scale)
        assert torch.equal(y, quantizer.eval()(value))


def test_settings_and_values_that_cannot_be_used_are_named() -> None:
    for text, settings in {
        "gradient": {"gradient": "foo"},
        "activation": {"activation": "gelu"},
        "method": {"method": "foo"},
        "momentum": {"momentum": 2.0},
        "mode": {"mode": "frozen"},
    }.items():
        with pytest.raises(ValueError, match=f"^{text} is"):
            ActivationQuantizer(4, **settings)
    with pytest.raises(ValueError, match=r"^gradient is"):
        WeightQuantizer(4, 3, gradient="foo")
    with pytest.raises(ValueError, match=r"^weight has shape \(5, 2\); wanted \[3, ...\]"):
        WeightQuantizer(4, 3)(torch.ones(5, 2))
    with pytest.raises(ValueError, match="are none"):
        ActivationQuantizer(4).train()(torch.ones(0, 3))


PROCESS = """
import sys, torch
import torch.distributed as dist
from clusterq.nn.quantizers import ActivationQuantizer
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
try:
    ActivationQuantizer(4).train()(torch.randn(4, 5))
except RuntimeError as error:
    print(error)
"""


def test_several_processes_do_not_start_from_their_own_batches(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0 and "calibrate the network" in output
