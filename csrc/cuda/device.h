// What every CUDA kernel file needs: element types, 16-byte packs, launches, sums of a block. No torch headers: each of
// them would be read once per architecture.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "numerics.h"
#if defined(CLUSTERQ_EMULATED)
// Of tests/cuda_emulation: the grid runs on the CPU.
#include <emulated_launch.h>
#endif

namespace clusterq {
namespace {

// The kernels that are not started here are caught by the check of the host function.
template <typename... P, typename... Arguments>
void launch(void (*kernel)(P...), int64_t blocks, unsigned threads, cudaStream_t stream,
            const Arguments&... arguments) {
  // More than a grid can have becomes a launch error, not another number.
  const unsigned count = blocks > std::numeric_limits<int32_t>::max() ? ~0u : static_cast<unsigned>(blocks);
#if defined(CLUSTERQ_EMULATED)
  emulation::run_grid(count, threads, [&] { kernel(arguments...); });
#else
  // clang-format off
  kernel<<<count, threads, 0, stream>>>(arguments...);
  // clang-format on
#endif
}

// Calls `body` with a value of the element type and one of the arithmetic type.
template <typename F>
void for_element(Element element, const F& body) {
  switch (element) {
    case Element::kFloat:
      return body(float{}, float{});
    case Element::kDouble:
      return body(double{}, double{});
    case Element::kBFloat16:
      return body(__nv_bfloat16{}, float{});
    case Element::kHalf:
      return body(__half{}, float{});
  }
}

template <typename A>
Activation<A> activation_of(ActivationKind kind) {
  constexpr A inf = std::numeric_limits<A>::infinity();
  if (kind == ActivationKind::kNone) return {-inf, inf};
  return {A(0), kind == ActivationKind::kRelu ? inf : A(6)};
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float of(float v) { return v; }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double of(double v) { return v; }
};
template <>
struct Narrow<__half> {
  static __device__ __forceinline__ __half of(float v) { return __float2half_rn(v); }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 of(float v) { return __float2bfloat16_rn(v); }
};

// V neighbours in memory, moved by one access.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// Loads and stores as one access. The store is spelled out: the compiler splits a struct, and a uint4, into its
// elements where that lets it share code with another branch.
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  Pack<T, V> pack;
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    memcpy(&pack, &bits, sizeof(pack));
  } else {
    pack = *reinterpret_cast<const Pack<T, V>*>(from);
  }
  return pack;
}

template <int V, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
#if !defined(CLUSTERQ_EMULATED)
  if constexpr (sizeof(pack) == 16) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(pack));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(pack) == 8) {
    uint2 bits;
    memcpy(&bits, &pack, sizeof(pack));
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// The first `left` elements, at most V.
template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_some(const T* from, int64_t left) {
  if (left >= V) return load_pack<V>(from);
  Pack<T, V> pack{};
  for (int v = 0; v < V - 1; ++v)
    if (v < left) pack.at[v] = from[v];
  return pack;
}

template <int V, typename T>
__device__ __forceinline__ void store_some(T* to, const Pack<T, V>& pack, int64_t left) {
  if (left >= V) return store_pack(to, pack);
#pragma unroll
  for (int v = 0; v < V - 1; ++v)
    if (v < left) to[v] = pack.at[v];
}

// Elements that 16 bytes hold.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

inline bool aligned(const void* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// 1 / scale, scale above 0, correctly rounded as IEEE division is. In line: the compiler's own division calls a
// subroutine for the ends of the range, and registers spill around the call. In the middle of the range these are its
// instructions.
__device__ __forceinline__ float reciprocal(float scale) {
#if defined(CLUSTERQ_EMULATED)
  return 1.0f / scale;
#else
  const bool subnormal = scale < 0x1p-126f;
  const float s = subnormal ? scale * 0x1p64f : scale >= 0x1p126f ? scale * 0x1p-64f : scale;
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(s));
  r = __fmaf_rn(r, -__fmaf_rn(s, r, -1.0f), r);
  if (scale < 0x1p126f) return subnormal ? r * 0x1p64f : r;
  // The result is subnormal: two Newton steps in double, then the one rounding.
  const double wide = scale;
  double q = static_cast<double>(r) * 0x1p-64;
  q = __fma_rn(q, __fma_rn(-wide, q, 1.0), q);
  q = __fma_rn(q, __fma_rn(-wide, q, 1.0), q);
  return static_cast<float>(q);
#endif
}
__device__ __forceinline__ double reciprocal(double scale) { return __drcp_rn(scale); }

constexpr unsigned kFullWarp = 0xffffffffu;

// Sums over the block in a fixed order; the result is thread 0's. At most 1024 threads, a multiple of 32.
__device__ __forceinline__ void block_sum(double& first, double& second) {
  __shared__ double warp_sums[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) {
    first += __shfl_down_sync(kFullWarp, first, offset);
    second += __shfl_down_sync(kFullWarp, second, offset);
  }
  if (lane == 0) {
    warp_sums[0][warp] = first;
    warp_sums[1][warp] = second;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / 32; ++w) {
      first += warp_sums[0][w];
      second += warp_sums[1][w];
    }
  }
}

// Bits of 8 / V neighbouring lanes, V bits each, as one byte: that of the first of these lanes. For whole warps.
template <int V>
__device__ __forceinline__ unsigned gather_byte(unsigned bits) {
#pragma unroll
  for (int width = V; width < 8; width *= 2) bits |= __shfl_down_sync(kFullWarp, bits, width / V) << width;
  return bits & 0xffu;
}

}  // namespace
}  // namespace clusterq
