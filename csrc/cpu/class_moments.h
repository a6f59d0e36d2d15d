// The CPU operators behind torch.ops.in2nect_cpp; see class_moments.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace in2nect::cpu {

// Counts, sums of raw rows (K or 0, d) and of unit rows, squares, second moments (d, d) or (K, d, d), and how many labels
// are neither a class nor the ignored one. Second moments are weighted by weights (K,), or else by 1 / counts.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, int64_t>
class_moments(torch::stable::Tensor features, torch::stable::Tensor labels, int64_t num_classes, int64_t ignore_index,
              bool sums, bool by_class, std::optional<torch::stable::Tensor> weights);

// sum a LSE (1,), G (K, d), and with curvatures B (K, d, d), else (0, d, d).
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> class_moments_mixtures(
    torch::stable::Tensor features, torch::stable::Tensor labels, torch::stable::Tensor centres,
    std::optional<torch::stable::Tensor> curvatures, torch::stable::Tensor present, torch::stable::Tensor anchors,
    int64_t ignore_index);

torch::stable::Tensor class_moments_backward(torch::stable::Tensor features, torch::stable::Tensor labels,
                                             torch::stable::Tensor centres,
                                             std::optional<torch::stable::Tensor> curvatures,
                                             torch::stable::Tensor present, torch::stable::Tensor anchors,
                                             torch::stable::Tensor matrices, torch::stable::Tensor scales,
                                             torch::stable::Tensor constant, torch::stable::Tensor own,
                                             std::optional<torch::stable::Tensor> grad_sums, int64_t ignore_index);

}  // namespace in2nect::cpu
