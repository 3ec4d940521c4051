// Vectors of bn_stats: arithmetic, loads and stores of 64 bytes. Included by bn_stats_kernels.h, once per instruction
// set; no include guard on purpose.
//
// A Vec is always 64 bytes, made of as many registers as that takes, so that every instruction set adds in the same
// order.

namespace clusterq::bn_stats::CLUSTERQ_ISA {

constexpr int kParts = 64 / CLUSTERQ_VECTOR_BYTES;

template <class E>
struct Native;

template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t index;
  typedef int32_t mask __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES)));
};

template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t index;
  typedef int64_t mask __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES)));
};

typedef uint32_t Words __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint16_t DenseHalves __attribute__((vector_size(CLUSTERQ_VECTOR_BYTES / 2)));
typedef Native<float>::type Floats;

template <class E>
struct Vec {
  typename Native<E>::type v[kParts];
};

template <class E>
constexpr int kLanes = 64 / static_cast<int>(sizeof(E));
template <class E>
constexpr int kPartLanes = CLUSTERQ_VECTOR_BYTES / static_cast<int>(sizeof(E));

template <class E>
CLUSTERQ_INLINE Vec<E> add(Vec<E> a, const Vec<E>& b) {
  for (int k = 0; k < kParts; ++k) a.v[k] += b.v[k];
  return a;
}

template <class E>
CLUSTERQ_INLINE Vec<E> sub(Vec<E> a, const Vec<E>& b) {
  for (int k = 0; k < kParts; ++k) a.v[k] -= b.v[k];
  return a;
}

template <class E>
CLUSTERQ_INLINE Vec<E> mul(Vec<E> a, const Vec<E>& b) {
  for (int k = 0; k < kParts; ++k) a.v[k] *= b.v[k];
  return a;
}

template <class E>
CLUSTERQ_INLINE Vec<E> splat(E value) {
  Vec<E> out;
  for (int k = 0; k < kParts; ++k) out.v[k] = value - typename Native<E>::type{};
  return out;
}

// The last `count` lanes of a, zero before them.
template <class E>
CLUSTERQ_INLINE Vec<E> keep_last(Vec<E> a, int64_t count) {
  using Mask = typename Native<E>::mask;
  const auto first = static_cast<typename Native<E>::index>(kLanes<E> - count);
  for (int k = 0; k < kParts; ++k) {
    Mask lane;
    for (int i = 0; i < kPartLanes<E>; ++i) lane[i] = k * kPartLanes<E> + i;
    const Mask keep = lane >= first - Mask{};
    a.v[k] = (typename Native<E>::type)((Mask)a.v[k] & keep);
  }
  return a;
}

// a where `flag` is not 0, else 0.
template <class E>
CLUSTERQ_INLINE Vec<E> keep_nonzero(Vec<E> a, const Vec<E>& flag) {
  using Mask = typename Native<E>::mask;
  for (int k = 0; k < kParts; ++k) {
    const Mask keep = (Mask)(flag.v[k] != typename Native<E>::type{});
    a.v[k] = (typename Native<E>::type)((Mask)a.v[k] & keep);
  }
  return a;
}

// Lane i + kBy of a at lane i.
template <class E, int kBy, int... kLane>
CLUSTERQ_INLINE typename Native<E>::type rotate(typename Native<E>::type a, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, a, ((kLane + kBy) % kPartLanes<E>)...);
#else
  return __builtin_shuffle(a, typename Native<E>::mask{((kLane + kBy) % kPartLanes<E>)...});
#endif
}

// Sum of the lanes by halving: lane i with lane i + L/2, and so on.
template <class E, int kWidth = kLanes<E> / 2>
CLUSTERQ_INLINE E sum(Vec<E> a) {
  if constexpr (kWidth >= kPartLanes<E>) {
    for (int k = 0; k < kWidth / kPartLanes<E>; ++k) a.v[k] += a.v[k + kWidth / kPartLanes<E>];
  } else {
    a.v[0] += rotate<E, kWidth>(a.v[0], std::make_integer_sequence<int, kPartLanes<E>>{});
  }
  if constexpr (kWidth == 1) {
    return a.v[0][0];
  } else {
    return sum<E, kWidth / 2>(a);
  }
}

#if CLUSTERQ_VECTOR_BYTES == 32
// GCC makes a detour through 128-bit registers of the generic conversions.
CLUSTERQ_INLINE Floats widen(BFloat16, Halves h) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
}
CLUSTERQ_INLINE Halves low_halves(Words w) {
  const __m256i packed = _mm256_packus_epi32((__m256i)w, (__m256i)w);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
CLUSTERQ_INLINE Floats widen(BFloat16, Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }
CLUSTERQ_INLINE Halves low_halves(Words w) { return __builtin_convertvector(w, DenseHalves); }
#endif

CLUSTERQ_INLINE Halves round_bits(Floats f) {
  const Words u = (Words)f;
  const Words rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  const Words nan = (Words)(f != f);
  return low_halves((rounded & ~nan) | (0x7fc0u & nan));
}

CLUSTERQ_INLINE Halves narrow(BFloat16, Floats f) {
#if CLUSTERQ_ROUNDS_BFLOAT16
  // The instruction takes subnormal numbers for 0 and keeps what a NaN carries.
  constexpr int kNanOrSubnormal = 0x01 | 0x20 | 0x80;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)f, kNanOrSubnormal) == 0, 1)) {
    return (Halves)(__m256i)_mm512_cvtneps_pbh((__m512)f);
  }
#endif
  return round_bits(f);
}

#if CLUSTERQ_VECTOR_BYTES == 64
CLUSTERQ_INLINE Floats widen(Half, Halves h) { return (Floats)_mm512_cvtph_ps((__m256i)h); }
CLUSTERQ_INLINE Halves narrow(Half, Floats f) {
  return (Halves)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif CLUSTERQ_VECTOR_BYTES == 32
CLUSTERQ_INLINE Floats widen(Half, Halves h) { return (Floats)_mm256_cvtph_ps((__m128i)h); }
CLUSTERQ_INLINE Halves narrow(Half, Floats f) {
  return (Halves)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
CLUSTERQ_INLINE Floats widen(Half, Halves h) {
  const Words u = __builtin_convertvector(h, Words);
  const Words magnitude = (u & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and makes half subnormals normal.
  const Words rebiased = (Words)((Floats)magnitude * 0x1p112f);
  const Words special = (Words)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (Floats)(rebiased | special | ((u & 0x8000u) << 16));
}

CLUSTERQ_INLINE Halves narrow(Half, Floats f) {
  const Words u = (Words)f;
  const Words magnitude = u & 0x7fffffffu;
  const Words normal = ((magnitude + (0xfffu + ((magnitude >> 13) & 1u))) >> 13) - (112u << 10);
  // Adding 0.5 rounds at 2^-24, the step of half subnormals, to even.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Words small = (Words)(magnitude < (113u << 23));
  const Words huge = (Words)(magnitude >= 0x477ff000u);
  const Words nan = (Words)(f != f);
  Words h = (subnormal & small) | (normal & ~small);
  h = (h & ~huge) | (0x7c00u & huge);
  h = (h & ~nan) | (0x7e00u & nan);
  return __builtin_convertvector(h | ((u >> 16) & 0x8000u), DenseHalves);
}
#endif

template <class T>
CLUSTERQ_INLINE Vec<Compute<T>> load(const T* p) {
  using E = Compute<T>;
  Vec<E> out;
  for (int k = 0; k < kParts; ++k) {
    if constexpr (std::is_same_v<T, E>) {
      out.v[k] = *reinterpret_cast<const typename Native<E>::unaligned*>(p + k * kPartLanes<E>);
    } else {
      out.v[k] = widen(T{}, *reinterpret_cast<const Halves*>(p + k * kPartLanes<E>));
    }
  }
  return out;
}

template <class T>
CLUSTERQ_INLINE void store(T* p, const Vec<Compute<T>>& a) {
  using E = Compute<T>;
  for (int k = 0; k < kParts; ++k) {
    if constexpr (std::is_same_v<T, E>) {
      *reinterpret_cast<typename Native<E>::unaligned*>(p + k * kPartLanes<E>) = a.v[k];
    } else {
      *reinterpret_cast<Halves*>(p + k * kPartLanes<E>) = narrow(T{}, a.v[k]);
    }
  }
}

template <class T>
CLUSTERQ_INLINE Compute<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    return *p;
  } else {
    return widen(T{}, Halves{} + p->bits)[0];
  }
}

template <class T>
CLUSTERQ_INLINE void store_one(T* p, Compute<T> value) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    *p = value;
  } else {
    p->bits = narrow(T{}, value - Floats{})[0];
  }
}

}  // namespace clusterq::bn_stats::CLUSTERQ_ISA
