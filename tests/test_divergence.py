"""A run that diverges says in which layer numbers stopped being finite, where that can still be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from clusterq import method as method_module
from clusterq.config import ClusterQConfig, FinetuneConfig, SynthesisConfig
from clusterq.divergence import first_nonfinite
from clusterq.errors import DivergenceError
from clusterq.method import ClusterQ
from clusterq.networks import DigitsConvNet
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
    with pytest.raises(DivergenceError, match=r"image synthesis diverged: the loss term .*; "):
        ClusterQ(DigitsConvNet(), config, input_shape=(1, 16, 16)).synthesize()
    assert looked == [1]


def test_the_one_image_is_one_that_is_not_finite() -> None:
    images = torch.zeros(5, 1, 16, 16)
    images[3, 0, 2, 2] = torch.nan
    source = StoredImages(images, torch.zeros(5, dtype=torch.int64), 5)
    error = method_module._located(DivergenceError("diverged"), DigitsConvNet().eval(), source)
    assert str(error) == "diverged; the images themselves are NaN or infinite"
