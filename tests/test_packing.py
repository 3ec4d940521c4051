"""Packed codes: exact round trips, and the bits where ONNX has them."""

from __future__ import annotations

import pytest
import torch

from clusterq import ops


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 130])
def test_round_trip(bits: int, signed: bool, length: int) -> None:
    codes = torch.arange(6 * length).reshape(3, 2, length) * 7 % 2**bits
    codes = (codes - 2 ** (bits - 1)).to(torch.int8) if signed else codes.to(torch.uint8)
    packed = ops.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, -(-length * bits // 8))
    back = ops.unpack_codes(packed, bits, length, signed=signed)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_of_a_byte(bits: int) -> None:
    """One long number, the first code in its lowest bits, negative ones in two's complement, the rest 0."""
    codes = torch.tensor([[1, -2, 0, -1, 1] * 5, [-2, 1, 1, 0, -1] * 5], dtype=torch.int8)
    wanted = []
    for row in codes.tolist():
        number = sum((code % 2**bits) << (bits * j) for j, code in enumerate(row))
        wanted.append(list(number.to_bytes(-(-25 * bits // 8), "little")))
    assert ops.pack_codes(codes, bits).tolist() == wanted


def test_what_quantize_makes() -> None:
    x = torch.randn(8, 5, 3, 3)
    for bits, low, high in ((4, -8, 7), (4, 0, 15), (2, -2, 1)):
        codes = ops.quantize(x, 0.2, max(low, 0), low, high)
        packed = ops.pack_codes(codes.flatten(1), bits)
        assert packed.numel() == 8 * -(-45 * bits // 8)
        again = ops.unpack_codes(packed, bits, 45, signed=low < 0).reshape(x.shape)
        assert torch.equal(again, codes)


def test_strided_codes() -> None:
    codes = torch.arange(60, dtype=torch.uint8).reshape(6, 10) % 16
    for bits in (4, 5):
        for view in (codes.t(), codes[:, ::3], codes[1:, 1:]):
            packed = ops.pack_codes(view, bits)
            assert packed.is_contiguous()
            assert torch.equal(ops.unpack_codes(packed, bits, view.size(1), signed=False), view)


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_other_widths_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=r"^bits is"):
        ops.pack_codes(torch.zeros(4, dtype=torch.uint8), bits)


def test_wrong_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"^packed has shape"):
        ops.unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 4, signed=False)
    with pytest.raises(ValueError, match=r"^codes has no dimensions"):
        ops.pack_codes(torch.zeros((), dtype=torch.uint8), 4)
