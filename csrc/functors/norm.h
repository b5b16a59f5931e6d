// Norms and inner products of gradients. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3, adaptive.
#pragma once
#include "functors/common.h"

namespace lt {

/// norm[bucket] = sqrt(sum t^2),  t = T (g + extra), or of their mix,  T = |w| + eta when adaptive, else 1.
/// roles: g, extra, w (read). Summed per chunk in A, then over chunks in double, both in a fixed order.
template <class A>
struct GradNorm {
  static constexpr const char* name = "grad_norm";
  enum { g, extra, w, kRoles };
  static constexpr const char* roles[] = {"g", "extra", "w"};
  static constexpr const char* hyper[] = {"adaptive", "eta"};
  static constexpr unsigned reads = bit(g) | bit(extra) | bit(w), writes = 0, bitmaps = 0;
  static constexpr unsigned variants[] = {bit(g), bit(g) | bit(extra), bit(g) | bit(w), reads};
  static constexpr int step = -1, sums = 1;
  static constexpr bool keyed = false, random = false;

  Mix<A> mix;
  A eta;
  Choice<A> adaptive;

  LT_HD GradNorm(const double* h, const Signals& s, const Here&) : mix(s, A(1)), eta(A(h[1])), adaptive(h[0] != 0) {}

  LT_HD void add(const A* x, A (&sum)[sums]) const {
    const A total = mix.direction(x[g], x[extra]);
    const A t = adaptive((std::fabs(x[w]) + eta) * total, total);
    sum[0] += t * t;
  }
  LT_HD static double finish(double sum) { return sqrt(sum); }
};

/// norm[bucket] = (g.g, extra.extra, g.extra): all that decomposing one gradient along another needs.
/// roles: g, extra (read)
template <class A>
struct GradDots {
  static constexpr const char* name = "grad_dots";
  enum { g, extra, kRoles };
  static constexpr const char* roles[] = {"g", "extra"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(g) | bit(extra), writes = 0, bitmaps = 0;
  static constexpr unsigned variants[] = {reads};
  static constexpr int step = -1, sums = 3;
  static constexpr bool keyed = false, random = false;

  LT_HD GradDots(const double*, const Signals&, const Here&) {}

  LT_HD void add(const A* x, A (&sum)[sums]) const {
    sum[0] += x[g] * x[g];
    sum[1] += x[extra] * x[extra];
    sum[2] += x[g] * x[extra];
  }
  LT_HD static double finish(double sum) { return sum; }
};

}  // namespace lt
