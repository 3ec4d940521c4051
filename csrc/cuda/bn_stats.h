// The kernels of the BatchNorm statistics as the op functions see them. Pointers are untyped, `Element` tells what x, y
// and incoming gradients point to; statistics and BatchNorm parameters are of the arithmetic type.
#pragma once

#include <cuda_runtime_api.h>

#include "bn_stats_plan.h"
#include "kernels.h"
#include "moments.h"

namespace clusterq {

// y = (x - mean) * (weight / sqrt(var + eps)) + bias; weight and bias may be absent.
struct Normalization {
  const void *weight = nullptr, *bias = nullptr, *mean = nullptr, *var = nullptr;
  double eps = 0;
  void* y = nullptr;
};

// Where statistics go: moments [images, parts, channels] for a merge, or mean and biased variance in rows of `stride`.
struct StatisticsTarget {
  Moments* moments = nullptr;
  void *mean = nullptr, *var = nullptr;
  int64_t stride = 0;
};

void launch_plane_statistics(Element element, const void* x, const Samples& samples, const StatisticsPlan& plan,
                             const Normalization* norm, const StatisticsTarget& target, cudaStream_t stream);
void launch_row_statistics(Element element, const void* x, const Samples& samples, const StatisticsPlan& plan,
                           const Normalization* norm, const StatisticsTarget& target, cudaStream_t stream);
inline void launch_statistics(Element element, const void* x, const Samples& samples, const StatisticsPlan& plan,
                              const Normalization* norm, const StatisticsTarget& target, cudaStream_t stream) {
  (samples.rows ? launch_row_statistics : launch_plane_statistics)(element, x, samples, plan, norm, target, stream);
}

// Statistics of one image and channel each, of several x with the same images, in columns of [images, stride].
struct Listed {
  const void* x;
  Samples samples;
  int64_t first_column;
};
void launch_statistics_list(Element element, const Listed* entries, int64_t count, void* mean, void* var,
                            int64_t stride, cudaStream_t stream);

// What segments are merged into: every image, all images, or the images of every class.
enum class Groups { kImages, kAll, kClasses };
struct Merge {
  Groups groups = Groups::kAll;
  // Moments of the segments, or x itself where an image and channel has one position; neither: nothing but NaN.
  const Moments* moments = nullptr;
  const void* x = nullptr;
  int64_t images = 0, channels = 0, positions = 0, part = 0, parts = 1;
  // One per image: its class, and how often it counts.
  const int64_t* labels = nullptr;
  const void* weights = nullptr;
  int64_t classes = 0, correction = 0;
  // [groups] (classes only) and [groups, channels].
  int64_t* count = nullptr;
  void *total = nullptr, *mean = nullptr, *var = nullptr;
};
void launch_merge(Element element, const Merge& merge, cudaStream_t stream);

// dx = incoming * scale + a * (x - center) + b; rows of [C] each, `stride` apart (0: one row for all images).
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};
struct BackwardTask {
  const void *x = nullptr, *grad = nullptr;
  void* dx = nullptr;
  Rows center, grad_mean, grad_var;
  double mean_factor = 0, var_factor = 0;
  // Of the BatchNorm that grad comes through.
  const void *weight = nullptr, *running_var = nullptr;
  double eps = 0;
  Samples samples;
};
void launch_statistics_backward(Element element, const BackwardTask& task, cudaStream_t stream);
void launch_statistics_backward_list(Element element, const BackwardTask* tasks, int64_t count, cudaStream_t stream);

// partial is [2, splits, columns] of double.
void launch_parameter_backward(Element element, const void* grad, const void* x, const ParameterPlan& plan,
                               const Normalization& norm, double* partial, void* dweight, void* dbias,
                               cudaStream_t stream);

}  // namespace clusterq
