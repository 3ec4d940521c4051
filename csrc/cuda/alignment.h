// The kernels of the alignment loss as the op function sees them: see clusterq/ops/_alignment_op.py for the arguments.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace clusterq {

constexpr int kMostTerms = 8;

// Tensors of the statistics' type are untyped here: float, or double where `wide`.
struct Alignment {
  bool wide = false;
  int64_t images = 0, columns = 0, first = 0, slots = 0, layers = 0;
  const void *mean = nullptr, *var = nullptr;
  int64_t mean_stride = 0, var_stride = 0;
  const void *target_mean = nullptr, *target_spread = nullptr, *weights = nullptr;
  const int64_t* starts = nullptr;
  double weight = 0, floor = 0;
  bool squared = false, rooted = false, average = false;
  const int64_t* labels = nullptr;
  const bool *mask = nullptr, *known = nullptr;
  const void *class_mean = nullptr, *class_spread = nullptr;
  int terms = 0;
  double class_weights[kMostTerms] = {};
  // Counts [1 + slots], means and variances [1 + slots, columns] of the batch and of the classes: given, or where they
  // go between two launches.
  bool given = false;
  double *merged_count = nullptr, *merged_mean = nullptr, *merged_var = nullptr;
  // [blocks, 1 + terms].
  double* partial = nullptr;
  int64_t reserved = -1;
  void *total = nullptr, *to_terms = nullptr, *grad_mean = nullptr, *grad_var = nullptr;
  int64_t* count = nullptr;
  void *own_mean = nullptr, *own_spread = nullptr;
};

int64_t alignment_blocks(int64_t columns);
// A counter of blocks in memory of the library, negative if it cannot give any: then another launch sums the loss.
int64_t reserve_alignment_counter(int device, cudaStream_t stream);
void launch_alignment(const Alignment& alignment, cudaStream_t stream);

}  // namespace clusterq
