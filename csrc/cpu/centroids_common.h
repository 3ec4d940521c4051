// What the two centroid kernel files share: 16-bit loads that vectorise, dtype dispatch, aligned scratch memory.
#pragma once

#include <check.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>

namespace clusterq {
namespace centroids {

#define CLUSTERQ_INLINE inline __attribute__((always_inline))

struct BFloat16Bits {
  uint16_t bits;
};

struct HalfBits {
  uint16_t bits;
};

CLUSTERQ_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

CLUSTERQ_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

CLUSTERQ_INLINE double widen(double value) { return value; }
CLUSTERQ_INLINE float widen(float value) { return value; }
CLUSTERQ_INLINE float widen(BFloat16Bits value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// Selects instead of branches, so that a loop over it becomes vector code.
CLUSTERQ_INLINE float widen(HalfBits value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + 0x38000000u;
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

inline void store(double* target, double value) { *target = value; }
inline void store(float* target, double value) { *target = static_cast<float>(value); }
inline void store(BFloat16Bits* target, double value) {
  target->bits = torch::headeronly::BFloat16(static_cast<float>(value)).x;
}
inline void store(HalfBits* target, double value) {
  target->bits = torch::headeronly::Half(static_cast<float>(value)).x;
}

// Calls f with a value of the element type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, const char* name, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16Bits{});
    case ScalarType::Half:
      return f(HalfBits{});
    case ScalarType::Double:
      return f(double{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// Uninitialised memory on a cache line, kept and reused while it is large enough.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > capacity_) {
      memory_.reset(static_cast<T*>(::operator new(sizeof(T) * count, std::align_val_t(64))));
      capacity_ = count;
    }
    return memory_.get();
  }
  T* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(T* pointer) const { ::operator delete(pointer, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t capacity_ = 0;
};

// Defined in centroids.cpp: x [B, N, D], centroids [B, K, D] -> index [B, N], distance [B, N].
std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& centroids);

}  // namespace centroids
}  // namespace clusterq
