"""Where trained networks come from: two built in, the model libraries, a user's own Python file.

A specification is `builtin:resnet20`, `builtin:digits`, `torchvision:NAME`, `timm:NAME`, `pytorchcv:NAME` or
`path/to/file.py:factory`. Weights are a file (safetensors, or a plain PyTorch state dict read with `weights_only=True`
and never any other way) or the library's own name for them. Nothing is fetched from a network unless `download=True`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq.errors import ModelError
from clusterq.libraries import IMAGENET_MEAN, IMAGENET_STD, LIBRARIES, Facts, named_normalization
from clusterq.networks import DigitsConvNet, resnet20
from clusterq.readers import first_line, read_safetensors, require_plain
from clusterq.readers_torch import read_pickled_tensors

DIGITS_WEIGHTS = Path(__file__).resolve().parent / "assets" / "digits_convnet.safetensors"
DIGITS_MEAN, DIGITS_STD = (0.306,), (0.319,)

_BUILTIN: dict[str, Callable[..., nn.Module]] = {"resnet20": resnet20, "digits": DigitsConvNet}


@dataclass(frozen=True)
class Source:
    """Where a network came from: goes into every result file.

    Attributes:
        model: the specification.
        weights: file name (without folder) or the library's name of the weights; None when a factory brought its own.
        weights_sha256: of the weight file, or of all tensors (`tensors_sha256`) when there is no file.
    """

    model: str
    weights: str | None
    weights_sha256: str


@dataclass(frozen=True)
class LoadedModel:
    """A network in evaluation mode with what is known about its input.

    Attributes:
        model: the network, float32, on the CPU.
        source: provenance.
        input_shape: channels, height, width of one image.
        num_classes: length of the output.
        mean, std: per-channel normalisation of pixels scaled to 0..1.
        transform: the library's own evaluation transform from a PIL image to a tensor, where it has one.
    """

    model: nn.Module
    source: Source
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Any], Tensor] | None = None

    @functools.cached_property
    def tensors_sha256(self) -> str:
        """Of the network's tensors as loaded: the same whatever file they came from."""
        return tensors_sha256(self.model.state_dict())

    def facts(self) -> dict[str, Any]:
        """What identifies the network and its input, as plain values."""
        return {
            **asdict(self.source),
            "tensors_sha256": self.tensors_sha256,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "input_shape": list(self.input_shape),
            "num_classes": self.num_classes,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def load_model(
    spec: str,
    weights: str | None = None,
    *,
    input_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    normalization: str | None = None,
    download: bool = False,
) -> LoadedModel:
    """Build the network a specification names and load its weights.

    Args:
        spec: see the module's docstring.
        weights: weight file, or the library's own name (`IMAGENET1K_V1`, a timm tag, `default`). Optional for
            `builtin:digits`, whose weights ship with the package, and for a factory that returns a trained network.
            They decide how many classes a built-in network has.
        input_size: height and width in pixels; default: what the library says, 32 for `resnet20`, else 224.
        mean, std: normalisation of pixels in 0..1; default: what the library says, else ImageNet's.
        normalization: both by name instead, see `clusterq.libraries.named_normalization`.
        download: allow the library to fetch its own weights.

    Raises:
        ModelError: an unknown name, weights that are absent, unreadable, damaged, NaN, infinite or of another shape, or
            a network whose output is not [N, classes].
        ValueError: `normalization` is unknown, or given together with `mean` or `std`.
        MissingPackageError: the library is not installed.
    """
    kind, name = _split(spec)
    model = build_model(spec)
    if normalization is not None:
        if mean is not None or std is not None:
            raise ValueError("normalization is given together with mean or std; wanted one of them")
        mean, std = named_normalization(normalization, _input_channels(model))
    facts = Facts(mean=mean, std=std, size=input_size)
    path: Path | None = None
    label = weights
    if weights is not None and Path(weights).is_file():
        path, label = Path(weights), Path(weights).name
    elif kind == "builtin" and name == "digits" and weights is None:
        path, label = DIGITS_WEIGHTS, DIGITS_WEIGHTS.name
    elif kind in LIBRARIES and weights is not None and not _looks_like_path(weights):
        path = LIBRARIES[kind].weights(name, weights, download)
    elif weights is not None:
        raise ModelError(f"weights {weights!r}: no such file")
    elif kind != "file":
        example = "FILE or the library's own name" if kind in LIBRARIES else "FILE"
        raise ModelError(f"{spec} needs trained weights: give --weights {example}")
    if kind in LIBRARIES:
        LIBRARIES[kind].describe(name, weights, model, facts)
    if path is not None:
        state = read_state_dict(path)
        if kind == "builtin":
            model = build_model(spec, _classes(model, state))
        load_weights(model, state, origin=path.name)
        digest = file_sha256(path)
    else:
        digest = tensors_sha256(model.state_dict())
    model = model.float().eval()
    _require_finite(model.state_dict(), label or spec)
    if name == "digits" and kind == "builtin":
        facts.fill(1, 16, DIGITS_MEAN, DIGITS_STD)
    facts.fill(_input_channels(model), 32 if spec == "builtin:resnet20" else 224, IMAGENET_MEAN, IMAGENET_STD)
    assert facts.size is not None and facts.channels is not None and facts.mean is not None and facts.std is not None
    for argument, values in (("mean", facts.mean), ("std", facts.std)):
        if len(values) != facts.channels:
            raise ModelError(f"{argument} has {len(values)} values; the network takes {facts.channels} channels")
    shape = (facts.channels, facts.size, facts.size)
    return LoadedModel(
        model,
        Source(spec, label, digest),
        shape,
        output_classes(model, shape),
        facts.mean,
        facts.std,
        facts.transform,
    )


def build_model(spec: str, num_classes: int | None = None) -> nn.Module:
    """The network's architecture with untrained weights (a factory may return trained ones).

    Args:
        spec: see the module's docstring.
        num_classes: of a built-in network, 10 unless given; other networks have the number their source gives them.

    Raises ModelError for an unknown specification and MissingPackageError for an absent library.
    """
    kind, name = _split(spec)
    if kind == "builtin":
        if name not in _BUILTIN:
            raise ModelError(f"no built-in network {name!r}; there are {', '.join(sorted(_BUILTIN))}")
        return _BUILTIN[name]() if num_classes is None else _BUILTIN[name](num_classes=num_classes)
    if kind in LIBRARIES:
        return LIBRARIES[kind].build(name)
    return _from_file(*spec.rsplit(":", 1))


def own_transform(
    source: Source, model: nn.Module, input_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any], Tensor] | None:
    """The evaluation transform of the library a network came from, if it makes images of this size and normalisation.

    Args:
        source: where the network came from.
        model: the network, or its quantized twin.
        input_shape, mean, std: what images are to be like.
    """
    kind, name = _split(source.model)
    if kind not in LIBRARIES:
        return None
    facts = Facts()
    LIBRARIES[kind].describe(name, source.weights, model, facts)
    known = facts.size is not None and (facts.size, facts.mean, facts.std) == (input_shape[1], mean, std)
    return facts.transform if known else None


@torch.no_grad()
def zero_image_logits(model: nn.Module, input_shape: tuple[int, int, int]) -> Tensor:
    """What the network, in the mode it is in, gives for two zero images of `input_shape` (channels, height, width).

    Raises ModelError when the network cannot run on such images or its output is not one [2, classes] tensor with at
    least two classes.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    images = torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        logits = model(images)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = first_line(error)
        raise ModelError(f"the network does not accept images of shape {tuple(input_shape)}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 2 or logits.shape[1] < 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(f"the network's output is {got} for 2 images; wanted [2, classes] with at least 2 classes")
    return logits


def output_classes(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Number of classes of the network, found by one forward pass; raises as `zero_image_logits`."""
    return zero_image_logits(model, input_shape).shape[1]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weight file by name. A `state_dict`/`model` entry around them and a `module.` prefix are removed.

    `.safetensors` is read with safetensors, everything else with `torch.load(weights_only=True)`; a file that this
    refuses is an error, never a second try.

    Raises:
        ModelError: unreadable, damaged, not a dictionary of tensors, or holding a NaN or infinite value.
    """
    path = Path(path)
    _require_weight_file(path)
    data: Any
    if path.suffix == ".safetensors":
        data = read_safetensors(path, ModelError)
    else:
        data = read_pickled_tensors(path, ModelError)
    for key in ("state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, dict) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        raise ModelError(f"{path.name} is not a dictionary of tensors")
    state = {str(k).removeprefix("module."): v for k, v in data.items()}
    require_plain(state, path.name, ModelError)
    _require_finite(state, path.name)
    return state


def load_weights(model: nn.Module, state: dict[str, Tensor], *, origin: str) -> None:
    """Load a state dict strictly; `num_batches_tracked` counters may be absent.

    Raises ModelError naming the first tensor, in the network's order, that is missing or of another shape, or the first
    that the network has no place for.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in state:
            if name.endswith("num_batches_tracked"):
                state = {**state, name: value}
                continue
            raise ModelError(f"{origin} does not fit the network: tensor {name} {list(value.shape)} is missing")
        if state[name].shape != value.shape:
            got = list(state[name].shape)
            raise ModelError(
                f"{origin} does not fit the network: tensor {name} has shape {got}; wanted {list(value.shape)}"
            )
    surplus = next((name for name in state if name not in own), None)
    if surplus is not None:
        raise ModelError(f"{origin} does not fit the network: the network has no tensor {surplus}")
    model.load_state_dict(state)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors in sorted order, hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _split(spec: str) -> tuple[str, str]:
    kind, _, name = spec.partition(":")
    if not name:
        raise ModelError(
            f"model {spec!r} names no network; wanted builtin:NAME, torchvision:NAME, timm:NAME, pytorchcv:NAME "
            "or FILE.py:FACTORY"
        )
    if kind == "builtin" or kind in LIBRARIES:
        return kind, name
    return "file", spec


def _from_file(file: str, factory: str) -> nn.Module:
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ModelError(f"model file {file!r}: no such Python file")
    name = f"clusterq_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, pickle and torch.fx look a class's module up by name, now and later.
    sys.modules[name] = module
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
            make = getattr(module, factory, None)
            if not callable(make):
                raise ModelError(f"{path.name} has no function {factory!r}")
            model = make()
    except ModelError:
        raise
    # A user's own code may raise anything, and all of it is told in the same way.
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ModelError(f"{path.name}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path.name}:{factory} returned a {type(model).__name__}; wanted a torch.nn.Module")
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules beside a user's file can be imported by it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Rows of the last Linear's weight in a state dict; None when it has no such matrix."""
    last = [name for name, value in model.state_dict().items() if value.dim() == 2][-1]
    return len(state[last]) if last in state and state[last].dim() == 2 else None


def _require_finite(state: Mapping[str, Tensor], origin: str) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{origin}: tensor {name} holds a NaN or infinite value")


def _require_weight_file(path: Path) -> None:
    """A pointer of git-lfs, a web page and the like: neither a zip archive nor a binary pickle, the forms of torch."""
    if path.suffix == ".safetensors" or not path.is_file():
        return
    with open(path, "rb") as file:
        begin = file.read(24)
    if not begin.startswith((b"PK", b"\x80")):
        shown = begin.decode("ascii", "replace")
        raise ModelError(f"{path.name} is not a PyTorch weight file: it begins with {shown!r}")


def runs_code(spec: str) -> bool:
    """Whether a specification names a Python file, which is run to make the network."""
    return _split(spec)[0] == "file"


def _input_channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def _looks_like_path(weights: str) -> bool:
    return "/" in weights or Path(weights).suffix in (".pt", ".pth", ".safetensors", ".bin", ".tar")
