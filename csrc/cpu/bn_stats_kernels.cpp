// Compiles bn_stats_kernels.h for every instruction set and picks one when the first op runs.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/bn_stats.h"

// Vec never crosses a function that is not inlined, so the ABI of wide vectors does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define CLUSTERQ_ISA portable
#define CLUSTERQ_VECTOR_BYTES 16
#include "cpu/bn_stats_kernels.h"

#if defined(__x86_64__)
#define CLUSTERQ_X86 1

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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define CLUSTERQ_ISA avx512
#define CLUSTERQ_VECTOR_BYTES 64
#include "cpu/bn_stats_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace clusterq::bn_stats {
namespace {

enum class Level { kPortable, kAvx2, kAvx512 };

Level level() {
#ifdef CLUSTERQ_X86
  // The variable PyTorch itself reads, so that one setting forces both.
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  if (capability != nullptr && std::strcmp(capability, "default") == 0) return Level::kPortable;
  const bool narrow = capability != nullptr && std::strcmp(capability, "avx2") == 0;
  if (!narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Level::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
#endif
  return Level::kPortable;
}

template <class T>
Kernels<T> choose() {
#ifdef CLUSTERQ_X86
  if (level() == Level::kAvx512) return avx512::table<T>();
  if (level() == Level::kAvx2) return avx2::table<T>();
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
template const Kernels<Float16>& kernels<Float16>();

}  // namespace clusterq::bn_stats
