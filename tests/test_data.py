"""Evaluation sets and accuracy, checked on small sets with known answers."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusterq.data import EvaluationSet, check_fits, content_sha256, digits, evaluate, open_data
from clusterq.errors import DataError, ModelError

INPUT = {"input_shape": (3, 4, 4), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.4)}


class Fixed(nn.Module):
    """Scores by the first pixel's value, read as the index of a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not self.training
        return self.table[x[:, 0, 0, 0].long()]


def _numbered(labels: list[int], num_classes: int | None = None) -> EvaluationSet:
    return EvaluationSet("set", lambda i: torch.full((1, 2, 2), float(i)), torch.tensor(labels), num_classes)


def _npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_top1_and_top5_by_hand() -> None:
    # Row i ranks the classes i, i+1, ... (mod 8) from best to worst.
    table = torch.tensor([[float(-((c - i) % 8)) for c in range(8)] for i in range(6)])
    model = Fixed(table).train()
    # Ranks of the labels below: 0, 1, 4, 5, 0, 7.
    data = _numbered([0, 2, 6, 0, 4, 4])
    for batch_size in (1, 4, 100):
        result = evaluate(model, data, batch_size=batch_size)
        assert result.top1 == pytest.approx(100 * 2 / 6)
        assert result.top5 == pytest.approx(100 * 4 / 6)
        assert result.count == 6
    assert model.training
    assert evaluate(model, data, limit=2).top1 == 50.0


def test_loader_of_batches_is_accepted() -> None:
    data = _numbered([0, 1, 1, 0])
    model = Fixed(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    result = evaluate(model, loader)
    assert (result.top1, result.top5, result.count) == (75.0, None, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite(value: float) -> None:
    model = Fixed(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, value]]))
    assert evaluate(model, _numbered([0, 0, 0, 1]), limit=3).top1 == 100
    with pytest.raises(ModelError, match="NaN or infinite among images 2 to 3"):
        evaluate(model, _numbered([0, 0, 0, 1]), batch_size=2)


def test_label_out_of_range() -> None:
    model = Fixed(torch.zeros(2, 3))
    with pytest.raises(DataError, match="label 3 is out of range for a network with 3 classes"):
        evaluate(model, _numbered([0, 3]))
    with pytest.raises(DataError, match="label 7 is out of range"):
        evaluate(model, [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 7]))])
    with pytest.raises(DataError, match="label -1 is negative"):
        _numbered([0, -1])
    with pytest.raises(DataError, match="label 4 is out of range; the set declares 4"):
        _numbered([0, 4], 4)


def test_class_counts_must_agree() -> None:
    check_fits(_numbered([0, 1], 5), 5)
    with pytest.raises(DataError, match="has 5 classes; the network has 10"):
        check_fits(_numbered([0, 1], 5), 10)


def test_no_images() -> None:
    with pytest.raises(DataError, match="holds no images"):
        _numbered([])
    with pytest.raises(DataError, match="no images"):
        evaluate(Fixed(torch.zeros(1, 2)), [])
    with pytest.raises(DataError, match="limit is 0"):
        evaluate(Fixed(torch.zeros(1, 2)), _numbered([0]), limit=0)


def test_npz_is_scaled_and_normalised(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    path = _npz(
        tmp_path / "set.npz", images=images, labels=np.arange(5, dtype=np.uint8), classes=np.array(list("abcde"))
    )
    data = open_data(str(path), **INPUT)  # type: ignore[arg-type]
    assert len(data) == 5 and data.num_classes == 5
    image, label = data[2]
    mean, std = np.array(INPUT["mean"]), np.array(INPUT["std"])
    expected = ((images[2].astype(np.float64) / 255 - mean) / std).transpose(2, 0, 1)
    torch.testing.assert_close(image.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)
    assert label == 2 and image.dtype == torch.float32


def test_npz_with_python_objects_is_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    path = _npz(tmp_path / "set.npz", images=images, labels=np.array([0, {"a": 1}], dtype=object))
    with pytest.raises(DataError, match="'labels' holds Python objects and was refused"):
        open_data(str(path), **INPUT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(2, int)}, "no array 'images'"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "no array 'labels'"),
        ({"images": np.zeros((2, 4, 4, 3)), "labels": np.zeros(2, int)}, "images are float64"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.zeros(2, int)}, "wanted uint8"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, r"labels are int64 \[3\]"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2)}, "labels are float64"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(2, int)}, r"images are \[1, 4, 4\]"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(2, int)}, r"the network takes \[3, 4, 4\]"),
    ],
)
def test_npz_of_wrong_content(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    path = _npz(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_data(str(path), **INPUT)  # type: ignore[arg-type]


def test_npz_that_announces_more_than_it_stores(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 224, 224, 3)}
    )
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"\0" * 10)
    with pytest.raises(DataError, match="'images' announces 150528000000000 bytes; 10 are stored"):
        open_data(str(path), **INPUT)  # type: ignore[arg-type]


@pytest.mark.parametrize("compressed", [False, True])
def test_flipped_bytes_of_an_npz_are_noticed_or_harmless(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "set.npz"
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    (np.savez_compressed if compressed else np.savez)(path, images=images, labels=np.array([0, 1, 2]))
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(bytes(damaged))
        try:
            data = open_data(str(path), **INPUT)  # type: ignore[arg-type]
        except DataError:
            refused += 1
        else:
            assert data.labels.tolist() == [0, 1, 2]
            expected = torch.from_numpy(images[1]).permute(2, 0, 1) / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
            torch.testing.assert_close(data[1][0], expected / torch.tensor([0.1, 0.2, 0.4])[:, None, None])
    assert refused > 20


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        open_data(str(path), **INPUT)  # type: ignore[arg-type]


def test_absent_set() -> None:
    with pytest.raises(DataError, match="was not found; wanted digits"):
        open_data("nowhere", **INPUT)  # type: ignore[arg-type]


def _png(value: int, size: tuple[int, int]) -> bytes:
    pil = pytest.importorskip("PIL.Image")
    stream = io.BytesIO()
    pil.new("RGB", size, (value, value, value)).save(stream, format="PNG")
    return stream.getvalue()


def _zip_folder(tmp_path: Path, rows: list[tuple[str, str]], files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows(rows)
    return tmp_path


def test_zipped_folder(tmp_path: Path) -> None:
    rows = [("b.png", "1"), ("a.png", "0")]
    _zip_folder(tmp_path, rows, {"a.png": _png(0, (5, 4)), "b.png": _png(255, (9, 12))})
    data = open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    assert [label for _, label in (data[0], data[1])] == [1, 0]
    image, _ = data[0]
    assert image.shape == (3, 4, 4)
    expected = (1 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.4])
    torch.testing.assert_close(image[:, 1, 2], expected)


def test_zipped_folder_with_missing_file_or_bad_label(tmp_path: Path) -> None:
    _zip_folder(tmp_path, [("c.png", "0")], {"a.png": _png(0, (4, 4))})
    with pytest.raises(DataError, match=r"has no file 'c\.png'"):
        open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    _zip_folder(tmp_path, [("a.png", "cat")], {"a.png": _png(0, (4, 4))})
    with pytest.raises(DataError, match="integer labels"):
        open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]


def test_damaged_zip_of_images(tmp_path: Path) -> None:
    good = _png(7, (4, 4))
    _zip_folder(tmp_path, [("a.png", "0"), ("b.png", "1"), ("c.png", "1")],
                {"a.png": good, "b.png": b"no image", "c.png": good[:40]})  # fmt: skip
    data = open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    assert data[0][0].shape == (3, 4, 4)
    for index, name in ((1, "b"), (2, "c")):
        with pytest.raises(DataError, match=rf"images\.zip: {name}\.png cannot be decoded as an image"):
            data[index]
    archive = tmp_path / "images.zip"
    content = bytearray(archive.read_bytes())
    content[content.index(good) + 30] ^= 1
    archive.write_bytes(bytes(content))
    data = open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"images\.zip: a\.png cannot be read: Bad CRC-32"):
        data[0]
    archive.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"images\.zip cannot be read: File is not a zip file"):
        open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]


def test_zip_with_a_damaged_deflate_stream(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", _png(7, (40, 40)) * 9)
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\n")
    content = bytearray(archive.read_bytes())
    # Local header of 30 bytes and the name, then the stream: 0x07 names a block type that does not exist.
    content[35] = 0x07
    archive.write_bytes(bytes(content))
    data = open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"a\.png cannot be read: .*invalid block type"):
        data[0]


def test_centre_crop_does_not_resample_a_prepared_image(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    pil.fromarray(pixels).save(stream, format="PNG")
    _zip_folder(tmp_path, [("a.png", "0")], {"a.png": stream.getvalue()})
    # The shorter side is 8 = round(7 / 0.875): the pixels of the crop are those of the file.
    image, _ = open_data(str(tmp_path), input_shape=(3, 7, 7), mean=(0.0,) * 3, std=(1.0,) * 3)[0]
    expected = torch.from_numpy(pixels[1:8, 0:7]).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(image, expected)
    larger, _ = open_data(str(tmp_path), input_shape=(3, 20, 20), mean=(0.0,) * 3, std=(1.0,) * 3)[0]
    assert larger.shape == (3, 20, 20)


def test_class_folders_with_own_transform(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    for name, value in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(_png(value, (6, 6)))
    seen: list[tuple[int, int]] = []

    def transform(image: object) -> Tensor:
        seen.append(image.size)  # type: ignore[attr-defined]
        return torch.zeros(3, 4, 4)

    data = open_data(str(tmp_path), transform=transform, **INPUT)  # type: ignore[arg-type]
    assert data.num_classes == 2 and data.labels.tolist() == [0, 1]
    assert data[1][0].shape == (3, 4, 4) and seen == [(6, 6)]


def test_damaged_file_in_a_class_folder(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "x.png").write_bytes(b"no image")
    data = open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"x\.png cannot be decoded as an image"):
        data[0]


def test_folder_without_classes(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="no class folders"):
        open_data(str(tmp_path), **INPUT)  # type: ignore[arg-type]


def test_cifar_absent(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(DataError, match="absent or damaged"):
        open_data(f"cifar10:{tmp_path}", **INPUT)  # type: ignore[arg-type]


def test_digits_split_is_disjoint_and_fixed() -> None:
    pytest.importorskip("sklearn")
    held, held_labels = digits(held_out=True)
    rest, rest_labels = digits(held_out=False)
    assert held.shape == (500, 1, 16, 16) and rest.shape == (1297, 1, 16, 16)
    assert float(held.min()) >= 0 and float(held.max()) <= 1
    everything = torch.cat([held, rest]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797
    again, again_labels = digits(held_out=True)
    assert torch.equal(held, again) and torch.equal(held_labels, again_labels)
    # Class counts of the whole set, from scikit-learn's description.
    assert torch.cat([held_labels, rest_labels]).bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


def test_digits_need_a_network_of_their_size() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(DataError, match=r"digits: images are \[1, 16, 16\]; the network takes \[3, 4, 4\]"):
        open_data("digits", **INPUT)  # type: ignore[arg-type]


def test_content_of_a_set_is_names_and_bytes_of_what_is_read(tmp_path: Path) -> None:
    assert content_sha256("digits") is None and content_sha256(f"cifar10:{tmp_path}") is None
    folder = tmp_path / "set"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "a.png").write_bytes(b"1")
    (folder / "cat" / "b.png").write_bytes(b"2")
    digests = [content_sha256(str(folder))]
    (folder / "cat" / "b.png").write_bytes(b"3")
    digests.append(content_sha256(str(folder)))
    (folder / "cat" / "b.png").rename(folder / "cat" / "c.png")
    digests.append(content_sha256(str(folder)))
    (folder / "images.zip").write_bytes(b"4")
    digests.append(content_sha256(str(folder)))
    # From here on it is an archive, and nothing else in the folder is read.
    (folder / "labels.csv").write_bytes(b"5")
    digests.append(content_sha256(str(folder)))
    (folder / "labels.csv").write_bytes(b"6")
    digests.append(content_sha256(str(folder)))
    assert len(set(digests)) == len(digests) and None not in digests
    (folder / "cat" / "a.png").unlink()
    assert content_sha256(str(folder)) == digests[-1]
    (tmp_path / "set.npz").write_bytes(b"abc")
    assert content_sha256(str(tmp_path / "set.npz")) == hashlib.sha256(b"abc").hexdigest()
