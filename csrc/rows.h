// What a cross entropy reads and writes: rows of logits. All checked before it gets here.
#pragma once
#include "functors/cross_entropy.h"

namespace lt {

/// Addresses may be null where nothing is said to the contrary: absent. Vectors are of A, [classes].
template <class A>
struct Rows {
  const char* logits;                        ///< [rows, classes], never null
  const int64_t* labels;                     ///< [rows], never null
  const A *scale, *shift, *margin, *spread;  ///< see CrossEntropy
  const int64_t* draw;                       ///< number of the noise; needed with spread
  const A *weight, *weight_sum;              ///< of the classes, and their sum
  A* losses;                                 ///< [rows]; null: read the state that an earlier call left
  A* state;                                  ///< [3, rows]: peak, 1 / sum, hit
  const A* cotangent[2];                     ///< by row or, by_label, [classes] and over rows
  char* grad[2];                             ///< [rows, classes], of the logits' type
  int64_t rows, classes;
  double seed;
  A smooth, keep, gamma;
  uint8_t dtype;
  bool detach, by_label;

  LT_HD bool adjusts() const { return scale || shift || margin || spread; }
  LT_HD A total_weight() const { return weight_sum ? *weight_sum : A(classes); }
  LT_HD A factor(int output, int64_t row, int64_t label) const {
    return by_label ? cotangent[output][label] / A(rows) : cotangent[output][row];
  }
};

}  // namespace lt
