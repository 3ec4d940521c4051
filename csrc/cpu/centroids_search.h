// The structures that the inner loops of the nearest-centroid search work on, and the bound on the error of a score.
//
// With u = 2^-24, x' = fl(x - m), c' = fl(c - m) and m a median of the centroids, the computed score s_k differs from
// t_k = x.c - |c|^2/2 (taken relative to m, exactly) by at most
//   E_k = |x' - h||c'_k| + |h||c'_k - g_k| + q (|x'||c'_k| + |c'_k|^2/2),
// where h and g are x' and c' as they are multiplied: themselves, or rounded to bfloat16, whose products are exact.
// q = (D + 10) u / (1 - (D + 10) u): D + 1 roundings of the sum, with or without FMA, 3 of x', c' and |c'|^2/2, one of
// a comparison with s - 2 E, and the rest for second-order terms; twice that for pairs of products.
#pragma once

#include <cmath>

#include "centroids_common.h"

namespace clusterq {
namespace centroids {

constexpr int kMostRows = 12, kMostWidth = 32;
// Candidates of a row that are kept; beyond them the row is scored once more.
constexpr int kRoom = 8;
constexpr int kOverflow = 1 << 20;
// A row that scores say nothing about.
constexpr int kMeasure = -1;

constexpr double kUnit = 0x1p-24;
// Below this no partial sum of a score can overflow float32.
constexpr double kLargest = 1e37;
constexpr int64_t kLargestDim = 1 << 18;

// Rows [N, D] of one batch entry as they lie in memory, strides in elements.
struct Points {
  const char* data;
  ScalarType dtype;
  int64_t element, row_stride, stride;

  CLUSTERQ_INLINE const char* row(int64_t n) const { return data + n * row_stride * element; }
  CLUSTERQ_INLINE bool direct() const { return dtype == ScalarType::Float && stride == 1; }
};

// Panels of centroids as the inner loops read them.
struct Panels {
  int64_t clusters, dim;
  // [panels][depth][width], the last panel one register wide where that is enough; padded with 0
  const void* operands;
  // -|c'|^2 / 2; -inf for padding and for centroids that cannot win
  const float* offset;
};

// |v|^2 of a vector, and of what is lost where it is rounded to bfloat16.
struct Size {
  float squares, lost;
};
struct Size64 {
  double squares, lost;
};

// Largest error of the scores of a row, from its norm.
struct Bound {
  double sums;
  // largest |c'|, |c'|^2/2 and |c' - g|
  double norm, half, lost;
  int64_t dim;
  bool exact;
  // factor between two distances that another order of summation cannot turn around
  double order;

  static Bound of(int64_t dim, bool pairs, bool exact) {
    const double steps = static_cast<double>(dim + 10) * kUnit * (pairs ? 2 : 1);
    return {1.01 * steps / (1 - steps), 0, 0, 0, dim, exact, 1 + 16 * static_cast<double>(dim + 8) * 0x1p-53};
  }

  // At least the norm of a row, from the squares as summed in float32: 1.01 covers the sum, 1 + 1e-5 this and all
  // that is computed from it, the added constant squares below the range of float32.
  CLUSTERQ_INLINE float norm_of(float squares) const {
    return __builtin_sqrtf(squares * 1.01f + static_cast<float>(dim) * 0x1p-100f) * (1 + 1e-5f);
  }

  // At least 2 E; infinite for a row that scores say nothing about. In float32, for many rows at once.
  CLUSTERQ_INLINE float reach(float row_norm, float row_lost) const {
    const float lost_norm = lost > 0 ? norm_of(row_lost) : 0.0f, c = static_cast<float>(norm),
                h = static_cast<float>(half);
    const float most = row_norm * c + h;
    const float apart = row_norm + c, wide = static_cast<float>(dim + 3) * 0x1p-53f;
    const float error = lost_norm * c + (row_norm + lost_norm) * static_cast<float>(lost) +
                        static_cast<float>(sums) * most + wide * apart * apart +
                        static_cast<float>(underflow(row_norm));
    const bool scored = most < static_cast<float>(kLargest) && row_norm < static_cast<float>(kLargest);
    return scored ? 2.0001f * error : __builtin_inff();
  }

  // What rounding to zero or to subnormals may add, with or without flush-to-zero.
  CLUSTERQ_INLINE double underflow(double row_norm) const {
    return static_cast<double>(dim) * 0x1p-120 * (1 + row_norm + norm);
  }
};

// Centroid `id` and the one a register further, whose scores shared a lane: the higher of the two.
struct Candidate {
  int32_t id;
  float score;
};

// What the search knows of a row: its best score and every pair of centroids within `reach` of it, in rising order.
struct Row {
  float best, second, reach, norm;
  int count;
  Candidate candidates[kRoom];

  CLUSTERQ_INLINE void start(float row_norm, float row_reach, bool exact) {
    norm = row_norm;
    best = second = -__builtin_inff();
    count = row_reach < __builtin_inff() ? 0 : kMeasure;
    reach = exact ? row_reach : 0.0f;
  }

  // Drops the candidates below `least`.
  CLUSTERQ_INLINE void keep(float least) {
    if (count > kRoom) return;
    int kept = 0;
    for (int j = 0; j < count; j++) {
      if (candidates[j].score >= least) candidates[kept++] = candidates[j];
    }
    count = kept;
  }
};

// One search over one set of centroids.
struct Job {
  // [clusters, dim] as they are, their centre, and which of them cannot win
  const float* values;
  const float* origin;
  const char* left_out;
  int64_t clusters;
  Bound bound;
  // number of nearest centroids asked for
  int wanted;
  // the nearest candidate is the answer
  bool simple;
  // decides row `number` from its values and what is known of it
  void (*decide)(void* context, const float* x, const Row& row, int64_t number);
  void* context;
};

// The inner loops of one instruction set (centroids_kernel.h).
struct Level {
  int lanes;
  bool pairs;
  void (*scan)(const Job&, const Panels&, const Points&, int64_t count, int64_t first, bool last, void* operands,
               float* scores, float* wide, Row* rows, const Output&);
  void (*pack)(const float* values, const char* left_out, const float* origin, int64_t count, int64_t width,
               int64_t dim, void* panel);
  Size64 (*size)(const float* values, const float* origin, int64_t dim);
  void (*score_row)(const float* row, const float* values, const float* origin, const float* offset, int64_t clusters,
                    int64_t dim, float* scores);
  double (*measure)(const float* a, const float* b, int64_t dim);
  void (*widen_bfloat16)(const void* source, int64_t step, int64_t count, float* target);
  void (*widen_half)(const void* source, int64_t step, int64_t count, float* target);
  void (*widen_float)(const void* source, int64_t step, int64_t count, float* target);
  void (*search_double)(const double* const rows[4], int64_t dim, const double* panels, int64_t groups,
                        double* distances, int64_t* index, int wanted);
};

}  // namespace centroids
}  // namespace clusterq
