// The CPU operators behind torch.ops.in2nect_cpp; see intra_exact.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace in2nect::cpu {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> intra_exact(
    torch::stable::Tensor features, torch::stable::Tensor labels, torch::stable::Tensor weights,
    torch::stable::Tensor anchors, int64_t ignore_index, double temperature, bool normalize, bool reduced);

torch::stable::Tensor intra_exact_backward(torch::stable::Tensor features, torch::stable::Tensor labels,
                                           torch::stable::Tensor log_d, torch::stable::Tensor weights,
                                           torch::stable::Tensor anchors, torch::stable::Tensor positive,
                                           torch::stable::Tensor own, int64_t ignore_index, double temperature,
                                           bool normalize, bool reduced);

}  // namespace in2nect::cpu
