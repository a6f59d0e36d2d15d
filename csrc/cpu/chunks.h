// How work is cut: by the shape alone, so that a sum over the cuts, added in order, is the same bits for any number of
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/class_sums.h"
#include "views.h"

namespace in2nect::cpu {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// A grid cut into row segments of at most `pixels` pixels: the unit of work.
struct Segments {
  int64_t height, width, pixels, per_row, total;

  Segments(int64_t batch, int64_t height, int64_t width, int64_t pixels)
      : height(height),
        width(width),
        pixels(std::min(pixels, std::max<int64_t>(width, 1))),
        per_row(divide_up(width, pixels)),
        total(batch * height * per_row) {}

  struct Segment {
    int64_t image, row, begin, count;
  };
  Segment operator[](int64_t unit) const {
    const int64_t row = unit / per_row;
    const int64_t begin = (unit % per_row) * pixels;
    return {row / height, row % height, begin, std::min(pixels, width - begin)};
  }
};

// Images whose rows follow one another are lines: fewer and longer segments.
template <typename T>
Shape as_lines(const Shape& shape, const Features<T>& features, const Labels& labels) {
  Shape lines = shape;
  if (shape.same_grid() && features.row == shape.width * features.column &&
      labels.row() == shape.width * labels.column()) {
    lines.height = lines.label_height = 1;
    lines.width = lines.label_width = shape.height * shape.width;
  }
  return lines;
}

// Calls body(chunk, begin, end) for `chunks` ranges that cover 0..units.
template <typename Body>
void for_each_chunk(int64_t chunks, int64_t units, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, chunks * kGrainElements / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * units / chunks, (chunk + 1) * units / chunks);
    }
  });
}

// Adds the chunks in order.
template <typename P, typename A>
void reduce_chunks(const std::vector<P>& partial, int64_t chunks, int64_t size, A* out) {
  std::vector<P> total(size);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < size; ++i) {
      total[i] += partial[chunk * size + i];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<A>(total[i]);
  }
}

}  // namespace in2nect::cpu
