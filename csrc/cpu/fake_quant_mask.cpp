// Fake-quantization that keeps one bit per element for its backward: forward, backward, and the form whose range lags
// behind. Masks: bit i % 8 of byte i / 8 belongs to element i in memory order.
#include <mutex>

#include "fake_quant_mask_avx512.h"
#include "fake_quant_ranges.h"

namespace clusterq {
namespace {

// Elements whose flags, a byte each, are made before they are packed: a multiple of 8, so that no byte has two writers.
constexpr int64_t kFlags = 4096;
// Elements whose flags are unpacked before they are used.
constexpr int64_t kPart = 512;

template <Rule kRule, typename T, typename A, typename G>
CLUSTERQ_INLINE void masked_run(const T* x, T* y, uint8_t* flags, int64_t n, G grids, Activation<A> activation) {
  // In parts, and with conversions in loops of their own: in one loop they are more than GCC 12 makes vector code of.
  constexpr int64_t kPart = 256;
  A wide[kPart], value[kPart], inside[kPart];
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t length = std::min(kPart, n - first);
    for (int64_t i = 0; i < length; ++i) wide[i] = load<A>(x[first + i]);
    for (int64_t i = 0; i < length; ++i) {
      const Masked<A> one = masked_quantize<kRule>(wide[i], grids.at(first + i), activation);
      value[i] = one.value;
      inside[i] = one.inside;
    }
    for (int64_t i = 0; i < length; ++i) y[first + i] = store<T>(value[i]);
    for (int64_t i = 0; i < length; ++i) flags[first + i] = static_cast<uint8_t>(static_cast<int32_t>(inside[i]));
  }
}

// Eight flags of 0 or 1 become the bits of a byte: the product shifts flag k to bit 56 + k.
CLUSTERQ_INLINE void pack_flags(const uint8_t* flags, uint8_t* mask, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * i, 8);
    mask[i] = static_cast<uint8_t>(eight * 0x0102040810204080u >> 56);
  }
}

// The eight flags of every byte: 0x00 or 0xff.
constexpr std::array<uint64_t, 256> kUnpacked = [] {
  std::array<uint64_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (unsigned k = 0; k < 8; ++k)
      if (byte >> k & 1) table[byte] |= uint64_t(0xff) << 8 * k;
  return table;
}();

// Flags of 0x00 or 0xff for `length` elements, a multiple of 8 excepted at the end.
CLUSTERQ_INLINE void unpack_flags(const uint8_t* mask, uint8_t* flags, int64_t length) {
  for (int64_t i = 0; i < ceil_div(length, 8); ++i) std::memcpy(flags + 8 * i, &kUnpacked[mask[i]], 8);
}

// All bits of a number, or none.
template <typename U>
CLUSTERQ_INLINE U bits_of(uint8_t flag) {
  return static_cast<U>(static_cast<int64_t>(static_cast<int8_t>(flag)));
}

// Of the bits of a number, whatever it is: a value that is not let through becomes +0.
template <typename U>
CLUSTERQ_INLINE void apply_run(const U* grad, const uint8_t* mask, U* grad_x, int64_t n) {
  uint8_t flags[kPart];
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t length = std::min(kPart, n - first);
    unpack_flags(mask + first / 8, flags, length);
    for (int64_t i = 0; i < length; ++i) grad_x[first + i] = grad[first + i] & bits_of<U>(flags[i]);
  }
}

template <typename U>
CLUSTERQ_INLINE void apply_in_place_run(U* grad, const uint8_t* mask, int64_t n) {
  uint8_t flags[kPart];
  for (int64_t first = 0; first < n; first += kPart) {
    const int64_t length = std::min(kPart, n - first);
    unpack_flags(mask + first / 8, flags, length);
    for (int64_t i = 0; i < length; ++i) grad[first + i] &= bits_of<U>(flags[i]);
  }
}

template <typename F>
void for_rule(Rule rule, const F& body) {
  switch (rule) {
    case Rule::kCodes:
      return body(std::integral_constant<Rule, Rule::kCodes>{});
    case Rule::kReal:
      return body(std::integral_constant<Rule, Rule::kReal>{});
    case Rule::kActivation:
      return body(std::integral_constant<Rule, Rule::kActivation>{});
  }
}

Tensor mask_of(const Tensor& x) {
  const std::array<int64_t, 1> shape{ceil_div(x.numel(), 8)};
  return torch::stable::new_empty(x, shape, ScalarType::Byte);
}

// Quantizes and masks block by block; `look(first, length, place)` sees every piece first, on the same thread.
template <typename T, typename A, typename F>
void masked_blocks(const Walk& walk, const PieceGrids<A>& pieces, Activation<A> activation, Rule rule, const T* x, T* y,
                   uint8_t* mask, int64_t start, int64_t length, const F& look) {
#ifdef CLUSTERQ_X86
  // Pieces that begin and end between the sixteen elements of a vector, the last one of x excepted.
  const bool aligned = pieces.pattern ? pieces.pattern->row % 16 == 0 : walk.channels == 1 || walk.inner % 16 == 0;
  if constexpr (std::is_same_v<A, float>) {
    if (aligned && cpu_level() == CpuLevel::kAvx512) {
      for_rule(rule, [&](auto kind) {
        for_pieces(walk, pieces.pattern, start, length, [&](int64_t first, int64_t n, int64_t place) {
          look(first, n, place);
          pieces.with(place, [&](auto g) {
            masked_lanes<decltype(kind)::value>(x + first, y + first, mask + first / 8, n, g, activation);
          });
        });
      });
      return;
    }
  }
#endif
  alignas(64) uint8_t flags[kFlags];
  for_rule(rule, [&](auto kind) {
    for_pieces(walk, pieces.pattern, start, length, [&](int64_t first, int64_t n, int64_t place) {
      look(first, n, place);
      pieces.with(place, [&](auto g) {
        at_level<masked_run<decltype(kind)::value, T, A, decltype(g)>>(x + first, y + first, flags + (first - start), n,
                                                                       g, activation);
      });
    });
  });
  const int64_t bytes = ceil_div(length, 8);
  std::fill(flags + length, flags + 8 * bytes, uint8_t(0));
  at_level<pack_flags>(static_cast<const uint8_t*>(flags), mask + start / 8, bytes);
}

std::tuple<Tensor, Tensor> masked(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                                  int64_t quant_max, std::optional<int64_t> axis, std::string activation,
                                  std::string rule) {
  return masked_forward(x, scale, zero_point, quant_min, quant_max, axis, activation, rule, false);
}

Tensor masked_backward(const Tensor& grad_output, const Tensor& saved, std::vector<int64_t> stride) {
  check_dtype(saved, ScalarType::Byte, "mask");
  const Tensor mask = packed(saved);
  check_numel(mask, ceil_div(grad_output.numel(), 8), "mask");
  CLUSTERQ_CHECK(static_cast<int64_t>(stride.size()) == grad_output.dim(), "stride must have an entry per dimension");
  bool same = true;
  for (int64_t d = 0; d < grad_output.dim(); ++d) same &= grad_output.stride(d) == stride[d];
  Tensor grad = grad_output;
  if (!same) {
    grad = empty_with_strides(grad_output, stride);
    torch::stable::copy_(grad, grad_output);
  }
  CLUSTERQ_CHECK(fills_memory(grad), "stride leaves gaps in memory");
  // Where grad was copied, the copy becomes the result.
  Tensor grad_x = same ? output_like(grad) : grad;
  const auto apply = [&](auto word) {
    using U = decltype(word);
    const auto* from = static_cast<const U*>(grad.const_data_ptr());
    const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* to = static_cast<U*>(grad_x.mutable_data_ptr());
    cpu_level();
    for_blocks<Walk::kBlock>(grad.numel(), false, [&](int64_t i, int64_t n) {
      same ? at_level<apply_run<U>>(from + i, bits + i / 8, to + i, n)
           : at_level<apply_in_place_run<U>>(to + i, bits + i / 8, n);
    });
  };
  for_floating(grad.scalar_type(), "grad", [&](auto element, auto) {
    constexpr size_t kSize = sizeof(element);
    if constexpr (kSize == 2) {
      apply(uint16_t{});
    } else if constexpr (kSize == 4) {
      apply(uint32_t{});
    } else {
      apply(uint64_t{});
    }
  });
  return grad_x;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> delayed(const Tensor& input, Tensor running_min, Tensor running_max,
                                                   int64_t quant_min, int64_t quant_max, double momentum,
                                                   bool symmetric, std::optional<int64_t> axis, std::string activation,
                                                   std::string rule) {
  const Tensor x = dense(input);
  Tensor y = output_like(x), mask = mask_of(x);
  const Walk walk(x, axis);
  RunningRange range(running_min, running_max, walk, compute_dtype(x.scalar_type()));
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    range.make_grids<A>(walk.channels, quant_min, quant_max, symmetric);
    if (walk.numel() == 0) return;
    const PieceGrids<A> pieces(walk, Grids<A>::of(range.scale, range.zero_point, walk, quant_min, quant_max));
    const auto bounds = activation_of<A>(activation);
    const Rule kind = rule_of(rule);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    auto* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
    // Of every place; which thread saw what does not matter to extreme values.
    const int64_t places = pieces.pattern ? pieces.pattern->row : walk.channels;
    std::vector<Range<A>> total(walk.channels);
    std::mutex guard;
    parallel_for(
        0, ceil_div(walk.numel(), kFlags), ceil_div(2 * Walk::kBlock, kFlags), [&](int64_t begin, int64_t end) {
          std::vector<A> low(places, std::numeric_limits<A>::infinity()),
              high(places, -std::numeric_limits<A>::infinity());
          for (int64_t block = begin; block < end; ++block) {
            const int64_t start = block * kFlags, length = std::min(kFlags, walk.numel() - start);
            masked_blocks<T, A>(walk, pieces, bounds, kind, from, to, bits, start, length,
                                [&](int64_t first, int64_t n, int64_t place) {
                                  if (pieces.pattern) {
                                    extend_rows<T, A>(from + first, n, 1, n, bounds, &low[place], &high[place]);
                                  } else {
                                    const auto now = range_of<T, A>(from + first, n, bounds);
                                    low[place] = std::min(low[place], now.low);
                                    high[place] = std::max(high[place], now.high);
                                  }
                                });
          }
          const std::lock_guard<std::mutex> lock(guard);
          for (int64_t place = 0; place < places; ++place)
            total[pieces.pattern ? place / walk.inner % walk.channels : place].extend({low[place], high[place]});
        });
    range.move<A>(total, momentum);
  });
  return {y, range.scale, range.zero_point, mask};
}

}  // namespace

std::tuple<Tensor, Tensor> masked_forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                                          int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                                          const std::string& activation, const std::string& rule, bool backwards) {
  const Tensor x = dense(input);
  Tensor y = output_like(x), mask = mask_of(x);
  const Walk walk(x, axis);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const Grids<A> grids = Grids<A>::of(scale, zero_point, walk, quant_min, quant_max);
    const auto bounds = activation_of<A>(activation);
    const Rule kind = rule_of(rule);
    if (walk.numel() == 0) return;
    const PieceGrids<A> pieces(walk, grids);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    auto* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
    for_blocks<kFlags>(walk.numel(), backwards, [&](int64_t start, int64_t length) {
      masked_blocks<T, A>(walk, pieces, bounds, kind, from, to, bits, start, length, [](int64_t, int64_t, int64_t) {});
    });
  });
  return {y, mask};
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("fake_quantize_masked", TORCH_BOX(&clusterq::masked));
  m.impl("fake_quantize_masked_backward", TORCH_BOX(&clusterq::masked_backward));
  m.impl("delayed_fake_quantize", TORCH_BOX(&clusterq::delayed));
}
