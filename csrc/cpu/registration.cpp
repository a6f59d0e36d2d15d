// Registers the CPU operators as torch.ops.in2nect_cpp.*; the autograd formulas and the fake implementations belong to
// the operators of the same names in in2nect::, in Python, which call these.
#include <torch/csrc/stable/library.h>

#include "class_moments.h"
#include "class_sums.h"
#include "gather_rows.h"
#include "intra_exact.h"
#include "pair_logsumexp.h"
#include "sample_pixels.h"

STABLE_TORCH_LIBRARY(in2nect_cpp, library) {
  library.def(
      "class_moments(Tensor features, Tensor labels, int num_classes, int ignore_index, bool sums, bool by_class,"
      " Tensor? weights=None)"
      " -> (Tensor counts, Tensor sums, Tensor unit_sums, Tensor squares, Tensor second, int strays)");
  library.def(
      "class_moments_mixtures(Tensor features, Tensor labels, Tensor centres, Tensor? curvatures, Tensor present,"
      " Tensor anchors, int ignore_index) -> (Tensor log_d, Tensor mixed, Tensor mixed_second)");
  library.def(
      "class_moments_backward(Tensor features, Tensor labels, Tensor centres, Tensor? curvatures, Tensor present,"
      " Tensor anchors, Tensor matrices, Tensor scales, Tensor constant, Tensor own, Tensor? grad_sums,"
      " int ignore_index) -> Tensor");
  library.def(
      "class_sums(Tensor features, Tensor labels, int num_classes, int ignore_index, bool normalize, bool squares)"
      " -> (Tensor sums, Tensor counts, Tensor squares, int strays)");
  library.def(
      "class_sums_backward(Tensor? grad_sums, Tensor? grad_squares, Tensor features, Tensor labels, int ignore_index,"
      " bool normalize) -> Tensor");
  library.def(
      "intra_exact(Tensor features, Tensor labels, Tensor weights, Tensor anchors, int ignore_index, float temperature,"
      " bool normalize, bool reduced) -> (Tensor total, Tensor log_d)");
  library.def(
      "intra_exact_backward(Tensor features, Tensor labels, Tensor log_d, Tensor weights, Tensor anchors,"
      " Tensor positive, Tensor own, int ignore_index, float temperature, bool normalize, bool reduced) -> Tensor");
  library.def(
      "pair_logsumexp(Tensor anchors, Tensor? keys, Tensor weights, float temperature, bool reduced) -> Tensor");
  library.def(
      "pair_logsumexp_backward(Tensor grad, Tensor log_d, Tensor anchors, Tensor? keys, Tensor weights,"
      " float temperature, bool reduced) -> (Tensor grad_anchors, Tensor grad_keys)");
  library.def("gather_rows(Tensor features, Tensor indices, int height, int width, bool normalize) -> Tensor");
  library.def(
      "gather_rows_backward(Tensor grad, Tensor features, Tensor indices, int height, int width, bool normalize)"
      " -> Tensor");
  library.def("sample_pixels(Tensor labels, int num_classes, int per_class, Tensor seed, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(in2nect_cpp, CPU, library) {
  library.impl("class_moments", TORCH_BOX(&in2nect::cpu::class_moments));
  library.impl("class_moments_mixtures", TORCH_BOX(&in2nect::cpu::class_moments_mixtures));
  library.impl("class_moments_backward", TORCH_BOX(&in2nect::cpu::class_moments_backward));
  library.impl("class_sums", TORCH_BOX(&in2nect::cpu::class_sums));
  library.impl("class_sums_backward", TORCH_BOX(&in2nect::cpu::class_sums_backward));
  library.impl("intra_exact", TORCH_BOX(&in2nect::cpu::intra_exact));
  library.impl("intra_exact_backward", TORCH_BOX(&in2nect::cpu::intra_exact_backward));
  library.impl("pair_logsumexp", TORCH_BOX(&in2nect::cpu::pair_logsumexp));
  library.impl("pair_logsumexp_backward", TORCH_BOX(&in2nect::cpu::pair_logsumexp_backward));
  library.impl("gather_rows", TORCH_BOX(&in2nect::cpu::gather_rows));
  library.impl("gather_rows_backward", TORCH_BOX(&in2nect::cpu::gather_rows_backward));
  library.impl("sample_pixels", TORCH_BOX(&in2nect::cpu::sample_pixels));
}
