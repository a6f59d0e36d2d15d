// The CPU operators behind torch.ops.in2nect_cpp; see pair_logsumexp.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace in2nect::cpu {

torch::stable::Tensor pair_logsumexp(torch::stable::Tensor anchors, std::optional<torch::stable::Tensor> keys,
                                     torch::stable::Tensor weights, double temperature, bool reduced);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> pair_logsumexp_backward(
    torch::stable::Tensor grad, torch::stable::Tensor log_d, torch::stable::Tensor anchors,
    std::optional<torch::stable::Tensor> keys, torch::stable::Tensor weights, double temperature, bool reduced);

}  // namespace in2nect::cpu
