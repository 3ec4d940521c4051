// The ops that each CUDA file registers: the dispatcher does not tell which library a kernel came from.
#pragma once

#include <string>
#include <vector>

namespace clusterq {

std::vector<std::string> fake_quant_ops();
std::vector<std::string> fake_quant_range_ops();
std::vector<std::string> fake_quant_weight_ops();
std::vector<std::string> bn_stats_ops();
std::vector<std::string> bn_stats_backward_ops();
std::vector<std::string> alignment_ops();
std::vector<std::string> centroid_ops();
std::vector<std::string> centroid_update_ops();

}  // namespace clusterq
