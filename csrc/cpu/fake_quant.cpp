// Elementwise fake-quantize kernels: forward, masked backward, quantize, dequantize. Formulas: numerics.h.
#include "fake_quant_forward.h"

namespace clusterq {
namespace {

template <typename T, typename A, typename G>
CLUSTERQ_INLINE void backward_run(const T* grad, const T* x, T* grad_x, int64_t n, G grids, Activation<A> activation) {
  if constexpr (std::is_same_v<T, Half>) {
    // In one loop the selects of both conversions and of the mask are more than GCC 12 makes vector code of.
    constexpr int64_t kPart = 256;
    A wide[kPart], above[kPart];
    for (int64_t first = 0; first < n; first += kPart) {
      const int64_t length = std::min(kPart, n - first);
      for (int64_t i = 0; i < length; ++i) wide[i] = load<A>(x[first + i]);
      for (int64_t i = 0; i < length; ++i) above[i] = load<A>(grad[first + i]);
      for (int64_t i = 0; i < length; ++i)
        above[i] = masked_gradient(wide[i], above[i], grids.at(first + i), activation);
      for (int64_t i = 0; i < length; ++i) grad_x[first + i] = store<T>(above[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i)
      grad_x[i] = store<T>(masked_gradient(load<A>(x[i]), load<A>(grad[i]), grids.at(i), activation));
  }
}

template <typename T, typename A, typename G>
void backward_piece(const T* grad, const T* x, T* grad_x, int64_t n, const G& grids, const Activation<A>& activation) {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<A, float>)
    if (cpu_level() == CpuLevel::kAvx512) return backward_lanes(grad, x, grad_x, n, grids, activation);
#endif
  at_level<backward_run<T, A, G>>(grad, x, grad_x, n, grids, activation);
}

template <typename T, typename A, typename Q, typename G>
CLUSTERQ_INLINE void quantize_run(const T* x, Q* codes, int64_t n, G grids) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<Q>(static_cast<int32_t>(quantize(load<A>(x[i]), grids.at(i))));
}

template <typename Q, typename T, typename A, typename G>
CLUSTERQ_INLINE void dequantize_run(const Q* codes, T* y, int64_t n, G grids) {
  for (int64_t i = 0; i < n; ++i) {
    const Grid<A> grid = grids.at(i);
    y[i] = store<T>((static_cast<A>(static_cast<int32_t>(codes[i])) - grid.zero_point) * grid.scale);
  }
}

Tensor backward(const Tensor& grad_output, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, std::string activation) {
  const Tensor x = dense(input), grad = with_strides_of(grad_output, x);
  Tensor grad_x = output_like(x);
  const Walk walk(x, axis);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto grids = Grids<A>::of(scale, zero_point, walk, quant_min, quant_max);
    const auto bounds = activation_of<A>(activation);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* above = static_cast<const T*>(grad.const_data_ptr());
    auto* to = static_cast<T*>(grad_x.mutable_data_ptr());
    elementwise(walk, grids,
                [&](int64_t i, int64_t n, auto g) { backward_piece<T, A>(above + i, from + i, to + i, n, g, bounds); });
  });
  return grad_x;
}

template <typename F>
void for_codes(ScalarType dtype, const F& body) {
  switch (dtype) {
    case ScalarType::Byte:
      return body(uint8_t{});
    case ScalarType::Char:
      return body(int8_t{});
    case ScalarType::Short:
      return body(int16_t{});
    case ScalarType::Int:
      return body(int32_t{});
    default:
      CLUSTERQ_CHECK(false, "codes must be uint8, int8, int16 or int32");
  }
}

ScalarType code_dtype(int64_t quant_min, int64_t quant_max) {
  if (quant_min >= 0 && quant_max <= 255) return ScalarType::Byte;
  if (quant_min >= -128 && quant_max <= 127) return ScalarType::Char;
  if (quant_min >= -32768 && quant_max <= 32767) return ScalarType::Short;
  return ScalarType::Int;
}

Tensor quantize_codes(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                      int64_t quant_max, std::optional<int64_t> axis) {
  const Tensor x = dense(input);
  const ScalarType dtype = code_dtype(quant_min, quant_max);
  Tensor codes = like(x, dtype);
  const Walk walk(x, axis);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto grids = Grids<A>::of(scale, zero_point, walk, quant_min, quant_max);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    for_codes(dtype, [&](auto code) {
      using Q = decltype(code);
      auto* to = static_cast<Q*>(codes.mutable_data_ptr());
      elementwise(walk, grids, [&](int64_t i, int64_t n, auto g) {
        at_level<quantize_run<T, A, Q, decltype(g)>>(from + i, to + i, n, g);
      });
    });
  });
  return codes;
}

Tensor dequantize_codes(const Tensor& input, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
                        ScalarType dtype) {
  const Tensor codes = dense(input);
  Tensor y = like(codes, dtype);
  const Walk walk(codes, axis);
  for_floating(dtype, "dtype", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto grids = Grids<A>::of(scale, zero_point, walk, 0, 0);
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    for_codes(codes.scalar_type(), [&](auto code) {
      using Q = decltype(code);
      const auto* from = static_cast<const Q*>(codes.const_data_ptr());
      elementwise(walk, grids, [&](int64_t i, int64_t n, auto g) {
        at_level<dequantize_run<Q, T, A, decltype(g)>>(from + i, to + i, n, g);
      });
    });
  });
  return y;
}

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                             int64_t quant_max, std::optional<int64_t> axis, std::string activation) {
  return forward(x, scale, zero_point, quant_min, quant_max, axis, activation, false);
}

}  // namespace

Tensor forward(const Tensor& input, const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
               std::optional<int64_t> axis, const std::string& activation, bool backwards) {
  const Tensor x = dense(input);
  Tensor y = output_like(x);
  const Walk walk(x, axis);
  for_floating(x.scalar_type(), "x", [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using A = decltype(arithmetic);
    const auto grids = Grids<A>::of(scale, zero_point, walk, quant_min, quant_max);
    const auto bounds = activation_of<A>(activation);
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    auto* to = static_cast<T*>(y.mutable_data_ptr());
    elementwise(
        walk, grids, [&](int64_t i, int64_t n, auto g) { forward_piece<T, A>(from + i, to + i, n, g, bounds); },
        backwards);
  });
  return y;
}

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&clusterq::fake_quantize_forward));
  m.impl("fake_quantize_backward", TORCH_BOX(&clusterq::backward));
  m.impl("quantize", TORCH_BOX(&clusterq::quantize_codes));
  m.impl("dequantize", TORCH_BOX(&clusterq::dequantize_codes));
}
