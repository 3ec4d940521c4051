// Compiles bn_stats_kernels.h for every instruction set and picks one when the first op runs.
#include <algorithm>
#include <limits>
#include <utility>

#include "cpu/bn_stats.h"

// Vec never crosses a function that is not inlined, so the ABI of wide vectors does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define CLUSTERQ_ROUNDS_BFLOAT16 0
#define CLUSTERQ_ISA portable
#define CLUSTERQ_VECTOR_BYTES 16
#include "cpu/bn_stats_kernels.h"

#ifdef CLUSTERQ_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define CLUSTERQ_ISA avx2
#define CLUSTERQ_VECTOR_BYTES 32
#include "cpu/bn_stats_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC 12 takes the undefined pass-through operand of its own unmasked AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define CLUSTERQ_ISA avx512
#define CLUSTERQ_VECTOR_BYTES 64
#include "cpu/bn_stats_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16")
#endif
// Used for bfloat16 only.
#undef CLUSTERQ_ROUNDS_BFLOAT16
#define CLUSTERQ_ROUNDS_BFLOAT16 1
#define CLUSTERQ_ISA avx512_bf16
#define CLUSTERQ_VECTOR_BYTES 64
#include "cpu/bn_stats_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

#endif

namespace clusterq::bn_stats {
namespace {

template <class T>
Kernels<T> choose() {
#ifdef CLUSTERQ_X86
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_avx512_bf16()) return avx512_bf16::table<T>();
  }
  if (cpu_level() == CpuLevel::kAvx512) return avx512::table<T>();
  if (cpu_level() == CpuLevel::kAvx2) return avx2::table<T>();
#endif
  return portable::table<T>();
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> chosen = choose<T>();
  return chosen;
}

template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<BFloat16>& kernels<BFloat16>();
template const Kernels<Half>& kernels<Half>();

}  // namespace clusterq::bn_stats
