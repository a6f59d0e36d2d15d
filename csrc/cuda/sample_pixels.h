// The CUDA operator behind torch.ops.in2nect_cuda.sample_pixels; see sample_pixels_kernels.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace in2nect::cuda {

torch::stable::Tensor sample_pixels(torch::stable::Tensor labels, int64_t num_classes, int64_t per_class,
                                    torch::stable::Tensor seed, int64_t ignore_index);

}  // namespace in2nect::cuda
