// Reads addresses and layouts of many tensors in one call, through the C exchange table that array libraries publish on
// their tensor type (DLPack 1.3). No torch header, about 20 ns a tensor; from Python the same takes 300.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "functors/common.h"

namespace lt {
namespace py = pybind11;

// The part of DLPack's ABI we use, as laid down in its specification.
namespace dlpack {
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  int32_t device_type, device_id, ndim;
  DataType dtype;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, Tensor* out);
  void* current_stream;
};
}  // namespace dlpack

/// Columns of a snapshot row; ltsam_fast.snapshot.COLUMNS.
enum Column { kAddress, kNumel, kDtypeCode, kDevice, kShape, kLayout, kColumns };

/// What a reading found: nothing new; other addresses; more than that. Refreshed: other addresses, and the table has
/// them.
enum Change { kSame, kMoved, kChanged, kRefreshed };

/// Where hashes start: large, so that no extent cancels it. From t.ndim alone, (2, 7) hashed like (6,).
constexpr int64_t kSeed = 0x6a09e667f3bcc909;

inline int64_t mix(int64_t hash, int64_t value) {
  return int64_t((uint64_t(hash) ^ uint64_t(value)) * 0x9e3779b97f4a7c15u) ^ (hash >> 29);
}

/// Layout 0: contiguous. 1: not dense (holes or overlap), or not aligned. Else a hash of the strides of a dense
/// permutation.
inline int64_t layout_of(const dlpack::Tensor& t, int64_t address, int64_t numel) {
  if (address % std::max(1, t.dtype.bits / 8)) return 1;
  if (!t.strides || numel < 2) return 0;
  int64_t expected = 1, hash = kSeed;
  bool contiguous = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    contiguous = contiguous && t.strides[d] == expected;
    expected *= t.shape[d];
    hash = mix(hash, t.strides[d]);
  }
  if (contiguous) return 0;
  // Dense: sorted by stride, each dimension begins where the previous one ends.
  int64_t reach = 1;
  for (int placed = 0; placed < t.ndim; ++placed) {
    int64_t next = -1;
    for (int d = 0; d < t.ndim && next < 0; ++d)
      if (t.shape[d] != 1 && t.strides[d] == reach) next = d;
    if (next < 0) break;
    reach *= t.shape[next];
  }
  return reach == numel ? (hash | 2) : 1;
}

inline int64_t dtype_code(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return -1;
  if (dtype.code == 1 && dtype.bits == 8) return kBitmap;
  if (dtype.code == 2) return dtype.bits == 32 ? kF32 : dtype.bits == 64 ? kF64 : dtype.bits == 16 ? kF16 : -1;
  return dtype.code == 4 && dtype.bits == 16 ? kBF16 : -1;
}

/// A row of a snapshot. An absent role has no device.
inline void describe(const dlpack::ExchangeApi& api, PyObject* tensor, int64_t* row) {
  if (tensor == Py_None) {
    std::fill_n(row, int(kColumns), int64_t(0));
    row[kDevice] = -1;
    return;
  }
  dlpack::Tensor t;
  if (api.view(tensor, &t) != 0) throw py::error_already_set();
  int64_t numel = 1, shape = mix(kSeed, t.ndim);
  for (int d = 0; d < t.ndim; ++d) {
    numel *= t.shape[d];
    shape = mix(shape, t.shape[d]);
  }
  row[kAddress] = reinterpret_cast<int64_t>(t.data) + int64_t(t.byte_offset);
  row[kNumel] = numel;
  row[kDtypeCode] = dtype_code(t.dtype);
  row[kDevice] = (int64_t(t.device_type) << 16) | t.device_id;
  row[kShape] = shape;
  row[kLayout] = layout_of(t, row[kAddress], numel);
}

inline const dlpack::ExchangeApi& exchange_api(const py::capsule& capsule) {
  const void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  return *static_cast<const dlpack::ExchangeApi*>(api);
}

/// How many bytes the elements of a snapshot's row take.
inline int64_t bytes_of_row(const int64_t* row) {
  return row[kNumel] * (row[kDtypeCode] == kBitmap ? 1 : item_size(uint8_t(row[kDtypeCode])));
}

struct Extent {
  int64_t begin;
  int64_t bytes : 63;
  uint64_t writes : 1;
};

/// Sorts by where they begin; many of them eight bits at a time, in a fraction of the time that comparing takes.
inline void sort_by_address(std::vector<Extent>& extents) {
  if (extents.size() < 100)
    return std::sort(extents.begin(), extents.end(),
                     [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  uint64_t differ = 0;
  for (const Extent& e : extents) differ |= uint64_t(e.begin ^ extents[0].begin);
  std::vector<Extent> sorted(extents.size());
  for (int shift = 0; shift < 64; shift += 8) {
    while (shift < 64 && !(differ >> shift & 1)) ++shift;  // allocators hand out multiples of 64
    if (shift == 64) break;
    const auto digit = [shift](const Extent& e) { return size_t(uint64_t(e.begin) >> shift & 255); };
    uint32_t places[257] = {};
    for (const Extent& e : extents) ++places[digit(e) + 1];
    for (int i = 0; i < 256; ++i) places[i + 1] += places[i];
    for (const Extent& e : extents) sorted[places[digit(e)]++] = e;
    extents.swap(sorted);
  }
}

/// Whether memory that is written may be shared, by a snapshot: quick, and with tensors that have holes never sure.
/// `written`: a bool for each role.
inline bool may_overlap(const py::array_t<int64_t, py::array::c_style>& snapshot, const py::tuple& written) {
  const py::ssize_t tensors = snapshot.shape(0), roles = snapshot.shape(1);
  std::vector<char> writes;
  for (const py::handle& one : written) writes.push_back(one.cast<bool>());
  if (std::find(writes.begin(), writes.end(), 1) == writes.end()) return false;
  std::vector<Extent> extents;
  extents.reserve(size_t(tensors * roles));
  const int64_t* row = snapshot.data();
  for (py::ssize_t i = 0; i < tensors; ++i) {
    const int64_t* first = row;
    for (py::ssize_t r = 0; r < roles; ++r, row += kColumns) {
      if (row[kDevice] == -1 || row[kNumel] == 0) continue;
      if (row[kLayout] == 1) return true;
      // Elements are read before they are written, so a role that is only read may be the tensor's first role itself.
      if (r > 0 && !writes[size_t(r)] && row[kAddress] == first[kAddress] && row[kDtypeCode] == first[kDtypeCode])
        continue;
      extents.push_back({row[kAddress], bytes_of_row(row), writes[size_t(r)] != 0});
    }
  }
  sort_by_address(extents);
  int64_t reach = 0, written_reach = 0;
  for (const Extent& e : extents) {
    if (e.begin < written_reach || (e.writes && e.begin < reach)) return true;
    reach = std::max(reach, e.begin + e.bytes);
    if (e.writes) written_reach = std::max(written_reach, e.begin + e.bytes);
  }
  return false;
}

/// Whether one of some ranges of bytes may meet a tensor that is written: with tensors that have holes never sure.
/// `written`: a bool for each role.
inline bool may_meet(const py::array_t<int64_t, py::array::c_style>& snapshot, const py::tuple& written,
                     const std::vector<std::pair<int64_t, int64_t>>& ranges) {
  const py::ssize_t tensors = snapshot.shape(0), roles = snapshot.shape(1);
  for (py::ssize_t r = 0; r < roles; ++r) {
    if (!written[size_t(r)].cast<bool>()) continue;
    const int64_t* row = snapshot.data() + r * kColumns;
    for (py::ssize_t i = 0; i < tensors; ++i, row += roles * kColumns) {
      if (row[kDevice] == -1 || row[kNumel] == 0) continue;
      if (row[kLayout] == 1) return true;
      const int64_t begin = row[kAddress], end = begin + bytes_of_row(row);
      for (const auto& range : ranges)
        if (range.first < end && begin < range.second) return true;
    }
  }
  return false;
}

/// Fills out[tensor, role, column] from `roles`, a tuple of lists of tensors or None (or None, for an absent role), and
/// says whether anything differs from what was there. With `pointers`, a table's addresses of the tensors that have
/// their first role, those are renewed too where that is all it takes; `out` then has read the same roles before.
/// A list that is no plain one is a ltsam_fast.snapshot.ReadOnce: it keeps its rows.
inline int snapshot(const py::capsule& capsule, const py::tuple& roles, py::array_t<int64_t, py::array::c_style> out,
                    const py::tuple& written, std::optional<py::array_t<int64_t, py::array::c_style>> pointers) {
  using Rows = py::array_t<int64_t, py::array::c_style>;
  static const py::handle key = PyUnicode_InternFromString("rows");
  const dlpack::ExchangeApi& api = exchange_api(capsule);
  const py::ssize_t tensors = out.shape(0), columns = out.shape(1), stride = columns * kColumns;
  int64_t* rows = out.mutable_data();
  int change = kSame;
  for (py::ssize_t r = 0; r < columns; ++r) {
    PyObject* list = PyTuple_GET_ITEM(roles.ptr(), r);
    if (list == Py_None && pointers) continue;
    Rows kept;
    const int64_t* known = nullptr;  // rows that have been read, and how far they lie apart
    py::ssize_t apart = kColumns;
    const bool once = list != Py_None && !PyList_CheckExact(list);
    if (r > 0 && list == PyTuple_GET_ITEM(roles.ptr(), r - 1)) {  // weights that are their own source
      known = rows + (r - 1) * kColumns;
      apart = stride;
    } else if (once) {
      const py::object before = py::handle(list).attr(key);
      if (!before.is_none()) known = (kept = Rows(before)).data();
    }
    for (py::ssize_t i = 0; i < tensors; ++i) {
      int64_t fresh[kColumns], *row = rows + i * stride + r * kColumns;
      if (known)
        std::copy_n(known + i * apart, int(kColumns), fresh);
      else
        describe(api, list == Py_None ? Py_None : PyList_GET_ITEM(list, i), fresh);
      if (!std::equal(fresh + 1, fresh + kColumns, row + 1)) change = kChanged;
      if (fresh[kAddress] != row[kAddress]) change = std::max<int>(change, kMoved);
      std::copy_n(fresh, int(kColumns), row);
    }
    if (once && !known) {
      kept = Rows({tensors, py::ssize_t(kColumns)});
      for (py::ssize_t i = 0; i < tensors; ++i)
        std::copy_n(rows + i * stride + r * kColumns, int(kColumns), kept.mutable_data() + i * kColumns);
      py::setattr(list, key, kept);
    }
  }
  if (change != kMoved || !pointers || may_overlap(out, written)) return change;
  int64_t* to = pointers->mutable_data();
  for (py::ssize_t i = 0; i < tensors; ++i, rows += stride)
    if (rows[kDevice] != -1)
      for (py::ssize_t r = 0; r < columns; ++r) *to++ = rows[r * kColumns + kAddress];
  return kRefreshed;
}

/// Whether torch's table can be used: same ABI, and it offers borrowed views.
inline bool can_snapshot(const py::capsule& capsule) {
  const dlpack::ExchangeApi& api = exchange_api(capsule);
  return api.major == 1 && api.view;
}

}  // namespace lt
