// The device side of CUDA C++ that csrc/cuda uses, for the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index current_thread, current_block, block_size, grid_size;

// Returns once every thread of the block, or of the warp, that has not ended is here.
void block_barrier();
void warp_barrier();
// One place of 16 bytes per lane of the current warp.
void* lane_slot(int lane);

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16);
  std::memcpy(lane_slot(current_thread.x % 32), &value, sizeof(T));
  warp_barrier();
  T other;
  std::memcpy(&other, lane_slot(source), sizeof(T));
  warp_barrier();
  return other;
}

}  // namespace emulation

#define threadIdx (::emulation::current_thread)
#define blockIdx (::emulation::current_block)
#define blockDim (::emulation::block_size)
#define gridDim (::emulation::grid_size)

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }
inline void __threadfence() {}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int lane = threadIdx.x % 32;
  return emulation::exchange(value, lane + offset < 32 ? lane + offset : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulation::exchange(value, static_cast<int>(threadIdx.x % 32) ^ bits);
}
inline int __all_sync(unsigned mask, int flag) {
  for (int offset = 16; offset > 0; offset /= 2) flag &= __shfl_xor_sync(mask, flag, offset);
  return flag;
}
inline unsigned __ballot_sync(unsigned mask, int flag) {
  unsigned bits = flag ? 1u << threadIdx.x % 32 : 0;
  for (int offset = 16; offset > 0; offset /= 2) bits |= __shfl_xor_sync(mask, bits, offset);
  return bits;
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) same |= (emulation::exchange(value, lane) == value ? 1u : 0u) << lane;
  return same;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <typename T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __drcp_rn(double v) { return 1.0 / v; }

template <typename To, typename From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline long long __double_as_longlong(double v) { return emulated_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return emulated_bits<double>(v); }
