// The Python module of the CUDA library. It holds build facts only: the kernels register themselves with the
// dispatcher.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "ops.h"

// As in csrc/module.cpp.
PYBIND11_MODULE(_C_cuda, module, pybind11::mod_gil_not_used()) {
  module.doc() = "CUDA kernels of clusterq";
  module.def("build_info", [] {
    pybind11::dict facts;
    facts["library"] = CLUSTERQ_LIBRARY;
    facts["compiler"] = CLUSTERQ_COMPILER;
    facts["cplusplus"] = std::to_string(__cplusplus);
    facts["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    return facts;
  });
  module.def("ops", [] {
    pybind11::list names;
    for (const auto& list :
         {clusterq::fake_quant_ops(), clusterq::fake_quant_range_ops(), clusterq::fake_quant_weight_ops(),
          clusterq::bn_stats_ops(), clusterq::bn_stats_backward_ops(), clusterq::alignment_ops(),
          clusterq::centroid_ops(), clusterq::centroid_update_ops()})
      for (const std::string& name : list) names.append(name);
    return names;
  });
}
