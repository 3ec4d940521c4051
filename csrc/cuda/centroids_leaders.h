// The best scores of a row: what the search keeps, and how parts of it merge. The greater score leads, the lower index
// among equals.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "inline.h"

namespace clusterq {

constexpr float kNoScore = -std::numeric_limits<float>::infinity();
constexpr int32_t kNoIndex = std::numeric_limits<int32_t>::max();

// Greatest score and its index. While they are offered indices may count from anywhere: `shift` moves their beginning,
// `place` does so for the last time.
template <int kKept>
struct Leaders {
  float best = kNoScore;
  int32_t index = kNoIndex;

  // A score of an index above all before it. A NaN does not lead.
  CLUSTERQ_INLINE void offer(float score, int32_t k) {
    const bool ahead = score > best;
    best = ahead ? score : best;
    index = ahead ? k : index;
  }
  CLUSTERQ_INLINE void merge(const Leaders& other) {
    const bool ahead = other.best > best || (other.best == best && other.index < index);
    best = ahead ? other.best : best;
    index = ahead ? other.index : index;
  }
  CLUSTERQ_INLINE void shift(int32_t by) { index += by; }
  CLUSTERQ_INLINE void place(int32_t by) { index = best > kNoScore ? index + by : kNoIndex; }
  template <typename F>
  CLUSTERQ_INLINE Leaders map(const F& f) const {
    Leaders other;
    other.best = f(best);
    other.index = f(index);
    return other;
  }
};

// With the second greatest score: how far the first leads.
template <>
struct Leaders<2> {
  float best = kNoScore, second = kNoScore;
  int32_t index = kNoIndex;

  CLUSTERQ_INLINE void offer(float score, int32_t k) {
    const bool ahead = score > best;
    second = fmaxf(second, ahead ? best : score);
    best = ahead ? score : best;
    index = ahead ? k : index;
  }
  CLUSTERQ_INLINE void merge(const Leaders& other) {
    const bool ahead = other.best > best || (other.best == best && other.index < index);
    second = fmaxf(fmaxf(second, other.second), ahead ? best : other.best);
    best = ahead ? other.best : best;
    index = ahead ? other.index : index;
  }
  CLUSTERQ_INLINE void shift(int32_t by) { index += by; }
  CLUSTERQ_INLINE void place(int32_t by) { index = best > kNoScore ? index + by : kNoIndex; }
  template <typename F>
  CLUSTERQ_INLINE Leaders map(const F& f) const {
    Leaders other;
    other.best = f(best);
    other.second = f(second);
    other.index = f(index);
    return other;
  }
};

// With the index of the second and the third greatest score.
template <>
struct Leaders<3> {
  float best = kNoScore, second = kNoScore, third = kNoScore;
  int32_t index = kNoIndex, runner = kNoIndex;

  CLUSTERQ_INLINE void offer(float score, int32_t k) { insert(score, k, score > best, score > second); }
  CLUSTERQ_INLINE void merge(const Leaders& other) {
    offer_any(other.best, other.index);
    offer_any(other.second, other.runner);
    third = fmaxf(third, other.third);
  }
  CLUSTERQ_INLINE void shift(int32_t by) {
    index += by;
    runner += by;
  }
  CLUSTERQ_INLINE void place(int32_t by) {
    index = best > kNoScore ? index + by : kNoIndex;
    runner = second > kNoScore ? runner + by : kNoIndex;
  }
  template <typename F>
  CLUSTERQ_INLINE Leaders map(const F& f) const {
    Leaders other;
    other.best = f(best);
    other.second = f(second);
    other.third = f(third);
    other.index = f(index);
    other.runner = f(runner);
    return other;
  }

 private:
  CLUSTERQ_INLINE void offer_any(float score, int32_t k) {
    insert(score, k, score > best || (score == best && k < index), score > second || (score == second && k < runner));
  }
  // `next`: ahead of the second, if not of the best.
  CLUSTERQ_INLINE void insert(float score, int32_t k, bool ahead, bool next) {
    third = fmaxf(third, next ? second : score);
    second = ahead ? best : next ? score : second;
    runner = ahead ? index : next ? k : runner;
    best = ahead ? score : best;
    index = ahead ? k : index;
  }
};

}  // namespace clusterq
