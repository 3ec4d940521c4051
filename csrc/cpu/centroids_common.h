// What the centroid kernel files share: aligned scratch memory, the structures of the search.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <tuple>

#include "cpu/simd.h"

namespace clusterq {
namespace centroids {

// Uninitialised memory on a cache line, kept and reused while it is large enough.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (count > capacity_) {
      memory_.reset();
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

struct Search {
  // false: rows that only float64 can decide keep the label of the search in float32
  bool exact;
  // how many of the nearest are wanted: 1, or 2
  int count;
};

// Where the results of rows go, row n at [n]: count indices and distances, and whether float64 had to decide. Any of
// them may be null.
struct Output {
  int64_t* index;
  float* distance;
  bool* undecided;

  // A result; k is -1 for none.
  CLUSTERQ_INLINE void set(int64_t place, int64_t k, double value) const {
    if (index != nullptr) index[place] = k;
    if (distance != nullptr) distance[place] = k < 0 ? __builtin_nanf("") : static_cast<float>(value);
  }
};

// Defined in centroids.cpp: x [B, N, D], centroids [B, K, D] -> index [B, N], distance [B, N].
std::tuple<Tensor, Tensor> nearest_centroid(Tensor x, Tensor centroids, std::string precision);

}  // namespace centroids
}  // namespace clusterq
