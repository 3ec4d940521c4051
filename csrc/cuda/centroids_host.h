// What the op functions on centroids share: rows as the kernels see them, sizes, centroids of a type they read.
#pragma once

#include <tuple>

#include "centroids.h"
#include "host.h"

namespace clusterq {
namespace {

using Optional = std::optional<Tensor>;

inline Tensor sized(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, sizes, dtype);
}

// x [B, N, D], copied only where neighbours along D do not lie side by side.
struct RowInput {
  Tensor x;
  RowSource source;
  ScalarType dtype;

  explicit RowInput(const Tensor& given) : x(given), dtype(compute_dtype(given.scalar_type())) {
    CLUSTERQ_CHECK(x.dim() == 3 && x.size(2) >= 1, "x has shape ", shape_text(x.sizes()), ", wanted [B, N, D], D >= 1");
    source.element = element_of(x.scalar_type(), "x");
    if (x.size(2) > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
    source.data = x.const_data_ptr();
    source.batch = x.size(0);
    source.rows = x.size(1);
    source.dim = x.size(2);
    CLUSTERQ_CHECK(source.rows < (int64_t(1) << 30) && source.dim < (int64_t(1) << 30), "x has N = ", source.rows,
                   " and D = ", source.dim, ", wanted fewer than 2^30");
    source.batch_stride = x.stride(0);
    source.row_stride = x.stride(1);
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    source.wide = reinterpret_cast<uintptr_t>(source.data) % 16 == 0 && source.batch_stride * bytes % 16 == 0 &&
                  source.row_stride * bytes % 16 == 0;
  }
  bool empty() const { return source.batch == 0 || source.rows == 0; }
};

// Centroids [B, K, D], dense, of the type of x or float32.
struct CentroidInput {
  Tensor centroids;
  Element element;
  int64_t clusters;

  CentroidInput(const Tensor& given, const RowInput& rows) : centroids(given), clusters(0) {
    CLUSTERQ_CHECK(given.dim() == 3, "centroids has ", given.dim(), " dimensions, wanted 3");
    clusters = given.size(1);
    CLUSTERQ_CHECK(clusters >= 1 && clusters < (int64_t(1) << 30), "centroids has K = ", clusters,
                   ", wanted 1 <= K < 2^30");
    check_sizes(given, {rows.source.batch, clusters, rows.source.dim}, "centroids");
    check_device(given, rows.x, "centroids");
    element = element_of(given.scalar_type(), "centroids");
    CLUSTERQ_CHECK((element == Element::kDouble) == (rows.source.element == Element::kDouble),
                   "float64 goes with float64 only");
    if (element == rows.source.element || element == Element::kFloat) {
      centroids = packed(given);
    } else {
      centroids = sized(given, {rows.source.batch, clusters, rows.source.dim}, ScalarType::Float);
      torch::stable::copy_(centroids, given);
      element = Element::kFloat;
    }
  }
};

}  // namespace

// Defined in centroids_ops.cpp: index and distance [B, N].
std::tuple<Tensor, Tensor> nearest_centroid(const Tensor& x, const Tensor& centroids, std::string precision);

}  // namespace clusterq
