// Integer codes on CUDA: quantize and dequantize, one launch; 16 bytes of the wider side to the access. Bytes per
// element of float32 and codes of a byte: 5.
#include "fake_quant_elementwise.h"

namespace clusterq {
namespace {

// Codes as they lie in memory: those of a byte, signed or not, are the same bits.
template <typename T, typename A, typename Q>
struct ToCodes {
  using In = T;
  using Out = Q;
  using Ready = Grid<A>;
  static constexpr bool kGrad = false, kMask = false, kDivides = Parameters<A>::kDivides;
  const T *x, *grad;
  Q* out;
  uint8_t* mask;
  Parameters<A> source;

  __device__ __forceinline__ void publish(int64_t) const {}
  __device__ __forceinline__ Ready ready(int64_t channel) const { return source.grid(channel); }
  __device__ __forceinline__ Q value(T v, T, const Ready& grid, bool&) const {
    return static_cast<Q>(static_cast<int>(quantize(A(widen(v)), grid)));
  }
};

// `half`: 128 where bytes are signed, else 0.
template <typename Q, typename T, typename A>
struct FromCodes {
  using In = Q;
  using Out = T;
  using Ready = Grid<A>;
  static constexpr bool kGrad = false, kMask = false, kDivides = Parameters<A>::kDivides;
  const Q *x, *grad;
  T* out;
  uint8_t* mask;
  Parameters<A> source;
  int half;

  __device__ __forceinline__ void publish(int64_t) const {}
  __device__ __forceinline__ Ready ready(int64_t channel) const {
    return {source.scale[channel], A(0), source.zero_point[channel], A(0), A(0)};
  }
  __device__ __forceinline__ T value(Q code, Q, const Ready& grid, bool&) const {
    const int number = (static_cast<int>(code) ^ half) - half;
    return Narrow<T>::of((static_cast<A>(number) - grid.zero_point) * grid.scale);
  }
};

template <typename F>
void for_code(int bytes, const F& body) {
  if (bytes == 1) return body(uint8_t{});
  if (bytes == 2) return body(int16_t{});
  body(int32_t{});
}

}  // namespace

void launch_quantize(Element element, const void* x, void* codes, int code_bytes, const Extent& extent,
                     const GridSource& source, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    for_code(code_bytes, [&](auto code) {
      using Q = decltype(code);
      const ToCodes<T, A, Q> op{static_cast<const T*>(x), nullptr, static_cast<Q*>(codes), nullptr, given<A>(source)};
      launch_elementwise<false>(op, extent, false, stream);
    });
  });
}

void launch_dequantize(Element element, const void* codes, int code_bytes, bool signed_bytes, void* y,
                       const Extent& extent, const GridSource& source, cudaStream_t stream) {
  for_element(element, [&](auto value, auto arithmetic) {
    using T = decltype(value);
    using A = decltype(arithmetic);
    for_code(code_bytes, [&](auto code) {
      using Q = decltype(code);
      const FromCodes<Q, T, A> op{static_cast<const Q*>(codes), nullptr, static_cast<T*>(y), nullptr, given<A>(source),
                                  signed_bytes ? 128 : 0};
      launch_elementwise<false>(op, extent, false, stream);
    });
  });
}

}  // namespace clusterq
