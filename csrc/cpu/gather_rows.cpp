// The rows of (B, d, h, w) features at M given pixels of a (B, H, W) grid on the CPU, and their gradient.
//
//   row_m = sum over the cells around pixel m of weight x cell, divided by its norm if asked
//
// Cost O(M d), whatever the resolution: four cells a row are read in place, whatever their strides, and one where the
// grids are the same. The gradient is as large as the features and mostly zeros: it is written once, in units of some
// hundred cells, each of which zeroes its cells and then stores those that rows touch while they are still in a cache.
// Beside the gradient that takes O(M) numbers, and O(M d) for unit rows.
//
// Determinism: a cell belongs to one unit, and the unit adds the rows that touch the cell in the order of their
// indices, so the result is the same bits for any number of threads. Each cell is rounded to the features' dtype once.
#include "gather_rows.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../common/tensors.h"
#include "memory.h"
#include "views.h"

namespace in2nect::cpu {
namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;
// Elements of the gradient's unit: 256 KiB of sums, where every cell is touched, stay in a second-level cache.
constexpr int64_t kUnitElements = 65536;
// Cells of a unit: the upper bound is that of the counters it clears, the lower keeps stores of one channel in lines.
constexpr int64_t kMinUnitCells = 64, kMaxUnitCells = 4096;

struct Shape {
  int64_t batch, channels, height, width;  // of the features, (B, d, h, w)
  int64_t pixel_height, pixel_width;       // of the grid that the indices count, (B, H, W)
  int64_t rows;                            // M

  bool same_grid() const {
    return height == pixel_height && width == pixel_width;
  }
  int64_t cells() const {
    return batch * height * width;
  }
  int64_t most_corners() const {
    return same_grid() ? 1 : 4;
  }
};

// The two cells around a pixel along one axis, as torch.nn.functional.interpolate has them with align_corners=False.
// Positions in double: float32 loses pixels from 2^23 on.
template <typename A>
struct Neighbours {
  int64_t cell[2];
  A weight[2];

  Neighbours(int64_t pixel, int64_t cells, int64_t pixels) {
    const double scale = static_cast<double>(cells) / static_cast<double>(pixels);
    const double position = std::max(0.0, (static_cast<double>(pixel) + 0.5) * scale - 0.5);
    cell[0] = std::min(static_cast<int64_t>(position), cells - 1);
    cell[1] = std::min(cell[0] + 1, cells - 1);
    weight[1] = static_cast<A>(position - static_cast<double>(cell[0]));
    weight[0] = A(1) - weight[1];
  }
};

// The cells that a pixel's row is made of, at most four; those of weight 0 are left out, whatever they hold.
template <typename A>
struct Corners {
  struct Corner {
    int64_t image, y, x;
    A weight;
  };
  Corner at[4];
  int64_t count = 0;

  Corners(const Shape& shape, int64_t index) {
    if (index < 0) {
      return;
    }
    const int64_t line = index / shape.pixel_width, x = index % shape.pixel_width;
    const int64_t image = line / shape.pixel_height, y = line % shape.pixel_height;
    if (shape.same_grid()) {
      at[count++] = {image, y, x, A(1)};
      return;
    }
    const Neighbours<A> rows(y, shape.height, shape.pixel_height), columns(x, shape.width, shape.pixel_width);
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) {
        const A weight = rows.weight[i] * columns.weight[j];
        if (weight != A(0)) {
          at[count++] = {image, rows.cell[i], columns.cell[j], weight};
        }
      }
    }
  }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// All corners in one walk over the channels: planes of a power of two of bytes share a set of the cache, so that a
// second walk would find nothing of the first.
template <int kCorners, typename T, typename A>
void blend(Features<const T> z, const Corners<A>& corners, int64_t d, A* row) {
  const T* from[kCorners];
  A weight[kCorners];
  for (int j = 0; j < kCorners; ++j) {
    const auto& corner = corners.at[j];
    from[j] = z.at(corner.image, corner.y, corner.x);
    weight[j] = corner.weight;
  }
  const auto walk = [&](int64_t stride) {
    for (int64_t c = 0; c < d; ++c) {
      A total = weight[0] * static_cast<A>(from[0][c * stride]);
      for (int j = 1; j < kCorners; ++j) {
        total += weight[j] * static_cast<A>(from[j][c * stride]);
      }
      row[c] = total;
    }
  };
  z.channel == 1 ? walk(1) : walk(z.channel);
}

template <typename T, typename A>
void read_row(Features<const T> z, const Corners<A>& corners, int64_t d, A* row) {
  switch (corners.count) {
    case 0:
      std::fill_n(row, d, A(0));
      return;
    case 1:
      return blend<1>(z, corners, d, row);
    case 2:
      return blend<2>(z, corners, d, row);
    case 3:
      return blend<3>(z, corners, d, row);
    default:
      return blend<4>(z, corners, d, row);
  }
}

template <typename A>
A dot(const A* a, const A* b, int64_t count) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    total += a[i] * b[i];
  }
  return total;
}

template <typename Body>
void for_each_row(const Shape& shape, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(shape.channels, 1));
  torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      body(m);
    }
  });
}

template <typename T, typename A>
void gather(Features<const T> z, const int64_t* indices, const Shape& shape, bool normalize, A* rows) {
  const int64_t d = shape.channels;
  for_each_row(shape, [&](int64_t m) {
    A* row = rows + m * d;
    read_row(z, Corners<A>(shape, indices[m]), d, row);
    if (normalize) {
      const A norm = std::max(std::sqrt(dot(row, row, d)), static_cast<A>(kZeroNorm));
      for (int64_t c = 0; c < d; ++c) {
        row[c] /= norm;
      }
    }
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The upstream gradient (M, d): rows of adjacent numbers.
template <typename A>
struct Rows {
  const A* data;
  int64_t stride;

  const A* operator[](int64_t m) const {
    return data + m * stride;
  }
};

// Gradient of the rows from that of the unit rows: dz = (g - (g.u) u) / |z|, and 0 for a zero row.
template <typename T, typename A>
void through_norms(Features<const T> z, const int64_t* indices, const Shape& shape, Rows<A> grad, A* out) {
  const int64_t d = shape.channels;
  for_each_row(shape, [&](int64_t m) {
    A* row = out + m * d;
    const A* g = grad[m];
    read_row(z, Corners<A>(shape, indices[m]), d, row);
    const A norm = std::sqrt(dot(row, row, d));
    if (norm <= static_cast<A>(kZeroNorm)) {
      std::fill_n(row, d, A(0));
      return;
    }
    const A inverse = A(1) / norm;
    const A along = inverse * dot(row, g, d);
    for (int64_t c = 0; c < d; ++c) {
      row[c] = inverse * (g[c] - along * (inverse * row[c]));
    }
  });
}

// The cells of the features' grid, (B, h, w) in row-major order, cut into units of a power of two.
struct Units {
  int64_t cells, shift, total;

  explicit Units(const Shape& shape) : cells(shape.cells()), shift(0) {
    const int64_t wanted = kUnitElements / std::max<int64_t>(shape.channels, 1);
    while ((int64_t{2} << shift) <= std::clamp(wanted, kMinUnitCells, kMaxUnitCells)) {
      ++shift;
    }
    total = divide_up(cells, int64_t{1} << shift);
  }
  int64_t first(int64_t unit) const {
    return std::min(unit << shift, cells);
  }
};

// What the rows add to the cells: entry m C + j is corner j of row m, with C corners a row at most. Ordered by unit, in
// a unit as they are numbered.
template <typename A>
class Entries {
 public:
  Entries(const int64_t* indices, const Shape& shape, const Units& units)
      : corners_(shape.most_corners()),
        cells_(shape.rows * corners_, kNone),
        weights_(shape.rows * corners_),
        starts_(units.total + 1) {
    for_each_row(shape, [&](int64_t m) {
      const Corners<A> corners(shape, indices[m]);
      for (int64_t j = 0; j < corners.count; ++j) {
        const auto& corner = corners.at[j];
        cells_[m * corners_ + j] = (corner.image * shape.height + corner.y) * shape.width + corner.x;
        weights_[m * corners_ + j] = corner.weight;
      }
    });
    for (const int64_t cell : cells_) {
      if (cell != kNone) {
        ++starts_[(cell >> units.shift) + 1];
      }
    }
    for (int64_t unit = 0; unit < units.total; ++unit) {
      starts_[unit + 1] += starts_[unit];
    }
    by_unit_.resize(starts_.back());
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t entry = 0; entry < static_cast<int64_t>(cells_.size()); ++entry) {
      if (cells_[entry] != kNone) {
        by_unit_[next[cells_[entry] >> units.shift]++] = entry;
      }
    }
  }

  const int64_t* begin(int64_t unit) const {
    return by_unit_.data() + starts_[unit];
  }
  const int64_t* end(int64_t unit) const {
    return by_unit_.data() + starts_[unit + 1];
  }
  int64_t cell(int64_t entry) const {
    return cells_[entry];
  }
  A weight(int64_t entry) const {
    return weights_[entry];
  }
  int64_t row(int64_t entry) const {
    return entry / corners_;
  }

 private:
  static constexpr int64_t kNone = -1;
  int64_t corners_;
  std::vector<int64_t> cells_;
  std::vector<A> weights_;
  std::vector<int64_t> starts_, by_unit_;
};

// The gradients of one unit's cells: those that entries touch, and zeros between them.
template <typename T>
class UnitWriter {
  using A = Accumulator<T>;

 public:
  UnitWriter(Features<T> gradient, const Shape& shape, const Units& units, const Entries<A>& entries, Rows<A> grad)
      : g_(gradient), shape_(shape), units_(units), entries_(entries), grad_(grad), slots_(int64_t{1} << units.shift) {}

  void write(int64_t unit) {
    const int64_t first = units_.first(unit), last = units_.first(unit + 1);
    add_up(unit, first);
    // pieces of cells that are evenly spaced: a whole image, where its lines follow each other, or one line
    const bool one_piece = g_.row == shape_.width * g_.column;
    const int64_t length = one_piece ? shape_.height * shape_.width : shape_.width;
    size_t touched = 0;
    for (int64_t begin = first; begin < last;) {
      const int64_t end = std::min(last, (begin / length + 1) * length);
      const size_t from = touched;
      while (touched < touched_.size() && touched_[touched] < end) {
        ++touched;
      }
      const int64_t line = begin / shape_.width;
      store(g_.at(line / shape_.height, line % shape_.height, begin % shape_.width), begin, end, from, touched);
      begin = end;
    }
  }

 private:
  // totals_ = sums of the entries of each touched cell, touched_ in ascending order
  void add_up(int64_t unit, int64_t first) {
    const int64_t d = shape_.channels;
    std::fill(slots_.begin(), slots_.end(), kUntouched);
    touched_.clear();
    for (const int64_t* entry = entries_.begin(unit); entry < entries_.end(unit); ++entry) {
      slots_[entries_.cell(*entry) - first] = 0;
    }
    for (size_t cell = 0; entries_.begin(unit) < entries_.end(unit) && cell < slots_.size(); ++cell) {
      if (slots_[cell] != kUntouched) {
        slots_[cell] = static_cast<int32_t>(touched_.size());
        touched_.push_back(first + static_cast<int64_t>(cell));
      }
    }
    totals_.assign(touched_.size() * d, A(0));
    for (const int64_t* entry = entries_.begin(unit); entry < entries_.end(unit); ++entry) {
      const A weight = entries_.weight(*entry);
      const A* g = grad_[entries_.row(*entry)];
      A* total = totals_.data() + slots_[entries_.cell(*entry) - first] * d;
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) {
        total[c] += weight * g[c];
      }
    }
  }

  // Cells [begin, end), the first of them at `to`; those of touched_[from, until) are not zero.
  void store(T* to, int64_t begin, int64_t end, size_t from, size_t until) const {
    const int64_t d = shape_.channels;
    if (g_.channels_inner()) {
      zero(to, end - begin, g_.column, d, g_.channel);
      for (size_t i = from; i < until; ++i) {
        T* cell = to + (touched_[i] - begin) * g_.column;
        for (int64_t c = 0; c < d; ++c) {
          cell[c * g_.channel] = static_cast<T>(totals_[i * d + c]);
        }
      }
      return;
    }
    for (int64_t c = 0; c < d; ++c) {
      T* plane = to + c * g_.channel;
      zero(plane, 1, 0, end - begin, g_.column);
      for (size_t i = from; i < until; ++i) {
        plane[(touched_[i] - begin) * g_.column] = static_cast<T>(totals_[i * d + c]);
      }
    }
  }

  static void zero(T* to, int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride) {
    if (inner_stride == 1 && outer_stride == inner) {
      inner *= outer;
      outer = 1;
    }
    for (int64_t o = 0; o < outer; ++o) {
      T* line = to + o * outer_stride;
      if (inner_stride == 1) {
        std::memset(static_cast<void*>(line), 0, inner * sizeof(T));  // all bits 0 is 0 in each of the dtypes
        continue;
      }
      for (int64_t i = 0; i < inner; ++i) {
        line[i * inner_stride] = T(0);
      }
    }
  }

  static constexpr int32_t kUntouched = -1;
  Features<T> g_;
  const Shape& shape_;
  const Units& units_;
  const Entries<A>& entries_;
  Rows<A> grad_;
  std::vector<int32_t> slots_;  // of each cell of the unit: its place in touched_
  std::vector<int64_t> touched_;
  std::vector<A> totals_;
};

// ---- calls ----------------------------------------------------------------------------------------------------------

Shape checked_shape(const char* name, const Tensor& features, const Tensor& indices, int64_t height, int64_t width) {
  require(features.dim() == 4, name, ": features must be (B, d, h, w), got ", features.dim(), " dimensions");
  require(indices.dim() == 1 && indices.scalar_type() == ScalarType::Long, name,
          ": indices must be (M,) int64, got ", indices.dim(), " dimensions of ",
          torch::headeronly::toString(indices.scalar_type()));
  require(height >= 0 && width >= 0, name, ": the grid of the indices must not be negative, got ", height, " x ",
          width);
  return {features.size(0), features.size(1), features.size(2), features.size(3), height, width, indices.size(0)};
}

// The indices side by side, each inside the grid or -1.
std::vector<int64_t> checked_indices(const char* name, const Tensor& indices, const Shape& shape) {
  const int64_t pixels = shape.batch * shape.pixel_height * shape.pixel_width;
  const int64_t* data = static_cast<const int64_t*>(indices.const_data_ptr());
  std::vector<int64_t> out(shape.rows);
  int64_t largest = -1;
  for (int64_t m = 0; m < shape.rows; ++m) {
    const int64_t index = out[m] = data[m * indices.stride(0)];
    require(index >= -1 && index < pixels, name, ": indices[", m, "] is ", index, "; a grid of ", shape.batch, " x ",
            shape.pixel_height, " x ", shape.pixel_width, " takes 0 to ", pixels - 1, ", and -1 for a row of zeros");
    largest = std::max(largest, index);
  }
  require(largest < 0 || shape.cells() > 0, name, ": there are no features to take the rows from, on a grid of ",
          shape.height, " x ", shape.width);
  return out;
}

template <typename T>
void scatter(const Tensor& grad, Features<const T> z, const std::vector<int64_t>& indices, const Shape& shape,
             bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const int64_t d = shape.channels;
  Rows<A> rows{static_cast<const A*>(grad.const_data_ptr()), grad.stride(0)};
  std::unique_ptr<A[]> side_by_side, raw;
  if (grad.stride(1) != 1) {
    side_by_side.reset(new A[shape.rows * d]);
    for_each_row(shape, [&](int64_t m) {
      for (int64_t c = 0; c < d; ++c) {
        side_by_side[m * d + c] = rows.data[m * rows.stride + c * grad.stride(1)];
      }
    });
    rows = {side_by_side.get(), d};
  }
  if (normalize) {
    raw.reset(new A[shape.rows * d]);
    through_norms(z, indices.data(), shape, rows, raw.get());
    rows = {raw.get(), d};
  }
  const Units units(shape);
  const Entries<A> entries(indices.data(), shape, units);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(d << units.shift, 1));
  torch::stable::parallel_for(0, units.total, grain, [&](int64_t begin, int64_t end) {
    UnitWriter<T> writer(gradient, shape, units, entries, rows);
    for (int64_t unit = begin; unit < end; ++unit) {
      writer.write(unit);
    }
  });
}

}  // namespace

Tensor gather_rows(Tensor features, Tensor indices, int64_t height, int64_t width, bool normalize) {
  const Shape shape = checked_shape("gather_rows", features, indices, height, width);
  const std::vector<int64_t> pixels = checked_indices("gather_rows", indices, shape);
  const ScalarType type = accumulator_type(features.scalar_type());
  Tensor rows = torch::stable::new_empty(features, {shape.rows, shape.channels}, type);
  dispatch_features("gather_rows", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    gather<T, A>(view<T>(features), pixels.data(), shape, normalize, static_cast<A*>(rows.mutable_data_ptr()));
  });
  return rows;
}

Tensor gather_rows_backward(Tensor grad, Tensor features, Tensor indices, int64_t height, int64_t width,
                            bool normalize) {
  const char* const name = "gather_rows_backward";
  const Shape shape = checked_shape(name, features, indices, height, width);
  const std::vector<int64_t> pixels = checked_indices(name, indices, shape);
  const ScalarType type = accumulator_type(features.scalar_type());
  require(grad.dim() == 2 && grad.size(0) == shape.rows && grad.size(1) == shape.channels &&
              grad.scalar_type() == type,
          name, ": grad must be (", shape.rows, ", ", shape.channels, ") ", torch::headeronly::toString(type));
  Tensor gradient = torch::stable::empty_like(features);
  advise_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  dispatch_features(name, features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    scatter<T>(grad, view<T>(features), pixels, shape, normalize, mutable_view<T>(gradient));
  });
  return gradient;
}

}  // namespace in2nect::cpu
