// Cross entropy of adjusted logits. Menon et al. 2021 (shift), Cao et al. 2019 (margin), Kini et al. 2021 (scale and
// shift), Li et al. 2022 (noise), Szegedy et al. 2016 (smoothing), Lin et al. 2017 (focal).
#pragma once
#include "functors/common.h"
#include "functors/random.h"

namespace lt {

LT_HD double exp_(double x) { return exp(x); }

/// e^x in float for x <= 88, 1 ulp; 0 where it would be subnormal, for those cost a hundred cycles each. Round to n ln2
/// + r, Taylor to degree 7 on |r| <= ln2 / 2, scale by 2^n. Written out because a loop around libm's expf does not
/// vectorize.
LT_HD float exp_(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  const bool tiny = x < -87.33f;
  x = tiny ? -87.33f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 2^23 rounds to an integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return tiny ? 0.0f : p * bits<float>((int32_t(n) + 127) << 23);
#endif
}

/// One row of logits z with label y, of C classes with weights w:
///   a_c = scale_c (z_c - spread_c |e_c|) + shift_c - [c = y] margin_y,    e = clamp(N(0, 1/9), -1, 1),
///   loss = sum_c q_c (log sum_k e^{a_k} - a_c),    q_c = keep w_y [c = y] + smooth w_c,
/// or, where nothing is smoothed, w_y (1 - e^{-l})^gamma l of the cross entropy l. The loops own the sums; this is the
/// arithmetic of an element, and of a row's end.
template <class A>
struct CrossEntropy {
  static constexpr const char* name = "cross_entropy";

  LT_HD static A shifted_exp(A z, A peak) { return exp_(z - peak); }

  /// |e|: the third of a standard normal number, at most 1.
  LT_HD static A noise(uint32_t word) {
    const float third = std::fabs(normal(word)) * 0.333333333f;
    return A(third < 1.0f ? third : 1.0f);
  }

  /// What the sums of a row come to. `spread_sum` is sum_c w_c (peak - a_c), of use only where `smooth` is not zero.
  struct End {
    A loss, hit;  ///< hit: the label's part of the derivative by the cross entropy

    LT_HD End(A sum, A peak, A label_logit, A weight, A spread_sum, A weight_sum, A smooth, A keep, A gamma,
              bool detach) {
      const A log_sum = A(log(double(sum))), nll = log_sum + (peak - label_logit);
      hit = keep * weight;
      loss = hit * nll;
      if (smooth != 0) loss += smooth * (weight_sum * log_sum + spread_sum);
      if (gamma == 0) return;
      // pow() and the division of doubles are calls on a GPU, which spill registers.
      const double missed = -expm1(-double(nll)), log_missed = log(missed);
      const double factor = exp(double(gamma) * log_missed);
      const bool moves = !detach && missed > 0 && missed < 1;
      const double by_factor = double(gamma) * (1 - missed) * double(nll) * exp((double(gamma) - 1) * log_missed);
      loss = A(factor * double(loss));
      hit = A(double(hit) * (moves ? factor + by_factor : factor));
    }
  };

  A peak, inverse_sum, hit, smooth, total;

  /// total = sum_c q_c, so the derivative by a_c is total softmax(a)_c - q_c; without smoothing over hit.
  LT_HD CrossEntropy(A peak, A inverse_sum, A hit, A smooth, A weight_sum)
      : peak(peak), inverse_sum(inverse_sum), hit(hit), smooth(smooth), total(hit + smooth * weight_sum) {}

  LT_HD A slope(A a, bool is_label) const { return shifted_exp(a, peak) * inverse_sum - (is_label ? A(1) : A(0)); }
  LT_HD A smooth_slope(A a, A weight, bool is_label) const {
    return total * (shifted_exp(a, peak) * inverse_sum) - (smooth * weight + (is_label ? hit : A(0)));
  }
};

}  // namespace lt
