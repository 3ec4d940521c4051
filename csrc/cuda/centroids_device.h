// What the centroid kernels share: reading rows, sums over a warp, rounding once from float64.
#pragma once

#include "centroids.h"
#include "device.h"

namespace clusterq {
namespace {

template <typename T>
struct Rows {
  const T* data;
  int64_t batch, rows, dim, batch_stride, row_stride;
  bool wide;

  explicit Rows(const RowSource& x)
      : data(static_cast<const T*>(x.data)),
        batch(x.batch),
        rows(x.rows),
        dim(x.dim),
        batch_stride(x.batch_stride),
        row_stride(x.row_stride),
        wide(x.wide) {}
  __device__ __forceinline__ const T* at(int64_t b, int64_t row) const {
    return data + b * batch_stride + row * row_stride;
  }
};

template <typename A>
__device__ __forceinline__ bool is_number(A v) {
  return v - v == A(0);
}

// The same bits in every lane.
__device__ __forceinline__ double warp_sum(double v) {
  for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(kFullWarp, v, bits);
  return v;
}

// v rounded once. By way of float: v cut off, its last bit set where something was cut, rounds as v itself does to the
// 8 or 11 bits of the 16-bit types.
template <typename T>
__device__ __forceinline__ T from_double(double v) {
  if constexpr (std::is_same_v<T, double>) {
    return v;
  } else {
    float f = static_cast<float>(v);
    if constexpr (!std::is_same_v<T, float>) {
      const double back = static_cast<double>(f);
      // Neither for a NaN.
      if (back < v || back > v) {
        const uint32_t bits = __float_as_uint(f);
        const bool beyond = (back < 0 ? -back : back) > (v < 0 ? -v : v);
        f = __uint_as_float((beyond ? bits - 1 : bits) | 1u);
      }
    }
    return Narrow<T>::of(f);
  }
}

// Calls `body` with a value of x's type and one of the centroids', which is x's or float.
template <typename F>
void for_pair(Element x, Element centroids, const F& body) {
  for_element(x, [&](auto t, auto a) {
    if (x == centroids) return body(t, t);
    // float64 goes with float64 only.
    if constexpr (sizeof(t) == 2) body(t, a);
  });
}

}  // namespace
}  // namespace clusterq
