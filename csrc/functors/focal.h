// Cross entropy with two weighted gradients. Focal-SAM (ICML 2025), Algorithm 1: u = 1 - v, v = lam (1 - pi)^gamma.
#pragma once
#include "functors/common.h"

namespace lt {

LT_HD double exp_(double x) { return exp(x); }

/// e^x in float, 1 ulp on [-104, 88]: round to n ln2 + r, Taylor to degree 7 on |r| <= ln2 / 2, scale by 2^n. Written
/// out because a loop around libm's expf does not vectorize.
LT_HD float exp_(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  x = x < -104.0f ? -104.0f : x;
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
  // Two factors, so that results below 2^-126 come out subnormal instead of wrapped.
  const int32_t half = int32_t(n) / 2, rest = int32_t(n) - half;
  return p * bits<float>((half + 127) << 23) * bits<float>((rest + 127) << 23);
#endif
}

/// One row of logits z with label y: loss = log sum_c e^{z_c} - z_y;  grad_a = a_y / rows (softmax(z) - onehot(y)).
/// The loops own max and sum; this is the arithmetic of an element.
template <class A>
struct FocalCrossEntropy {
  static constexpr const char* name = "focal_cross_entropy";
  A peak, inverse_sum, weight_u, weight_v;

  LT_HD static A shifted_exp(A z, A peak) { return exp_(z - peak); }
  LT_HD static A loss(A sum, A peak, A label_logit) { return A(log(double(sum))) + (peak - label_logit); }
  LT_HD void gradients(A z, bool is_label, A& grad_u, A& grad_v) const {
    const A slope = shifted_exp(z, peak) * inverse_sum - (is_label ? A(1) : A(0));
    grad_u = weight_u * slope;
    grad_v = weight_v * slope;
  }
};

}  // namespace lt
