// Tensor-core products of the search, rows from shared memory to fragments, and copies that do not wait. Emulated ones
// compute the same fragments lane by lane.
#pragma once

#include "centroids_plan.h"
#include "device.h"
#if defined(CLUSTERQ_EMULATED)
#include <tensor_cores.h>
#endif

namespace clusterq {
namespace {

// Two floats as bfloat16, to nearest, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
#if defined(CLUSTERQ_EMULATED)
  return emulated_bits<uint16_t>(__float2bfloat16_rn(low)) |
         static_cast<uint32_t>(emulated_bits<uint16_t>(__float2bfloat16_rn(high))) << 16;
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// Eight values as their bfloat16 parts: v = high + middle + less than 2^-17 |v|.
struct SplitUnit {
  uint32_t high[4], middle[4];
};

__device__ __forceinline__ SplitUnit split_unit(const float (&v)[8]) {
  SplitUnit unit;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = pack_bfloat16(v[2 * i], v[2 * i + 1]);
    unit.high[i] = pair;
    unit.middle[i] =
        pack_bfloat16(v[2 * i] - __uint_as_float(pair << 16), v[2 * i + 1] - __uint_as_float(pair & 0xffff0000u));
  }
  return unit;
}

__device__ __forceinline__ void store_unit(uint16_t* to, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

// Four matrices of 8 rows of 8 values of 16 bits: lane l names row l % 8 of matrix l / 8 and gets of every matrix the
// two neighbours 2 (l % 4) of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
#if defined(CLUSTERQ_EMULATED)
  emulated_load_matrices(to, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// to [16, 8] += a [16, 16] b [16, 8] over a warp; kHalf: of float16, else of bfloat16.
template <bool kHalf>
__device__ __forceinline__ void multiply_add_tile(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(CLUSTERQ_EMULATED)
  emulated_multiply_add_tile(to, a, b0, b1, [](uint16_t bits) {
    if constexpr (kHalf) return widen(emulated_bits<__half>(bits));
    return widen(emulated_bits<__nv_bfloat16>(bits));
  });
#else
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// 16 bytes to shared memory: there after `wait_copies` and a barrier.
__device__ __forceinline__ void copy_unit(uint16_t* to, const uint16_t* from) {
#if defined(CLUSTERQ_EMULATED)
  memcpy(to, from, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
#endif
}

__device__ __forceinline__ void wait_copies() {
#if !defined(CLUSTERQ_EMULATED)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace
}  // namespace clusterq
