// Registers the CPU operators as torch.ops.in2nect_cpp.*; the autograd formula and the fake implementation belong to
// in2nect::class_sums, in Python, which calls these.
#include <torch/csrc/stable/library.h>

#include "class_sums.h"

STABLE_TORCH_LIBRARY(in2nect_cpp, library) {
  library.def(
      "class_sums(Tensor features, Tensor labels, int num_classes, int ignore_index, bool normalize, bool squares)"
      " -> (Tensor sums, Tensor counts, Tensor squares, int strays)");
  library.def(
      "class_sums_backward(Tensor? grad_sums, Tensor? grad_squares, Tensor features, Tensor labels, int ignore_index,"
      " bool normalize) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(in2nect_cpp, CPU, library) {
  library.impl("class_sums", TORCH_BOX(&in2nect::cpu::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&in2nect::cpu::class_sums_backward));
}
