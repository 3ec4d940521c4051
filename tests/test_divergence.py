"""A run that diverges says in which layer numbers stopped being finite, where that can still be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from clusterq import method as method_module
from clusterq.config import ClusterQConfig, FinetuneConfig, QuantizationConfig, SynthesisConfig
from clusterq.divergence import first_nonfinite
from clusterq.errors import DivergenceError
from clusterq.method import ClusterQ
from clusterq.networks import DigitsConvNet
from clusterq.qat import calibrate, prepare
from clusterq.synthesis import StoredImages


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4), nn.Flatten()), nn.Linear(144, 3)
    )


def test_the_first_place_in_execution_order_is_named() -> None:
    images = torch.randn(2, 1, 8, 8)
    network = _network().eval()
    assert first_nonfinite(network, images) == ""
    assert first_nonfinite(network, images / 0) == "the images themselves are NaN or infinite"
    with torch.no_grad():
        network[3].weight[0, 0] = torch.nan
        assert first_nonfinite(network, images) == "the first NaN or infinity is in weight of layer 3"
        network[2][0].running_var[0] = -1
    assert first_nonfinite(network, images) == "the first NaN or infinity is in the output of layer 2.0"
    assert not network.training and all(not module._forward_hooks for module in network.modules())


def test_a_diverging_student_names_its_layer() -> None:
    network = DigitsConvNet()
    synthesis = SynthesisConfig(num_images=16, batch_size=16, image_steps=1)
    config = ClusterQConfig(synthesis=synthesis, finetune=FinetuneConfig(steps=20, batch_size=8, lr=1e30, grad_clip=0))
    method = ClusterQ(network, config, input_shape=(1, 16, 16))
    with pytest.raises(
        DivergenceError, match=r"loss term 'kd' became nan at step \d+; .*; the first NaN .* of layer \w"
    ):
        method.finetune()


@pytest.mark.parametrize("source", ["bank", "generator"])
def test_diverging_images_are_named_after_a_look_at_one(monkeypatch: pytest.MonkeyPatch, source: Any) -> None:
    looked: list[int] = []

    def watched(network: nn.Module, images: torch.Tensor) -> str:
        looked.append(len(images))
        return first_nonfinite(network, images)

    monkeypatch.setattr(method_module, "first_nonfinite", watched)
    synthesis = SynthesisConfig(
        source=source, num_images=16, batch_size=16, image_steps=30, image_lr=1e30, bns_weight=1e30, steps=30,
        generator_lr=1e30, generator_width=8,
    )  # fmt: skip
    config = replace(ClusterQConfig(), synthesis=synthesis)
    place = "the images themselves are NaN or infinite"
    with pytest.raises(DivergenceError, match=rf"image synthesis diverged: the loss term .*; lower .*; {place}$"):
        ClusterQ(DigitsConvNet(), config, input_shape=(1, 16, 16)).synthesize()
    assert looked == [1]


def test_weights_of_layers_with_layers_in_them_and_what_comes_between_layers() -> None:
    images = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    student = prepare(network, QuantizationConfig(), example_input=images).eval()
    calibrate(student, images, QuantizationConfig())
    assert any(student.get_submodule("3").children())
    with torch.no_grad():
        student.get_submodule("3").weight[0, 0] = torch.inf
    assert first_nonfinite(student, images) == "the first NaN or infinity is in weight of layer 3"

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.ReLU(), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x) / 0)
            return out

    assert first_nonfinite(Between(), images) == "the first NaN or infinity is in the input of layer second"

    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0

    found = first_nonfinite(nn.Sequential(nn.Identity(), Last()), images)
    assert found == "the first NaN or infinity is in the output of layer 1"
    assert first_nonfinite(Last(), images) == "the first NaN or infinity is in the output of the network"


def test_a_network_that_fails_while_the_place_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(network: nn.Module, images: torch.Tensor) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("clusterq.method.first_nonfinite", fail)
    synthesis = SynthesisConfig(num_images=16, batch_size=16, image_steps=30, image_lr=1e30, bns_weight=1e30)
    config = replace(ClusterQConfig(), synthesis=synthesis)
    with pytest.raises(DivergenceError, match=r"image synthesis diverged: the loss term .*; lower .* learning rate$"):
        ClusterQ(DigitsConvNet(), config, input_shape=(1, 16, 16)).synthesize()


def test_the_one_image_is_one_that_is_not_finite() -> None:
    images = torch.zeros(5, 1, 16, 16)
    images[3, 0, 2, 2] = torch.nan
    source = StoredImages(images, torch.zeros(5, dtype=torch.int64), 5)
    error = method_module._located(DivergenceError("diverged"), DigitsConvNet().eval(), source)
    assert str(error) == "diverged; the images themselves are NaN or infinite"
