"""Evaluation sets and top-1/top-5 accuracy. Real images are used here and nowhere else: the method never sees them.

A set is named by `digits` (scikit-learn's handwritten digits, held-out part), `cifar10:DIR` or `cifar100:DIR`
(torchvision's layout), an `.npz` file (`images` uint8 [N, H, W, C], `labels` [N], optional `classes`), a folder with
`images.zip` and `labels.csv` (`file,label`), or a folder of one sub-folder per class. Pixels are scaled to 0..1 and
normalised per channel with the network's own mean and standard deviation; image files go through the library's own
transform where there is one.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clusterq.errors import DataError, ModelError, require
from clusterq.models import LoadedModel, file_sha256
from clusterq.processes import Processes
from clusterq.readers import BROKEN_ZIP, IMAGE_BYTES, decoded_image, read_array, read_labels, require_unpacked_size

DIGITS_HELD_OUT = 500
_DIGITS_SPLIT_SEED = 0
# Files of a set of images in one archive.
_ARCHIVE = ("images.zip", "labels.csv")


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy in percent on `count` images; `top5` is None for five classes or fewer."""

    top1: float
    top5: float | None
    count: int


class EvaluationSet(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images with labels: item `i` is (float32 [C, H, W] normalised, label).

    Attributes:
        name: how results call it.
        num_classes: number of classes the set declares; None when it declares none.
        labels: int64 [N].
    """

    def __init__(
        self, name: str, image: Callable[[int], Tensor], labels: Tensor, num_classes: int | None = None
    ) -> None:
        if labels.numel() == 0:
            raise DataError(f"{name} holds no images")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0:
            raise DataError(f"{name}: label {lowest} is negative")
        if highest >= 1 << 31:
            raise DataError(f"{name}: label {highest} is larger than any number of classes")
        if num_classes is not None and highest >= num_classes:
            raise DataError(f"{name}: label {highest} is out of range; the set declares {num_classes} classes")
        self.name = name
        self.labels = labels
        self.num_classes = num_classes
        self._image = image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._image(index), int(self.labels[index])

    def batches(
        self, batch_size: int, limit: int | None = None, *, processes: Processes | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [n, C, H, W], labels [n]) in order, n <= batch_size, over the first `limit` images or all.

        Of several processes each gets every so many-th batch.
        """
        processes = processes or Processes()
        end = len(self) if limit is None else min(limit, len(self))
        for start in range(processes.rank * batch_size, end, processes.size * batch_size):
            stop = min(start + batch_size, end)
            yield torch.stack([self._image(i) for i in range(start, stop)]), self.labels[start:stop]


def check_fits(data: EvaluationSet, num_classes: int) -> None:
    """Raises DataError when the set's classes cannot be those of a network with `num_classes` outputs."""
    if data.num_classes is not None and data.num_classes != num_classes:
        raise DataError(f"{data.name} has {data.num_classes} classes; the network has {num_classes}")
    highest = int(data.labels.max())
    if highest >= num_classes:
        raise DataError(f"{data.name}: label {highest} is out of range for a network with {num_classes} classes")


def evaluate(
    model: nn.Module,
    data: EvaluationSet | Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int = 128,
    limit: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    processes: Processes | None = None,
) -> EvaluationResult:
    """Top-1 and top-5 accuracy in evaluation mode, float32, without gradients. The training flag is restored.

    Args:
        model: maps [N, C, H, W] to [N, classes].
        data: an `EvaluationSet`, or any iterable of (images, labels) batches such as a DataLoader.
        batch_size, limit: of an `EvaluationSet`; a limit counts images from the start.
        device: where to run; default: where the model's first parameter lies.
        progress: called with images done and images in total (None when unknown) after each batch.
        processes: that share the batches of an `EvaluationSet` and get the same result.

    Raises:
        DataError: no images, a label outside the network's classes, or another declared class count.
        ModelError: an output that is NaN or infinite.
    """
    from clusterq.nn.layers import quantized_weights_kept

    processes = processes if processes is not None and isinstance(data, EvaluationSet) else Processes()
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; wanted at least 1 image")
    if device is None:
        parameter = next(model.parameters(), None)
        device = parameter.device if parameter is not None else "cpu"
    total: int | None = None
    batches: Iterable[tuple[Tensor, Tensor]] = data  # type: ignore[assignment]
    if isinstance(data, EvaluationSet):
        total = len(data) if limit is None else min(limit, len(data))
        batches = data.batches(batch_size, limit, processes=processes)
    count, hits1, hits5, classes = 0, 0, 0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), quantized_weights_kept(model):
            for images, labels in batches:
                y = model(images.to(device))
                if classes == 0:
                    classes = int(y.shape[1])
                    if isinstance(data, EvaluationSet):
                        check_fits(data, classes)
                if int(labels.max()) >= classes or int(labels.min()) < 0:
                    raise DataError(f"label {int(labels.max())} is out of range for a network with {classes} classes")
                if not bool(torch.isfinite(y).all()):
                    raise ModelError(
                        f"the network's output is NaN or infinite among images {count} to {count + len(y) - 1}"
                    )
                top = y.float().topk(min(5, classes), dim=1).indices.cpu() == labels.cpu()[:, None]
                hits1 += int(top[:, 0].sum())
                hits5 += int(top.any(dim=1).sum())
                count += len(labels)
                if progress is not None:
                    done = count * processes.size
                    progress(done if total is None else min(done, total), total)
    finally:
        model.train(training)
    if processes.size > 1:
        hits1, hits5, count = (int(n) for n in processes.add_(torch.tensor([hits1, hits5, count], device=device)))
        # A process without a batch has not seen it.
        classes = processes.agree(classes)
    if count == 0:
        raise DataError("there are no images to evaluate on")
    return EvaluationResult(100 * hits1 / count, 100 * hits5 / count if classes > 5 else None, count)


def open_data(
    spec: str,
    *,
    input_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    transform: Callable[[Any], Tensor] | None = None,
) -> EvaluationSet:
    """Open the evaluation set a specification names (see the module's docstring).

    Args:
        spec: name, file or folder.
        input_shape: channels, height, width that the network takes.
        mean, std: normalisation of pixels in 0..1, one value per channel.
        transform: from a PIL image to a normalised tensor, used for image files instead of resize, centre crop and
            normalisation.

    Raises:
        DataError: it does not exist, is damaged, or its images do not have the network's channels and size.
        MissingPackageError: torchvision, scikit-learn or Pillow is needed and absent.
    """
    normalise = _normaliser(mean, std)
    own = transform
    prepare = _file_transform(input_shape, normalise) if own is None else lambda image: own(image.convert("RGB"))
    kind, _, root = spec.partition(":")
    if spec == "digits":
        if input_shape != (1, 16, 16):
            raise DataError(f"digits: images are [1, 16, 16]; the network takes {list(input_shape)}")
        images, labels = digits(held_out=True)
        return EvaluationSet("digits (held-out)", lambda i: normalise(images[i]), labels, 10)
    if kind in ("cifar10", "cifar100") and root:
        return _cifar(kind, root, input_shape, normalise)
    path = Path(spec)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, input_shape, normalise)
    if all((path / name).is_file() for name in _ARCHIVE):
        return _zipped(path, prepare)
    if path.is_dir():
        return _folder(path, prepare)
    raise DataError(
        f"evaluation set {spec!r} was not found; wanted digits, cifar10:DIR, cifar100:DIR, FILE.npz, "
        "a folder with images.zip and labels.csv, or a folder of class folders"
    )


def open_for(loaded: LoadedModel, spec: str) -> EvaluationSet:
    """`open_data` with the input facts of a loaded network, checked against its number of classes."""
    data = open_data(spec, input_shape=loaded.input_shape, mean=loaded.mean, std=loaded.std, transform=loaded.transform)
    check_fits(data, loaded.num_classes)
    return data


def content_sha256(spec: str) -> str | None:
    """SHA-256 of a set's content, hexadecimal: of a file its bytes, of a folder the names and bytes of its files.

    None for the named sets, whose content is fixed: scikit-learn brings one, torchvision verifies the others.

    Args:
        spec: see the module's docstring.

    Raises:
        OSError: a file cannot be read.
    """
    path = Path(spec)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return None
    archive = [path / name for name in _ARCHIVE]
    files = archive if all(file.is_file() for file in archive) else [file for file in path.rglob("*") if file.is_file()]
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
        digest.update(json.dumps([name, file_sha256(file)]).encode())
    return digest.hexdigest()


def digits(*, held_out: bool) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits at 16x16: float32 [N, 1, 16, 16] in 0..1 and int64 [N].

    A fixed random permutation sets 500 images aside; `held_out` chooses these or the other 1,297. Images are enlarged
    from 8x8 by bilinear interpolation.
    """
    source = require("sklearn.datasets", purpose="the digits set", extra="demo").load_digits()
    images = torch.from_numpy(source.images).float()[:, None] / 16
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED))
    chosen = order[:DIGITS_HELD_OUT] if held_out else order[DIGITS_HELD_OUT:]
    larger = torch.nn.functional.interpolate(images[chosen], size=(16, 16), mode="bilinear", align_corners=False)
    return larger, labels[chosen]


def _normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    shift = torch.tensor(mean, dtype=torch.float32)[:, None, None]
    scale = torch.tensor(std, dtype=torch.float32)[:, None, None]
    if not bool((scale > 0).all()):
        raise DataError(f"std is {list(std)}; wanted positive values")

    def normalise(image: Tensor) -> Tensor:
        return (image - shift) / scale

    return normalise


def _pixels(image: Tensor) -> Tensor:
    """uint8 [H, W, C] -> float32 [C, H, W] in 0..1."""
    return image.permute(2, 0, 1).float() / 255


def _array_set(
    name: str,
    images: Tensor,
    labels: Tensor,
    num_classes: int | None,
    input_shape: tuple[int, int, int],
    normalise: Callable[[Tensor], Tensor],
) -> EvaluationSet:
    height, width, channels = images.shape[1:]
    if (channels, height, width) != input_shape:
        got, wanted = [channels, height, width], list(input_shape)
        raise DataError(f"{name}: images are {got} (channels, height, width); the network takes {wanted}")
    return EvaluationSet(name, lambda i: normalise(_pixels(images[i])), labels, num_classes)


def _cifar(
    kind: str, root: str, input_shape: tuple[int, int, int], normalise: Callable[[Tensor], Tensor]
) -> EvaluationSet:
    datasets = require("torchvision.datasets", purpose=kind, extra="vision")
    # torchvision verifies the MD5 of every file before it unpickles one.
    try:
        source = getattr(datasets, kind.upper())(root, train=False, download=False)
    except RuntimeError:
        raise DataError(f"{kind}:{root}: the set is absent or damaged (torchvision's layout is expected)") from None
    labels = torch.tensor(source.targets)
    return _array_set(kind, torch.from_numpy(source.data), labels, len(source.classes), input_shape, normalise)


def _npz(path: Path, input_shape: tuple[int, int, int], normalise: Callable[[Tensor], Tensor]) -> EvaluationSet:
    try:
        with zipfile.ZipFile(path) as archive:
            require_unpacked_size(archive, path.stat().st_size, path.name, DataError)
            members = {info.filename: info for info in archive.infolist()}
            images = read_array(path.name, archive, members, "images")
            labels = read_array(path.name, archive, members, "labels")
            named = read_array(path.name, archive, members, "classes") if "classes.npy" in members else None
    except BROKEN_ZIP as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path.name} cannot be read as an .npz file: {error}") from error
    if images.dtype != "uint8" or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"{path.name}: images are {images.dtype} {list(images.shape)}; wanted uint8 [N, H, W, 1 or 3]")
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) != len(images):
        raise DataError(f"{path.name}: labels are {labels.dtype} {list(labels.shape)}; wanted integers [{len(images)}]")
    if named is not None and named.ndim != 1:
        raise DataError(f"{path.name}: classes are {list(named.shape)}; wanted one name per class")
    classes = None if named is None else len(named)
    target = torch.from_numpy(labels.astype("int64"))
    return _array_set(path.name, torch.from_numpy(images), target, classes, input_shape, normalise)


def _file_transform(
    input_shape: tuple[int, int, int], normalise: Callable[[Tensor], Tensor]
) -> Callable[[Any], Tensor]:
    """Shorter side to size / 0.875 (an image that covers the crop is never enlarged), centre crop, normalise."""
    channels, height, width = input_shape

    def prepare(image: Any) -> Tensor:
        import numpy as np

        image = image.convert("L" if channels == 1 else "RGB")
        shorter = min(image.size)
        wanted = round(max(height, width) / 0.875)
        if shorter > wanted or image.width < width or image.height < height:
            scale = wanted / shorter
            image = image.resize((round(image.width * scale), round(image.height * scale)), resample=2)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return normalise(_pixels(pixels if channels > 1 else pixels[:, :, None]))

    return prepare


def _zipped(path: Path, prepare: Callable[[Any], Tensor]) -> EvaluationSet:
    rows = read_labels(path / "labels.csv")
    name = f"{path.name}/images.zip"
    try:
        archive = zipfile.ZipFile(path / "images.zip")
        require_unpacked_size(archive, (path / "images.zip").stat().st_size, name, DataError)
    except BROKEN_ZIP as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} cannot be read: {error}") from error
    # Members are looked up by their names in the archive and never written anywhere.
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    absent = next((file for file, _ in rows if file not in sizes), None)
    if absent is not None:
        raise DataError(f"{name} has no file {absent!r}, which labels.csv names")

    def image(index: int) -> Tensor:
        file = rows[index][0]
        if sizes[file] > IMAGE_BYTES:
            raise DataError(f"{name}: {file} has {sizes[file]} bytes; too many for one image")
        try:
            content = archive.read(file)
        except BROKEN_ZIP as error:
            raise DataError(f"{name}: {file} cannot be read: {error}") from error
        with decoded_image(io.BytesIO(content), f"{name}: {file}") as picture:
            return prepare(picture)

    return EvaluationSet(path.name, image, torch.tensor([label for _, label in rows]))


def _folder(path: Path, prepare: Callable[[Any], Tensor]) -> EvaluationSet:
    datasets = require("torchvision.datasets", purpose="a folder of class folders", extra="vision")
    try:
        source = datasets.ImageFolder(str(path))
    except FileNotFoundError:
        raise DataError(f"{path.name}: no class folders with images in it") from None

    def image(index: int) -> Tensor:
        file = source.samples[index][0]
        if Path(file).stat().st_size > IMAGE_BYTES:
            raise DataError(f"{file} has more than {IMAGE_BYTES} bytes; too many for one image")
        with open(file, "rb") as stream, decoded_image(stream, file) as picture:
            return prepare(picture.convert("RGB"))

    return EvaluationSet(path.name, image, torch.tensor(source.targets), len(source.classes))
