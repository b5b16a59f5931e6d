// What a step does to lists of as many objects as there are parameters, each in one call: Python takes some 50 ns an
// object. ltsam_fast.lists has the definitions.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>

namespace lt {
namespace py = pybind11;

inline py::object owned(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

/// Calls visit(index, object) for each object of a list or tuple until it returns false; says whether it never did.
/// An attribute may be Python code, which may change the list.
template <class Visit>
bool for_all(const py::object& items, const Visit& visit) {
  const py::object fast = owned(PySequence_Fast(items.ptr(), "a list is needed"));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
    const auto item = py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(fast.ptr(), i));
    if (!visit(i, item.ptr())) return false;
  }
  return true;
}

inline bool has_none(const py::object& items) {
  const py::object fast = owned(PySequence_Fast(items.ptr(), "a list is needed"));
  PyObject** const first = PySequence_Fast_ITEMS(fast.ptr());
  PyObject** const end = first + PySequence_Fast_GET_SIZE(fast.ptr());
  return std::find(first, end, Py_None) != end;  // no object is touched, which may lie far away
}

inline bool same_items(const py::object& first, const py::object& second) {
  const py::object one = owned(PySequence_Fast(first.ptr(), "a list is needed"));
  const py::object other = owned(PySequence_Fast(second.ptr(), "a list is needed"));
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(one.ptr());
  PyObject** const items = PySequence_Fast_ITEMS(one.ptr());
  return size == PySequence_Fast_GET_SIZE(other.ptr()) &&
         (one.is(other) || std::equal(items, items + size, PySequence_Fast_ITEMS(other.ptr())));
}

/// An attribute of one object after the other. Where it is C code of their type, which torch's are, that is called at
/// once: to look it up takes as long.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(owned(PyUnicode_InternFromString(name))) {}

  py::object get(PyObject* of) {
    const PyGetSetDef* code = code_of(Py_TYPE(of));
    return owned(code && code->get ? code->get(of, code->closure) : PyObject_GetAttr(of, name_.ptr()));
  }

  void set(PyObject* of, PyObject* value) {
    const PyGetSetDef* code = code_of(Py_TYPE(of));
    if ((code && code->set ? code->set(of, value, code->closure) : PyObject_SetAttr(of, name_.ptr(), value)) != 0)
      throw py::error_already_set();
  }

 private:
  const PyGetSetDef* code_of(PyTypeObject* type) {
    if (type == type_) return code_;
    const py::object found = py::getattr(reinterpret_cast<PyObject*>(type), name_.ptr(), py::none());
    const bool plain = type->tp_getattro == PyObject_GenericGetAttr && type->tp_setattro == PyObject_GenericSetAttr &&
                       Py_TYPE(found.ptr()) == &PyGetSetDescr_Type;
    type_ = type;
    return code_ = plain ? reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset : nullptr;
  }

  const py::object name_;
  PyTypeObject* type_ = nullptr;
  const PyGetSetDef* code_ = nullptr;
};

inline bool has_views(const py::list& tensors) {
  Attribute base("_base");
  return !for_all(tensors, [&](Py_ssize_t, PyObject* one) { return one == Py_None || base.get(one).is_none(); });
}

inline py::list gradients_of(const py::list& params) {
  Attribute grad("grad"), requires_grad("requires_grad");
  py::list found;
  for_all(params, [&](Py_ssize_t, PyObject* param) {
    py::object one = grad.get(param);
    if (!one.is_none() && requires_grad.get(param).ptr() != Py_True) one = py::none();
    found.append(std::move(one));
    return true;
  });
  return found;
}

inline void clear_gradients(const py::object& params) {
  Attribute grad("grad");
  for_all(params, [&](Py_ssize_t, PyObject* param) {
    grad.set(param, Py_None);
    return true;
  });
}

inline py::list values_of(const py::dict& of, const py::list& keys) {
  py::list found;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t place = 0;
  for_all(keys, [&](Py_ssize_t, PyObject* wanted) {
    // Most often they are in the same order, and nobody has to be asked for a hash.
    const bool next = PyDict_Next(of.ptr(), &place, &key, &value) && key == wanted;
    found.append(next ? py::reinterpret_borrow<py::object>(value) : owned(PyObject_GetItem(of.ptr(), wanted)));
    return true;
  });
  return found;
}

inline py::list entries(const py::list& dicts, const py::object& name) {
  static const py::handle get = PyUnicode_InternFromString("get");
  py::list found;
  for_all(dicts, [&](Py_ssize_t, PyObject* dict) {
    if (PyDict_CheckExact(dict)) {
      PyObject* value = PyDict_GetItemWithError(dict, name.ptr());
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      found.append(py::reinterpret_borrow<py::object>(value ? value : Py_None));
    } else {
      found.append(owned(PyObject_CallMethodOneArg(dict, get.ptr(), name.ptr())));
    }
    return true;
  });
  return found;
}

inline void bind_lists(py::module_& m) {
  m.def("has_none", has_none);
  m.def("same_items", same_items);
  m.def("has_views", has_views);
  m.def("gradients_of", gradients_of);
  m.def("clear_gradients", clear_gradients);
  m.def("values_of", values_of);
  m.def("entries", entries);
}

}  // namespace lt
