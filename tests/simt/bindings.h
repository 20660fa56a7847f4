// What a test module offers Python besides its kernels: simt's error, options and traffic.
#pragma once

#include <pybind11/pybind11.h>

#include "simt.h"

namespace simt {

inline void bind(pybind11::module_& module) {
  namespace py = pybind11;
  // Local: several modules with an Error each may be loaded.
  py::register_local_exception<Error>(module, "Error", PyExc_RuntimeError);
  module.def(
      "set_options",
      [](bool shuffle, uint64_t seed, unsigned os_threads) {
        options() = Options();
        options().shuffle = shuffle;
        options().seed = seed;
        if (os_threads) options().os_threads = os_threads;
      },
      py::arg("shuffle") = false, py::arg("seed") = 0, py::arg("os_threads") = 0);
  module.def("unwatch_all", unwatch_all);
  module.def("traffic", [](const char* name) {
    const Traffic counted = traffic(name);
    py::dict result;
    result["loads"] = counted.loads;
    result["stores"] = counted.stores;
    result["wide_loads"] = counted.wide_loads;
    result["wide_stores"] = counted.wide_stores;
    result["load_bytes"] = counted.load_bytes;
    result["store_bytes"] = counted.store_bytes;
    return result;
  });
}

}  // namespace simt
