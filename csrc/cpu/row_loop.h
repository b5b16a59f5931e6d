// The CPU loop over rows of logits: a thread takes a row at a time, which stays in its cache from the first look to the
// last.
#pragma once
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/loop.h"
#include "rows.h"

namespace lt {

constexpr int kGroup = 16;  // lanes of a row's end that are summed together

/// |e| of an element for each random word.
template <class A>
LT_CLONES void noise_tile(const uint32_t* words, int count, A* noise) {
  for (int i = 0; i < count; ++i) noise[i] = CrossEntropy<A>::noise(words[i]);
}

/// factor_c |e| of all rows. Groups of four elements stand side by side whichever row they are of, so that few classes
/// fill a vector as well as many.
template <class A>
LT_CLONES void clouds(int64_t rows, int64_t classes, const A* factor, double seed, double step, A* out) {
  constexpr int kPlane = 64;
  const int64_t quads = (classes + 3) / 4, total = rows * quads;
  const Philox first(seed, step, 0);
  int64_t row = 0, quad = 0;
  for (int64_t done = 0; done < total; done += kPlane) {
    const int count = int(std::min<int64_t>(kPlane, total - done));
    int64_t row_of[kPlane];
    uint32_t number[kPlane] = {}, quad_of[kPlane] = {};
    for (int q = 0; q < count; ++q) {
      row_of[q] = row, number[q] = uint32_t(row & 0xffffff), quad_of[q] = uint32_t(quad);
      if (++quad == quads) quad = 0, ++row;
    }
    uint32_t words[4][kPlane];
    float noise[4][kPlane];
    for (int q = 0; q < kPlane; ++q) {
      Philox philox = first;
      philox.number = number[q];
      uint32_t word[4];
      philox(quad_of[q], word);
      for (int j = 0; j < 4; ++j) words[j][q] = word[j];
    }
    for (int j = 0; j < 4; ++j)
      for (int q = 0; q < kPlane; ++q) noise[j][q] = CrossEntropy<float>::noise(words[j][q]);
    for (int q = 0; q < count; ++q) {
      const int64_t begin = 4 * int64_t(quad_of[q]);
      const int here = int(std::min<int64_t>(4, classes - begin));
      for (int j = 0; j < here; ++j) out[row_of[q] * classes + begin + j] = factor[begin + j] * A(noise[j][q]);
    }
  }
}

/// a = scale (z - spread |e|) + shift, in place or from z.
template <bool kScale, bool kShift, bool kSpread, class A>
LT_CLONES void adjust_tile(const A* z, int count, const A* scale, const A* shift, const A* spread, const A* noise,
                           A* a) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    A x = z[i];
    if constexpr (kSpread) x -= spread[i] * noise[i];
    if constexpr (kScale) x *= scale[i];
    if constexpr (kShift) x += shift[i];
    a[i] = x;
  }
}

template <class A, class Term>
LT_HD A lane_sum(int64_t count, const Term& term) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
  for (int j = 0; i < count; ++i, ++j) lanes[j] += term(i);
  return fold(lanes, [](A x, A y) { return x + y; });
}

/// The maximum of a row, and the sum of e^{a - maximum}, in kWidth lanes; as many as kLanes give the same bits if the
/// row has no more elements. A NaN is never greater, so it is passed over here and surfaces in the sum. The rest of a
/// row is filled up with -inf, which is no maximum and adds nothing: an element at a time it would take longer than all
/// others.
template <int kWidth, class A>
LT_CLONES void peak_and_sum(const A* a, int64_t count, A* peak, A* sum) {
  const int64_t full = count / kWidth * kWidth;
  const int rest = int(count - full);
  alignas(64) A tail[kWidth], lanes[kWidth];
  for (int j = 0; j < kWidth; ++j) tail[j] = j < rest ? a[full + j] : -std::numeric_limits<A>::infinity();
  for (int j = 0; j < kWidth; ++j) lanes[j] = a[0];
  for (int64_t i = 0; i < full; i += kWidth)
    for (int j = 0; j < kWidth; ++j) lanes[j] = a[i + j] > lanes[j] ? a[i + j] : lanes[j];
  for (int j = 0; j < kWidth; ++j) lanes[j] = tail[j] > lanes[j] ? tail[j] : lanes[j];
  const A top = fold(lanes, [](A x, A y) { return y > x ? y : x; });
  for (int j = 0; j < kWidth; ++j) lanes[j] = 0;
  for (int64_t i = 0; i < full; i += kWidth)
    for (int j = 0; j < kWidth; ++j) lanes[j] += CrossEntropy<A>::shifted_exp(a[i + j], top);
  for (int group = 0; group < rest; group += kGroup)
    for (int j = group; j < group + kGroup; ++j) lanes[j] += CrossEntropy<A>::shifted_exp(tail[j], top);
  *peak = top;
  *sum = fold(lanes, [](A x, A y) { return x + y; });
}

/// sum_c w_c (peak - a_c)
template <bool kWeighted, class A>
LT_CLONES A spread_sum(const A* a, int64_t count, A peak, const A* weight) {
  return lane_sum<A>(count, [&](int64_t i) { return kWeighted ? weight[i] * (peak - a[i]) : peak - a[i]; });
}

template <bool kScale, bool kSmooth, bool kWeighted, class A>
LT_CLONES void slope_tile(const CrossEntropy<A> f, const A* a, int count, int label, A times, const A* scale,
                          const A* weight, A* slope) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const bool is_label = i == label;
    A x = kSmooth ? f.smooth_slope(a[i], kWeighted ? weight[i] : A(1), is_label) : f.slope(a[i], is_label);
    if constexpr (kScale) x *= scale[i];
    slope[i] = times * x;
  }
}

template <class A>
LT_CLONES void multiply(const A* from, int count, A factor, A* to) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) to[i] = factor * from[i];
}

/// Calls body with the flags as constants.
template <class Body>
void choose(const Body& body) {
  body();
}
template <class Body, class... Flags>
void choose(const Body& body, bool flag, Flags... rest) {
  if (flag)
    choose([&](auto... others) { body(std::true_type(), others...); }, rest...);
  else
    choose([&](auto... others) { body(std::false_type(), others...); }, rest...);
}

template <class A>
const A* from(const A* vector, int64_t begin) {
  return vector ? vector + begin : nullptr;
}

/// Calls visit(begin, count) for each tile of a row.
template <class Visit>
void for_tiles(int64_t classes, const Visit& visit) {
  for (int64_t begin = 0; begin < classes; begin += kTile) visit(begin, int(std::min<int64_t>(kTile, classes - begin)));
}

/// A row of logits, widened and adjusted in a thread's own memory; where it lies, if that is how it lies there.
template <class A>
const A* adjusted_row(const Rows<A>& in, int64_t row, int64_t label, std::vector<A>& memory) {
  const char* z = in.logits + row * in.classes * item_size(in.dtype);
  const bool native = in.dtype == (sizeof(A) == 8 ? kF64 : kF32);
  if (native && !in.adjusts()) return reinterpret_cast<const A*>(z);
  static thread_local uint32_t words[kTile];
  static thread_local A noise[kTile];
  memory.resize(size_t(in.classes));
  A* a = memory.data();
  for_tiles(in.classes, [&](int64_t begin, int count) {
    const A* tile = native ? reinterpret_cast<const A*>(z) + begin : a + begin;
    if (!native) load(in.dtype, z + begin * item_size(in.dtype), count, a + begin);
    if (in.spread) {
      // Whole groups, for a few elements past the last vector would take longer than a vector.
      const int drawn = (count + kGroup - 1) / kGroup * kGroup;
      draw(Philox(in.seed, double(*in.draw), row & 0xffffff), begin / 4, drawn / 4, words);
      noise_tile(words, drawn, noise);
    }
    choose(
        [&](auto scales, auto shifts, auto spreads) {
          adjust_tile<scales.value, shifts.value, spreads.value>(
              tile, count, from(in.scale, begin), from(in.shift, begin), from(in.spread, begin), noise, a + begin);
        },
        in.scale != nullptr, in.shift != nullptr, in.spread != nullptr);
  });
  if (in.margin) a[label] -= in.margin[label];
  return a;
}

template <class A>
void row_gradients(const Rows<A>& in, const CrossEntropy<A>& f, const A* a, int64_t row, int64_t label) {
  alignas(64) static thread_local A slope[kTile], scaled[kTile];
  const bool native = in.dtype == (sizeof(A) == 8 ? kF64 : kF32);
  const int outputs = in.grad[1] ? 2 : 1;
  A factor[2] = {};
  for (int k = 0; k < outputs; ++k) factor[k] = in.factor(k, row, label) * (in.smooth != 0 ? A(1) : f.hit);
  for_tiles(in.classes, [&](int64_t begin, int count) {
    // As an int, which is as wide as a float: comparing wider numbers takes a vector loop longer than the exponential.
    const int label_here = label >= begin && label < begin + count ? int(label - begin) : -1;
    const auto place = [&](int k) { return in.grad[k] + (row * in.classes + begin) * item_size(in.dtype); };
    const auto slopes = [&](A times, A* to) {
      choose(
          [&](auto scales, auto smooths, auto weighs) {
            slope_tile<scales.value, smooths.value, weighs.value>(f, a + begin, count, label_here, times,
                                                                  from(in.scale, begin), from(in.weight, begin), to);
          },
          in.scale != nullptr, in.smooth != 0, in.weight != nullptr);
    };
    if (outputs == 1) {
      slopes(factor[0], native ? reinterpret_cast<A*>(place(0)) : scaled);
      if (!native) narrow(in.dtype, scaled, count, place(0));
      return;
    }
    slopes(A(1), slope);  // the exponentials serve both
    for (int k = 0; k < outputs; ++k) {
      multiply(slope, count, factor[k], native ? reinterpret_cast<A*>(place(k)) : scaled);
      if (!native) narrow(in.dtype, scaled, count, place(k));
    }
  });
}

/// Whether all labels lie in [0, classes).
LT_CLONES inline bool are_labels(const int64_t* labels, int64_t count, int64_t classes) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all &= uint64_t(labels[i]) < uint64_t(classes);
  return all;
}

template <class A>
void CpuLoop::cross_entropy(const Rows<A>& in, intptr_t threads) {
  for_each_chunk(in.rows, 16 * in.rows * in.classes, int(threads), [&](int64_t row) {
    static thread_local std::vector<A> memory;
    const int64_t label = in.labels[row];
    const A* a = adjusted_row(in, row, label, memory);
    A end[3];  // peak, 1 / sum, hit
    if (in.losses) {
      A sum, spread = 0;
      if (in.classes > kGroup)
        peak_and_sum<kLanes>(a, in.classes, &end[0], &sum);
      else
        peak_and_sum<kGroup>(a, in.classes, &end[0], &sum);
      if (in.smooth != 0)
        spread = in.weight ? spread_sum<true>(a, in.classes, end[0], in.weight)
                           : spread_sum<false>(a, in.classes, end[0], in.weight);
      const typename CrossEntropy<A>::End done(sum, end[0], a[label], in.weight ? in.weight[label] : A(1), spread,
                                               in.total_weight(), in.smooth, in.keep, in.gamma, in.detach);
      in.losses[row] = done.loss;
      end[1] = A(1) / sum, end[2] = done.hit;
      for (int i = 0; in.state && i < 3; ++i) in.state[i * in.rows + row] = end[i];
    } else {
      for (int i = 0; i < 3; ++i) end[i] = in.state[i * in.rows + row];
    }
    if (in.grad[0]) row_gradients(in, {end[0], end[1], end[2], in.smooth, in.total_weight()}, a, row, label);
  });
}

}  // namespace lt
