"""Codes packed into bytes on a GPU through Triton. One launch each; at most 1.5 (4 bits) or 1.25 bytes per code.

Rows are the last dimension, so codes that are not contiguous are copied first.
"""

import torch
import triton

from . import _packing_jit as jit

_WORDS, _BYTES = 2048, 512


def _aligned(t, size):
    return t.numel() % size == 0 and t.data_ptr() % size == 0


def pack_codes(codes, bits):
    per_byte, length = 8 // bits, codes.size(-1)
    packed_length = triton.cdiv(length, per_byte)
    out = torch.empty((*codes.shape[:-1], packed_length), dtype=torch.uint8, device=codes.device)
    n = out.numel()
    if n == 0:
        return out
    codes = codes.contiguous()
    with torch.cuda.device_of(codes):
        if length % per_byte == 0 and _aligned(codes, 4):
            words = codes.view(-1).view(torch.int32)
            packed = out.view(-1).view(torch.int16) if bits == 4 else out
            jit.pack_words_kernel[(triton.cdiv(words.numel(), _WORDS),)](
                packed, words, words.numel(), BITS=bits, BLOCK=_WORDS
            )
        else:
            jit.pack_rows_kernel[(triton.cdiv(n, _BYTES),)](
                out, codes, n, length, packed_length, BITS=bits, BLOCK=_BYTES
            )
    return out


def unpack_codes(packed, bits, length, signed):
    per_byte, packed_length = 8 // bits, packed.size(-1)
    out = torch.empty(
        (*packed.shape[:-1], length), dtype=torch.int8 if signed else torch.uint8, device=packed.device
    )  # fmt: skip
    n = out.numel()
    if n == 0:
        return out
    packed = packed.contiguous()
    if packed_length * per_byte < length:
        raise ValueError(f"packed has {packed_length} bytes in the last dimension; wanted enough for {length} codes")
    with torch.cuda.device_of(packed):
        if length == packed_length * per_byte and n % 4 == 0 and _aligned(packed, 4 // per_byte or 1):
            words = out.view(-1).view(torch.int32)
            pairs = packed.view(-1).view(torch.int16) if bits == 4 else packed
            jit.unpack_words_kernel[(triton.cdiv(n // 4, _WORDS),)](
                words, pairs, n // 4, BITS=bits, SIGNED=signed, BLOCK=_WORDS
            )
        else:
            jit.unpack_rows_kernel[(triton.cdiv(n, _BYTES),)](
                out, packed, n, length, packed_length, BITS=bits, SIGNED=signed, BLOCK=_BYTES
            )
    return out
