// BatchNorm statistics on the CPU: the table of SIMD kernels, and what the forward and backward files share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/simd.h"

namespace clusterq::bn_stats {

// Arithmetic type: 16-bit inputs are computed in float32.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Longest run that is summed in E before it joins a double; also bounds the cost of recomputing one run.
constexpr int64_t kRun = 4096;

// Kernels over one block of an image: `planes` blocks are C runs of `length` consecutive elements, `stride` apart;
// `rows` blocks are rows of C consecutive channels. Sums are of shifted values: s1[c] = sum(x - shift[c]), s2[c] = sum
// of squares. All give the same bits on every instruction set: fixed 64-byte lanes, fixed trees, no fused multiply-add.
template <class T>
struct Kernels {
  using E = Compute<T>;
  void (*plane_sums)(const T* x, int64_t channels, int64_t stride, int64_t length, const E* shift, E* s1, E* s2);
  // The same sums, and y = (x - center) * scale + bias.
  void (*plane_norm)(const T* x, T* y, int64_t channels, int64_t stride, int64_t length, const E* shift,
                     const E* center, const E* scale, const E* bias, E* s1, E* s2);
  // s1[c] = sum(g), s2[c] = sum(g * (x - center)).
  void (*plane_dot)(const T* x, const T* g, int64_t channels, int64_t stride, int64_t length, const E* center, E* s1,
                    E* s2);
  // out = a * (x - center) + b, plus scale * g where g is given; where a is 0, x does not enter.
  void (*plane_affine)(const T* x, const T* g, T* out, int64_t channels, int64_t length, const E* center, const E* a,
                       const E* b, const E* scale);
  // The sums of plane_sums and plane_norm over several images, `image` elements apart, of planes that are neighbours.
  // `lanes` has room for 2 * 64 bytes per channel.
  void (*image_sums)(const T* x, int64_t images, int64_t image, int64_t channels, int64_t length, const E* shift,
                     E* lanes, E* s1, E* s2);
  void (*image_norm)(const T* x, T* y, int64_t images, int64_t image, int64_t channels, int64_t length, const E* shift,
                     const E* center, const E* scale, const E* bias, E* lanes, E* s1, E* s2);
  // Rows kernels treat `fold` rows as one of width fold * C, so that few channels still fill the lanes. Per-channel
  // arguments are repeated fold times; s1 and s2 have room for fold * C + 16 and return C sums.
  void (*row_sums)(const T* x, int64_t rows, int64_t channels, int64_t fold, const E* shift, E* s1, E* s2);
  void (*row_norm)(const T* x, T* y, int64_t rows, int64_t channels, int64_t fold, const E* shift, const E* center,
                   const E* scale, const E* bias, E* s1, E* s2);
  void (*row_dot)(const T* x, const T* g, int64_t rows, int64_t channels, int64_t fold, const E* center, E* s1, E* s2);
  void (*row_affine)(const T* x, const T* g, T* out, int64_t rows, int64_t channels, int64_t fold, const E* center,
                     const E* a, const E* b, const E* scale);
  // out = a * (x - center) + b, with x even where a is 0.
  void (*row_scale)(const T* x, T* out, int64_t rows, int64_t channels, int64_t fold, const E* center, const E* a,
                    const E* b);
  // Means and centered squares of a block from its shifted sums. `suspects` receives the channels whose shift was so
  // far from the mean, or whose sums overflowed, that digits were lost; returns how many.
  int64_t (*finish)(int64_t channels, double count, const E* shift, const E* s1, const E* s2, double* mean, double* m2,
                    int32_t* suspects);
  // Two passes in double over `length` elements, `stride` apart: the answer for suspects.
  void (*exact)(const T* x, int64_t length, int64_t stride, double* mean, double* m2);
  // Chan's rule over channels: (count_a, mean_a, m2_a) += (count_b, mean_b, m2_b).
  void (*merge)(int64_t channels, double count_a, double* mean_a, double* m2_a, double count_b, const double* mean_b,
                const double* m2_b);
};

// The kernels of `cpu_level()`.
template <class T>
const Kernels<T>& kernels();

// x as [N, C, S], dense, with either positions or channels innermost (`rows`); `tensor` keeps the memory alive.
struct View {
  Tensor tensor;
  int64_t images, channels, spatial;
  bool rows;

  int64_t numel() const { return images * channels * spatial; }
  template <class T>
  const T* data() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

// A view of x itself where it is dense in either order, of a contiguous copy otherwise.
View view(const Tensor& x);

// `tensor`, of the shape and dtype of x, in the memory order of x, copied if it is in another one.
Tensor in_order_of(const View& x, const Tensor& tensor, const char* name);

// Uninitialised, with the shape, dtype and strides of x.
Tensor empty_like(const View& x);

// float32, or float64 for float64 x.
ScalarType statistics_dtype(const View& x);

// A contiguous argument of the statistics' dtype, [C].
Tensor per_channel(const View& x, const Tensor& tensor, const char* name);

// An argument of the statistics' dtype, [N, C] or [1, C]: row n begins `step * n` elements from the first, 0 for the
// latter. Where rows are not C neighbours, `tensor` is a copy.
struct Rows {
  Tensor tensor;
  int64_t step;

  template <class E>
  const E* row(int64_t n) const {
    return static_cast<const E*>(tensor.const_data_ptr()) + n * step;
  }
};
Rows rows_of(const View& x, const Tensor& tensor, const char* name);

// Parameters of eval-mode BatchNorm: y = (x - center) * scale + bias.
struct Parameters {
  Tensor center, running_var;
  std::optional<Tensor> weight, bias;
  double eps;
};
Parameters parameters_of(const View& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps);

// weight / sqrt(running_var + eps), [C].
template <class E>
std::vector<E> scales(int64_t channels, const std::optional<Tensor>& weight, const Tensor& running_var, double eps) {
  const auto* var = static_cast<const E*>(running_var.const_data_ptr());
  const auto* w = weight.has_value() ? static_cast<const E*>(weight->const_data_ptr()) : nullptr;
  std::vector<E> result(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const E inverse = E(1) / std::sqrt(var[c] + static_cast<E>(eps));
    result[c] = w == nullptr ? inverse : w[c] * inverse;
  }
  return result;
}

// Rows of C channels that are folded into one, so that a row fills four lanes' worth of registers.
inline int64_t fold(int64_t channels) { return ceil_div(64, std::max<int64_t>(1, channels)); }

// Rows per block of a channels-innermost tensor: short enough to stay in the L2 cache until recomputed, and for a lane,
// which adds one value of every `fold` rows, to add at most 256 in a row. Equal squares round alike every time.
inline int64_t block_rows(int64_t channels) {
  const int64_t rows = std::max<int64_t>(32, 65536 / std::max<int64_t>(1, channels));
  return std::min(rows, 256 * fold(channels));
}

// Work is cut into this many shards whatever the number of threads, so that results do not depend on it.
constexpr int64_t kShards = 16;

// Shards run in parallel when the tensor is worth it.
inline int64_t grain(const View& x, int64_t shards) { return x.numel() < 32768 ? std::max<int64_t>(1, shards) : 1; }

// `values` [C] repeated `times`; out may be values itself.
template <class E>
void repeat(const E* values, int64_t channels, int64_t times, E* out) {
  for (int64_t f = out == values ? 1 : 0; f < times; ++f) std::copy_n(values, channels, out + f * channels);
}

// to = scale * (from - center) + bias, tensors of the shape of x with channels innermost; [C] each of the vectors.
template <class T>
void scale_rows(const View& x, const T* from, T* to, const Compute<T>* center, const Compute<T>* scale,
                const Compute<T>* bias) {
  const int64_t channels = x.channels, f = fold(channels), w = f * channels, rows = x.images * x.spatial;
  const int64_t block = std::max(f, block_rows(channels) / f * f), blocks = ceil_div(rows, block);
  std::vector<Compute<T>> folded(3 * w);
  const Compute<T>* vectors[] = {center, scale, bias};
  for (int i = 0; i < 3; ++i) repeat(vectors[i], channels, f, folded.data() + i * w);
  torch::stable::parallel_for(0, blocks, grain(x, blocks), [&](int64_t begin, int64_t end) {
    const int64_t r = begin * block, count = std::min(end * block, rows) - r, at = r * channels;
    kernels<T>().row_scale(from + at, to + at, count, channels, f, folded.data(), folded.data() + w,
                           folded.data() + 2 * w);
  });
}

// Calls f with a value of the element type of x.
template <class F>
void dispatch(const View& x, const F& f) {
  for_floating(x.tensor.scalar_type(), "x", [&](auto element, auto) { f(element); });
}

}  // namespace clusterq::bn_stats
