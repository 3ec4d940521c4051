"""Integer codes of 2 to 8 bits without gaps between them, and back: exact.

A row (the last dimension) is a stream of bits in which bit i is bit `i % 8` of byte `i // 8`, bit 0 the lowest. Code j
takes the `bits` bits from bit `j * bits` on, its own lowest bit first; with 4 bits that is ONNX's INT4 and UINT4: the
first code in the lowest bits of a byte. Signed codes are stored in two's complement. Unused bits of the last byte of a
row are 0. Results are contiguous.

Widths of 2 and 4 bits are dispatcher ops with kernels; the others, which only files need, are made of torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterq.ops._checks import check_integer, check_tensor
from clusterq.ops._library import register_op

__all__ = ["pack_codes", "unpack_codes"]

_CODES = (torch.uint8, torch.int8)


# Widths that divide a byte, for which there are ops and kernels.
_EVEN = (2, 4)


def _per_byte(bits: int) -> int:
    return 8 // bits


def _packed_length(length: int, bits: int) -> int:
    return (length * bits + 7) // 8


def _pack(codes: Tensor, bits: int) -> Tensor:
    n, length = _per_byte(bits), codes.size(-1)
    padded = codes.new_zeros((*codes.shape[:-1], _packed_length(length, bits), n), dtype=torch.uint8)
    padded.flatten(-2)[..., :length] = codes.view(torch.uint8) & ((1 << bits) - 1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :length]
    # Of a single row `contiguous` keeps the strides of the cut.
    codes = codes.clone(memory_format=torch.contiguous_format)
    if not signed:
        return codes
    half = 1 << (bits - 1)
    return ((codes ^ half).view(torch.int8) - half).contiguous()


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Any width: eight codes fill `bits` bytes, so that a 64-bit word holds them."""
    length = codes.size(-1)
    padded = codes.new_zeros((*codes.shape[:-1], -(-length // 8), 8), dtype=torch.uint8)
    padded.flatten(-2)[..., :length] = codes.view(torch.uint8) & ((1 << bits) - 1)
    words = padded[..., 0].to(torch.int64)
    for k in range(1, 8):
        words |= padded[..., k].to(torch.int64) << (k * bits)
    packed = torch.stack([(words >> (8 * i) & 255).to(torch.uint8) for i in range(bits)], -1)
    return packed.flatten(-2)[..., : _packed_length(length, bits)].clone(memory_format=torch.contiguous_format)


def _unpack_stream(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    groups = -(-length // 8)
    padded = packed.new_zeros((*packed.shape[:-1], groups, bits))
    padded.flatten(-2)[..., : packed.size(-1)] = packed
    words = padded[..., 0].to(torch.int64)
    for i in range(1, bits):
        words |= padded[..., i].to(torch.int64) << (8 * i)
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    codes = torch.stack([(words >> (k * bits) & mask).to(torch.uint8) for k in range(8)], -1)
    codes = codes.flatten(-2)[..., :length].clone(memory_format=torch.contiguous_format)
    return (codes ^ half).view(torch.int8) - half if signed else codes


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], _packed_length(codes.size(-1), bits)), dtype=torch.uint8)


def _fake_unpack(packed: Tensor, bits: int, length: int, signed: bool) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], length), dtype=torch.int8 if signed else torch.uint8)


pack_op = register_op(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    reference=_pack,
    fake=_fake_pack,
    triton="packing:pack_codes",
)
unpack_op = register_op(
    "unpack_codes(Tensor packed, int bits, SymInt length, bool signed) -> Tensor",
    reference=_unpack,
    fake=_fake_unpack,
    triton="packing:unpack_codes",
)


def _check_bits(bits: int) -> None:
    check_integer("bits", bits, 2, 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes [..., L], uint8 or int8 as `quantize` makes them, into uint8 [..., ceil(L * bits / 8)].

    `bits` is 2 to 8. Codes outside 0 to 2^bits - 1, or -2^(bits-1) to 2^(bits-1) - 1 for int8, lose their upper bits:
    that is not checked, for it would wait for the device. Raises ValueError or TypeError for a bad argument.
    """
    check_tensor("codes", codes, _CODES)
    _check_bits(bits)
    if codes.dim() == 0:
        raise ValueError("codes has no dimensions; wanted at least one")
    packed: Tensor = pack_op(codes, bits) if bits in _EVEN else _pack_stream(codes, bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, length: int, *, signed: bool) -> Tensor:
    """Codes [..., length] of `pack_codes`: int8 if `signed`, else uint8.

    Args:
        packed: uint8 [..., ceil(length * bits / 8)].
        bits: 2 to 8, as they were packed.
        length: size of the last dimension of the codes.
        signed: whether the codes were int8.

    Raises ValueError or TypeError for a bad argument.
    """
    check_tensor("packed", packed, (torch.uint8,))
    _check_bits(bits)
    check_integer("length", length, 0)
    if packed.dim() == 0 or packed.size(-1) != _packed_length(length, bits):
        wanted = _packed_length(length, bits)
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; wanted {wanted} bytes in the last dimension for length {length}"
        )
    codes: Tensor = (unpack_op if bits in _EVEN else _unpack_stream)(packed, bits, length, signed)
    return codes
