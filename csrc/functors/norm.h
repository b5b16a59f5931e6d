// The norm of the ascent gradient. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3 for the adaptive form.
#pragma once
#include "functors/common.h"

namespace lt {

/// norm[bucket] = sqrt(sum t^2),  t = T (g + extra),  T = |w| + eta when adaptive, else 1.
/// roles: g, extra, w (read). Summed per chunk in A, then over chunks in double, both in a fixed order.
template <class A>
struct GradNorm {
  static constexpr const char* name = "grad_norm";
  enum { g, extra, w, kRoles };
  static constexpr const char* roles[] = {"g", "extra", "w"};
  static constexpr const char* hyper[] = {"adaptive", "eta"};
  static constexpr unsigned reads = bit(g) | bit(extra) | bit(w), writes = 0;
  static constexpr unsigned variants[] = {bit(g), bit(g) | bit(extra), bit(g) | bit(w), reads};
  static constexpr int step = -1;

  A eta;
  bool adaptive;

  LT_HD GradNorm(const double* h, const Signals&, const float*) : eta(A(h[1])), adaptive(h[0] != 0) {}

  LT_HD A term(const A* x) const {
    const A sum = x[g] + x[extra];
    const A t = adaptive ? (std::fabs(x[w]) + eta) * sum : sum;
    return t * t;
  }
  LT_HD static double finish(double sum) { return sqrt(sum); }
};

}  // namespace lt
