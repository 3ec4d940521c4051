// Codes of 2 and 4 bits on CUDA: to bytes and back, one launch, 16 codes to the access where the rows form one stream.
#include "device.h"

namespace clusterq {
namespace {

constexpr int kThreads = 256;
constexpr int kCodes = 16;

// One stream of `length` codes: a thread packs 16 of them.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    pack_stream_kernel(uint8_t* __restrict__ packed, const uint8_t* __restrict__ codes, int64_t length) {
  constexpr int kBytes = kCodes * kBits / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, left = length - i * kCodes;
  if (left <= 0) return;
  const Pack<uint8_t, kCodes> from = load_some<kCodes>(codes + i * kCodes, left);
  uint32_t words[4];
  memcpy(words, &from, sizeof(words));
  Pack<uint8_t, kBytes> result;
  uint32_t bits[kBytes / 4] = {};
#pragma unroll
  for (int w = 0; w < 4; ++w) bits[w * kBits / 8] |= pack_word(words[w], kBits) << (w * kBits * 4 % 32);
  memcpy(&result, bits, sizeof(result));
  store_some(packed + i * kBytes, result, (left * kBits + 7) / 8);
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_stream_kernel(uint8_t* __restrict__ codes, const uint8_t* __restrict__ packed, int64_t length,
                         uint32_t half) {
  constexpr int kBytes = kCodes * kBits / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, left = length - i * kCodes;
  if (left <= 0) return;
  const Pack<uint8_t, kBytes> from = load_some<kBytes>(packed + i * kBytes, (left * kBits + 7) / 8);
  uint32_t bits[kBytes / 4];
  memcpy(bits, &from, sizeof(bits));
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = unpack_word(bits[w * kBits / 8] >> (w * kBits * 4 % 32), kBits, half);
  Pack<uint8_t, kCodes> result;
  memcpy(&result, words, sizeof(result));
  store_some(codes + i * kCodes, result, left);
}

// Rows that end within a byte, or start anywhere: a thread per byte of `packed`, `per_row` to the row.
__global__ void __launch_bounds__(kThreads)
    pack_rows_kernel(uint8_t* __restrict__ packed, const uint8_t* __restrict__ codes, int64_t bytes, Divider per_row,
                     int64_t length, int bits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const int64_t row = per_row.quotient(i, bytes <= int64_t(1) << 30), first = (i - row * per_row.divisor) * (8 / bits);
  uint32_t word = 0;
  for (int j = 0; j < 8 / bits; ++j)
    if (first + j < length) word |= static_cast<uint32_t>(codes[row * length + first + j]) << (8 * j);
  packed[i] = static_cast<uint8_t>(pack_word(word, bits));
}

__global__ void __launch_bounds__(kThreads)
    unpack_rows_kernel(uint8_t* __restrict__ codes, const uint8_t* __restrict__ packed, int64_t bytes, Divider per_row,
                       int64_t length, int bits, uint32_t half) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= bytes) return;
  const int64_t row = per_row.quotient(i, bytes <= int64_t(1) << 30), first = (i - row * per_row.divisor) * (8 / bits);
  const uint32_t word = unpack_word(packed[i], bits, half);
  for (int j = 0; j < 8 / bits; ++j)
    if (first + j < length) codes[row * length + first + j] = static_cast<uint8_t>(word >> (8 * j));
}

// Whether no row ends within a byte, so that all of them are one.
bool is_stream(int64_t rows, int64_t length, int bits, const void* codes, const void* packed) {
  return (rows == 1 || length % (8 / bits) == 0) && aligned(codes) && aligned(packed, kCodes * bits / 8);
}

}  // namespace

void launch_pack(const uint8_t* codes, uint8_t* packed, int64_t rows, int64_t length, int bits, cudaStream_t stream) {
  if (is_stream(rows, length, bits, codes, packed)) {
    launch(bits == 4 ? pack_stream_kernel<4> : pack_stream_kernel<2>, blocks_of(rows * length, kThreads * kCodes),
           kThreads, stream, packed, codes, rows * length);
    return;
  }
  const int64_t per_row = blocks_of(length, 8 / bits);
  launch(pack_rows_kernel, blocks_of(rows * per_row, kThreads), kThreads, stream, packed, codes, rows * per_row,
         Divider(per_row), length, bits);
}

void launch_unpack(const uint8_t* packed, uint8_t* codes, int64_t rows, int64_t length, int bits, bool is_signed,
                   cudaStream_t stream) {
  const uint32_t half = is_signed ? 1u << (bits - 1) : 0u;
  if (is_stream(rows, length, bits, codes, packed)) {
    launch(bits == 4 ? unpack_stream_kernel<4> : unpack_stream_kernel<2>, blocks_of(rows * length, kThreads * kCodes),
           kThreads, stream, codes, packed, rows * length, half);
    return;
  }
  const int64_t per_row = blocks_of(length, 8 / bits);
  launch(unpack_rows_kernel, blocks_of(rows * per_row, kThreads), kThreads, stream, codes, packed, rows * per_row,
         Divider(per_row), length, bits, half);
}

}  // namespace clusterq
