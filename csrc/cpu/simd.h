// What the CPU kernels share: which instruction set to use, functions compiled once for each, 16-bit floats.
//
// Nothing here needs ifuncs or `target_clones`: plain target attributes work with every GCC and clang, on every libc.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "inline.h"
#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CLUSTERQ_X86 1
#include <cpuid.h>
#include <immintrin.h>
#define CLUSTERQ_AVX2 "avx2,fma,f16c"
#define CLUSTERQ_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#endif

namespace clusterq {

enum class CpuLevel { kDefault, kAvx2, kAvx512 };

// The best level that this CPU has.
inline CpuLevel best_cpu_level() {
#ifdef CLUSTERQ_X86
  // Not every compiler's __builtin_cpu_supports knows f16c. That the system saves the registers follows from AVX2.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  const bool has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return CpuLevel::kAvx512;
  if (has_avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kDefault;
}

// Whether the CPU rounds float32 to bfloat16, and multiplies pairs of them, itself.
inline bool has_bfloat16() {
#ifdef CLUSTERQ_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return best_cpu_level() == CpuLevel::kAvx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 5 & 1) != 0;
#else
  return false;
#endif
}

inline std::string wanted_cpu_level() {
  const char* variable = std::getenv("CLUSTERQ_CPU_CAPABILITY");
  return variable == nullptr ? "" : variable;
}

inline CpuLevel chosen_cpu_level() {
  const std::string wanted = wanted_cpu_level();
  const CpuLevel best = best_cpu_level();
  if (wanted.empty()) return best;
  const bool bfloat16 = wanted == "avx512_bf16";
  CLUSTERQ_CHECK(wanted == "default" || wanted == "avx2" || wanted == "avx512" || bfloat16,
                 "CLUSTERQ_CPU_CAPABILITY is ", wanted, "; wanted default, avx2, avx512 or avx512_bf16");
  const CpuLevel level = wanted == "default" ? CpuLevel::kDefault
                         : wanted == "avx2"  ? CpuLevel::kAvx2
                                             : CpuLevel::kAvx512;
  CLUSTERQ_CHECK(level <= best && (!bfloat16 || has_bfloat16()), "CLUSTERQ_CPU_CAPABILITY is ", wanted,
                 ", which this CPU or this build does not offer");
  return level;
}

// The level that all kernels use: that of CLUSTERQ_CPU_CAPABILITY, else the best. Raises while the variable is wrong,
// so ops ask once before their threads start.
inline CpuLevel cpu_level() {
  static const CpuLevel level = chosen_cpu_level();
  return level;
}

// Whether kernels use what `has_bfloat16` tells of.
inline bool has_avx512_bf16() {
  static const bool has = cpu_level() == CpuLevel::kAvx512 && has_bfloat16() && wanted_cpu_level() != "avx512";
  return has;
}

template <typename P>
struct Unaliased {
  using type = P;
};
template <typename P>
struct Unaliased<P*> {
  using type = P* __restrict;
};

// The CLUSTERQ_INLINE function `body`, compiled for every level.
template <auto body>
struct Compiled;

template <typename R, typename... Args, R (*body)(Args...)>
struct Compiled<body> {
  static R portable(typename Unaliased<Args>::type... args) { return body(args...); }
#ifdef CLUSTERQ_X86
  __attribute__((target(CLUSTERQ_AVX2))) static R avx2(typename Unaliased<Args>::type... args) { return body(args...); }
  __attribute__((target(CLUSTERQ_AVX512))) static R avx512(typename Unaliased<Args>::type... args) {
    return body(args...);
  }
#endif
};

// Calls `body` as compiled for the level in use. What it writes through one pointer, it must not reach through another.
// `body` has to be in an unnamed namespace: code for one level must never be merged across files by the linker.
template <auto body, typename... Args>
auto at_level(Args... args) {
#ifdef CLUSTERQ_X86
  const CpuLevel level = cpu_level();
  if (level == CpuLevel::kAvx512) return Compiled<body>::avx512(args...);
  if (level == CpuLevel::kAvx2) return Compiled<body>::avx2(args...);
#endif
  return Compiled<body>::portable(args...);
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename F>
void for_floating(ScalarType dtype, const char* name, const F& body) {
  for_floating<BFloat16, Half>(dtype, name, body);
}

CLUSTERQ_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

CLUSTERQ_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One element in arithmetic type A. Selects instead of branches, so that a loop over it becomes vector code.
template <typename A, typename T>
CLUSTERQ_INLINE A load(T v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return as_float(uint32_t(v.bits) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
    // Exponents are rebiased by 112; subnormals become normal by subtracting 2^-14 as a float.
    const uint32_t shifted = uint32_t(v.bits & 0x7fff) << 13, exponent = shifted & 0x0f800000;
    uint32_t bits = shifted + 0x38000000;
    bits = exponent == 0x0f800000 ? bits + 0x38000000 : bits;
    const uint32_t subnormal = as_bits(as_float(bits + 0x00800000) - as_float(0x38800000));
    bits = exponent == 0 ? subnormal : bits;
    return as_float(bits | uint32_t(v.bits & 0x8000) << 16);
  } else {
    return static_cast<A>(v);
  }
}

// Rounds to nearest even, as torch does; a double bound for 16 bits is rounded to float first.
template <typename T, typename A>
CLUSTERQ_INLINE T store(A v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float narrow = static_cast<float>(v);
    const uint32_t bits = as_bits(narrow);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(narrow == narrow ? rounded : 0x7fc0)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const uint32_t bits = as_bits(static_cast<float>(v)), sign = bits & 0x80000000, magnitude = bits ^ sign;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 leaves the subnormal's digits, rounded, at the bottom of the mantissa.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
    uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x47800000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return {static_cast<uint16_t>(half | sign >> 16)};
  } else {
    return static_cast<T>(v);
  }
}

}  // namespace clusterq
