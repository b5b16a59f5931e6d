// Perturb the weights to w + eps, and restore them. Foret et al. 2021 (SAM) eq. 2; Kwon et al. 2021 (ASAM) eq. 3.
#pragma once
#include "functors/common.h"
#include "functors/random.h"

namespace lt {

/// old = original;  backup = old;  w = old + (T d) scale,  d = g, or the combination of g and mean,  scale = rho / (|d|
/// + eps), T = (|old| + eta)^2 when adaptive, else 1;  mean = keep mean + (1 - keep) g. Masked elements stay, and a
/// norm that is not finite perturbs nothing. roles: w (write), original (read: where the old weights are), g (read),
/// backup (write), mean (read, write), mask (bits)
template <class A>
struct Perturb {
  static constexpr const char* name = "perturb_";
  enum { w, original, g, backup, mean, mask, kRoles };
  static constexpr const char* roles[] = {"w", "original", "g", "backup", "mean", "mask"};
  static constexpr const char* hyper[] = {"rho", "adaptive", "eta", "eps", "decay"};
  static constexpr unsigned reads = bit(original) | bit(g) | bit(mean) | bit(mask), bitmaps = bit(mask);
  static constexpr unsigned writes = bit(w) | bit(backup) | bit(mean);
  static constexpr unsigned again = bit(w) | bit(original) | bit(g), plain = again | bit(backup);
  static constexpr unsigned variants[] = {again, plain, plain | bit(mean), plain | bit(mask), reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = false, random = false;

  Combination<A> combination;
  A eta, inverse, decay, fresh, scale;
  Choice<A> adaptive, active;

  LT_HD Perturb(const double* h, const Signals& s, const Here&)
      : combination(s, A(0)),
        eta(A(h[2])),
        inverse(s.inverse_scale<A>()),
        decay(A(h[4])),
        fresh(A(1 - h[4])),  // in fp32 1 - 0.999 has four digits
        scale(A(h[0]) * inverse / (s.norm_as<A>() * inverse + A(h[3]))),
        adaptive(h[1] != 0),
        active(!s.skip() && finite(s.norm_as<A>()) && finite(scale)) {}

  LT_HD A perturbed(const A* x) const {
    const A old = x[original], t = std::fabs(old) + eta, d = combination.direction(x[g], x[mean]);
    return old + adaptive(t * t * d, d) * scale;
  }
  LT_HD void finish(A* x, A perturbed, bool moves) const {
    const A old = x[original];
    x[backup] = old;
    x[w] = active(moves ? perturbed : old, old);
    x[mean] = active(decay * x[mean] + fresh * (x[g] * inverse), x[mean]);
  }
  LT_HD void operator()(A* x) const { finish(x, perturbed(x), x[mask] == A(0)); }
};

/// As Perturb, but of the elements only a share `probability` is moved, each with that probability, and with
/// `stochastic` 16-bit weights are rounded up or down at random, so that small steps survive on average.
template <class A>
struct RandomPerturb : Perturb<A> {
  using Base = Perturb<A>;
  static constexpr const char* name = "random_perturb_";
  static constexpr const char* hyper[] = {"rho",         "adaptive",   "eta",  "eps", "decay",
                                          "probability", "stochastic", "seed", "step"};
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
    const A perturbed = Base::perturbed(x);
    const A rounded = A(rounding(float(perturbed), word >> 16));
    const bool moves = (x[Base::mask] == A(0)) & (int32_t(word & 0xffffu) < moving);
    Base::finish(x, stochastic(rounded, perturbed), moves);
  }
};

/// backup = old = original;  w = old + amplitude clamp(sigma z, -clip, clip),  z standard normal.
/// Poster of GNM-PT (NeurIPS 2024, arXiv 2410.21042), eqs. 1-3.
/// roles: w (write), original (read), backup (write)
template <class A>
struct GaussianPerturb {
  static constexpr const char* name = "gaussian_perturb_";
  enum { w, original, backup, kRoles };
  static constexpr const char* roles[] = {"w", "original", "backup"};
  static constexpr const char* hyper[] = {"amplitude", "sigma", "clip", "seed", "step"};
  static constexpr unsigned reads = bit(original), writes = bit(w) | bit(backup), bitmaps = 0;
  static constexpr unsigned variants[] = {bit(w) | bit(original), reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = true, random = true;

  Philox philox;
  A amplitude, sigma, clip;

  LT_HD GaussianPerturb(const double* h, const Signals& s, const Here& here)
      : philox(h[3], s.taken(h[4]), here.number), amplitude(A(h[0])), sigma(A(h[1])), clip(A(h[2])) {}

  LT_HD void operator()(A* x, uint32_t word) const {
    const A old = x[original], e = sigma * A(normal(word)), low = e < -clip ? -clip : e;
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

/// out = c[0] g + c[1] kept of a combination; unless the update is skipped.   roles: out (read, write), g, kept (read)
template <class A>
struct Combine {
  static constexpr const char* name = "combine_";
  enum { out, g, kept, kRoles };
  static constexpr const char* roles[] = {"out", "g", "kept"};
  static constexpr const char* hyper[] = {nullptr};
  static constexpr unsigned reads = bit(out) | bit(g) | bit(kept), writes = bit(out), bitmaps = 0;
  static constexpr unsigned variants[] = {reads | writes};
  static constexpr int step = -1;
  static constexpr bool keyed = false, random = false;

  Combination<A> combination;
  Choice<A> active;

  LT_HD Combine(const double*, const Signals& s, const Here&) : combination(s, A(1)), active(!s.skip()) {}
  LT_HD void operator()(A* x) const { x[out] = active(combination.direction(x[g], x[kept]), x[out]); }
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
