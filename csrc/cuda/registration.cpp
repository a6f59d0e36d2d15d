// Registers the CUDA operators as torch.ops.in2nect_cuda.*; the autograd formula and the fake implementation belong to
// the operators of the same names in in2nect::, in Python, which call these.
#include <torch/csrc/stable/library.h>

#include "class_sums.h"
#include "pair_logsumexp.h"
#include "sample_pixels.h"

STABLE_TORCH_LIBRARY(in2nect_cuda, library) {
  library.def(
      "class_sums(Tensor features, Tensor labels, int num_classes, int ignore_index, bool normalize, bool squares)"
      " -> (Tensor sums, Tensor counts, Tensor squares)");
  library.def(
      "class_sums_backward(Tensor? grad_sums, Tensor? grad_squares, Tensor features, Tensor labels, int ignore_index,"
      " bool normalize) -> Tensor");
  library.def("pair_logsumexp(Tensor anchors, Tensor? keys, Tensor weights, float temperature) -> Tensor");
  library.def(
      "pair_logsumexp_backward(Tensor grad, Tensor log_d, Tensor anchors, Tensor? keys, Tensor weights,"
      " float temperature) -> (Tensor grad_anchors, Tensor grad_keys)");
  library.def(
      "sample_pixels(Tensor labels, int num_classes, int per_class, Tensor seed, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(in2nect_cuda, CUDA, library) {
  library.impl("class_sums", TORCH_BOX(&in2nect::cuda::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&in2nect::cuda::class_sums_backward));
  library.impl("pair_logsumexp", TORCH_BOX(&in2nect::cuda::pair_logsumexp));
  library.impl("pair_logsumexp_backward", TORCH_BOX(&in2nect::cuda::pair_logsumexp_backward));
  library.impl("sample_pixels", TORCH_BOX(&in2nect::cuda::sample_pixels));
}

// For Python, by ctypes: the chips this library was built for, "sm_86 compute_90".
extern "C" __attribute__((visibility("default"))) const char* in2nect_cuda_targets() {
  return IN2NECT_CUDA_TARGETS;
}
