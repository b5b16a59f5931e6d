// The CUDA loop over rows of logits: a block a row.
#pragma once
#include "cuda/loop.cuh"
#include "rows.h"

namespace lt {

template <class A>
__device__ __forceinline__ A get(const char* from, uint8_t dtype, int64_t index) {
  A x[kVector];
  decode(fetch<A>(dtype, false, from + index * item_size(dtype), 0, 1), dtype, x);
  return x[0];
}

template <class A>
__device__ __forceinline__ void set(char* to, uint8_t dtype, int64_t index, A value) {
  const A x[kVector] = {value};
  put(encode(dtype, x), dtype, false, to + index * item_size(dtype), 0, 1);
}

/// Calls visit(c, a) for each class c of this thread's share of a row, with its adjusted logit. Noise is made four at a
/// time, so threads take four neighbours then.
template <class A, class Visit>
__device__ __forceinline__ void for_classes(const Rows<A>& in, int64_t row, int64_t label, const Visit& visit) {
  const auto adjusted = [&](int64_t c, uint32_t word) {
    A a = get<A>(in.logits, in.dtype, row * in.classes + c);
    if (in.spread) a -= in.spread[c] * CrossEntropy<A>::noise(word);
    if (in.scale) a *= in.scale[c];
    if (in.shift) a += in.shift[c];
    return in.margin && c == label ? a - in.margin[c] : a;
  };
  if (!in.spread) {
    for (int64_t c = threadIdx.x; c < in.classes; c += blockDim.x) visit(c, adjusted(c, 0));
    return;
  }
  const Philox philox(in.seed, double(*in.draw), row & 0xffffff);
  for (int64_t quad = threadIdx.x; 4 * quad < in.classes; quad += blockDim.x) {
    uint32_t word[4];
    philox(uint64_t(quad), word);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (4 * quad + j < in.classes) visit(4 * quad + j, adjusted(4 * quad + j, word[j]));
  }
}

/// A label that is no class makes its row NaN: to refuse it, the host would have to wait.
template <class A>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(LT_ARGUMENT(Rows<A>) in) {
  __shared__ A label_logit;
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const int64_t label = in.labels[row];
    const bool known = label >= 0 && label < in.classes;
    A peak, inverse_sum, hit;
    if (in.losses) {
      peak = -INFINITY;
      for_classes(in, row, label, [&](int64_t c, A a) {
        peak = a > peak ? a : peak;
        if (c == label) label_logit = a;
      });
      peak = A(block_fold(double(peak), [](double a, double b) { return b > a ? b : a; }));
      const A of_label =
          known ? label_logit : A(NAN);  // read before the next barrier: behind it the next row may be written
      A sum = 0, spread = 0;
      for_classes(in, row, label, [&](int64_t c, A a) {
        sum += CrossEntropy<A>::shifted_exp(a, peak);
        if (in.smooth != 0) spread += (in.weight ? in.weight[c] : A(1)) * (peak - a);
      });
      sum = A(block_sum(double(sum)));
      if (in.smooth != 0) spread = A(block_sum(double(spread)));
      const A weight = !known ? A(NAN) : in.weight ? in.weight[label] : A(1);
      const typename CrossEntropy<A>::End end(sum, peak, of_label, weight, spread, in.total_weight(), in.smooth,
                                              in.keep, in.gamma, in.detach);
      inverse_sum = A(1) / sum, hit = end.hit;
      if (threadIdx.x == 0) {
        in.losses[row] = end.loss;
        if (in.state) {
          in.state[row] = peak;
          in.state[in.rows + row] = inverse_sum;
          in.state[2 * in.rows + row] = hit;
        }
      }
    } else {
      peak = in.state[row], inverse_sum = in.state[in.rows + row], hit = in.state[2 * in.rows + row];
    }
    if (!in.grad[0]) continue;
    const CrossEntropy<A> f(peak, inverse_sum, hit, in.smooth, in.total_weight());
    A factor[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      factor[k] = !in.grad[k] ? A(0) : (known ? in.factor(k, row, label) : A(NAN)) * (in.smooth != 0 ? A(1) : hit);
    for_classes(in, row, label, [&](int64_t c, A a) {
      A slope =
          in.smooth != 0 ? f.smooth_slope(a, in.weight ? in.weight[c] : A(1), c == label) : f.slope(a, c == label);
      if (in.scale) slope *= in.scale[c];
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (in.grad[k]) set(in.grad[k], in.dtype, row * in.classes + c, factor[k] * slope);
    });
  }
}

template <class A>
void CudaLoop::cross_entropy(const Rows<A>& in, intptr_t stream) {
  if (in.rows == 0) return;
  int threads = 32;
  while (threads < kThreads && threads * 8 < in.classes) threads *= 2;
  const int64_t blocks = std::min<int64_t>(in.rows, 1 << 20);
  launch(CrossEntropy<A>::name, cross_entropy_kernel<A>, blocks, threads, stream, in);
}

}  // namespace lt
