"""Triton kernels behind `packing.py`. Four codes are a 32-bit word where no byte reaches over the end of a row."""

import triton
import triton.language as tl


@triton.jit
def _packed(word, BITS: tl.constexpr):
    if BITS == 4:
        word = word & 0x0F0F0F0F
        word = word | (word >> 4)
        packed = (word & 0xFF) | ((word >> 8) & 0xFF00)
    else:
        word = word & 0x03030303
        packed = word | (word >> 6) | (word >> 12) | (word >> 18)
    return packed


@triton.jit
def _unpacked(packed, BITS: tl.constexpr, SIGNED: tl.constexpr):
    packed = packed.to(tl.int32)
    if BITS == 4:
        word = (packed & 0xFF) | ((packed & 0xFF00) << 8)
        word = (word & 0x000F000F) | ((word & 0x00F000F0) << 4)
        # The product copies the sign of every byte to its upper bits and reaches no other byte.
        if SIGNED:
            word = word | (word & 0x08080808) * 0x1E
    else:
        packed = packed & 0xFF
        word = (packed | (packed << 6) | (packed << 12) | (packed << 18)) & 0x03030303
        if SIGNED:
            word = word | (word & 0x02020202) * 0x7E
    return word


@triton.jit(do_not_specialize=["n"])
def pack_words_kernel(out_ptr, codes_ptr, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """n words of four codes (int32) to n pairs of bytes (4 bits: int16) or bytes (2 bits: uint8)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        tl.store(out_ptr + offs, _packed(tl.load(codes_ptr + offs), BITS).to(out_ptr.dtype.element_ty))
    else:
        word = tl.load(codes_ptr + offs, mask=offs < n, other=0)
        tl.store(out_ptr + offs, _packed(word, BITS).to(out_ptr.dtype.element_ty), mask=offs < n)


@triton.jit(do_not_specialize=["n"])
def unpack_words_kernel(out_ptr, packed_ptr, n, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        tl.store(out_ptr + offs, _unpacked(tl.load(packed_ptr + offs), BITS, SIGNED))
    else:
        packed = tl.load(packed_ptr + offs, mask=offs < n, other=0)
        tl.store(out_ptr + offs, _unpacked(packed, BITS, SIGNED), mask=offs < n)


@triton.jit
def _row_and_column(start, length, BLOCK: tl.constexpr):
    """Row and column of the elements start, start + 1, ... of a matrix of rows of `length`."""
    row = start // length
    if length.dtype == tl.int32:
        # What is left of a row, and BLOCK, add up to less than 2^32.
        within = (start - row * length).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
        skipped = within // length.to(tl.uint32)
        column = (within - skipped * length.to(tl.uint32)).to(tl.int64)
    else:
        within = start - row * length + tl.arange(0, BLOCK)
        skipped = within // length
        column = within - skipped * length
    return row + skipped.to(tl.int64), column


@triton.jit(do_not_specialize=["n", "length", "packed_length"])
def pack_rows_kernel(out_ptr, codes_ptr, n, length, packed_length, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Any length: a program makes BLOCK of n bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    row, byte = _row_and_column(start, packed_length, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    for j in tl.static_range(8 // BITS):
        column = byte * (8 // BITS) + j
        valid = (offs < n) & (column < length)
        code = tl.load(codes_ptr + row * length + column, mask=valid, other=0).to(tl.int32)
        packed = packed | ((code & ((1 << BITS) - 1)) << (j * BITS))
    tl.store(out_ptr + offs, packed.to(tl.uint8), mask=offs < n)


@triton.jit(do_not_specialize=["n", "length", "packed_length"])
def unpack_rows_kernel(
    out_ptr, packed_ptr, n, length, packed_length, BITS: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Any length: a program makes BLOCK of n codes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    row, column = _row_and_column(start, length, BLOCK)
    byte = column // (8 // BITS)
    packed = tl.load(packed_ptr + row * packed_length + byte, mask=offs < n, other=0).to(tl.int32)
    code = (packed >> ((column - byte * (8 // BITS)) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
    if SIGNED:
        code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    tl.store(out_ptr + offs, code.to(out_ptr.dtype.element_ty), mask=offs < n)
