#include "bind.h"
#include "cpu/dlpack.h"
#include "cpu/lists.h"
#include "cpu/loop.h"
#include "cpu/row_loop.h"

// What the functions share is made once, under C++'s own lock, and never changed: they need no GIL.
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  lt::bind<lt::CpuLoop>(m);
  lt::bind_lists(m);
  m.def("snapshot", lt::snapshot);
  m.def("can_snapshot", lt::can_snapshot);
  m.def("may_overlap", lt::may_overlap);
  m.def("may_meet", lt::may_meet);
  m.def("are_labels", [](intptr_t labels, int64_t count, int64_t classes) {
    return lt::are_labels(reinterpret_cast<const int64_t*>(labels), count, classes);
  });
  m.def("clouds",
        [](intptr_t out, bool wide, int64_t rows, int64_t classes, intptr_t factor, intptr_t draw, double seed) {
          const double step = double(*reinterpret_cast<const int64_t*>(draw));
          const auto fill = [&](auto* to) {
            lt::clouds(rows, classes, reinterpret_cast<decltype(to)>(factor), seed, step, to);
          };
          wide ? fill(reinterpret_cast<double*>(out)) : fill(reinterpret_cast<float*>(out));
        });
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
}
