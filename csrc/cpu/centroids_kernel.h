// The inner loops of the nearest-centroid search for one instruction set. Included once per level by centroids.cpp,
// which sets CLUSTERQ_LEVEL (a namespace), CLUSTERQ_FLOATS (floats per register: 16, 8 or 4), CLUSTERQ_PAIRS (1:
// products of bfloat16, two at a time) and the compiler's target; hence no include guard, and nothing from the standard
// library, whose shared template instances must not use that target.
//
// Score of centroid k for a row: x'.c'_k - |c'_k|^2 / 2, largest wins, with x' and c' relative to the book's centre.

#include "centroids_lanes.h"

namespace CLUSTERQ_LEVEL {

// One step of the products: a float of a row and a register of floats, or a pair of bfloat16 and a register of pairs.
#if CLUSTERQ_PAIRS
typedef uint32_t Operand;
CLUSTERQ_INLINE Floats step(Operand row, const Operand* column, Floats sum) {
  const __m512i values = _mm512_set1_epi32(static_cast<int>(row)), centroids = _mm512_loadu_si512(column);
  return _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)centroids);
}
#else
typedef float Operand;
CLUSTERQ_INLINE Floats step(Operand row, const Operand* column, Floats sum) {
  return multiply_add(fill(row), load(column), sum);
}
#endif

// 12 rows by 2 registers of centroids leave room for operands in 32 registers, 6 by 2 in 16.
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kWidth = 2 * kLanes;
static_assert(kRows <= kMostRows && kWidth <= kMostWidth);

constexpr int64_t depth_of(int64_t dim) { return CLUSTERQ_PAIRS ? (dim + 1) / 2 : dim; }

// Scores of kRows rows against V registers of centroids: the higher one of the lane's two goes to `scores`, and is kept
// in `highest` where it is the highest of the lane so far.
template <int V>
CLUSTERQ_INLINE void score_panel(const Operand* rows, int64_t depth, const Operand* panel, const float* offset,
                                 float* scores, int64_t stride, Floats* highest) {
  Floats sum[kRows][V];
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    const Floats start = load(offset + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) sum[r][v] = start;
  }
  for (int64_t d = 0; d < depth; d++) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = step(rows[r * depth + d], panel + v * kLanes, sum[r][v]);
    }
    panel += V * kLanes;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
    const Floats top = V == 2 ? larger(sum[r][V - 1], sum[r][0]) : sum[r][0];
    save(scores + r * stride, top);
    highest[r] = larger(top, highest[r]);
  }
}

CLUSTERQ_INLINE void score(const Panels& book, const Operand* rows, float* scores, int64_t stride, Floats* highest) {
  const int64_t depth = depth_of(book.dim);
  const Operand* panel = static_cast<const Operand*>(book.operands);
  for (int r = 0; r < kRows; r++) highest[r] = fill(-__builtin_inff());
  int64_t first = 0;
  for (; first + kLanes < book.clusters; first += kWidth, scores += kLanes) {
    score_panel<2>(rows, depth, panel + first * depth, book.offset + first, scores, stride, highest);
  }
  if (first < book.clusters) {
    score_panel<1>(rows, depth, panel + first * depth, book.offset + first, scores, stride, highest);
  }
}

// Writes values as operands; returns what rounding took from them.
#if CLUSTERQ_PAIRS
CLUSTERQ_INLINE Floats put(Operand* target, int64_t d, Floats values) {
  const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(target) + d), _mm512_cvtepi32_epi16(bits));
  return values - _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
#else
CLUSTERQ_INLINE Floats put(Operand* target, int64_t d, Floats values) {
  save(target + d, values);
  return fill(0);
}
#endif

// The first `count` <= kLanes floats, zeros after them.
CLUSTERQ_INLINE Floats load_part(const float* p, int64_t count) {
#if CLUSTERQ_FLOATS == 16
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
#else
  float values[kLanes] = {};
  for (int64_t j = 0; j < count; j++) values[j] = p[j];
  return load(values);
#endif
}

// target = row - origin as operands, padded with zeros to whole registers.
CLUSTERQ_INLINE Size centre(const float* row, const float* origin, int64_t dim, Operand* target) {
  Floats squares = fill(0), lost = fill(0);
  const auto add = [&](int64_t d, Floats value) __attribute__((always_inline)) {
    const Floats rest = put(target, d, value);
    squares = multiply_add(value, value, squares);
    lost = multiply_add(rest, rest, lost);
  };
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) add(d, load(row + d) - load(origin + d));
  if (d < dim) add(d, load_part(row + d, dim - d) - load_part(origin + d, dim - d));
  return {total(squares), CLUSTERQ_PAIRS ? total(lost) : 0.0f};
}

// Squares of a centroid relative to the origin, in double, and those of what its operands lose.
Size64 size(const float* values, const float* origin, int64_t dim) {
  double squares = 0, lost = 0;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t part = dim - d < kLanes ? dim - d : kLanes;
    Operand operands[kLanes];
    const Floats value = load_part(values + d, part) - load_part(origin + d, part), rest = put(operands, 0, value);
    float lanes[2][kLanes];
    save(lanes[0], value), save(lanes[1], rest);
    for (int j = 0; j < kLanes; j++) {
      squares += static_cast<double>(lanes[0][j]) * lanes[0][j];
      lost += static_cast<double>(lanes[1][j]) * lanes[1][j];
    }
  }
  return {squares, lost};
}

// Centroids [count, dim] as one panel, `width` of them (a register or two), those that take no part as zeros.
void pack(const float* values, const char* left_out, const float* origin, int64_t count, int64_t width, int64_t dim,
          void* panel) {
  Operand* target = static_cast<Operand*>(panel);
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t part = dim - d < kLanes ? dim - d : kLanes, steps = depth_of(part), first = depth_of(d);
    for (int64_t j = 0; j < width; j++) {
      Operand column[kLanes] = {};
      if (j < count && !left_out[j]) {
        const float* row = values + j * dim + d;
        const bool whole = part == kLanes;
        put(column, 0,
            (whole ? load(row) : load_part(row, part)) - (whole ? load(origin + d) : load_part(origin + d, part)));
      }
      for (int64_t i = 0; i < steps; i++) target[(first + i) * width + j] = column[i];
    }
  }
}

// Adds the pairs that reach `least` to the row's candidates; their centroids are counted from `first`. Four registers
// at a time: where the next candidate stands is not to be foreseen, and every test that may go either way costs more
// than the registers.
CLUSTERQ_INLINE void select(const float* scores, int64_t length, int64_t first, float least, Row& row) {
  const Floats limit = fill(least);
  int count = row.count;
  for (int64_t k = 0; k < length; k += 4 * kLanes) {
    uint64_t found = 0;
    for (int v = 0; v < 4 && k + v * kLanes < length; v++) {
      found |= static_cast<uint64_t>(at_least(load(scores + k + v * kLanes), limit)) << (v * kLanes);
    }
    for (; found != 0; found &= found - 1) {
      const int64_t place = k + __builtin_ctzll(found);
      if (count == kRoom) {
        row.count = count;
        row.keep(least);
        count = row.count;
        if (count == kRoom) {
          row.count = kOverflow;
          return;
        }
      }
      const int64_t id = first + place / kLanes * kWidth + place % kLanes;
      row.candidates[count++] = {static_cast<int32_t>(id), scores[place]};
    }
  }
  row.count = count;
}

// Best and second best of a row of scores.
CLUSTERQ_INLINE void highest_two(const float* scores, int64_t length, float& best, float& second) {
  Floats top = fill(-__builtin_inff()), next = top;
  for (int64_t k = 0; k < length; k += kLanes) {
    const Floats value = load(scores + k);
    next = larger(next, smaller(value, top));
    top = larger(top, value);
  }
  float tops[kLanes], nexts[kLanes];
  save(tops, top), save(nexts, next);
  for (int j = 0; j < kLanes; j++) {
    const float a = tops[j], b = nexts[j] > second ? nexts[j] : second;
    second = a > best ? (best > b ? best : b) : (a > b ? a : b);
    best = a > best ? a : best;
  }
}

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles8 __attribute__((vector_size(64), may_alias));
typedef double Doubles4 __attribute__((vector_size(32), may_alias));

// Adds (a - b)^2 of eight floats, or of the first `count`.
CLUSTERQ_INLINE void add_squares(const float* a, const float* b, Doubles8& squares) {
  const Doubles8 difference = __builtin_convertvector(*reinterpret_cast<const Floats8*>(a), Doubles8) -
                              __builtin_convertvector(*reinterpret_cast<const Floats8*>(b), Doubles8);
  squares += difference * difference;
}
CLUSTERQ_INLINE void add_squares(const float* a, const float* b, int64_t count, Doubles8& squares) {
  float parts[2][8] = {};
#if CLUSTERQ_FLOATS == 16
  const __mmask8 lanes = static_cast<__mmask8>((1u << count) - 1);
  _mm256_storeu_ps(parts[0], _mm256_maskz_loadu_ps(lanes, a)),
      _mm256_storeu_ps(parts[1], _mm256_maskz_loadu_ps(lanes, b));
#else
  for (int64_t j = 0; j < count; j++) parts[0][j] = a[j], parts[1][j] = b[j];
#endif
  add_squares(parts[0], parts[1], squares);
}

// sum (a - b)^2 in float64 over eight interleaved partial sums: the same bits at every level.
CLUSTERQ_INLINE double distance(const float* a, const float* b, int64_t dim) {
  Doubles8 squares = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) add_squares(a + d, b + d, squares);
  if (d < dim) add_squares(a + d, b + d, dim - d, squares);
#if CLUSTERQ_FLOATS == 16
  const __m512d all = (__m512d)squares;
  const Doubles4 halves = (Doubles4)_mm512_castpd512_pd256(all) + (Doubles4)_mm512_extractf64x4_pd(all, 1);
#else
  Doubles4 parts[2];
  __builtin_memcpy(parts, &squares, sizeof(parts));
  const Doubles4 halves = parts[0] + parts[1];
#endif
  return (halves[0] + halves[1]) + (halves[2] + halves[3]);
}

double measure(const float* a, const float* b, int64_t dim) { return distance(a, b, dim); }

// The nearest of a row's candidates by distance; false where another is as good as equally near.
CLUSTERQ_INLINE bool decide(const Job& job, const float* x, int64_t dim, const Row& row, int64_t number,
                            const Output& output) {
  int64_t index = row.candidates[0].id;
  double least = distance(x, job.values + index * dim, dim), next = __builtin_inf();
  const auto meet = [&](int64_t other) __attribute__((always_inline)) {
    // which of two is nearer is not to be foreseen: no branches
    const double value = distance(x, job.values + other * dim, dim), farther = value > least ? value : least;
    next = farther < next ? farther : next;
    index =
        static_cast<int64_t>(static_cast<uint64_t>(index) ^ ((index ^ other) & -static_cast<uint64_t>(value < least)));
    least = value < least ? value : least;
  };
  for (int j = 0; j < row.count; j++) {
    const int64_t id = row.candidates[j].id, mate = id + kLanes;
    if (j > 0 && !job.left_out[id]) meet(id);
    if (mate < job.clusters && !job.left_out[mate]) meet(mate);
  }
  if (job.left_out[row.candidates[0].id] || !(next > least * job.bound.order)) return false;
  output.set(number, index, least);
  // a difference of scores is half a difference of distances
  if (output.undecided != nullptr) output.undecided[number] = !(next - least > 2 * row.reach);
  return true;
}

template <class T>
void widen(const void* source, int64_t step, int64_t count, float* target) {
  const T* typed = static_cast<const T*>(source);
  if (step == 1) {
    for (int64_t d = 0; d < count; d++) target[d] = clusterq::load<float>(typed[d]);
  } else {
    for (int64_t d = 0; d < count; d++) target[d] = clusterq::load<float>(typed[d * step]);
  }
}

// `count` rows against the panels, whose first centroid is number `first` of all. Starts the states where first is 0;
// in the last call decides rows with one candidate and hands the others to `job.decide`. Memory: operands kMostRows *
// (dim + 16) floats, scores kMostRows * (clusters / 2 + kMostWidth), wide kMostRows * dim where rows are not floats
// side by side.
void scan(const Job& job, const Panels& book, const Points& points, int64_t count, int64_t first, bool last,
          void* operands, float* scores, float* wide, Row* rows, const Output& output) {
  const int64_t dim = book.dim, depth = depth_of(dim);
  // a score for every two centroids
  const int64_t length = (book.clusters + kWidth - 1) / kWidth * kLanes;
  Operand* centred = static_cast<Operand*>(operands);
  Floats highest[kRows];
  for (int64_t n = 0; n < count; n += kRows) {
    const int64_t group = count - n < kRows ? count - n : kRows;
    const float* x = reinterpret_cast<const float*>(points.row(n));
    int64_t stride = points.row_stride;
    if (!points.direct()) {
      for (int64_t r = 0; r < group; r++) {
        const void* row = points.row(n + r);
        if (points.dtype == ScalarType::BFloat16) widen<BFloat16>(row, points.stride, dim, wide + r * dim);
        if (points.dtype == ScalarType::Half) widen<Half>(row, points.stride, dim, wide + r * dim);
        if (points.dtype == ScalarType::Float) widen<float>(row, points.stride, dim, wide + r * dim);
      }
      x = wide, stride = dim;
    }
    Size sizes[kRows] = {};
    for (int64_t r = 0; r < group; r++) sizes[r] = centre(x + r * stride, job.origin, dim, centred + r * depth);
    if (first == 0) {
      float norm[kRows], reach[kRows];
      for (int r = 0; r < kRows; r++) norm[r] = job.bound.norm_of(sizes[r].squares);
      for (int r = 0; r < kRows; r++) reach[r] = job.bound.reach(norm[r], sizes[r].lost);
      for (int64_t r = 0; r < group; r++) rows[n + r].start(norm[r], reach[r], job.bound.exact);
    }
    score(book, centred, scores, length, highest);
    for (int64_t r = 0; r < group; r++) {
      Row& row = rows[n + r];
      if (row.count == kMeasure) continue;
      const float* own = scores + r * length;
      const float top = largest(highest[r]), before = row.best;
      if (job.wanted == 2) {
        highest_two(own, length, row.best, row.second);
      } else {
        row.best = top > row.best ? top : row.best;
      }
      const float least = (job.wanted == 2 ? row.second : row.best) - row.reach;
      // none of the earlier ones is a candidate any more
      if (row.count == kOverflow && least > before) row.count = 0;
      // -inf marks padding and what cannot win
      if (top >= least && row.count != kOverflow) select(own, length, first, least > -3e38f ? least : -3e38f, row);
    }
    if (!last) continue;
    for (int64_t r = 0; r < group; r++) {
      Row& row = rows[n + r];
      const float* point = x + r * stride;
      // candidates of earlier panels
      if (first > 0 && row.count > 1 && job.wanted == 1) row.keep(row.best - row.reach);
      if (!job.simple || row.count < 1 || row.count > kRoom || !decide(job, point, dim, row, n + r, output)) {
        job.decide(job.context, point, row, n + r);
      }
    }
  }
}

// Scores of one row in float32 against centroids as they lie in memory.
void score_row(const float* row, const float* values, const float* origin, const float* offset, int64_t clusters,
               int64_t dim, float* scores) {
  for (int64_t k = 0; k < clusters; k++) {
    const float* other = values + k * dim;
    Floats sum = fill(0);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      const Floats middle = load(origin + d);
      sum = multiply_add(load(row + d) - middle, load(other + d) - middle, sum);
    }
    float lanes[kLanes], total = offset[k];
    save(lanes, sum);
    for (; d < dim; d++) total += (row[d] - origin[d]) * (other[d] - origin[d]);
    for (int j = 0; j < kLanes; j++) total += lanes[j];
    scores[k] = total;
  }
}

// Four float64 rows against groups of eight centroids, [groups, dim, 8]; squares are added in the order of d.
void search_double(const double* const rows[4], int64_t dim, const double* panels, int64_t groups, double* distances,
                   int64_t* index, int wanted) {
  typedef int64_t Longs8 __attribute__((vector_size(64), may_alias));
  Doubles8 best[4], second[4];
  Longs8 id[4], other[4];
  for (int r = 0; r < 4; r++) {
    best[r] = second[r] = Doubles8{} + __builtin_inf();
    id[r] = other[r] = Longs8{} - 1;
  }
  for (int64_t g = 0; g < groups; g++) {
    Doubles8 sum[4] = {};
    const Doubles8* column = reinterpret_cast<const Doubles8*>(panels + g * dim * 8);
    for (int64_t d = 0; d < dim; d++) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        const Doubles8 difference = rows[r][d] - column[d];
        sum[r] += difference * difference;
      }
    }
    const Longs8 number = Longs8{0, 1, 2, 3, 4, 5, 6, 7} + g * 8;
    for (int r = 0; r < 4; r++) {
      const Longs8 better = (sum[r] < best[r]) | ((id[r] < 0) & (sum[r] == sum[r]));
      if (wanted == 2) {
        const Doubles8 rest = better ? best[r] : sum[r];
        const Longs8 name = better ? id[r] : number;
        // who was first is second, also before one of equal distance and higher index
        const Longs8 closer = (rest < second[r]) | ((other[r] < 0) & (rest == rest));
        const Longs8 next = (better & (id[r] >= 0)) | (~better & closer);
        second[r] = next ? rest : second[r];
        other[r] = next ? name : other[r];
      }
      best[r] = better ? sum[r] : best[r];
      id[r] = better ? number : id[r];
    }
  }
  for (int r = 0; r < 4; r++) {
    for (int w = 0; w < wanted; w++) {
      double lowest = __builtin_nan("");
      int64_t found = -1;
      int lane = 0;
      for (int j = 0; j < 8; j++) {
        if (id[r][j] < 0) continue;
        const bool lower = found < 0 || best[r][j] < lowest;
        if (lower || (best[r][j] == lowest && id[r][j] < found)) lowest = best[r][j], found = id[r][j], lane = j;
      }
      distances[r * wanted + w] = lowest;
      index[r * wanted + w] = found;
      // the lane's runner-up takes the winner's place
      if (found >= 0) best[r][lane] = second[r][lane], id[r][lane] = other[r][lane], other[r][lane] = -1;
    }
  }
}

const Level level = {kLanes,  CLUSTERQ_PAIRS,  scan,        pack,         size,         score_row,
                     measure, widen<BFloat16>, widen<Half>, widen<float>, search_double};

}  // namespace CLUSTERQ_LEVEL
