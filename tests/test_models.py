"""Networks and weights: built-in architectures, strict loading, refusal of unsafe files."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clusterq.errors import MissingPackageError, ModelError, require
from clusterq.models import (
    DIGITS_WEIGHTS,
    build_model,
    file_sha256,
    load_model,
    load_weights,
    output_classes,
    own_transform,
    read_state_dict,
    tensors_sha256,
)
from clusterq.networks import ChannelPadShortcut, resnet20


@pytest.fixture
def resnet_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "resnet20.pt"
    torch.save(resnet20().state_dict(), path)
    return path


def test_resnet20_has_the_published_size_and_layers() -> None:
    model = resnet20()
    # 0.27 M parameters: Deep Residual Learning, table 6.
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 19
    assert output_classes(model.eval(), (3, 32, 32)) == 10


def test_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    y = ChannelPadShortcut(2)(x)
    assert y.shape == (2, 7, 2, 2)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert int(y[:, :2].count_nonzero()) == 0 and int(y[:, 5:].count_nonzero()) == 0


def test_load_resnet20(resnet_file: Path) -> None:
    loaded = load_model("builtin:resnet20", str(resnet_file))
    assert loaded.input_shape == (3, 32, 32)
    assert loaded.num_classes == 10
    assert loaded.mean == (0.485, 0.456, 0.406) and loaded.std == (0.229, 0.224, 0.225)
    assert loaded.source.weights_sha256 == hashlib.sha256(resnet_file.read_bytes()).hexdigest()
    assert not loaded.model.training
    torch.manual_seed(0)
    expected = resnet20().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.model.state_dict().items())


def test_wrapped_state_dict_and_module_prefix(tmp_path: Path) -> None:
    state = resnet20().state_dict()
    path = tmp_path / "wrapped.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    assert set(read_state_dict(path)) == set(state)


def test_first_tensor_of_wrong_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wide.pt"
    torch.save({**resnet20().state_dict(), "conv1.weight": torch.zeros(16, 1, 3, 3)}, path)
    with pytest.raises(ModelError, match=r"tensor conv1\.weight has shape \[16, 1, 3, 3\]; wanted \[16, 3, 3, 3\]"):
        load_model("builtin:resnet20", str(path))


def test_weights_decide_the_classes_of_a_built_in_network(tmp_path: Path) -> None:
    path = tmp_path / "hundred.pt"
    state = resnet20(num_classes=100).state_dict()
    torch.save(state, path)
    loaded = load_model("builtin:resnet20", str(path))
    assert loaded.num_classes == 100
    assert torch.equal(loaded.model.state_dict()["linear.weight"], state["linear.weight"])
    torch.save({**state, "linear.bias": torch.zeros(10)}, path)
    with pytest.raises(ModelError, match=r"tensor linear\.bias has shape \[10\]; wanted \[100\]"):
        load_model("builtin:resnet20", str(path))


def test_missing_and_surplus_tensors_are_named() -> None:
    model = resnet20()
    state = model.state_dict()
    del state["layer2.1.bn1.weight"]
    with pytest.raises(ModelError, match=r"layer2\.1\.bn1\.weight \[32\] is missing"):
        load_weights(model, state, origin="x.pt")
    with pytest.raises(ModelError, match="no tensor extra"):
        load_weights(model, {**model.state_dict(), "extra": torch.zeros(1)}, origin="x.pt")


def test_batch_counters_may_be_absent() -> None:
    model = resnet20()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_weights(model, state, origin="x.pt")


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for name in ("torch.pt", "plain.pth"):
        path = tmp_path / name
        payload = {"conv1.weight": _Malicious(touched)}
        if name == "torch.pt":
            torch.save(payload, path)
        else:
            path.write_bytes(pickle.dumps(payload, protocol=2))
        with pytest.raises(ModelError, match="refused"):
            read_state_dict(path)
    assert not touched.exists()


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(resnet20(), path)
    with pytest.raises(ModelError, match="refused"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_file_gives_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04 not weights at all")
    with pytest.raises(ModelError, match=name) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_truncated_file_is_an_error(resnet_file: Path) -> None:
    resnet_file.write_bytes(resnet_file.read_bytes()[:-2000])
    with pytest.raises(ModelError):
        read_state_dict(resnet_file)


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", b"<!doctype html><html></html>", b""]
)
def test_file_that_is_no_weight_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"w\.pt is not a PyTorch weight file") as caught:
        read_state_dict(path)
    assert "run code" not in str(caught.value)


def test_nan_in_weights_is_named(tmp_path: Path) -> None:
    state = resnet20().state_dict()
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1\.weight holds a NaN"):
        read_state_dict(tmp_path / "nan.pt")


def test_weights_of_a_factory_must_be_finite(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch.nn as nn\n"
        "def make():\n"
        "    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))\n"
        "    model[3].bias.data[2] = float('inf')\n"
        "    return model\n"
    )
    with pytest.raises(ModelError, match=r"net\.py:make: tensor 3\.bias holds a NaN or infinite value"):
        load_model(f"{file}:make", input_size=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def make(:\n", r"net\.py: SyntaxError: "),
        ("import absent_package_xyz\n", r"net\.py: ModuleNotFoundError: No module named 'absent_package_xyz'"),
        ("def make():\n    raise KeyError('first\\nsecond')\n", r"net\.py: KeyError: "),
        ("def make():\n    raise ArithmeticError('first\\nsecond')\n", r"net\.py: ArithmeticError: first$"),
        ("raise SystemExit(3)\n", r"net\.py: SystemExit: 3"),
    ],
)
def test_factory_that_fails_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "net.py"
    file.write_text(content)
    with pytest.raises(ModelError, match=message):
        load_model(f"{file}:make")
    assert str(tmp_path) not in sys.path


def test_factory_may_use_dataclasses_and_modules_beside_it(tmp_path: Path) -> None:
    (tmp_path / "clusterq_test_sibling.py").write_text("CHANNELS = 5\n")
    file = tmp_path / "net_with_sibling.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch.nn as nn\n"
        "@dataclass\n"
        "class Shape:\n"
        "    channels: int\n"
        "class Net(nn.Conv2d):\n"
        "    pass\n"
        "def make():\n"
        "    from clusterq_test_sibling import CHANNELS\n"
        "    return Net(1, Shape(CHANNELS).channels, 3)\n"
    )
    before = list(sys.path)
    model = build_model(f"{file}:make")
    assert isinstance(model, nn.Conv2d) and model.out_channels == 5
    assert sys.path == before
    assert dataclasses.is_dataclass(sys.modules[type(model).__module__].Shape)


@pytest.mark.parametrize(
    ("name", "channels", "mean", "std"),
    [
        ("none", 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("none", 1, (0.0,), (1.0,)),
        ("imagenet", 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("imagenet", 1, (1.347 / 3,), (0.678 / 3,)),
    ],
)
def test_named_normalization_fits_the_channels(
    tmp_path: Path, name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch.nn as nn\n"
        f"def make():\n    return nn.Sequential(nn.Conv2d({channels}, 4, 8), nn.Flatten(), nn.Linear(4, 7))\n"
    )
    loaded = load_model(f"{file}:make", input_size=8, normalization=name)
    assert loaded.mean == pytest.approx(mean) and loaded.std == pytest.approx(std)
    with pytest.raises(ValueError, match="together with mean or std"):
        load_model(f"{file}:make", input_size=8, normalization=name, mean=(0.0,) * channels)
    with pytest.raises(ValueError, match="normalization 'mnist' is not one of"):
        load_model(f"{file}:make", input_size=8, normalization="mnist")


def test_factory_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch.nn as nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(4, 7))\n"
        "def wrong():\n    return 3\n"
    )
    loaded = load_model(f"{file}:make", input_size=12)
    assert loaded.input_shape == (1, 12, 12) and loaded.num_classes == 7
    assert loaded.source.weights is None
    assert loaded.source.weights_sha256 == tensors_sha256(loaded.model.state_dict())
    assert len(loaded.mean) == len(loaded.std) == 1
    with pytest.raises(ModelError, match="returned a int"):
        load_model(f"{file}:wrong")
    with pytest.raises(ModelError, match="has no function 'absent'"):
        load_model(f"{file}:absent")


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("resnet20", None, "names no network"),
        ("builtin:resnet21", None, "no built-in network"),
        ("builtin:resnet20", None, "needs trained weights"),
        ("builtin:resnet20", "absent.pt", "no such file"),
        ("absent.py:make", None, "no such Python file"),
        ("torchvision:resnet1818", "DEFAULT", "no classification network"),
        ("torchvision:resnet18", "IMAGENET22K", "has no weights"),
        ("torchvision:resnet18", None, "needs trained weights"),
    ],
)
def test_bad_specifications(spec: str, weights: str | None, message: str) -> None:
    if spec.startswith("torchvision"):
        pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match=message):
        load_model(spec, weights)


def test_library_weights_are_not_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("network access")

    monkeypatch.setattr(torch.hub, "download_url_to_file", forbidden)
    with pytest.raises(ModelError, match="--download"):
        load_model("torchvision:resnet18", "IMAGENET1K_V1")


def test_torchvision_weights_from_cache_and_from_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    state = models.get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    file = models.get_model_weights("shufflenet_v2_x0_5").IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    cached = tmp_path / "hub" / "checkpoints" / file
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    loaded = load_model("torchvision:shufflenet_v2_x0_5", "IMAGENET1K_V1")
    assert loaded.input_shape == (3, 224, 224) and loaded.num_classes == 1000
    assert loaded.transform is not None
    same = (loaded.input_shape, loaded.mean, loaded.std)
    assert repr(own_transform(loaded.source, loaded.model, *same)) == repr(loaded.transform)
    assert own_transform(loaded.source, loaded.model, (3, 64, 64), loaded.mean, loaded.std) is None
    smaller = load_model("torchvision:shufflenet_v2_x0_5", str(cached), input_size=64)
    assert smaller.input_shape == (3, 64, 64) and smaller.transform is None
    assert torch.equal(smaller.model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_missing_package_is_named() -> None:
    with pytest.raises(MissingPackageError, match=r"'absent_package_xyz', which is not installed: pip install"):
        require("absent_package_xyz.sub", purpose="this test")


def test_output_must_be_class_scores() -> None:
    with pytest.raises(ModelError, match=r"shape \[2, 4, 8, 8\] for 2 images"):
        output_classes(nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8))
    with pytest.raises(ModelError, match=r"does not accept images of shape \(1, 8, 8\)"):
        output_classes(nn.Conv2d(3, 4, 3, padding=1), (1, 8, 8))


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    one = tensors_sha256({"a": torch.ones(2), "b": torch.zeros(1)})
    assert one == tensors_sha256({"b": torch.zeros(1), "a": torch.ones(2)})
    assert one != tensors_sha256({"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.float64)})


def test_digits_network_ships_with_its_weights() -> None:
    assert DIGITS_WEIGHTS.stat().st_size < 300_000
    loaded = load_model("builtin:digits")
    assert loaded.input_shape == (1, 16, 16) and loaded.num_classes == 10
    assert isinstance(build_model("builtin:digits"), type(loaded.model))
