"""Whole networks of scheme deploy in onnxruntime."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clusterq.data import EvaluationSet, open_for
from clusterq.deploy import run_integer
from clusterq.deploy._onnx_runtime import integer_kernels, runner
from clusterq.deploy.onnx import export_onnx
from clusterq.models import LoadedModel, load_model
from clusterq.nn.layers import quantized_weights_kept
from clusterq.nn.same_padding import SamePadConv2d
from clusterq.qat.prepare import unreached

sys.path.insert(0, os.path.dirname(__file__))
from deploy_cases import randomise
from onnx_deploy_checks import INTEGER, MOVING, check, made
from test_same_padding import network as same_padded


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model = getattr(models, name)(weights=None)
    if name == "vgg16_bn":
        # Its own classifier has 120 million weights.
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 10))
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg16_bn"])
def test_torchvision(name: str, data_dir: Path, tmp_path: Path):
    """Minutes of torch.export: only where CLUSTERQ_DATA asks for real networks."""
    model, x = randomise(_torchvision(name)), torch.randn(2, 3, 32, 32)
    twin = made(model, x)
    assert unreached(twin) == []
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING and operators["QuantizeLinear"] == 1


def test_timm(data_dir: Path, tmp_path: Path):
    timm = pytest.importorskip("timm")
    # The last pads as TensorFlow does, by convolutions of timm's own.
    for name, own in (("efficientnet_lite0", 0), ("regnetx_002", 0), ("tf_efficientnet_lite0", 5)):
        model, x = randomise(timm.create_model(name)), torch.randn(2, 3, 32, 32)
        twin = made(model, x)
        assert unreached(twin) == [] and sum(isinstance(m, SamePadConv2d) for m in twin.modules()) == own
        operators = check(twin, x, tmp_path)
        assert set(operators) <= INTEGER | MOVING


def test_padding_of_tensorflow(tmp_path: Path):
    """The odd zeros of convolutions of their own class are codes: the zero point of the input."""
    x = torch.randn(16, 3, 33, 32)
    operators = check(made(same_padded(), x), x, tmp_path)
    assert set(operators) <= INTEGER | MOVING and operators["QLinearConv"] == 3


def test_resnet20_on_real_images(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path):
    """Layer by layer on images of CIFAR-10: onnxruntime, the integers, and the class of the twin."""
    loaded, images = cifar10
    x, labels = next(iter(images.batches(512, 512)))
    twin = made(loaded.model, x[:128])
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING
    assert operators["QLinearConv"] == 19 and operators["QLinearAdd"] == 9 and operators["QGemm"] == 1
    with torch.no_grad(), quantized_weights_kept(twin):
        wanted = twin(x).argmax(1)
    found = run_integer(twin, x).argmax(1)
    assert int((wanted != found).sum()) <= 0.001 * len(x) + 1
    assert float((found == labels).float().mean()) > 0.88
    assert len(integer_kernels(export_onnx(twin, tmp_path / "k.onnx", example_input=x[:2])).layers) == 20


def test_classes_of_the_whole_test_set(cifar10: tuple[LoadedModel, EvaluationSet], tmp_path: Path):
    """All 10,000 images: the twin's class for 99.9 % of them, its top-1 within 0.05 points."""
    loaded, images = cifar10
    twin = made(loaded.model, next(iter(images.batches(128, 128)))[0])
    call = runner(export_onnx(twin, tmp_path / "net.onnx", example_input=torch.zeros(2, *loaded.input_shape)).path)
    found, wanted, labels = [], [], []
    with torch.no_grad(), quantized_weights_kept(twin):
        for x, label in images.batches(500):
            found.append(torch.from_numpy(call(x.numpy())).argmax(1))
            wanted.append(twin(x).argmax(1))
            labels.append(label)
    ours, theirs, label = (torch.cat(parts) for parts in (found, wanted, labels))
    assert len(label) == 10_000 and int((ours == theirs).sum()) >= 9_990
    assert abs(int((ours == label).sum()) - int((theirs == label).sum())) <= 5


def test_mobilenet_v1_on_real_images(data_dir: Path, tmp_path: Path):
    folder = data_dir / "networks"
    loaded = load_model(
        f"{folder / 'networks.py'}:mobilenet_v1_025", str(folder / "imagenet_mobilenetv1_025.pt"), input_size=64
    )
    x, _ = next(iter(open_for(loaded, str(data_dir / "ilsvrc2012-val1300")).batches(16, 16)))
    twin = made(loaded.model, x, weight_bits=8, activation_bits=8)
    operators = check(twin, x, tmp_path)
    assert set(operators) <= INTEGER | MOVING
    with torch.no_grad():
        full, found = loaded.model(x).argmax(1), run_integer(twin, x).argmax(1)
    # 13 of 16 measured, of 1,000 classes.
    assert int((full == found).sum()) >= 12
