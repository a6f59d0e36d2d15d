// Registers the CPU operators as torch.ops.in2nect_cpp.*; the autograd formulas and the fake implementations belong to
// the operators of the same names in in2nect::, in Python, which call these.
#include <torch/csrc/stable/library.h>

#include "class_sums.h"
#include "gather_rows.h"
#include "sample_pixels.h"

STABLE_TORCH_LIBRARY(in2nect_cpp, library) {
  library.def(
      "class_sums(Tensor features, Tensor labels, int num_classes, int ignore_index, bool normalize, bool squares)"
      " -> (Tensor sums, Tensor counts, Tensor squares)");
  library.def(
      "class_sums_backward(Tensor? grad_sums, Tensor? grad_squares, Tensor features, Tensor labels, int ignore_index,"
      " bool normalize) -> Tensor");
  library.def("gather_rows(Tensor features, Tensor indices, int height, int width, bool normalize) -> Tensor");
  library.def(
      "gather_rows_backward(Tensor grad, Tensor features, Tensor indices, int height, int width, bool normalize)"
      " -> Tensor");
  library.def("sample_pixels(Tensor labels, int num_classes, int per_class, Tensor seed, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(in2nect_cpp, CPU, library) {
  library.impl("class_sums", TORCH_BOX(&in2nect::cpu::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&in2nect::cpu::class_sums_backward));
  library.impl("gather_rows", TORCH_BOX(&in2nect::cpu::gather_rows));
  library.impl("gather_rows_backward", TORCH_BOX(&in2nect::cpu::gather_rows_backward));
  library.impl("sample_pixels", TORCH_BOX(&in2nect::cpu::sample_pixels));
}
