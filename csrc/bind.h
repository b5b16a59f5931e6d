// Makes every op of ops.h a Python function of the native module that includes this, called as
// ltsam_fast.backend.Backend says.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <type_traits>

#include "launch_args.h"
#include "ops.h"
#include "rows.h"

namespace lt {
namespace py = pybind11;

/// Names of attributes, made Python's strings once: that takes longer than to look one up.
struct Keys {
  const py::handle pointers = key("pointers"), dtypes = key("dtypes"), numels = key("numels"), groups = key("groups"),
                   numbers = key("numbers"), buckets = key("buckets"), bucket_count = key("bucket_count"),
                   first_chunk = key("first_chunk"), scratch = key("scratch"), wide = key("wide"), hyper = key("hyper"),
                   addresses = key("addresses"), stream_or_threads = key("stream_or_threads"),
                   launched = key("launched"), rows = key("rows"), classes = key("classes"), dtype = key("dtype");

  static py::handle key(const char* name) { return PyUnicode_InternFromString(name); }
  static const Keys& get() {
    static const Keys keys;
    return keys;
  }
};

template <class T>
using Array = py::array_t<T, py::array::c_style>;

/// A ltsam_fast.launch_args.LaunchArgs as the loops take it; keeps its arrays alive while the op runs.
struct BoundArgs {
  Array<int64_t> pointers, numels, numbers, first_chunk;
  Array<uint8_t> dtypes;
  Array<int32_t> groups, buckets;
  LaunchArgs args;

  BoundArgs(const char* op, const py::object& given, int roles, const Keys& key = Keys::get())
      : pointers(given.attr(key.pointers)),
        numels(given.attr(key.numels)),
        numbers(given.attr(key.numbers)),
        first_chunk(given.attr(key.first_chunk)),
        dtypes(given.attr(key.dtypes)),
        groups(given.attr(key.groups)),
        buckets(given.attr(key.buckets)) {
    if (pointers.ndim() != 2 || pointers.shape(1) != roles)
      throw py::value_error(std::string(op) + ": args.pointers must have shape (tensors, " + std::to_string(roles) +
                            ")");
    args = LaunchArgs{pointers.shape(0),
                      given.attr(key.bucket_count).cast<int64_t>(),
                      pointers.data(),
                      dtypes.data(),
                      numels.data(),
                      groups.data(),
                      numbers.data(),
                      buckets.data(),
                      first_chunk.data(),
                      reinterpret_cast<double*>(given.attr(key.scratch).cast<intptr_t>()),
                      given.attr(key.wide).cast<bool>(),
                      0};
  }
};

inline Signals signals_from(const py::tuple& addresses) {
  const auto address = [&](int i) { return reinterpret_cast<void*>(addresses[size_t(i)].cast<intptr_t>()); };
  return {address(0), static_cast<const float*>(address(1)), static_cast<float*>(address(2)), address(3),
          static_cast<const float*>(address(4))};
}

/// Rows of hyperparameters: a NumPy array, or a contiguous float64 tensor on the device.
struct BoundHyper {
  Array<double> rows;
  Hyper hyper{nullptr, 0};

  explicit BoundHyper(const py::object& given) {
    if (py::isinstance<py::array>(given)) {
      rows = Array<double>(given);
      hyper = {rows.data(), rows.ndim() == 2 ? rows.shape(1) : 0};
    } else {
      hyper.columns = given.attr("shape")[py::int_(1)].cast<int64_t>();
      hyper.live = reinterpret_cast<const double*>(given.attr("data_ptr")().cast<intptr_t>());
    }
  }
};

/// A ltsam_fast.launch_args.RowArgs, whose addresses and numbers are in this order.
template <class A>
Rows<A> rows_from(const py::object& args) {
  const Keys& key = Keys::get();
  const py::tuple addresses = args.attr(key.addresses), numbers = args.attr(key.numbers);
  size_t a = 0, n = 0;
  const auto next = [&](auto*& to) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(addresses[a++].cast<intptr_t>());
  };
  const auto number = [&] { return numbers[n++].cast<double>(); };
  Rows<A> in;
  in.rows = args.attr(key.rows).cast<int64_t>();
  in.classes = args.attr(key.classes).cast<int64_t>();
  in.dtype = args.attr(key.dtype).cast<uint8_t>();
  next(in.logits), next(in.labels), next(in.scale), next(in.shift), next(in.margin), next(in.spread), next(in.draw);
  next(in.weight), next(in.weight_sum), next(in.losses), next(in.state);
  next(in.cotangent[0]), next(in.cotangent[1]), next(in.grad[0]), next(in.grad[1]);
  const double smoothing = number();
  in.smooth = A(smoothing / double(in.classes));
  in.keep = A(1 - smoothing);
  in.gamma = A(number());
  in.detach = number() != 0;
  in.seed = number();
  in.by_label = number() != 0;
  return in;
}

template <class F>
py::tuple names(const char* const* first, size_t count) {
  py::list list;
  for (size_t i = 0; i < count; ++i)
    if (first[i]) list.append(first[i]);
  return py::tuple(list);
}

/// Defines F<float> and F<double> as one Python function, and notes its roles and hyperparameters in SIGNATURES.
template <template <class> class F, class Run>
void bind_op(py::module_& m, py::dict& signatures, const Run& run) {
  const char* name = F<float>::name;
  m.def(name, [run](const py::object& args) {
    const Keys& key = Keys::get();
    const BoundArgs bound(F<float>::name, args, F<float>::kRoles);
    const BoundHyper rows(args.attr(key.hyper));
    const Signals signals = signals_from(args.attr(key.addresses));
    const auto stream_or_threads = args.attr(key.stream_or_threads).cast<intptr_t>();
    try {
      py::gil_scoped_release release;
      run(bound.args, rows.hyper, signals, stream_or_threads);
    } catch (...) {
      args.attr(key.launched) = py::cpp_function([tensors = bound.args.tensors, launched = bound.args.launched] {
        py::array_t<bool> written(tensors);
        for (int64_t t = 0; t < tensors; ++t) written.mutable_at(t) = t < launched;
        return written;
      });
      throw;
    }
    args.attr(key.launched) = true;  // in here no Python, and so no signal handler, can have come in between
  });
  // sizeof, for nvcc's front end does not know the bound of a template's array well enough for std::size.
  constexpr size_t roles = sizeof(F<float>::roles) / sizeof(char*), hyper = sizeof(F<float>::hyper) / sizeof(char*);
  signatures[name] = py::make_tuple(names<F<float>>(F<float>::roles, roles), names<F<float>>(F<float>::hyper, hyper));
}

template <class Loop, template <class> class... F>
void bind_maps(py::module_& m, py::dict& signatures, OpList<F...>) {
  (bind_op<F>(m, signatures,
              [](const LaunchArgs& a, const Hyper& h, const Signals& s, intptr_t stream_or_threads) {
                a.wide ? Loop::template map<F<double>, double>(a, h, s, stream_or_threads)
                       : Loop::template map<F<float>, float>(a, h, s, stream_or_threads);
              }),
   ...);
}

template <class Loop, template <class> class... F>
void bind_reductions(py::module_& m, py::dict& signatures, OpList<F...>) {
  (bind_op<F>(m, signatures,
              [](const LaunchArgs& a, const Hyper& h, const Signals& s, intptr_t stream_or_threads) {
                a.wide ? Loop::template reduce<F<double>, double>(a, h, s, stream_or_threads)
                       : Loop::template reduce<F<float>, float>(a, h, s, stream_or_threads);
              }),
   ...);
}

/// Every op of ops.h, run by Loop.
template <class Loop>
void bind(py::module_& m) {
  py::dict signatures;
  bind_maps<Loop>(m, signatures, MapOps());
  bind_reductions<Loop>(m, signatures, ReduceOps());
  m.def(CrossEntropy<float>::name, [](const py::object& args) {
    const Keys& key = Keys::get();
    const auto stream_or_threads = args.attr(key.stream_or_threads).cast<intptr_t>();
    if (args.attr(key.dtype).cast<uint8_t>() == kF64) {
      const auto in = rows_from<double>(args);
      py::gil_scoped_release release;
      Loop::template cross_entropy<double>(in, stream_or_threads);
    } else {
      const auto in = rows_from<float>(args);
      py::gil_scoped_release release;
      Loop::template cross_entropy<float>(in, stream_or_threads);
    }
  });
  m.attr("CAPTURABLE") = true;
  m.attr("SIGNATURES") = signatures;
  m.attr("CHUNK") = kChunk;
}

}  // namespace lt
