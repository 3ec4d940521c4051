// The inner loops of the nearest-centroid search for one instruction set. Included once per level by centroids.cpp,
// which sets CLUSTERQ_LEVEL (a namespace) and CLUSTERQ_LANES (floats per register: 16, 8 or 4) and the compiler's
// target; hence no include guard, and nothing from the standard library, whose shared template instances must not use
// that target.
//
// Score of centroid k for a row: x'.c'_k - |c'_k|^2 / 2, largest wins, with x' and c' relative to the mean of the
// centroids.

namespace CLUSTERQ_LEVEL {

constexpr int kLanes = CLUSTERQ_LANES;

#if CLUSTERQ_LANES == 16
using Floats = __m512;
using Ints = __m512i;
CLUSTERQ_INLINE Floats load(const float* p) { return _mm512_load_ps(p); }
CLUSTERQ_INLINE Floats fill(float v) { return _mm512_set1_ps(v); }
CLUSTERQ_INLINE Ints fill_int(int32_t v) { return _mm512_set1_epi32(v); }
CLUSTERQ_INLINE void save(float* p, Floats v) { _mm512_store_ps(p, v); }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
CLUSTERQ_INLINE Ints lane_numbers(int32_t first) {
  const Ints lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
}
CLUSTERQ_INLINE void keep_best(Floats score, Ints number, Floats& best, Floats& second, Ints& id) {
  const __mmask16 better = _mm512_cmp_ps_mask(score, best, _CMP_GT_OQ);
  second = _mm512_max_ps(second, _mm512_min_ps(score, best));
  best = _mm512_max_ps(score, best);
  id = _mm512_mask_mov_epi32(id, better, number);
}
#elif CLUSTERQ_LANES == 8
using Floats = __m256;
using Ints = __m256i;
CLUSTERQ_INLINE Floats load(const float* p) { return _mm256_load_ps(p); }
CLUSTERQ_INLINE Floats fill(float v) { return _mm256_set1_ps(v); }
CLUSTERQ_INLINE Ints fill_int(int32_t v) { return _mm256_set1_epi32(v); }
CLUSTERQ_INLINE void save(float* p, Floats v) { _mm256_store_ps(p, v); }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
CLUSTERQ_INLINE Ints lane_numbers(int32_t first) {
  return _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
}
CLUSTERQ_INLINE void keep_best(Floats score, Ints number, Floats& best, Floats& second, Ints& id) {
  const Floats better = _mm256_cmp_ps(score, best, _CMP_GT_OQ);
  second = _mm256_max_ps(second, _mm256_min_ps(score, best));
  best = _mm256_max_ps(score, best);
  id = _mm256_blendv_epi8(id, number, _mm256_castps_si256(better));
}
#else
typedef float Floats __attribute__((vector_size(16), may_alias));
typedef int32_t Ints __attribute__((vector_size(16), may_alias));
CLUSTERQ_INLINE Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
CLUSTERQ_INLINE Floats fill(float v) { return Floats{v, v, v, v}; }
CLUSTERQ_INLINE Ints fill_int(int32_t v) { return Ints{v, v, v, v}; }
CLUSTERQ_INLINE void save(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
CLUSTERQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
CLUSTERQ_INLINE Ints lane_numbers(int32_t first) { return Ints{0, 1, 2, 3} + fill_int(first); }
CLUSTERQ_INLINE void keep_best(Floats score, Ints number, Floats& best, Floats& second, Ints& id) {
  const Ints better = score > best;
  const Floats lower = better ? best : score;
  second = lower > second ? lower : second;
  best = better ? score : best;
  id = better ? number : id;
}
#endif

// A panel is kPanelVectors registers of centroids wide; 6 rows by 4 registers leave room for operands in 32 registers,
// 6 by 2 in 16. Few centroids take twice the rows instead, to have enough independent sums in flight.
constexpr int kPanelVectors = kLanes == 16 ? 4 : 2;
constexpr int kWidth = kPanelVectors * kLanes;
constexpr int kRows = 6;
constexpr int kRowsNarrow = kLanes == 16 ? 12 : 6;

// Per row and lane: best score so far, second best, and the number of the best centroid.
struct State {
  Floats best, second;
  Ints id;
};

template <int R, int V>
CLUSTERQ_INLINE void accumulate(const float* rows, int64_t dim, const float* panel, const float* offset,
                                Floats (&sum)[R][V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const Floats start = load(offset + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sum[r][v] = start;
  }
  for (int64_t d = 0; d < dim; d++) {
    Floats column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) column[v] = load(panel + v * kLanes);
    panel += V * kLanes;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Floats value = fill(rows[r * dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = multiply_add(value, column[v], sum[r][v]);
    }
  }
}

template <int R, int V>
CLUSTERQ_INLINE void search_panel(const float* rows, int64_t dim, const float* panel, const float* offset,
                                  int64_t first, State* state) {
  Floats sum[R][V];
  accumulate<R, V>(rows, dim, panel, offset, sum);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    Floats best = state[r].best, second = state[r].second;
    Ints id = state[r].id;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      keep_best(sum[r][v], lane_numbers(static_cast<int32_t>(first + v * kLanes)), best, second, id);
    }
    state[r] = {best, second, id};
  }
}

// Rows [R, dim] against panels [begin, end); the last panel of a book may be narrower than the others.
template <int R>
void search_panels(const Book& book, const float* rows, int64_t begin, int64_t end, State* state) {
  const int64_t full = book.clusters / kWidth;
  for (int64_t p = begin; p < end; p++) {
    const float* panel = book.panels + p * kWidth * book.dim;
    const float* offset = book.offset + p * kWidth;
    const int64_t vectors = p < full ? kPanelVectors : (book.clusters - p * kWidth + kLanes - 1) / kLanes;
    if constexpr (R == kRowsNarrow && R != kRows) {
      if (vectors == 1) search_panel<R, 1>(rows, book.dim, panel, offset, p * kWidth, state);
      if (vectors == 2) search_panel<R, 2>(rows, book.dim, panel, offset, p * kWidth, state);
    } else {
      if (vectors == 1) search_panel<R, 1>(rows, book.dim, panel, offset, p * kWidth, state);
      if (vectors == 2) search_panel<R, 2>(rows, book.dim, panel, offset, p * kWidth, state);
      if constexpr (kPanelVectors == 4) {
        if (vectors == 3) search_panel<R, 3>(rows, book.dim, panel, offset, p * kWidth, state);
        if (vectors == 4) search_panel<R, 4>(rows, book.dim, panel, offset, p * kWidth, state);
      }
    }
  }
}

CLUSTERQ_INLINE Found reduce(const State& state) {
  const float* best = reinterpret_cast<const float*>(&state.best);
  const float* second = reinterpret_cast<const float*>(&state.second);
  const int32_t* id = reinterpret_cast<const int32_t*>(&state.id);
#if CLUSTERQ_LANES == 16
  const float top = _mm512_reduce_max_ps(state.best);
  const unsigned equal = _mm512_cmp_ps_mask(state.best, _mm512_set1_ps(top), _CMP_EQ_OQ);
  const int lane = equal == 0 ? 0 : __builtin_ctz(equal);
  const __mmask16 winner = static_cast<__mmask16>(1u << lane);
  const Floats rest = _mm512_mask_mov_ps(state.best, winner, state.second);
  (void)best, (void)second;
  return {top, _mm512_reduce_max_ps(rest), id[lane]};
#else
  int lane = 0;
  for (int j = 1; j < kLanes; j++) lane = best[j] > best[lane] ? j : lane;
  float next = second[lane];
  for (int j = 0; j < kLanes; j++) next = j != lane && best[j] > next ? best[j] : next;
  return {best[lane], next, id[lane]};
#endif
}

// `count` rows, readable up to the next multiple of 12, against the whole book. `memory` holds a State per such row.
void search(const Book& book, const float* rows, int64_t count, void* memory, Found* found) {
  State* state = static_cast<State*>(memory);
  const float lowest = -__builtin_inff();
  for (int64_t n = 0; n < count + kRowsNarrow; n++) state[n] = {fill(lowest), fill(lowest), fill_int(0)};
  const int64_t panels = (book.clusters + kWidth - 1) / kWidth;
  const bool narrow = kRowsNarrow != kRows && book.clusters <= 2 * kLanes;
  // half of a common L2 cache for the panels that all rows of the block meet before the next panels come
  const int64_t wanted = (512 << 10) / (kWidth * book.dim * static_cast<int64_t>(sizeof(float)));
  const int64_t step = wanted < 1 ? 1 : wanted;
  for (int64_t begin = 0; begin < panels; begin += step) {
    const int64_t end = begin + step < panels ? begin + step : panels;
    if (narrow) {
      for (int64_t n = 0; n < count; n += kRowsNarrow) {
        search_panels<kRowsNarrow>(book, rows + n * book.dim, begin, end, state + n);
      }
    } else {
      for (int64_t n = 0; n < count; n += kRows) {
        search_panels<kRows>(book, rows + n * book.dim, begin, end, state + n);
      }
    }
  }
  for (int64_t n = 0; n < count; n++) found[n] = reduce(state[n]);
}

template <int V>
CLUSTERQ_INLINE void score_panel(const float* row, int64_t dim, const float* panel, const float* offset,
                                 float* scores) {
  Floats sum[1][V];
  accumulate<1, V>(row, dim, panel, offset, sum);
  for (int v = 0; v < V; v++) save(scores + v * kLanes, sum[0][v]);
}

// The scores of one row, by the operations of `search`; `scores` holds whole panels.
void score(const Book& book, const float* row, float* scores) {
  for (int64_t first = 0; first < book.clusters; first += kWidth) {
    const float* panel = book.panels + first * book.dim;
    const int64_t vectors = (book.clusters - first + kLanes - 1) / kLanes;
    if (vectors >= kPanelVectors) score_panel<kPanelVectors>(row, book.dim, panel, book.offset + first, scores + first);
    if (vectors == 1) score_panel<1>(row, book.dim, panel, book.offset + first, scores + first);
    if constexpr (kPanelVectors == 4) {
      if (vectors == 2) score_panel<2>(row, book.dim, panel, book.offset + first, scores + first);
      if (vectors == 3) score_panel<3>(row, book.dim, panel, book.offset + first, scores + first);
    }
  }
}

template <class T>
void widen_row(const void* source, int64_t dim, float* target) {
  const T* typed = static_cast<const T*>(source);
  for (int64_t d = 0; d < dim; d++) target[d] = clusterq::load<float>(typed[d]);
}

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles8 __attribute__((vector_size(64), may_alias));

// target = row - origin; returns the sum of the squares.
float centre(const float* row, const float* origin, int64_t dim, float* target) {
  Floats8 squares = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const Floats8 value = *reinterpret_cast<const Floats8*>(row + d) - *reinterpret_cast<const Floats8*>(origin + d);
    *reinterpret_cast<Floats8*>(target + d) = value;
    squares += value * value;
  }
  float total = 0;
  for (; d < dim; d++) {
    target[d] = row[d] - origin[d];
    total += target[d] * target[d];
  }
  for (int j = 0; j < 8; j++) total += squares[j];
  return total;
}

// sum (a - b)^2 in float64 over eight interleaved partial sums: the same bits at every level.
double distance(const float* a, const float* b, int64_t dim) {
  Doubles8 squares = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const Doubles8 difference = __builtin_convertvector(*reinterpret_cast<const Floats8*>(a + d), Doubles8) -
                                __builtin_convertvector(*reinterpret_cast<const Floats8*>(b + d), Doubles8);
    squares += difference * difference;
  }
  double partial[8];
  for (int j = 0; j < 8; j++) partial[j] = squares[j];
  for (int j = 0; d < dim; d++, j++) {
    const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
    partial[j] += difference * difference;
  }
  return ((partial[0] + partial[4]) + (partial[1] + partial[5])) +
         ((partial[2] + partial[6]) + (partial[3] + partial[7]));
}

// Four float64 rows against groups of eight centroids, [groups, dim, 8]; squares are added in the order of d.
void search_double(const double* const rows[4], int64_t dim, const double* panels, int64_t groups, double* distances,
                   int64_t* index) {
  typedef int64_t Longs8 __attribute__((vector_size(64), may_alias));
  Doubles8 best[4];
  Longs8 id[4];
  for (int r = 0; r < 4; r++) best[r] = Doubles8{} + __builtin_inf(), id[r] = Longs8{} - 1;
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
      best[r] = better ? sum[r] : best[r];
      id[r] = better ? number : id[r];
    }
  }
  for (int r = 0; r < 4; r++) {
    distances[r] = __builtin_nan("");
    index[r] = -1;
    for (int j = 0; j < 8; j++) {
      if (id[r][j] < 0) continue;
      const bool lower = index[r] < 0 || best[r][j] < distances[r];
      if (lower || (best[r][j] == distances[r] && id[r][j] < index[r])) distances[r] = best[r][j], index[r] = id[r][j];
    }
  }
}

const Level level = {kLanes,          kWidth, sizeof(State), search,       score, widen_row<BFloat16>,
                     widen_row<Half>, centre, distance,      search_double};

}  // namespace CLUSTERQ_LEVEL
