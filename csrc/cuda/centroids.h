// The centroid kernels as the op functions in centroids_ops.cpp and centroids_update_ops.cpp see them. Shapes and
// meaning: clusterq/ops/_centroids_ops.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "centroids_plan.h"
#include "kernels.h"

namespace clusterq {

// x [batch, rows, dim]: neighbours along dim lie side by side; `wide`: every row starts on 16 bytes.
struct RowSource {
  Element element = Element::kFloat;
  const void* data = nullptr;
  int64_t batch = 0, rows = 0, dim = 0;
  int64_t batch_stride = 0, row_stride = 0;
  bool wide = false;
};

// What is known of the prepared centroids of one batch entry. Largest |c'| and |c'|^2/2 of the finite ones, as bits of
// floats: those of a greater number are greater. `raw`: the centre is 0, and the search multiplies the given values.
struct BookFacts {
  uint32_t norm, half, raw;
};

// Centroids as the search reads them; see SearchPlan for the sizes.
struct Book {
  BookFacts* facts = nullptr;  // [batch]
  float* centre = nullptr;     // [batch, dim]
  float* offsets = nullptr;    // [batch, padded]: -|c'|^2/2, -inf for those that cannot win and for padding
  uint16_t* panels = nullptr;  // [batch, tiles, chunks, 2 parts, 64 centroids, 32 values]
};

struct CentroidSearch {
  RowSource x;
  int64_t clusters = 0;
  // [batch, clusters, dim], dense, of the type of x or float.
  Element centroid_element = Element::kFloat;
  const void* centroids = nullptr;
  // Without one, all rows are searched in float64.
  bool has_book = false;
  Book book;
  SearchPlan plan;
  // Best scores that are kept of every row: 1 suffices for "fast", 2 tell whether the row is decided, 3 the pair.
  int kept = 2;
  // [plan.parts, batch * rows], `leader_words` of 4 bytes each.
  void* leaders = nullptr;
  bool exact = true;
  // [batch, rows], or [batch, rows, 2] with 3 kept; or only `undecided` [batch, rows].
  int64_t* index = nullptr;
  void* distance = nullptr;
  bool* undecided = nullptr;
};

constexpr int leader_words(int kept) { return kept == 1 ? 2 : kept == 2 ? 3 : 5; }

void launch_prepare(const CentroidSearch& search, cudaStream_t stream);
void launch_search(const CentroidSearch& search, cudaStream_t stream);
// Decides what the search left open and writes the results.
void launch_settle(const CentroidSearch& search, cudaStream_t stream);

// Sums of w x and of w over the rows of every centroid; or, where `flow`, of the gradient 2 g (x - c).
struct SegmentSums {
  RowSource x;
  int64_t clusters = 0;
  const int64_t* index = nullptr;  // [batch, rows]
  // [batch, rows] of the arithmetic type: weights, none for 1; or the gradient g of the distances.
  const void* weights = nullptr;
  // [batch, clusters, dim], dense, of the type of x or float: only for the gradient.
  bool flow = false;
  Element centroid_element = Element::kFloat;
  const void* centroids = nullptr;
  SumsPlan plan;
  // Scratch of the ordered sums; see SumsPlan for the sizes. `counts` begins as 0.
  int32_t *counts = nullptr, *starts = nullptr, *segments = nullptr, *order = nullptr;
  double* partial = nullptr;
  // double [batch, clusters, dim + 1]; of the gradient: minus the sum, [batch, clusters, dim].
  Element result_element = Element::kDouble;
  void* result = nullptr;
};

void launch_ordered_sums(const SegmentSums& sums, cudaStream_t stream);
// `result` begins as 0.
void launch_atomic_sums(const SegmentSums& sums, cudaStream_t stream);
// dx [batch, rows, dim], dense, of the type of x.
void launch_row_gradient(const SegmentSums& sums, void* dx, cudaStream_t stream);

// A tensor written where it lies.
struct Strided {
  void* data = nullptr;
  int64_t stride[3] = {};
};
enum class MoveMode { kMean, kCodebook, kRunning };
struct MovingAverage {
  int64_t batch = 0, clusters = 0, dim = 0;
  Element element = Element::kFloat;
  Strided centroids, size, running;
  // [batch, clusters, dim + 1], dense.
  const double* sums = nullptr;
  MoveMode mode = MoveMode::kMean;
  double decay = 0, smoothing = 0;
  // [batch]: sizes of all clusters together, for the smoothing.
  double* whole = nullptr;
};
void launch_move(const MovingAverage& move, cudaStream_t stream);

}  // namespace clusterq
