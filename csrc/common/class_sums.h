// What the CPU and the CUDA operator `class_sums` share: the checked shape of a call. Host code only; costs nothing
// beside the tensors' own metadata.
#pragma once

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace in2nect {

struct Shape {
  int64_t batch, channels, height, width;  // of the features, (B, d, h, w)
  int64_t label_height, label_width;       // of the labels, (B, H, W)
  int64_t classes;

  bool same_grid() const {
    return height == label_height && width == label_width;
  }
};

inline Shape checked_shape(const Tensor& features, const Tensor& labels, int64_t num_classes) {
  require(features.dim() == 4, "class_sums: features must be (B, d, h, w), got ", features.dim(), " dimensions");
  require(labels.dim() == 3, "class_sums: labels must be (B, H, W), got ", labels.dim(), " dimensions");
  require(features.size(0) == labels.size(0), "class_sums: features hold ", features.size(0), " images and labels ",
          labels.size(0), "; pass one label image per feature image");
  require_labels("class_sums", labels.scalar_type());
  require(num_classes >= 1 && num_classes <= INT32_MAX, "class_sums: num_classes must be at least 1, got ", num_classes);
  const Shape shape{features.size(0), features.size(1), features.size(2), features.size(3),
                    labels.size(1),   labels.size(2),   num_classes};
  const bool labelled = shape.batch * shape.label_height * shape.label_width > 0;
  require(!labelled || (shape.height > 0 && shape.width > 0), "class_sums: labels of ", shape.label_height, " x ",
          shape.label_width, " pixels need features, got a grid of ", shape.height, " x ", shape.width);
  return shape;
}

// Shape of a backward call: the number of classes comes from the upstream gradients, (K, d) and (K,).
inline Shape checked_shape(const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_squares,
                           const Tensor& features, const Tensor& labels) {
  const int64_t classes = grad_sums ? grad_sums->size(0) : grad_squares ? grad_squares->size(0) : 1;
  const Shape shape = checked_shape(features, labels, classes);
  const ScalarType type = accumulator_type(features.scalar_type());
  if (grad_sums) {
    require(grad_sums->dim() == 2 && grad_sums->size(1) == shape.channels && grad_sums->scalar_type() == type,
            "class_sums_backward: grad_sums must be (K, ", shape.channels, ") ", torch::headeronly::toString(type));
  }
  if (grad_squares) {
    require(grad_squares->dim() == 1 && grad_squares->size(0) == classes && grad_squares->scalar_type() == type,
            "class_sums_backward: grad_squares must be (", classes, ",) ", torch::headeronly::toString(type));
  }
  return shape;
}

}  // namespace in2nect
