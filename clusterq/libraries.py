"""Networks and weights of torchvision, timm and pytorchcv, without touching the network unless a download is asked for.

Each library is asked three things: build the architecture, find the file with its published weights, and say how images
are prepared for it. The weight files are read by `clusterq.models.read_state_dict`, not by the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clusterq.errors import ModelError, require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "none": ((0.0,), (1.0,)),
}


@dataclass
class Facts:
    """What is known about a network's input; a None is filled by the next source that knows."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    channels: int | None = None
    transform: Callable[[Any], Tensor] | None = None

    def fill(self, channels: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Keep what is known, take the rest; a single value is repeated, or a triple averaged, to fit the channels."""
        self.channels = self.channels or channels
        self.size = self.size or size
        self.mean = self.mean or _fit(mean, self.channels)
        self.std = self.std or _fit(std, self.channels)


def named_normalization(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of pixels in 0..1 by name: `imagenet`, `cifar10`, `cifar100`, `none`; one value per channel each.

    A single value is repeated, and a triple averaged for a network that does not take three channels.

    Raises ValueError for an unknown name.
    """
    if name not in _NORMALIZATIONS:
        raise ValueError(f"normalization {name!r} is not one of {', '.join(_NORMALIZATIONS)}")
    mean, std = _NORMALIZATIONS[name]
    return _fit(mean, channels), _fit(std, channels)


def _fit(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else (sum(values) / len(values),) * channels


class Library(Protocol):
    """What `clusterq.models` asks of a library of networks."""

    def build(self, name: str) -> nn.Module:
        """The architecture. Raises ModelError for an unknown name."""

    def weights(self, name: str, weights: str, download: bool) -> Path:
        """The file of the published weights. Raises ModelError when unknown, or absent and `download` is False."""

    def describe(self, name: str, weights: str | None, model: nn.Module, facts: Facts) -> None:
        """Fill in what the library knows about the input of the network with these weights."""


def _absent(library: str, weights: str, path: Path | str) -> ModelError:
    return ModelError(f"{library} weights {weights!r} are not on this machine ({path}); --download fetches them")


class _Torchvision:
    @staticmethod
    def _models() -> Any:
        return require("torchvision.models", purpose="torchvision:NAME", extra="vision")

    def build(self, name: str) -> nn.Module:
        models = self._models()
        if name not in models.list_models(module=models):
            raise ModelError(f"torchvision has no classification network {name!r}")
        model: nn.Module = models.get_model(name, weights=None)
        return model

    def _entry(self, name: str, weights: str) -> Any:
        options = self._models().get_model_weights(name)
        wanted = weights.rsplit(".", 1)[-1].upper()
        if wanted not in options.__members__:
            raise ModelError(
                f"torchvision:{name} has no weights {weights!r}; there are {', '.join(options.__members__)}"
            )
        return options[wanted]

    def weights(self, name: str, weights: str, download: bool) -> Path:
        entry = self._entry(name, weights)
        file = entry.url.rsplit("/", 1)[-1]
        path = Path(str(torch.hub.get_dir()), "checkpoints", file)
        if not path.is_file():
            if not download:
                raise _absent("torchvision", weights, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # The last part of the file name is the beginning of its SHA-256.
            torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        return path

    def describe(self, name: str, weights: str | None, model: nn.Module, facts: Facts) -> None:
        options = self._models().get_model_weights(name)
        if weights is not None and weights.rsplit(".", 1)[-1].upper() in options.__members__:
            entry = self._entry(name, weights)
        elif len(options):
            entry = next(iter(options))
        else:
            return
        preset = entry.transforms()
        own_size = facts.size is None and facts.mean is None and facts.std is None
        facts.fill(3, preset.crop_size[0], tuple(preset.mean), tuple(preset.std))
        if own_size:
            facts.transform = preset


class _Timm:
    @staticmethod
    def _timm() -> Any:
        return require("timm", purpose="timm:NAME")

    def build(self, name: str) -> nn.Module:
        timm = self._timm()
        # timm fetches and reads from elsewhere by names such as hf-hub:USER/MODEL and local-dir:PATH.
        if ":" in name or "/" in name or not timm.is_model(name):
            raise ModelError(f"timm has no network {name!r}")
        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    def _published(self, name: str, weights: str | None) -> Any:
        """timm's record of these weights, None when it has none: `weights` is a tag, or `default` for the usual one."""
        tagged = name if weights == "default" else f"{name.split('.', 1)[0]}.{weights}"
        try:
            return self._timm().models.get_pretrained_cfg(tagged)
        except RuntimeError:
            return None

    def weights(self, name: str, weights: str, download: bool) -> Path:
        published = self._published(name, weights)
        if published is None or not published.hf_hub_id:
            raise ModelError(f"timm:{name} has no weights {weights!r}")
        hub = require("huggingface_hub", purpose="weights of timm")
        repository = published.hf_hub_id
        if repository.endswith("/"):
            repository = f"{repository}{published.architecture}.{published.tag}"
        file = published.hf_hub_filename or "model.safetensors"
        try:
            return Path(hub.hf_hub_download(repository, file, local_files_only=not download))
        except hub.errors.LocalEntryNotFoundError:
            raise _absent("timm", weights, f"Hugging Face cache, {repository}") from None

    def describe(self, name: str, weights: str | None, model: nn.Module, facts: Facts) -> None:
        data = require("timm.data", purpose="timm:NAME")
        published = self._published(name, weights)
        if published is None:
            config = data.resolve_model_data_config(model)
        else:
            config = data.resolve_data_config(pretrained_cfg=published.to_dict())
        own = facts.size is None and facts.mean is None and facts.std is None
        channels, size, _ = config["input_size"]
        facts.fill(channels, size, tuple(config["mean"]), tuple(config["std"]))
        if own:
            facts.transform = data.create_transform(**config, is_training=False)


class _Pytorchcv:
    def build(self, name: str) -> nn.Module:
        provider = require("pytorchcv.model_provider", purpose="pytorchcv:NAME")
        try:
            model: nn.Module = provider.get_model(name, pretrained=False)
        except ValueError:
            raise ModelError(f"pytorchcv has no network {name!r}") from None
        return model

    def weights(self, name: str, weights: str, download: bool) -> Path:
        if weights not in ("default", name):
            raise ModelError(f"pytorchcv:{name} has one set of weights, 'default', not {weights!r}")
        store = require("pytorchcv.models.common.model_store", purpose="pytorchcv:NAME")
        try:
            error, sha1, _ = store.get_model_name_suffix_data(name)
        except ValueError:
            raise ModelError(f"pytorchcv publishes no weights for {name!r}") from None
        path = Path("~/.torch/models").expanduser() / f"{name}-{error}-{sha1[:8]}.pth"
        if download:
            return Path(store.get_model_file(name))
        if not path.is_file():
            raise _absent("pytorchcv", weights, path)
        return path

    def describe(self, name: str, weights: str | None, model: nn.Module, facts: Facts) -> None:
        size = getattr(model, "in_size", (224, 224))[0]
        if name.rsplit("_", 1)[-1] in ("cifar10", "cifar100"):
            # The normalisation its authors evaluate these networks with; ImageNet's for all others.
            facts.fill(3, size, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        facts.size = facts.size or int(size)


LIBRARIES: dict[str, Library] = {"torchvision": _Torchvision(), "timm": _Timm(), "pytorchcv": _Pytorchcv()}
