// The CUDA operators behind torch.ops.in2nect_cuda.pair_logsumexp and its backward; see pair_logsumexp_kernels.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace in2nect::cuda {

torch::stable::Tensor pair_logsumexp(torch::stable::Tensor anchors, std::optional<torch::stable::Tensor> keys,
                                     torch::stable::Tensor weights, double temperature);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> pair_logsumexp_backward(
    torch::stable::Tensor grad, torch::stable::Tensor log_d, torch::stable::Tensor anchors,
    std::optional<torch::stable::Tensor> keys, torch::stable::Tensor weights, double temperature);

}  // namespace in2nect::cuda
