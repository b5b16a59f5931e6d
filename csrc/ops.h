// THE list of native ops. An op added here appears in every native module under its functor's name.
#pragma once
#include "functors/cross_entropy.h"
#include "functors/norm.h"
#include "functors/perturb.h"
#include "functors/step.h"

namespace lt {

template <template <class> class... F>
struct OpList {};

using MapOps = OpList<Perturb, RandomPerturb, GaussianPerturb, ClassPerturb, Combine, Restore, SgdStep, AdamStep>;
using ReduceOps = OpList<GradNorm, GradDots>;

}  // namespace lt
