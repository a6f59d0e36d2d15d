// Bilinear interpolation with align_corners=False along one axis: which two feature rows (or columns) a label row (or
// column) lies between, and with which weights. The coordinates are those of torch.nn.functional.interpolate with
// `size=`: max(0, (o + 0.5) * inputs / outputs - 0.5), the upper neighbour clamped to the edge.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace in2nect {

template <typename A>
struct Axis {
  std::vector<int64_t> lower, upper;
  std::vector<A> lower_weight, upper_weight;

  Axis(int64_t inputs, int64_t outputs)
      : lower(outputs), upper(outputs), lower_weight(outputs), upper_weight(outputs) {
    const A scale = outputs > 0 ? static_cast<A>(inputs) / static_cast<A>(outputs) : A(0);
    for (int64_t o = 0; o < outputs; ++o) {
      const A position = std::max(A(0), scale * (static_cast<A>(o) + A(0.5)) - A(0.5));
      lower[o] = std::min(static_cast<int64_t>(position), inputs - 1);
      upper[o] = std::min(lower[o] + 1, inputs - 1);
      upper_weight[o] = std::min(std::max(position - static_cast<A>(lower[o]), A(0)), A(1));
      lower_weight[o] = A(1) - upper_weight[o];
    }
  }

  // The outputs that touch an input in [begin, end) are [first(begin), last(end)): both neighbours only ever grow.
  int64_t first(int64_t begin) const {
    return std::lower_bound(upper.begin(), upper.end(), begin) - upper.begin();
  }
  int64_t last(int64_t end) const {
    return std::lower_bound(lower.begin(), lower.end(), end) - lower.begin();
  }

  // Weight of input i in output o; at the far edge both neighbours are the same input.
  A weight(int64_t o, int64_t i) const {
    return (lower[o] == i ? lower_weight[o] : A(0)) + (upper[o] == i ? upper_weight[o] : A(0));
  }
};

}  // namespace in2nect
