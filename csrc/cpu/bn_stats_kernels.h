// SIMD bodies of bn_stats, compiled once per instruction set: bn_stats_kernels.cpp includes this file inside a target
// region with CLUSTERQ_ISA (namespace) and CLUSTERQ_VECTOR_BYTES (register width) defined. No include guard on purpose.
#include "cpu/bn_stats_vector.h"

namespace clusterq::bn_stats::CLUSTERQ_ISA {

enum class Mode { kSums, kNorm, kDot };

// Adds one element, or one vector, of a channel to its sums; `g` is the gradient (kDot), `y` the output (kNorm).
template <class T, Mode mode>
CLUSTERQ_INLINE void accumulate(const T* x, const T* g, T* y, const Vec<Compute<T>>& shift,
                                const Vec<Compute<T>>& center, const Vec<Compute<T>>& scale,
                                const Vec<Compute<T>>& bias, int64_t keep, Vec<Compute<T>>& s1, Vec<Compute<T>>& s2) {
  using E = Compute<T>;
  const Vec<E> value = load(x);
  Vec<E> first = sub(value, shift), second;
  if constexpr (mode == Mode::kDot) {
    Vec<E> grad = load(g);
    if (keep < kLanes<E>) {
      grad = keep_last(grad, keep);
      first = keep_last(first, keep);
    }
    second = mul(grad, first);
    first = grad;
  } else {
    if (keep < kLanes<E>) first = keep_last(first, keep);
    second = mul(first, first);
  }
  s1 = add(s1, first);
  s2 = add(s2, second);
  if constexpr (mode == Mode::kNorm) store(y, add(mul(sub(value, center), scale), bias));
}

template <class T, Mode mode>
CLUSTERQ_INLINE void accumulate_one(const T* x, const T* g, T* y, Compute<T> shift, Compute<T> center, Compute<T> scale,
                                    Compute<T> bias, Compute<T>& s1, Compute<T>& s2) {
  const Compute<T> value = load_one(x), centered = value - shift;
  const Compute<T> weight = mode == Mode::kDot ? load_one(g) : centered;
  s1 += weight;
  s2 += weight * centered;
  if constexpr (mode == Mode::kNorm) store_one(y, (value - center) * scale + bias);
}

// Adds a plane of at least one vector to a and b, whose two vectors are of one sum.
template <class T, Mode mode>
CLUSTERQ_INLINE void sum_plane(const T* x, const T* g, T* y, int64_t length, const Vec<Compute<T>>& k,
                               const Vec<Compute<T>>& vm, const Vec<Compute<T>>& vs, const Vec<Compute<T>>& vt,
                               Vec<Compute<T>>* a, Vec<Compute<T>>* b) {
  constexpr int kL = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + 2 * kL <= length; i += 2 * kL) {
    for (int j = 0; j < 2; ++j) {
      const int64_t o = i + j * kL;
      accumulate<T, mode>(x + o, g + o, y + o, k, vm, vs, vt, kL, a[j], b[j]);
    }
  }
  if (i + kL <= length) {
    accumulate<T, mode>(x + i, g + i, y + i, k, vm, vs, vt, kL, a[0], b[0]);
    i += kL;
  }
  if (i < length) {
    const int64_t o = length - kL;
    accumulate<T, mode>(x + o, g + o, y + o, k, vm, vs, vt, length - i, a[1], b[1]);
  }
}

template <class T, Mode mode>
CLUSTERQ_INLINE void planes(const T* x, const T* g, T* y, int64_t channels, int64_t stride, int64_t length,
                            const Compute<T>* shift, const Compute<T>* center, const Compute<T>* scale,
                            const Compute<T>* bias, Compute<T>* s1, Compute<T>* s2) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>;
  constexpr bool kNorm = mode == Mode::kNorm, kDot = mode == Mode::kDot;
  for (int64_t c = 0; c < channels; ++c) {
    const T* xc = x + c * stride;
    const T* gc = kDot ? g + c * stride : nullptr;
    T* yc = kNorm ? y + c * stride : nullptr;
    const E m = kNorm ? center[c] : E(0), s = kNorm ? scale[c] : E(0), t = kNorm ? bias[c] : E(0);
    if (length < kL) {
      E first = 0, second = 0;
      for (int64_t i = 0; i < length; ++i)
        accumulate_one<T, mode>(xc + i, gc + i, yc + i, shift[c], m, s, t, first, second);
      s1[c] = first;
      s2[c] = second;
      continue;
    }
    const Vec<E> k = splat(shift[c]), vm = splat(m), vs = splat(s), vt = splat(t);
    // Two, not four: with AVX2 a vector is two of the 16 registers.
    Vec<E> a[2] = {}, b[2] = {};
    sum_plane<T, mode>(xc, gc, yc, length, k, vm, vs, vt, a, b);
    s1[c] = sum(add(a[0], a[1]));
    s2[c] = sum(add(b[0], b[1]));
  }
}

// Sums of every channel over the planes of several images, `image` elements apart: lanes are added up at the end, once.
template <class T, Mode mode>
CLUSTERQ_INLINE void image_planes(const T* x, T* y, int64_t images, int64_t image, int64_t channels, int64_t length,
                                  const Compute<T>* shift, const Compute<T>* center, const Compute<T>* scale,
                                  const Compute<T>* bias, Compute<T>* lanes, Compute<T>* s1, Compute<T>* s2) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>;
  constexpr bool kNorm = mode == Mode::kNorm;
  E *first = lanes, *second = lanes + channels * kL;
  std::fill_n(lanes, 2 * channels * kL, E(0));
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = n * image + c * length;
      const Vec<E> k = splat(shift[c]), vm = splat(kNorm ? center[c] : E(0)), vs = splat(kNorm ? scale[c] : E(0)),
                   vt = splat(kNorm ? bias[c] : E(0));
      Vec<E> a[2] = {load(first + c * kL)}, b[2] = {load(second + c * kL)};
      sum_plane<T, mode>(x + at, nullptr, kNorm ? y + at : nullptr, length, k, vm, vs, vt, a, b);
      store(first + c * kL, add(a[0], a[1]));
      store(second + c * kL, add(b[0], b[1]));
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    s1[c] = sum(load(first + c * kL));
    s2[c] = sum(load(second + c * kL));
  }
}

// Adds kRows folded rows to the sums. The last vector of a row that is no multiple of the lanes overlaps the one before
// it and has sums of its own behind theirs, so that nothing is counted twice.
template <class T, Mode mode, int kRows>
CLUSTERQ_INLINE void add_rows(const T* x, const T* g, T* y, int64_t width, const Compute<T>* shift,
                              const Compute<T>* center, const Compute<T>* scale, const Compute<T>* bias, Compute<T>* s1,
                              Compute<T>* s2) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>;
  constexpr bool kNorm = mode == Mode::kNorm, kDot = mode == Mode::kDot;
  for (int64_t at = 0; at < width; at += kL) {
    const int64_t o = at + kL <= width ? at : width - kL;
    const Vec<E> k = load(shift + o);
    Vec<E> vm = {}, vs = {}, vt = {}, a = load(s1 + at), b = load(s2 + at);
    if constexpr (kNorm) {
      vm = load(center + o);
      vs = load(scale + o);
      vt = load(bias + o);
    }
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = r * width + o;
      // The walk goes down the rows, which the hardware is slow to follow: fetch the next group's.
      if constexpr (kRows > 1) __builtin_prefetch(x + i + kRows * width);
      accumulate<T, mode>(x + i, kDot ? g + i : nullptr, kNorm ? y + i : nullptr, k, vm, vs, vt, kL, a, b);
    }
    store(s1 + at, a);
    store(s2 + at, b);
  }
}

template <class T, Mode mode>
CLUSTERQ_INLINE void rows(const T* x, const T* g, T* y, int64_t rows, int64_t channels, int64_t fold,
                          const Compute<T>* shift, const Compute<T>* center, const Compute<T>* scale,
                          const Compute<T>* bias, Compute<T>* s1, Compute<T>* s2) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>, kRows = 8;
  constexpr bool kNorm = mode == Mode::kNorm, kDot = mode == Mode::kDot;
  const int64_t width = channels * fold, folded = rows / fold, tail = width % kL;
  std::fill_n(s1, width + kL, E(0));
  std::fill_n(s2, width + kL, E(0));
  int64_t row = 0;
  for (; row + kRows <= folded; row += kRows) {
    const int64_t i = row * width;
    const T* gi = kDot ? g + i : nullptr;
    T* yi = kNorm ? y + i : nullptr;
    add_rows<T, mode, kRows>(x + i, gi, yi, width, shift, center, scale, bias, s1, s2);
  }
  for (; row < folded; ++row) {
    const int64_t i = row * width;
    add_rows<T, mode, 1>(x + i, kDot ? g + i : nullptr, kNorm ? y + i : nullptr, width, shift, center, scale, bias, s1,
                         s2);
  }
  for (int64_t i = width - tail; i < width; ++i) {
    s1[i] = s1[i + kL - tail];
    s2[i] = s2[i + kL - tail];
  }
  for (int64_t f = 1; f < fold; ++f) {
    for (int64_t c = 0; c < channels; ++c) {
      s1[c] += s1[f * channels + c];
      s2[c] += s2[f * channels + c];
    }
  }
  for (int64_t r = folded * fold; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      accumulate_one<T, mode>(x + i, kDot ? g + i : nullptr, kNorm ? y + i : nullptr, shift[c],
                              kNorm ? center[c] : E(0), kNorm ? scale[c] : E(0), kNorm ? bias[c] : E(0), s1[c], s2[c]);
    }
  }
}

template <class T>
void plane_sums(const T* x, int64_t channels, int64_t stride, int64_t length, const Compute<T>* shift, Compute<T>* s1,
                Compute<T>* s2) {
  planes<T, Mode::kSums>(x, nullptr, nullptr, channels, stride, length, shift, nullptr, nullptr, nullptr, s1, s2);
}

template <class T>
void plane_norm(const T* x, T* y, int64_t channels, int64_t stride, int64_t length, const Compute<T>* shift,
                const Compute<T>* center, const Compute<T>* scale, const Compute<T>* bias, Compute<T>* s1,
                Compute<T>* s2) {
  planes<T, Mode::kNorm>(x, nullptr, y, channels, stride, length, shift, center, scale, bias, s1, s2);
}

template <class T>
void plane_dot(const T* x, const T* g, int64_t channels, int64_t stride, int64_t length, const Compute<T>* center,
               Compute<T>* s1, Compute<T>* s2) {
  planes<T, Mode::kDot>(x, g, nullptr, channels, stride, length, center, nullptr, nullptr, nullptr, s1, s2);
}

template <class T>
void image_sums(const T* x, int64_t images, int64_t image, int64_t channels, int64_t length, const Compute<T>* shift,
                Compute<T>* lanes, Compute<T>* s1, Compute<T>* s2) {
  image_planes<T, Mode::kSums>(x, nullptr, images, image, channels, length, shift, nullptr, nullptr, nullptr, lanes, s1,
                               s2);
}

template <class T>
void image_norm(const T* x, T* y, int64_t images, int64_t image, int64_t channels, int64_t length,
                const Compute<T>* shift, const Compute<T>* center, const Compute<T>* scale, const Compute<T>* bias,
                Compute<T>* lanes, Compute<T>* s1, Compute<T>* s2) {
  image_planes<T, Mode::kNorm>(x, y, images, image, channels, length, shift, center, scale, bias, lanes, s1, s2);
}

template <class T>
void row_sums(const T* x, int64_t count, int64_t channels, int64_t fold, const Compute<T>* shift, Compute<T>* s1,
              Compute<T>* s2) {
  rows<T, Mode::kSums>(x, nullptr, nullptr, count, channels, fold, shift, nullptr, nullptr, nullptr, s1, s2);
}

template <class T>
void row_norm(const T* x, T* y, int64_t count, int64_t channels, int64_t fold, const Compute<T>* shift,
              const Compute<T>* center, const Compute<T>* scale, const Compute<T>* bias, Compute<T>* s1,
              Compute<T>* s2) {
  rows<T, Mode::kNorm>(x, nullptr, y, count, channels, fold, shift, center, scale, bias, s1, s2);
}

template <class T>
void row_dot(const T* x, const T* g, int64_t count, int64_t channels, int64_t fold, const Compute<T>* center,
             Compute<T>* s1, Compute<T>* s2) {
  rows<T, Mode::kDot>(x, g, nullptr, count, channels, fold, center, nullptr, nullptr, nullptr, s1, s2);
}

// a * (x - center), but 0 where a is 0 (kSelect): x may be anything there.
template <class T, bool kSelect>
CLUSTERQ_INLINE void affine_one(const T* x, const T* g, T* out, Compute<T> center, Compute<T> a, Compute<T> b,
                                Compute<T> scale) {
  const Compute<T> own = (kSelect && a == 0 ? Compute<T>(0) : a * (load_one(x) - center)) + b;
  store_one(out, g == nullptr ? own : scale * load_one(g) + own);
}

template <class T, bool kSelect>
CLUSTERQ_INLINE void affine(const T* x, const T* g, T* out, const Vec<Compute<T>>& center, const Vec<Compute<T>>& a,
                            const Vec<Compute<T>>& b, const Vec<Compute<T>>& scale) {
  Vec<Compute<T>> own = mul(a, sub(load(x), center));
  if constexpr (kSelect) own = keep_nonzero(own, a);
  own = add(own, b);
  store(out, g == nullptr ? own : add(mul(scale, load(g)), own));
}

template <class T>
void plane_affine(const T* x, const T* g, T* out, int64_t channels, int64_t length, const Compute<T>* center,
                  const Compute<T>* a, const Compute<T>* b, const Compute<T>* scale) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>;
  for (int64_t c = 0; c < channels; ++c) {
    const T* gc = g == nullptr ? nullptr : g + c * length;
    const bool unused = a[c] == 0;
    // What is not used is not read either: x then stands for the gradient, or for nothing.
    const T* xc = !unused ? x + c * length : gc;
    T* oc = out + c * length;
    if (xc == nullptr) {
      const Vec<E> vb = splat(b[c]);
      int64_t i = 0;
      for (; i + kL <= length; i += kL) store(oc + i, vb);
      for (; i < length; ++i) store_one(oc + i, b[c]);
      continue;
    }
    const E m = unused ? E(0) : center[c], w = unused ? scale[c] : a[c], s = g == nullptr || unused ? E(0) : scale[c];
    const Vec<E> vm = splat(m), va = splat(w), vb = splat(b[c]), vs = splat(s);
    int64_t i = 0;
    if (gc == nullptr || unused) {
      for (; i + kL <= length; i += kL) affine<T, false>(xc + i, nullptr, oc + i, vm, va, vb, vs);
      for (; i < length; ++i) affine_one<T, false>(xc + i, nullptr, oc + i, m, w, b[c], s);
    } else {
      for (; i + kL <= length; i += kL) affine<T, false>(xc + i, gc + i, oc + i, vm, va, vb, vs);
      for (; i < length; ++i) affine_one<T, false>(xc + i, gc + i, oc + i, m, w, b[c], s);
    }
  }
}

template <class T, bool kSelect>
CLUSTERQ_INLINE void affine_rows(const T* x, const T* g, T* out, int64_t rows, int64_t channels, int64_t fold,
                                 const Compute<T>* center, const Compute<T>* a, const Compute<T>* b,
                                 const Compute<T>* scale) {
  using E = Compute<T>;
  constexpr int kL = kLanes<E>;
  const int64_t width = channels * fold, total = rows * channels;
  const Vec<E> none = splat(E(0));
  for (int64_t start = 0; start < total; start += width) {
    const int64_t end = start + width < total ? width : total - start;
    const T* xr = x + start;
    const T* gr = g == nullptr ? nullptr : g + start;
    T* outr = out + start;
    int64_t i = 0;
    if (gr == nullptr) {
      for (; i + kL <= end; i += kL)
        affine<T, kSelect>(xr + i, nullptr, outr + i, load(center + i), load(a + i), load(b + i), none);
      for (; i < end; ++i) affine_one<T, kSelect>(xr + i, nullptr, outr + i, center[i], a[i], b[i], E(0));
    } else {
      for (; i + kL <= end; i += kL)
        affine<T, kSelect>(xr + i, gr + i, outr + i, load(center + i), load(a + i), load(b + i), load(scale + i));
      for (; i < end; ++i) affine_one<T, kSelect>(xr + i, gr + i, outr + i, center[i], a[i], b[i], scale[i]);
    }
  }
}

template <class T>
void row_affine(const T* x, const T* g, T* out, int64_t rows, int64_t channels, int64_t fold, const Compute<T>* center,
                const Compute<T>* a, const Compute<T>* b, const Compute<T>* scale) {
  affine_rows<T, true>(x, g, out, rows, channels, fold, center, a, b, scale);
}

template <class T>
void row_scale(const T* x, T* out, int64_t rows, int64_t channels, int64_t fold, const Compute<T>* center,
               const Compute<T>* a, const Compute<T>* b) {
  affine_rows<T, false>(x, nullptr, out, rows, channels, fold, center, a, b, nullptr);
}

template <class E>
int64_t finish(int64_t channels, double count, const E* shift, const E* s1, const E* s2, double* mean, double* m2,
               int32_t* suspects) {
  const double inverse = 1.0 / count;
  for (int64_t c = 0; c < channels; ++c) {
    const double first = s1[c], offset = first * inverse, squares = double(s2[c]) - first * offset;
    mean[c] = double(shift[c]) + offset;
    m2[c] = squares > 0 ? squares : 0;
  }
  // A shift off by d standard deviations makes s2 = (1 + d^2) * m2 and loses log2(1 + d^2) bits: here at most two.
  const auto trusted = [&](int64_t c) {
    const double squares = s2[c];
    return (squares <= 4 * m2[c]) & (squares <= double(std::numeric_limits<E>::max()));
  };
  int64_t right = 0;
  for (int64_t c = 0; c < channels; ++c) right += trusted(c);
  if (right == channels) return 0;
  int64_t found = 0;
  for (int64_t c = 0; c < channels; ++c) {
    if (!trusted(c)) suspects[found++] = static_cast<int32_t>(c);
  }
  return found;
}

template <class T>
void exact(const T* x, int64_t length, int64_t stride, double* mean, double* m2) {
  double first[8] = {}, second[8] = {}, residual[8] = {};
  int64_t i = 0;
  for (; i + 8 <= length; i += 8) {
    for (int j = 0; j < 8; ++j) first[j] += load_one(x + (i + j) * stride);
  }
  for (; i < length; ++i) first[0] += load_one(x + i * stride);
  const double total =
      ((first[0] + first[4]) + (first[2] + first[6])) + ((first[1] + first[5]) + (first[3] + first[7]));
  const double center = total / length;
  for (i = 0; i + 8 <= length; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const double d = load_one(x + (i + j) * stride) - center;
      residual[j] += d;
      second[j] += d * d;
    }
  }
  for (; i < length; ++i) {
    const double d = load_one(x + i * stride) - center;
    residual[0] += d;
    second[0] += d * d;
  }
  double left = 0, squares = 0;
  for (int j = 0; j < 8; ++j) {
    left += residual[j];
    squares += second[j];
  }
  const double corrected = squares - left * left / length;
  *mean = center;
  *m2 = corrected < 0 ? 0 : corrected;
}

static void merge(int64_t channels, double count_a, double* mean_a, double* m2_a, double count_b, const double* mean_b,
                  const double* m2_b) {
  const double share = count_b / (count_a + count_b), cross = count_a * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double d = mean_b[c] - mean_a[c];
    mean_a[c] += d * share;
    m2_a[c] += m2_b[c] + d * d * cross;
  }
}

template <class T>
Kernels<T> table() {
  return {plane_sums<T>, plane_norm<T>, plane_dot<T>,  plane_affine<T>, image_sums<T>,      image_norm<T>, row_sums<T>,
          row_norm<T>,   row_dot<T>,    row_affine<T>, row_scale<T>,    finish<Compute<T>>, exact<T>,      merge};
}

}  // namespace clusterq::bn_stats::CLUSTERQ_ISA

#undef CLUSTERQ_ISA
#undef CLUSTERQ_VECTOR_BYTES
