#include "bind.h"
#include "cuda/loop.cuh"
#include "cuda/row_loop.cuh"

PYBIND11_MODULE(_cuda, m) {
  lt::bind<lt::CudaLoop>(m);
#ifdef __CUDA_ARCH_LIST__
  m.attr("ARCHS") = pybind11::make_tuple(__CUDA_ARCH_LIST__);
#else
  m.attr("ARCHS") = pybind11::tuple();
#endif
}
