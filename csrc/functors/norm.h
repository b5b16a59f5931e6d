// Norms and inner products of gradients. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3, adaptive.
#pragma once
#include "functors/common.h"

namespace lt {

/// norm[bucket] = sqrt(sum t^2),  t = T (g + kept), or of their combination,  T = |w| + eta when adaptive, else 1.
/// roles: g, kept, w (read). Summed per chunk in A, then over chunks in double, both in a fixed order.
template <class A>
struct GradNorm {
  static constexpr const char* name = "grad_norm";
  enum { g, kept, w, kRoles };
  static constexpr const char* roles[] = {"g", "kept", "w"};
  static constexpr const char* hyper[] = {"adaptive", "eta"};
  static constexpr unsigned reads = bit(g) | bit(kept) | bit(w), writes = 0, bitmaps = 0;
  static constexpr unsigned variants[] = {bit(g), bit(g) | bit(kept), bit(g) | bit(w), reads};
  static constexpr int step = -1, sums = 1;
  static constexpr bool keyed = false, random = false;

  Combination<A> combination;
  A eta;
  Choice<A> adaptive;

  LT_HD GradNorm(const double* h, const Signals& s, const Here&)
      : combination(s, A(1)), eta(A(h[1])), adaptive(h[0] != 0) {}

  LT_HD void add(const A* x, A (&sum)[sums]) const {
    const A total = combination.direction(x[g], x[kept]);
    const A t = adaptive((std::fabs(x[w]) + eta) * total, total);
    sum[0] += t * t;
  }
  LT_HD static double finish(double sum) { return sqrt(sum); }
};

/// norm[bucket] = (g.g, other.other, g.other): all that decomposing one gradient along another needs.
/// roles: g, other (read)
template <class A>
struct GradDots {
  static constexpr const char* name = "grad_dots";
  enum { g, other, kRoles };
  static constexpr const char* roles[] = {"g", "other"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(g) | bit(other), writes = 0, bitmaps = 0;
  static constexpr unsigned variants[] = {reads};
  static constexpr int step = -1, sums = 3;
  static constexpr bool keyed = false, random = false;

  LT_HD GradDots(const double*, const Signals&, const Here&) {}

  LT_HD void add(const A* x, A (&sum)[sums]) const {
    sum[0] += x[g] * x[g];
    sum[1] += x[other] * x[other];
    sum[2] += x[g] * x[other];
  }
  LT_HD static double finish(double sum) { return sum; }
};

}  // namespace lt
