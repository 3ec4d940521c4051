// The Python module of the CPU library. It holds build facts only: the kernels register themselves with the dispatcher.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"library", CLUSTERQ_LIBRARY},
      {"compiler", CLUSTERQ_COMPILER},
      {"cplusplus", std::to_string(__cplusplus)},
#if defined(__x86_64__)
      {"architecture", "x86_64"},
#elif defined(__aarch64__)
      {"architecture", "aarch64"},
#else
      {"architecture", "other"},
#endif
  };
}

}  // namespace

// Nothing of the module changes after its import: without a GIL it needs none.
PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "CPU kernels of clusterq";
  module.def("build_info", [] {
    pybind11::dict facts;
    for (const auto& [key, value] : build_info()) facts[pybind11::str(key)] = value;
    return facts;
  });
}
