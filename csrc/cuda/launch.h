// What every CUDA kernel file of ClusterQ needs: device and stream of a call, 16-byte packs, block sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>

#include "layout.h"
#include "numerics.h"

namespace clusterq {
namespace {

// Makes the device of x current for the call and holds the stream that the caller works on.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_device(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the device of the data");
}

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "the tensor needs more blocks than a launch can have");
  return static_cast<unsigned>(blocks);
}

template <typename F>
void for_floating(ScalarType dtype, const char* name, const F& body) {
  clusterq::for_floating<__nv_bfloat16, __half>(dtype, name, body);
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
  if constexpr (sizeof(pack) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof(pack));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

// Elements that 16 bytes hold.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 1 / scale, scale above 0, correctly rounded as IEEE division is. In line: the compiler's own division calls a
// subroutine for the ends of the range, and registers spill around the call. In the middle of the range these are its
// instructions.
__device__ __forceinline__ float reciprocal(float scale) {
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
}
__device__ __forceinline__ double reciprocal(double scale) { return __drcp_rn(scale); }

// Sums over the block in a fixed order; the result is thread 0's. At most 1024 threads, a multiple of 32.
__device__ __forceinline__ void block_sum(double& first, double& second) {
  __shared__ double warp_sums[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) {
    first += __shfl_down_sync(0xffffffffu, first, offset);
    second += __shfl_down_sync(0xffffffffu, second, offset);
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

}  // namespace
}  // namespace clusterq
