// Restore, add up the gradients and update in one pass: 24 bytes a parameter for SGD with momentum in fp32.
#pragma once
#include "functors/common.h"

namespace lt {

/// What SGD and Adam share: unscaling, clipping to max_norm, the sign, and whether to update at all.
template <class A>
struct Direction {
  Combination<A> combination;
  A inverse, clip;  // one after the other, as in torch: their product may be too small for a number
  Choice<A> active, decouples;

  LT_HD Direction(double maximize, double max_norm, const Signals& s)
      : combination(s, A(1)),
        inverse(s.inverse_scale<A>()),
        clip(1),
        active(!s.skip()),
        decouples(s.combination != nullptr) {
    if (max_norm > 0 && s.norm) {
      const A wanted = A(max_norm) / (s.norm_as<A>() * inverse + A(1e-6));
      clip = wanted > A(1) ? A(1) : wanted;  // NaN stays, as in torch
    }
    if (maximize != 0) inverse = -inverse;
  }
  LT_HD A operator()(A g, A kept) const { return combination.direction(g, kept) * inverse * clip; }
  /// A step that the base optimizer does not see: the decoupled part of WSAM (Yue et al. 2023, Algorithm 1).
  LT_HD A add_decoupled(A moved, A lr, A g, A kept) const {
    return decouples(moved - lr * (combination.decoupled(g, kept) * inverse), moved);
  }
};

/// torch.optim.SGD on the restored weights with the gradient g + kept.
/// roles: w (write), original (read: where the old weights are), g, kept (read), m (read, write), step
template <class A>
struct SgdStep {
  static constexpr const char* name = "sgd_step_";
  enum { w, original, g, kept, m, step_role, kRoles };
  static constexpr const char* roles[] = {"w", "original", "g", "kept", "m", "step"};
  static constexpr const char* hyper[] = {"lr",       "momentum", "dampening", "weight_decay",
                                          "nesterov", "maximize", "max_norm"};
  static constexpr unsigned reads = bit(original) | bit(g) | bit(kept) | bit(m), writes = bit(w) | bit(m);
  static constexpr unsigned bitmaps = 0;
  static constexpr unsigned plain = bit(w) | bit(original) | bit(g);
  static constexpr unsigned variants[] = {plain, plain | bit(kept), plain | bit(m), plain | bit(kept) | bit(m)};
  static constexpr int step = step_role;
  static constexpr bool keyed = false, random = false;

  Direction<A> direction;
  A lr, momentum, fresh, decay;
  Choice<A> decays, nesterov, first, keeps;

  LT_HD SgdStep(const double* h, const Signals& s, const Here& here)
      : direction(h[5], h[6], s),
        lr(A(h[0])),
        momentum(A(h[1])),
        fresh(A(1 - h[2])),
        decay(A(h[3])),
        decays(decay != A(0)),             // else the weights do not count, be they infinite
        nesterov(h[4] != 0 && h[1] != 0),  // not 0 times an infinite buffer
        first(h[1] == 0 || (here.step && *here.step == 0.0f)),
        keeps(h[1] != 0 && !s.skip()) {}

  LT_HD void operator()(A* x) const {
    const A old = x[original], along = direction(x[g], x[kept]), d = decays(along + decay * old, along);
    const A buffer = first(d, momentum * x[m] + fresh * d);
    const A move = nesterov(d + momentum * buffer, buffer);
    x[w] = direction.active(direction.add_decoupled(old - lr * move, lr, x[g], x[kept]), old);
    x[m] = keeps(buffer, x[m]);
  }
};

/// torch.optim.Adam (AdamW when decoupled; amsgrad when vmax is there) on the restored weights with g + kept.
/// roles: w (write), original, g, kept (read), m, v, vmax (read, write), step
template <class A>
struct AdamStep {
  static constexpr const char* name = "adam_step_";
  enum { w, original, g, kept, m, v, vmax, step_role, kRoles };
  static constexpr const char* roles[] = {"w", "original", "g", "kept", "m", "v", "vmax", "step"};
  static constexpr const char* hyper[] = {"lr",           "beta1",     "beta2",    "eps",
                                          "weight_decay", "decoupled", "maximize", "max_norm"};
  static constexpr unsigned state = bit(m) | bit(v) | bit(vmax);
  static constexpr unsigned reads = bit(original) | bit(g) | bit(kept) | state, writes = bit(w) | state;
  static constexpr unsigned bitmaps = 0;
  static constexpr unsigned plain = bit(w) | bit(original) | bit(g) | bit(m) | bit(v);
  static constexpr unsigned variants[] = {plain, plain | bit(kept), plain | bit(vmax), plain | bit(kept) | bit(vmax)};
  static constexpr int step = step_role;
  static constexpr bool keyed = false, random = false;

  Direction<A> direction;
  A lr, step_size, fresh1, beta2, fresh2, root_correction2, eps, keep, decay;
  Choice<A> decays;

  LT_HD AdamStep(const double* h, const Signals& s, const Here& here)
      : direction(h[6], h[7], s), lr(A(h[0])), decay(A(h[4])), decays(decay != A(0) && h[5] == 0) {
    const double t = double(*here.step) + 1;
    step_size = A(h[0] / (1 - pow(h[1], t)));
    fresh1 = A(1 - h[1]);
    beta2 = A(h[2]);
    fresh2 = A(1 - h[2]);
    root_correction2 = A(sqrt(1 - pow(h[2], t)));
    eps = A(h[3]);
    keep = h[5] != 0 ? A(1 - h[0] * h[4]) : A(1);
  }

  LT_HD void operator()(A* x) const {
    const A old = x[original], along = direction(x[g], x[kept]), d = decays(along + decay * old, along);
    const A mean = x[m] + fresh1 * (d - x[m]);
    const A square = beta2 * x[v] + fresh2 * d * d;
    // vmax reads as 0 without amsgrad. NaN stays, as in torch.
    const A largest = (x[vmax] > square) | (x[vmax] != x[vmax]) ? x[vmax] : square;
    const A moved = old * keep - step_size * mean / (std::sqrt(largest) / root_correction2 + eps);
    x[w] = direction.active(direction.add_decoupled(moved, lr, x[g], x[kept]), old);
    x[m] = direction.active(mean, x[m]);
    x[v] = direction.active(square, x[v]);
    x[vmax] = direction.active(largest, x[vmax]);
  }
};

}  // namespace lt
