// Climb to w + eps and come back. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3.
#pragma once
#include "functors/common.h"
#include "functors/random.h"

namespace lt {

/// old = source;  backup = old;  w = old + (T d) scale,  d = g, or the mix of g and mean,  scale = rho / (|d| + eps),
/// T = (|old| + eta)^2 when adaptive, else 1;  mean = keep mean + (1 - keep) g. Frozen elements stay, and a norm that
/// is not finite perturbs nothing. roles: w (write), source (read: where the old weights are), g (read), backup
/// (write), mean (read, write), frozen (bits)
template <class A>
struct Perturb {
  static constexpr const char* name = "perturb_";
  enum { w, source, g, backup, mean, frozen, kRoles };
  static constexpr const char* roles[] = {"w", "source", "g", "backup", "mean", "frozen"};
  static constexpr const char* hyper[] = {"rho", "adaptive", "eta", "eps", "decay"};
  static constexpr unsigned reads = bit(source) | bit(g) | bit(mean) | bit(frozen), bitmaps = bit(frozen);
  static constexpr unsigned writes = bit(w) | bit(backup) | bit(mean);
  static constexpr unsigned again = bit(w) | bit(source) | bit(g), plain = again | bit(backup);
  static constexpr unsigned variants[] = {again, plain, plain | bit(mean), plain | bit(frozen), reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = false, random = false;

  Mix<A> mix;
  A eta, inverse, decay, scale;
  Choice<A> adaptive, active;

  LT_HD Perturb(const double* h, const Signals& s, const Here&)
      : mix(s, A(0)),
        eta(A(h[2])),
        inverse(s.inverse_scale<A>()),
        decay(A(h[4])),
        scale(A(h[0]) * inverse / (s.norm_as<A>() * inverse + A(h[3]))),
        adaptive(h[1] != 0),
        active(!s.skip() && finite(s.norm_as<A>()) && finite(scale)) {}

  LT_HD A climb(const A* x) const {
    const A old = x[source], t = std::fabs(old) + eta, d = mix.direction(x[g], x[mean]);
    return old + adaptive(t * t * d, d) * scale;
  }
  LT_HD void finish(A* x, A climbed, bool moves) const {
    const A old = x[source];
    x[backup] = old;
    x[w] = active(moves ? climbed : old, old);
    x[mean] = active(decay * x[mean] + (A(1) - decay) * (x[g] * inverse), x[mean]);
  }
  LT_HD void operator()(A* x) const { finish(x, climb(x), x[frozen] == A(0)); }
};

/// As Perturb, but of the elements only a share `chance` is moved, each with that chance, and with `stochastic` 16-bit
/// weights are rounded up or down at random, so that small steps survive on average.
template <class A>
struct RandomPerturb : Perturb<A> {
  using Base = Perturb<A>;
  static constexpr const char* name = "random_perturb_";
  static constexpr const char* hyper[] = {"rho",    "adaptive",   "eta",  "eps", "decay",
                                          "chance", "stochastic", "seed", "step"};
  static constexpr bool keyed = true, random = true;

  Philox philox;
  int32_t moving;  ///< of 2^16
  RandomRounding rounding;
  Choice<A> stochastic;

  LT_HD RandomPerturb(const double* h, const Signals& s, const Here& here)
      : Base(h, s, here),
        philox(h[7], s.taken(h[8]), here.number),
        moving(int32_t(h[5] * 65536 + 0.5)),
        rounding(here.dtype),
        stochastic(h[6] != 0 && here.dtype >= kBF16) {}

  LT_HD void operator()(A* x, uint32_t word) const {
    const A climbed = Base::climb(x);
    const A rounded = A(rounding(float(climbed), word >> 16));
    const bool moves = (x[Base::frozen] == A(0)) & (int32_t(word & 0xffffu) < moving);
    Base::finish(x, stochastic(rounded, climbed), moves);
  }
};

/// backup = old = source;  w = old + amplitude clamp(sigma z, -clip, clip),  z standard normal.
/// Poster of GNM-PT (NeurIPS 2024, arXiv 2410.21042), eqs. 1-3.
/// roles: w (write), source (read), backup (write)
template <class A>
struct GaussianPerturb {
  static constexpr const char* name = "gaussian_perturb_";
  enum { w, source, backup, kRoles };
  static constexpr const char* roles[] = {"w", "source", "backup"};
  static constexpr const char* hyper[] = {"amplitude", "sigma", "clip", "seed", "step"};
  static constexpr unsigned reads = bit(source), writes = bit(w) | bit(backup), bitmaps = 0;
  static constexpr unsigned variants[] = {bit(w) | bit(source), reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = true, random = true;

  Philox philox;
  A amplitude, sigma, clip;

  LT_HD GaussianPerturb(const double* h, const Signals& s, const Here& here)
      : philox(h[3], s.taken(h[4]), here.number), amplitude(A(h[0])), sigma(A(h[1])), clip(A(h[2])) {}

  LT_HD void operator()(A* x, uint32_t word) const {
    const A old = x[source], e = sigma * A(normal(word)), low = e < -clip ? -clip : e;
    x[backup] = old;
    x[w] = old + amplitude * (low > clip ? clip : low);
  }
};

/// g = w + norm[number] g: each tensor's gradient becomes its perturbed weight, for many perturbations of the same
/// weights in one pass. CC-SAM (Zhou et al., CVPR 2023). roles: w (read), g (read, write)
template <class A>
struct ClassPerturb {
  static constexpr const char* name = "perturb_by_class_";
  enum { w, g, kRoles };
  static constexpr const char* roles[] = {"w", "g"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(w) | bit(g), writes = bit(g), bitmaps = 0;
  static constexpr unsigned variants[] = {reads};
  static constexpr int step = -1;
  static constexpr bool keyed = true, random = false;

  A scale;

  LT_HD ClassPerturb(const double*, const Signals& s, const Here& here)
      : scale(static_cast<const A*>(s.norm)[here.number]) {}

  LT_HD void operator()(A* x) const { x[g] = x[w] + scale * x[g]; }
};

/// out = c[0] g + c[1] extra of a mix; unless the update is skipped.   roles: out (read, write), g, extra (read)
template <class A>
struct Combine {
  static constexpr const char* name = "combine_";
  enum { out, g, extra, kRoles };
  static constexpr const char* roles[] = {"out", "g", "extra"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(out) | bit(g) | bit(extra), writes = bit(out), bitmaps = 0;
  static constexpr unsigned variants[] = {reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = false, random = false;

  Mix<A> mix;
  Choice<A> active;

  LT_HD Combine(const double*, const Signals& s, const Here&) : mix(s, A(1)), active(!s.skip()) {}
  LT_HD void operator()(A* x) const { x[out] = active(mix.direction(x[g], x[extra]), x[out]); }
};

/// w = backup, bit for bit.   roles: w (write), backup (read)
template <class A>
struct Restore {
  static constexpr const char* name = "restore_";
  enum { w, backup, kRoles };
  static constexpr const char* roles[] = {"w", "backup"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(backup), writes = bit(w), bitmaps = 0;
  static constexpr unsigned variants[] = {reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = false, random = false;

  LT_HD Restore(const double*, const Signals&, const Here&) {}
  LT_HD void operator()(A* x) const { x[w] = x[backup]; }
};

}  // namespace lt
