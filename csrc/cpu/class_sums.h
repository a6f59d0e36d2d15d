// The CPU operators behind torch.ops.in2nect_cpp; see class_sums.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace in2nect::cpu {

// Sums, counts and squares of the classes, and how many labels are neither a class nor the ignored one.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, int64_t> class_sums(
    torch::stable::Tensor features, torch::stable::Tensor labels, int64_t num_classes, int64_t ignore_index,
    bool normalize, bool squares);

torch::stable::Tensor class_sums_backward(std::optional<torch::stable::Tensor> grad_sums,
                                          std::optional<torch::stable::Tensor> grad_squares,
                                          torch::stable::Tensor features, torch::stable::Tensor labels,
                                          int64_t ignore_index, bool normalize);

}  // namespace in2nect::cpu
