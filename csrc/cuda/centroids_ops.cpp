// The centroid search of CUDA tensors: checks, outputs, launches.
#include <tuple>

#include "centroids_host.h"

namespace clusterq {
namespace {

bool is_exact(const std::string& precision) {
  CLUSTERQ_CHECK(precision == "exact" || precision == "fast", "precision must be exact or fast");
  return precision == "exact";
}

// What the launches write between them, kept alive.
struct Scratch {
  Tensor facts, centre, offsets, panels, leaders;
};

// The search itself; `search` tells what is kept and where results go.
void run(CentroidSearch& search, const RowInput& rows, const CentroidInput& given) {
  const Launch launch(rows.x);
  const int64_t batch = rows.source.batch, count = rows.source.rows, dim = rows.source.dim;
  search.x = rows.source;
  search.clusters = given.clusters;
  search.centroid_element = given.element;
  search.centroids = given.centroids.const_data_ptr();
  search.has_book = rows.source.element != Element::kDouble && given.clusters * dim > kDirectBook;
  Scratch scratch;
  if (search.has_book) {
    const SearchPlan plan = plan_search(batch, count, given.clusters, dim);
    const auto room = [&](Tensor& tensor, int64_t values, ScalarType dtype) {
      tensor = sized(rows.x, {values}, dtype);
      return tensor.mutable_data_ptr();
    };
    search.plan = plan;
    search.book.facts = static_cast<BookFacts*>(room(scratch.facts, batch * 3, ScalarType::Int));
    search.book.centre = static_cast<float*>(room(scratch.centre, batch * dim, ScalarType::Float));
    search.book.offsets = static_cast<float*>(room(scratch.offsets, batch * plan.padded(), ScalarType::Float));
    search.book.panels = static_cast<uint16_t*>(room(scratch.panels, batch * plan.panel_values(), ScalarType::Short));
    search.leaders = room(scratch.leaders, plan.parts * batch * count * leader_words(search.kept), ScalarType::Int);
    launch_prepare(search, launch.stream());
    launch_search(search, launch.stream());
  }
  launch_settle(search, launch.stream());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& centroids, bool exact, bool pair) {
  const RowInput rows(x);
  const CentroidInput given(centroids, rows);
  std::vector<int64_t> sizes{rows.source.batch, rows.source.rows};
  if (pair) sizes.push_back(2);
  Tensor index = sized(x, sizes, ScalarType::Long), distance = sized(x, sizes, rows.dtype);
  if (rows.empty()) return {index, distance};
  CentroidSearch search;
  search.kept = pair ? 3 : exact ? 2 : 1;
  search.exact = exact;
  search.index = static_cast<int64_t*>(index.mutable_data_ptr());
  search.distance = distance.mutable_data_ptr();
  run(search, rows, given);
  return {index, distance};
}

std::tuple<Tensor, Tensor> two_nearest_centroids(const Tensor& x, const Tensor& centroids, std::string precision) {
  return nearest(x, centroids, is_exact(precision), true);
}

Tensor undecided_rows(const Tensor& x, const Tensor& centroids) {
  const RowInput rows(x);
  const CentroidInput given(centroids, rows);
  Tensor mask = sized(x, {rows.source.batch, rows.source.rows}, ScalarType::Bool);
  if (rows.empty()) return mask;
  if (rows.source.element == Element::kDouble || given.clusters * rows.source.dim <= kDirectBook) {
    // Searched in float64 from the start.
    torch::stable::fill_(mask, 0);
    return mask;
  }
  CentroidSearch search;
  search.undecided = static_cast<bool*>(mask.mutable_data_ptr());
  run(search, rows, given);
  return mask;
}

}  // namespace

std::tuple<Tensor, Tensor> nearest_centroid(const Tensor& x, const Tensor& centroids, std::string precision) {
  return nearest(x, centroids, is_exact(precision), false);
}

std::vector<std::string> centroid_ops() { return {"nearest_centroid", "two_nearest_centroids", "undecided_rows"}; }

}  // namespace clusterq

STABLE_TORCH_LIBRARY_IMPL(clusterq, CLUSTERQ_KEY, m) {
  m.impl("nearest_centroid", TORCH_BOX(&clusterq::nearest_centroid));
  m.impl("two_nearest_centroids", TORCH_BOX(&clusterq::two_nearest_centroids));
  m.impl("undecided_rows", TORCH_BOX(&clusterq::undecided_rows));
}
