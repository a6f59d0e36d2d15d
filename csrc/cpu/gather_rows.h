// The CPU operators behind torch.ops.in2nect_cpp.gather_rows and its backward; see gather_rows.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace in2nect::cpu {

torch::stable::Tensor gather_rows(torch::stable::Tensor features, torch::stable::Tensor indices, int64_t height,
                                  int64_t width, bool normalize);

torch::stable::Tensor gather_rows_backward(torch::stable::Tensor grad, torch::stable::Tensor features,
                                           torch::stable::Tensor indices, int64_t height, int64_t width,
                                           bool normalize);

}  // namespace in2nect::cpu
