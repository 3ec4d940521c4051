// Two and four integer codes to the byte, and back. Rows are the last dimension; formulas: clusterq/ops/packing.py.
#include <vector>

#include "fake_quant.h"

namespace clusterq {
namespace {

template <int kBits>
CLUSTERQ_INLINE void pack_run(const uint8_t* codes, uint8_t* packed, int64_t bytes) {
  constexpr int kPerByte = 8 / kBits;
  for (int64_t i = 0; i < bytes; ++i) {
    unsigned byte = 0;
    for (int k = 0; k < kPerByte; ++k) byte |= (codes[i * kPerByte + k] & ((1u << kBits) - 1)) << k * kBits;
    packed[i] = static_cast<uint8_t>(byte);
  }
}

// `half`: 2^(bits - 1) for signed codes, whose sign is spread by the exclusive or and the subtraction; else 0.
template <int kBits>
CLUSTERQ_INLINE void unpack_run(const uint8_t* packed, uint8_t* codes, int64_t bytes, uint8_t half) {
  constexpr int kPerByte = 8 / kBits;
  for (int64_t i = 0; i < bytes; ++i)
    for (int k = 0; k < kPerByte; ++k)
      codes[i * kPerByte + k] = static_cast<uint8_t>(((packed[i] >> k * kBits & ((1u << kBits) - 1)) ^ half) - half);
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

template <typename F>
void for_bits(int64_t bits, const F& body) {
  if (bits == 2) return body(std::integral_constant<int, 2>{});
  CLUSTERQ_CHECK(bits == 4, "bits must be 2 or 4");
  body(std::integral_constant<int, 4>{});
}

// Calls `body(row)` for every row on some thread; `length`: elements of a row.
template <typename F>
void for_rows(int64_t rows, int64_t length, const F& body) {
  cpu_level();
  parallel_for(0, rows, ceil_div(2 * Walk::kBlock, std::max<int64_t>(length, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

Tensor pack_codes(const Tensor& input, int64_t bits) {
  const ScalarType dtype = input.scalar_type();
  CLUSTERQ_CHECK((dtype == ScalarType::Byte || dtype == ScalarType::Char) && input.dim() > 0,
                 "codes must be uint8 or int8, of a dimension or more");
  const Tensor codes = packed(input);
  const int64_t length = codes.size(codes.dim() - 1), rows = length == 0 ? 0 : codes.numel() / length;
  Tensor result;
  for_bits(bits, [&](auto width) {
    constexpr int kBits = decltype(width)::value, kPerByte = 8 / kBits;
    const int64_t whole = length / kPerByte, bytes = ceil_div(length, kPerByte);
    result = torch::stable::new_empty(codes, with_last(codes, bytes), ScalarType::Byte);
    const auto* from = static_cast<const uint8_t*>(codes.const_data_ptr());
    auto* to = static_cast<uint8_t*>(result.mutable_data_ptr());
    for_rows(rows, length, [&](int64_t row) {
      at_level<pack_run<kBits>>(from + row * length, to + row * bytes, whole);
      if (whole == bytes) return;
      uint8_t rest[kPerByte] = {};
      std::copy(from + row * length + whole * kPerByte, from + (row + 1) * length, rest);
      pack_run<kBits>(rest, to + row * bytes + whole, 1);
    });
  });
  return result;
}

Tensor unpack_codes(const Tensor& input, int64_t bits, int64_t length, bool is_signed) {
  CLUSTERQ_CHECK(input.scalar_type() == ScalarType::Byte && input.dim() > 0,
                 "packed must be uint8, of a dimension or more");
  const Tensor bytes_in = packed(input);
  Tensor result =
      torch::stable::new_empty(bytes_in, with_last(bytes_in, length), is_signed ? ScalarType::Char : ScalarType::Byte);
  for_bits(bits, [&](auto width) {
    constexpr int kBits = decltype(width)::value, kPerByte = 8 / kBits;
    const int64_t whole = length / kPerByte, bytes = ceil_div(length, kPerByte);
    CLUSTERQ_CHECK(bytes_in.size(bytes_in.dim() - 1) == bytes, "packed has another length than its codes need");
    const auto* from = static_cast<const uint8_t*>(bytes_in.const_data_ptr());
    auto* to = static_cast<uint8_t*>(result.mutable_data_ptr());
    const uint8_t half = is_signed ? 1 << (kBits - 1) : 0;
    for_rows(length == 0 ? 0 : result.numel() / length, length, [&](int64_t row) {
      at_level<unpack_run<kBits>>(from + row * bytes, to + row * length, whole, half);
      if (whole == bytes) return;
      uint8_t rest[kPerByte];
      unpack_run<kBits>(from + row * bytes + whole, rest, 1, half);
      std::copy(rest, rest + length % kPerByte, to + row * length + whole * kPerByte);
    });
  });
  return result;
}

}  // namespace
}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&clusterq::pack_codes));
  m.impl("unpack_codes", TORCH_BOX(&clusterq::unpack_codes));
}
