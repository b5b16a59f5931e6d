// What Python hands over: addresses, sizes and element types of T tensors by R roles. All checked before it gets here.
#pragma once
#include "functors/common.h"

namespace lt {

struct LaunchArgs {
  int64_t tensors, buckets;
  const int64_t* pointers;     ///< [tensors, roles], 0 = absent: reads as zeros, is not written
  const uint8_t* dtypes;       ///< [tensors, roles]
  const int64_t* numels;       ///< [tensors]
  const int32_t* groups;       ///< [tensors], row of the hyperparameters
  const int64_t* numbers;      ///< [tensors], position in the caller's list, and see Philox
  const int32_t* bucket_of;    ///< [tensors], output index of a reduction, nondecreasing
  const int64_t* first_chunk;  ///< [tensors + 1]
  double* scratch;             ///< the CUDA block counter in the first, then one slot for each chunk and sum
  bool wide;                   ///< accumulate in double
  mutable int64_t launched;    ///< tensors, from the first on, whose launches have succeeded

  static constexpr int kFirstSlot = 1;
  double* slots() const { return scratch + kFirstSlot; }
  int64_t chunks() const { return first_chunk[tensors]; }
};

/// Hyperparameters of a pass, one row a parameter group.
struct Hyper {
  const double* rows;  ///< on the host, read by the call
  int64_t columns;
  const double* live =
      nullptr;  ///< or on the device, read whenever the kernel runs: what a CUDA graph replays may change
  const double* row(int32_t group) const { return rows + group * columns; }
};

}  // namespace lt
