// How the CUDA kernels of the centroids divide work, where they put values, which scores they keep, and the bound on
// the errors of scores: host code.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cuda/centroids_leaders.h"
#include "cuda/centroids_plan.h"

using namespace clusterq;

namespace {

int failures = 0;
int64_t checks = 0;
std::mt19937_64 random_bits(0);

void expect(bool ok, const char* what, double a = 0, double b = 0, double c = 0) {
  ++checks;
  if (!ok && ++failures < 20) std::printf("%s: %.17g %.17g %.17g\n", what, a, b, c);
}

void search_plans() {
  for (const int64_t batch : {1, 2, 3, 40, 1000, 70000})
    for (const int64_t rows : {1, 127, 128, 129, 5000, 1 << 20})
      for (const int64_t clusters : {1, 63, 64, 65, 1000, 8192, 100003})
        for (const int64_t dim : {1, 32, 33, 513}) {
          const SearchPlan plan = plan_search(batch, rows, clusters, dim);
          expect(plan.padded() >= clusters && plan.padded() < clusters + kTileColumns, "columns", plan.tiles, clusters);
          expect(plan.chunks * kTileDepth >= dim && plan.chunks * kTileDepth < dim + kTileDepth, "depth", plan.chunks);
          expect(plan.row_tiles * kTileRows >= rows, "rows", plan.row_tiles, rows);
          // Every part has a tile, and together they have all.
          expect(plan.parts * plan.part >= plan.tiles && (plan.parts - 1) * plan.part < plan.tiles, "parts", plan.parts,
                 plan.part, plan.tiles);
          const int64_t blocks = batch * plan.row_tiles;
          expect(plan.parts == 1 || blocks * plan.parts <= kSearchBlocks, "blocks", blocks, plan.parts);
        }
}

void sums_plans() {
  for (const int64_t rows : {1, 255, 256, 1024, 1025, 100000, 1 << 20, 100 << 20})
    for (const int64_t clusters : {1, 7, 1000, 65536}) {
      const SumsPlan plan = plan_sums(rows, clusters);
      expect(plan.tile % 32 == 0 && plan.tiles * plan.tile >= rows && (plan.tiles - 1) * plan.tile < rows, "tiles",
             plan.tile, plan.tiles, rows);
      // Less than a hundredth of rows * clusters.
      expect(plan.tiles == 1 || plan.tiles * 100 < rows, "counts", plan.tiles, rows);
      if (rows > 100000) continue;
      for (int turn = 0; turn < 20; ++turn) {
        // Few clusters or many get the rows.
        const int64_t used = 1 + static_cast<int64_t>(random_bits() % clusters);
        std::vector<int64_t> counts(clusters);
        for (int64_t n = 0; n < rows; ++n) ++counts[random_bits() % used];
        int64_t segments = 0;
        for (const int64_t count : counts) segments += blocks_of(count, kSegmentRows);
        expect(segments <= plan.segments, "segments", segments, plan.segments, rows);
      }
    }
}

void panels() {
  std::set<int> places;
  for (int row = 0; row < kTileRows; ++row)
    for (int unit = 0; unit < kTileDepth / 8; ++unit) {
      const int place = panel_place(row, unit);
      expect(place % 8 == 0 && place / (8 * 4) == row, "place", row, unit, place);
      places.insert(place);
    }
  expect(static_cast<int>(places.size()) == kTileRows * kTileDepth / 8, "places", places.size());
  // The 16-byte units that are read or written at once lie on different banks: eight rows; four units of two rows.
  for (int row = 0; row < kTileRows; row += 2)
    for (int unit = 0; unit < kTileDepth / 8; ++unit) {
      std::set<int> read, written;
      for (int i = 0; i < 8; ++i) {
        read.insert(panel_place(row / 8 * 8 + i, unit) / 8 % 8);
        written.insert(panel_place(row + i / 4, i % 4) / 8 % 8);
      }
      expect(read.size() == 8 && written.size() == 8, "banks", row, unit);
    }
}

struct Scored {
  float score;
  int32_t k;
};

template <int kKept>
void compare(const Leaders<kKept>& found, const std::vector<Scored>& sorted) {
  const auto score = [&](size_t i) { return i < sorted.size() ? sorted[i].score : kNoScore; };
  const auto index = [&](size_t i) { return score(i) > kNoScore ? sorted[i].k : kNoIndex; };
  expect(found.best == score(0) && found.index == index(0), "best", found.best, score(0), found.index);
  if constexpr (kKept > 1) expect(found.second == score(1), "second", found.second, score(1));
  if constexpr (kKept > 2) {
    expect(found.runner == index(1), "runner", found.runner, index(1));
    expect(found.third == score(2), "third", found.third, score(2));
  }
}

// Scores dealt out to lanes as a warp does it, tile by tile, then merged in any order.
template <int kKept>
void leaders() {
  for (int turn = 0; turn < 20000; ++turn) {
    const int tiles = 1 + random_bits() % 3, lanes = 4, width = 8;
    std::vector<Leaders<kKept>> parts(lanes);
    std::vector<Scored> all;
    const float levels = 1 + random_bits() % 12;
    for (int tile = 0; tile < tiles; ++tile) {
      for (auto& part : parts) part.shift(-lanes * width);
      for (int i = 0; i < lanes * width; ++i) {
        float score = static_cast<float>(random_bits() % static_cast<int>(levels)) - 3;
        const int special = random_bits() % (turn % 3 == 0 ? 2 : 40);
        if (special == 0) score = kNoScore;
        if (special == 1) score = std::numeric_limits<float>::quiet_NaN();
        const int lane = i / 2 % lanes, place = i / (2 * lanes) * 2 * lanes + i % 2;
        parts[lane].offer(score, place);
        if (score > kNoScore) all.push_back({score, tile * lanes * width + place + 2 * lane});
      }
    }
    for (int lane = 0; lane < lanes; ++lane) parts[lane].place((tiles - 1) * lanes * width + 2 * lane);
    std::stable_sort(all.begin(), all.end(), [](const Scored& a, const Scored& b) {
      return a.score != b.score ? a.score > b.score : a.k < b.k;
    });
    std::shuffle(parts.begin(), parts.end(), random_bits);
    Leaders<kKept> found = parts[0];
    for (int lane = 1; lane < lanes; ++lane) found.merge(parts[lane]);
    compare(found, all);
  }
}

float to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

// Bits below 2^-23 of the largest are dropped, in blocks of 8, and in the result.
float accumulate(float sum, const std::vector<double>& products) {
  for (size_t first = 0; first < products.size(); first += 8) {
    double largest = std::fabs(static_cast<double>(sum)), total = 0;
    for (size_t i = first; i < std::min(first + 8, products.size()); ++i)
      largest = std::max(largest, std::fabs(products[i]));
    if (largest == 0) continue;
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
    total = std::trunc(sum / unit) * unit;
    for (size_t i = first; i < std::min(first + 8, products.size()); ++i)
      total += std::trunc(products[i] / unit) * unit;
    float cut = static_cast<float>(total);
    if (std::fabs(static_cast<double>(cut)) > std::fabs(total)) cut = std::nextafter(cut, 0.0f);
    sum = cut;
  }
  return sum;
}

struct Vectors {
  std::vector<float> x, c, m;
};

// Error of a score over its bound. Exact numbers are long double: 64 bits of sums of products of 24.
double part_of_bound(const Vectors& v, bool raw) {
  const int64_t dim = v.x.size();
  long double exact = 0, half = 0;
  double rows = 0, columns = 0;
  std::vector<std::vector<double>> products(3);
  for (int64_t d = 0; d < dim; ++d) {
    const float x = v.x[d] - v.m[d], c = v.c[d] - v.m[d];
    const long double far_x = static_cast<long double>(v.x[d]) - v.m[d],
                      far_c = static_cast<long double>(v.c[d]) - v.m[d];
    exact += far_x * far_c;
    half += far_c * far_c / 2;
    rows += static_cast<double>(x) * x;
    columns += static_cast<double>(c) * c;
    const float h = to_bfloat16(x), m = to_bfloat16(x - h), high = to_bfloat16(c), middle = to_bfloat16(c - high);
    products[0].push_back(raw ? static_cast<double>(x) * c : static_cast<double>(h) * high);
    products[1].push_back(static_cast<double>(h) * middle);
    products[2].push_back(static_cast<double>(m) * high);
  }
  float score = -static_cast<float>(0.5 * columns);
  for (int64_t first = 0; first < dim; first += 16)
    for (int pass = 0; pass < (raw ? 1 : 3); ++pass)
      score = accumulate(score, {products[pass].begin() + first, products[pass].begin() + std::min(first + 16, dim)});
  const ScoreBound bound =
      bound_scores(raw, dim, std::sqrt(rows) * (1 + 1e-6), std::sqrt(columns) * (1 + 1e-6), 0.5 * columns * (1 + 1e-6));
  return static_cast<double>(std::fabs(score - (exact - half))) / bound.error;
}

void bounds() {
  std::normal_distribution<float> normal;
  double most = 0, most_raw = 0;
  for (int turn = 0; turn < 30000; ++turn) {
    const int64_t dim = 1 + random_bits() % (turn % 4 == 0 ? 300 : 24);
    const bool raw = turn % 2 == 0;
    const float offset = turn % 3 == 0 && !raw ? 100 : 0,
                scale = std::ldexp(1.0f, static_cast<int>(random_bits() % 60) - 30);
    Vectors v;
    for (int64_t d = 0; d < dim; ++d) {
      const auto next = [&] {
        const float value = (normal(random_bits) + offset) * scale;
        return raw ? to_bfloat16(value) : value;
      };
      v.x.push_back(next());
      // Near or far, of one sign or of both.
      v.c.push_back(turn % 5 == 0 ? v.x[d] : next());
      v.m.push_back(raw ? 0 : offset * scale);
    }
    const double part = part_of_bound(v, raw);
    expect(part <= 1, raw ? "raw" : "in parts", part, dim, turn);
    (raw ? most_raw : most) = std::max(raw ? most_raw : most, part);
  }
  // Values just below halfway between two of 8 bits, whose second part is just below halfway again, lose most.
  for (const int64_t dim : {1, 16, 64}) {
    const float value = 1 + 0x1p-8f - 0x1p-16f + 0x1p-17f - 0x1p-22f;
    // Rows far out: next to nothing of the bound is for the offset.
    const Vectors v{std::vector<float>(dim, 1024 * value), std::vector<float>(dim, value),
                    std::vector<float>(dim, 0.0f)};
    const double part = part_of_bound(v, false);
    expect(part <= 1 && part > 0.4, "halfway", part, dim);
    most = std::max(most, part);
  }
  expect(most > 0.2 && most_raw > 0.01, "the bound is not idle", most, most_raw);
  std::printf("largest parts of the bound: %.3f in parts, %.3f as they are\n", most, most_raw);
  expect(std::isinf(bound_scores(false, (int64_t(1) << 18) + 1, 1, 1, 1).error), "too many terms");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  expect(!(bound_scores(false, 4, nan, 1, 1).magnitude < kLargestMagnitude), "NaN");
}

}  // namespace

int main() {
  search_plans();
  sums_plans();
  panels();
  leaders<1>();
  leaders<2>();
  leaders<3>();
  bounds();
  std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
  return failures != 0;
}
