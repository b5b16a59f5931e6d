// Climb to w + eps and come back. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3.
#pragma once
#include "functors/common.h"

namespace lt {

/// backup = w;  w = w + (T g) scale,  scale = rho / (|g| + eps),  T = (|w| + eta)^2 when adaptive, else 1.
/// roles: w (read, write), g (read), backup (write). A norm that is not finite perturbs nothing.
template <class A>
struct Perturb {
  static constexpr const char* name = "perturb_";
  enum { w, g, backup, kRoles };
  static constexpr const char* roles[] = {"w", "g", "backup"};
  static constexpr const char* hyper[] = {"rho", "adaptive", "eta", "eps"};
  static constexpr unsigned reads = bit(w) | bit(g), writes = bit(w) | bit(backup);
  static constexpr unsigned variants[] = {reads | writes};
  static constexpr int step = -1;

  A scale, eta;
  bool adaptive, active;

  LT_HD Perturb(const double* h, const Signals& s, const float*) : eta(A(h[2])), adaptive(h[1] != 0) {
    const A inverse = s.inverse_scale<A>(), norm = s.norm_as<A>();
    scale = A(h[0]) * inverse / (norm * inverse + A(h[3]));
    active = !s.skip() && finite(norm) && finite(scale);
  }

  LT_HD void operator()(A* x) const {
    const A old = x[w], t = std::fabs(old) + eta;
    const A climbed = old + (adaptive ? t * t * x[g] : x[g]) * scale;
    x[backup] = old;
    x[w] = active ? climbed : old;
  }
};

/// w = backup, bit for bit.   roles: w (write), backup (read)
template <class A>
struct Restore {
  static constexpr const char* name = "restore_";
  enum { w, backup, kRoles };
  static constexpr const char* roles[] = {"w", "backup"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(backup), writes = bit(w);
  static constexpr unsigned variants[] = {reads | writes};
  static constexpr int step = -1;

  LT_HD Restore(const double*, const Signals&, const float*) {}
  LT_HD void operator()(A* x) const { x[w] = x[backup]; }
};

}  // namespace lt
