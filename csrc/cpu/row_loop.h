// The CPU loop over rows of logits: a thread takes a row at a time, which stays in its cache from the first look to the
// last.
#pragma once
#include <type_traits>
#include <vector>

#include "cpu/loop.h"
#include "rows.h"

namespace lt {

/// a = scale (z - spread |e|) + shift, in place or from z.
template <bool kScale, bool kShift, bool kSpread, class A>
LT_CLONES void adjust_tile(const A* z, int count, const A* scale, const A* shift, const A* spread,
                           const uint32_t* words, A* a) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    A x = z[i];
    if constexpr (kSpread) x -= spread[i] * CrossEntropy<A>::noise(words[i]);
    if constexpr (kScale) x *= scale[i];
    if constexpr (kShift) x += shift[i];
    a[i] = x;
  }
}

/// A NaN is never greater, so it is passed over here and surfaces in the sum.
template <class A>
LT_CLONES A row_max(const A* a, int64_t count) {
  A lanes[kLanes];
  for (A& lane : lanes) lane = a[0];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = a[i + j] > lanes[j] ? a[i + j] : lanes[j];
  for (int j = 0; i < count; ++i, ++j) lanes[j] = a[i] > lanes[j] ? a[i] : lanes[j];
  return fold(lanes, [](A x, A y) { return y > x ? y : x; });
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

template <class A>
LT_CLONES A row_sum(const A* a, int64_t count, A peak) {
  return lane_sum<A>(count, [&](int64_t i) { return CrossEntropy<A>::shifted_exp(a[i], peak); });
}

/// sum_c w_c (peak - a_c)
template <bool kWeighted, class A>
LT_CLONES A spread_sum(const A* a, int64_t count, A peak, const A* weight) {
  return lane_sum<A>(count, [&](int64_t i) { return kWeighted ? weight[i] * (peak - a[i]) : peak - a[i]; });
}

template <bool kScale, bool kSmooth, bool kWeighted, class A>
LT_CLONES void slope_tile(const CrossEntropy<A> f, const A* a, int count, int64_t label, A times, const A* scale,
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
  memory.resize(size_t(in.classes));
  A* a = memory.data();
  for_tiles(in.classes, [&](int64_t begin, int count) {
    const A* tile = native ? reinterpret_cast<const A*>(z) + begin : a + begin;
    if (!native) load(in.dtype, z + begin * item_size(in.dtype), count, a + begin);
    if (in.spread) draw(Philox(in.seed, double(*in.draw), row & 0xffffff), begin / 4, (count + 3) / 4, words);
    choose(
        [&](auto scales, auto shifts, auto spreads) {
          adjust_tile<scales.value, shifts.value, spreads.value>(
              tile, count, from(in.scale, begin), from(in.shift, begin), from(in.spread, begin), words, a + begin);
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
    const auto place = [&](int k) { return in.grad[k] + (row * in.classes + begin) * item_size(in.dtype); };
    const auto slopes = [&](A times, A* to) {
      choose(
          [&](auto scales, auto smooths, auto weighs) {
            slope_tile<scales.value, smooths.value, weighs.value>(f, a + begin, count, label - begin, times,
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

template <class A>
void CpuLoop::cross_entropy(const Rows<A>& in, intptr_t threads) {
  for_each_chunk(in.rows, 16 * in.rows * in.classes, int(threads), [&](int64_t row) {
    static thread_local std::vector<A> memory;
    const int64_t label = in.labels[row];
    const A* a = adjusted_row(in, row, label, memory);
    A end[3];  // peak, 1 / sum, hit
    if (in.losses) {
      end[0] = row_max(a, in.classes);
      const A sum = row_sum(a, in.classes, end[0]);
      A spread = 0;
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
