// Per-class sums of (B, d, h, w) features under (B, H, W) labels on the CPU, and their gradient.
//
//   sums[k] = sum_{i in k} row_i,   counts[k] = n_k,   squares[k] = sum_{i in k} |row_i|^2
//
// row_i is the feature vector at label pixel i, interpolated bilinearly where the labels are on another grid, and
// divided by its norm if asked. Cost O(N d): the features are read once in place, whatever their strides, and the
// upsampled features are never held; a few rows of a tile are. Sums of plain rows on another grid need no
// interpolation: sum_i row_i = A Z, where A (K, h w) is the adjoint of the upsampling applied to the one-hot labels.
//
// Determinism: the work is cut by the shape alone, each cut is summed in order, and the cuts are added in order, in
// double, so the result is the same bits for any number of threads. The gradient is gathered, never scattered to.
#include "class_sums.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/class_sums.h"
#include "interpolation.h"
#include "views.h"

namespace in2nect::cpu {
namespace {

// Partial results a call is cut into: enough for 64 threads, and 64 x K x d doubles stay small beside the features.
constexpr int64_t kChunks = 64;
// Elements of a tile: 64 KiB of float32, so that a tile and its partial sums stay in a second-level cache.
constexpr int64_t kTileElements = 16384;
// Pixels of a tile: float32 sums run over at most this many terms before they go to a double.
constexpr int64_t kMinTilePixels = 32, kMaxTilePixels = 512;
// Feature rows a thread gathers the gradient of at once; one label row in eight ratios is interpolated twice.
constexpr int64_t kStripRows = 8;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// Neighbouring pixels of one class. Label images are patches: long runs turn a scatter into plain sums.
struct Run {
  int32_t label;
  int64_t begin, end;
};

void find_runs(const std::vector<int32_t>& labels, int64_t count, std::vector<Run>& runs) {
  runs.clear();
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    while (end < count && labels[end] == labels[begin]) {
      ++end;
    }
    runs.push_back({labels[begin], begin, end});
    begin = end;
  }
}

// Rows of features in the accumulation type: channels inner (pixel i at data + i * pixel, channels adjacent) or pixels
// inner (channel c at data + c * channel, pixels adjacent).
template <typename P>
struct Tile {
  P* data;
  int64_t pixel, channel;
  bool channels_inner;
};

template <typename P>
Tile<P> packed_tile(P* data, int64_t pixels, int64_t channels, bool channels_inner) {
  return channels_inner ? Tile<P>{data, channels, 1, true} : Tile<P>{data, 1, pixels, false};
}

// ---- small loops the compiler vectorises ----------------------------------------------------------------------------

template <typename A>
A sum(const A* z, int64_t count) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) {
    total += z[i];
  }
  return total;
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

template <typename A>
void axpy(A alpha, const A* x, A* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    y[i] += alpha * x[i];
  }
}

// ---- fixed cuts of the work -----------------------------------------------------------------------------------------

// A grid cut into row segments of at most `pixels` pixels: the unit of work.
struct Segments {
  int64_t height, width, pixels, per_row, total;

  Segments(int64_t batch, int64_t height, int64_t width, int64_t channels)
      : height(height),
        width(width),
        pixels(std::clamp(kTileElements / std::max<int64_t>(channels, 1), kMinTilePixels, kMaxTilePixels)),
        per_row(divide_up(width, pixels)),
        total(batch * height * per_row) {
    pixels = std::min(pixels, std::max<int64_t>(width, 1));
  }

  struct Segment {
    int64_t image, row, begin, count;
  };
  Segment operator[](int64_t unit) const {
    const int64_t row = unit / per_row;
    const int64_t begin = (unit % per_row) * pixels;
    return {row / height, row % height, begin, std::min(pixels, width - begin)};
  }
};

// Calls body(chunk, begin, end) for at most kChunks ranges that cover 0..units.
template <typename Body>
void for_each_chunk(int64_t units, int64_t elements, const Body& body) {
  const int64_t chunks = std::min(units, kChunks);
  const int64_t grain = std::max<int64_t>(1, chunks * kGrainElements / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      body(chunk, chunk * units / chunks, (chunk + 1) * units / chunks);
    }
  });
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Sums of one tile in the accumulation type, emptied into a chunk's doubles after each tile.
template <typename A>
class Partial {
 public:
  Partial(const Shape& shape, double* sums, double* squares)
      : d_(shape.channels),
        sums_(shape.classes * shape.channels),
        squares_(shape.classes),
        seen_(shape.classes),
        total_sums_(sums),
        total_squares_(squares) {}

  // The sums of class k, to be added to; marks the class as seen.
  A* sums(int32_t k) {
    if (!seen_[k]) {
      seen_[k] = 1;
      touched_.push_back(k);
    }
    return sums_.data() + k * d_;
  }
  A& square(int32_t k) {
    return squares_[k];
  }

  void flush() {
    for (const int32_t k : touched_) {
      A* row = sums_.data() + k * d_;
      for (int64_t c = 0; c < d_; ++c) {
        total_sums_[k * d_ + c] += static_cast<double>(row[c]);
        row[c] = 0;
      }
      total_squares_[k] += static_cast<double>(squares_[k]);
      squares_[k] = 0;
      seen_[k] = 0;
    }
    touched_.clear();
  }

 private:
  int64_t d_;
  std::vector<A> sums_, squares_;
  std::vector<char> seen_;
  std::vector<int32_t> touched_;
  double *total_sums_, *total_squares_;
};

// One row segment of features, on their own grid or interpolated, as a tile; owns the buffers that needs.
template <typename T>
class TileReader {
  using A = Accumulator<T>;

 public:
  TileReader(Features<const T> features, const Shape& shape, const Axis<A>* rows, const Axis<A>* columns)
      : z_(features), d_(shape.channels), rows_(rows), columns_(columns) {}

  bool channels_inner() const {
    return z_.channels_inner();
  }

  // `count` pixels from (b, y, x) of the features' grid; in place where dtype and strides allow.
  Tile<const A> read(int64_t b, int64_t y, int64_t x, int64_t count) {
    if constexpr (std::is_same_v<T, A>) {
      if (channels_inner() && z_.channel == 1) {
        return {z_.at(b, y, x), z_.column, 1, true};
      }
      if (!channels_inner() && z_.column == 1) {
        return {z_.at(b, y, x), 1, z_.channel, false};
      }
    }
    tile_.resize(count * d_);
    load(b, y, x, count, [](A& target, A value) { target = value; }, tile_.data());
    return packed_tile<const A>(tile_.data(), count, d_, channels_inner());
  }

  // `count` pixels from (b, y, x) of the labels' grid: first blend two feature rows, then neighbours along the row.
  Tile<const A> interpolate(int64_t b, int64_t y, int64_t x, int64_t count) {
    const int64_t left = columns_->lower[x];
    const int64_t width = columns_->upper[x + count - 1] - left + 1;
    blend_rows(b, y, left, width);
    tile_.resize(count * d_);
    for (int64_t i = 0; channels_inner() && i < count; ++i) {
      const A low = columns_->lower_weight[x + i], high = columns_->upper_weight[x + i];
      const A* a = blended_.data() + (columns_->lower[x + i] - left) * d_;  // [d]
      const A* c = blended_.data() + (columns_->upper[x + i] - left) * d_;
      A* out = tile_.data() + i * d_;
      for (int64_t j = 0; j < d_; ++j) {
        out[j] = low * a[j] + high * c[j];
      }
    }
    for (int64_t c = 0; !channels_inner() && c < d_; ++c) {
      const A* row = blended_.data() + c * width - left;
      A* out = tile_.data() + c * count;
      for (int64_t i = x; i < x + count; ++i) {
        out[i - x] = columns_->lower_weight[i] * row[columns_->lower[i]] +
                     columns_->upper_weight[i] * row[columns_->upper[i]];
      }
    }
    return packed_tile<const A>(tile_.data(), count, d_, channels_inner());
  }

 private:
  // blended_ = lower_weight * row below + upper_weight * row above, over feature columns left .. left + width
  void blend_rows(int64_t b, int64_t y, int64_t left, int64_t width) {
    blended_.resize(width * d_);
    const A low = rows_->lower_weight[y], high = rows_->upper_weight[y];
    load(b, rows_->lower[y], left, width, [low](A& target, A value) { target = low * value; }, blended_.data());
    load(b, rows_->upper[y], left, width, [high](A& target, A value) { target += high * value; }, blended_.data());
  }

  template <typename Store>
  void load(int64_t b, int64_t y, int64_t x, int64_t count, const Store& store, A* out) {
    const T* source = z_.at(b, y, x);
    const int64_t outer = channels_inner() ? count : d_, inner = channels_inner() ? d_ : count;
    const int64_t outer_stride = channels_inner() ? z_.column : z_.channel;
    const int64_t inner_stride = channels_inner() ? z_.channel : z_.column;
    for (int64_t o = 0; o < outer; ++o) {
      const T* from = source + o * outer_stride;
      A* to = out + o * inner;
      if (inner_stride == 1) {
        for (int64_t i = 0; i < inner; ++i) {
          store(to[i], static_cast<A>(from[i]));
        }
      } else {
        for (int64_t i = 0; i < inner; ++i) {
          store(to[i], static_cast<A>(from[i * inner_stride]));
        }
      }
    }
  }

  Features<const T> z_;
  int64_t d_;
  const Axis<A>*rows_, *columns_;
  std::vector<A> tile_, blended_;
};

template <typename A>
void square_norms(const Tile<const A>& tile, int64_t count, int64_t d, std::vector<A>& out) {
  out.assign(count, A(0));
  if (tile.channels_inner) {
    for (int64_t i = 0; i < count; ++i) {
      const A* row = tile.data + i * tile.pixel;
      out[i] = dot(row, row, d);
    }
    return;
  }
  for (int64_t c = 0; c < d; ++c) {
    const A* row = tile.data + c * tile.channel;
    A* norms = out.data();
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      norms[i] += row[i] * row[i];
    }
  }
}

template <typename A>
A inverse_norm(A square) {
  return A(1) / std::max(std::sqrt(square), static_cast<A>(kZeroNorm));
}

// Adds the rows of a tile, times `scale` where it is not null, to the sums of their classes.
template <typename A>
void add_rows(const Tile<const A>& tile, const std::vector<Run>& runs, const A* scale, int64_t d, Partial<A>& partial) {
  for (const Run& run : runs) {
    if (run.label == kSkip) {
      continue;
    }
    A* sums = partial.sums(run.label);
    if (tile.channels_inner) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        axpy(scale ? scale[i] : A(1), tile.data + i * tile.pixel, sums, d);
      }
      continue;
    }
    const int64_t length = run.end - run.begin;
    for (int64_t c = 0; c < d; ++c) {
      const A* row = tile.data + c * tile.channel + run.begin;
      sums[c] += scale ? dot(scale + run.begin, row, length) : sum(row, length);
    }
  }
}

// Weights of the feature pixels [x, x + count) of row i in the sums of each class: rows of the adjoint A, (K, count).
template <typename A>
class AdjointWeights {
 public:
  AdjointWeights(const Labels& labels, const Shape& shape, const Axis<A>& rows, const Axis<A>& columns)
      : labels_(labels),
        rows_(rows),
        columns_(columns),
        weights_(shape.classes * std::min(kMaxTilePixels, shape.width)),
        seen_(shape.classes),
        codes_(shape.label_width) {}

  void compute(int64_t b, int64_t i, int64_t x, int64_t count) {
    clear(count);
    const int64_t begin = columns_.first(x), end = columns_.last(x + count);
    for (int64_t y = rows_.first(i); y < rows_.last(i + 1); ++y) {
      labels_.read(b, y, begin, end - begin, codes_.data());
      add_label_row(rows_.weight(y, i), begin, end, x, count);
    }
  }
  const std::vector<int32_t>& classes() const {
    return touched_;
  }
  const A* of_class(int32_t k) const {
    return weights_.data() + k * stride();
  }

 private:
  int64_t stride() const {
    return static_cast<int64_t>(weights_.size() / seen_.size());
  }
  void clear(int64_t count) {
    for (const int32_t k : touched_) {
      std::fill_n(weights_.data() + k * stride(), count, A(0));
      seen_[k] = 0;
    }
    touched_.clear();
  }
  void add_label_row(A row_weight, int64_t begin, int64_t end, int64_t x, int64_t count) {
    for (int64_t o = begin; o < end; ++o) {
      const int32_t k = codes_[o - begin];
      if (k == kSkip) {
        continue;
      }
      if (!seen_[k]) {
        seen_[k] = 1;
        touched_.push_back(k);
      }
      A* weights = weights_.data() + k * stride();
      const int64_t low = columns_.lower[o] - x, high = columns_.upper[o] - x;
      if (low >= 0 && low < count) {
        weights[low] += row_weight * columns_.lower_weight[o];
      }
      if (high >= 0 && high < count) {
        weights[high] += row_weight * columns_.upper_weight[o];
      }
    }
  }

  const Labels& labels_;
  const Axis<A>&rows_, &columns_;
  std::vector<A> weights_;
  std::vector<char> seen_;
  std::vector<int32_t> touched_, codes_;
};

template <typename A>
void add_weighted(const Tile<const A>& tile, const AdjointWeights<A>& weights, int64_t count, int64_t d,
                  Partial<A>& partial) {
  for (const int32_t k : weights.classes()) {
    const A* weight = weights.of_class(k);
    A* sums = partial.sums(k);
    for (int64_t c = 0; !tile.channels_inner && c < d; ++c) {
      sums[c] += dot(weight, tile.data + c * tile.channel, count);
    }
    for (int64_t i = 0; tile.channels_inner && i < count; ++i) {
      if (weight[i] != A(0)) {
        axpy(weight[i], tile.data + i * tile.pixel, sums, d);
      }
    }
  }
}

struct Totals {
  std::vector<double> sums, squares;  // (chunks, K, d) and (chunks, K)

  explicit Totals(const Shape& shape)
      : sums(kChunks * shape.classes * shape.channels), squares(kChunks * shape.classes) {}
};

// Every row of the labels' grid, interpolated where the grids differ.
template <typename T>
void sum_rows(Features<const T> z, const Labels& labels, const Shape& shape, bool normalize, bool squares,
              Totals& totals) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const Segments segments(shape.batch, shape.label_height, shape.label_width, shape.channels);
  const int64_t d = shape.channels;
  for_each_chunk(segments.total, segments.total * segments.pixels * d, [&](int64_t chunk, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    Partial<A> partial(shape, totals.sums.data() + chunk * shape.classes * d,
                       totals.squares.data() + chunk * shape.classes);
    std::vector<int32_t> codes(segments.pixels);
    std::vector<Run> runs;
    std::vector<A> norms, scale(normalize ? segments.pixels : 0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, y, x, count] = segments[unit];
      labels.read(b, y, x, count, codes.data());
      find_runs(codes, count, runs);
      const Tile<const A> tile =
          shape.same_grid() ? reader.read(b, y, x, count) : reader.interpolate(b, y, x, count);
      if (normalize || squares) {
        square_norms(tile, count, d, norms);
      }
      for (int64_t i = 0; normalize && i < count; ++i) {
        scale[i] = inverse_norm(norms[i]);
        norms[i] *= scale[i] * scale[i];
      }
      add_rows(tile, runs, normalize ? scale.data() : nullptr, d, partial);
      for (const Run& run : runs) {
        if (squares && run.label != kSkip) {
          partial.square(run.label) += sum(norms.data() + run.begin, run.end - run.begin);
        }
      }
      partial.flush();
    }
  });
}

// Plain rows on another grid: the weights of each feature pixel in each class, times the features.
template <typename T>
void sum_adjoint(Features<const T> z, const Labels& labels, const Shape& shape, Totals& totals) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const Segments segments(shape.batch, shape.height, shape.width, shape.channels);
  const int64_t d = shape.channels;
  for_each_chunk(segments.total, segments.total * segments.pixels * d, [&](int64_t chunk, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    AdjointWeights<A> weights(labels, shape, rows, columns);
    Partial<A> partial(shape, totals.sums.data() + chunk * shape.classes * d,
                       totals.squares.data() + chunk * shape.classes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, i, x, count] = segments[unit];
      weights.compute(b, i, x, count);
      add_weighted(reader.read(b, i, x, count), weights, count, d, partial);
      partial.flush();
    }
  });
}

void count_labels(const Labels& labels, const Shape& shape, int64_t* counts) {
  const int64_t rows = shape.batch * shape.label_height;
  std::vector<int64_t> partial(kChunks * shape.classes);
  for_each_chunk(rows, rows * shape.label_width, [&](int64_t chunk, int64_t begin, int64_t end) {
    std::vector<int32_t> codes(shape.label_width);
    int64_t* own = partial.data() + chunk * shape.classes;
    for (int64_t row = begin; row < end; ++row) {
      labels.read(row / shape.label_height, row % shape.label_height, 0, shape.label_width, codes.data());
      for (const int32_t k : codes) {
        if (k != kSkip) {
          ++own[k];
        }
      }
    }
  });
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
    for (int64_t k = 0; k < shape.classes; ++k) {
      counts[k] += partial[chunk * shape.classes + k];
    }
  }
}

// Adds the chunks in order.
template <typename A>
void reduce_chunks(const std::vector<double>& partial, A* out) {
  const int64_t size = static_cast<int64_t>(partial.size()) / kChunks;
  std::vector<double> total(size);
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
    for (int64_t i = 0; i < size; ++i) {
      total[i] += partial[chunk * size + i];
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    out[i] = static_cast<A>(total[i]);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The upstream gradients as contiguous copies: sums (K, d) for channels inner, and (d, K) for pixels inner.
template <typename A>
struct Upstream {
  std::vector<A> by_class, by_channel, squares;
  int64_t classes, channels;
  bool with_squares;

  Upstream(const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_squares, const Shape& shape)
      : by_class(shape.classes * shape.channels),
        by_channel(shape.classes * shape.channels),
        squares(shape.classes),
        classes(shape.classes),
        channels(shape.channels),
        with_squares(grad_squares.has_value()) {
    for (int64_t k = 0; grad_squares && k < classes; ++k) {
      squares[k] = static_cast<const A*>(grad_squares->const_data_ptr())[k * grad_squares->stride(0)];
    }
    for (int64_t k = 0; grad_sums && k < classes; ++k) {
      const A* row = static_cast<const A*>(grad_sums->const_data_ptr()) + k * grad_sums->stride(0);
      for (int64_t c = 0; c < channels; ++c) {
        by_class[k * channels + c] = by_channel[c * classes + k] = row[c * grad_sums->stride(1)];
      }
    }
  }
};

// Gradient of one row z of class k, dz = alpha g_k + beta z:
//   plain:       alpha = 1,        beta = 2 q_k
//   normalised:  alpha = 1 / |z|,  beta = (2 q_k - du.u) / |z|^2,  du.u = g_k.z / |z| + 2 q_k |u|^2;  0 for a zero row
template <typename A>
struct RowGradient {
  A alpha, beta;

  RowGradient(A square, A projection, A square_gradient, bool normalize)
      : alpha(1), beta(2 * square_gradient) {
    if (!normalize) {
      return;
    }
    const A inverse = inverse_norm(square);
    alpha = std::sqrt(square) > static_cast<A>(kZeroNorm) ? inverse : A(0);
    const A radial = inverse * projection + 2 * square_gradient * inverse * inverse * square;
    beta = alpha * alpha * (2 * square_gradient - radial);
  }
};

// Row gradients of a tile into `out`, which has the tile's layout; zero where a pixel has no class.
template <typename A>
class TileGradient {
 public:
  TileGradient(const Upstream<A>& upstream, bool normalize) : upstream_(upstream), normalize_(normalize) {}

  void compute(const Tile<const A>& z, const std::vector<Run>& runs, int64_t count, const Tile<A>& out) {
    if (z.channels_inner) {
      channels_inner(z, runs, out);
    } else {
      pixels_inner(z, runs, count, out);
    }
  }

  // Plain rows without squares: dz = g_k, whatever z is.
  void broadcast(const std::vector<Run>& runs, const Tile<A>& out) {
    const int64_t d = upstream_.channels, classes = upstream_.classes;
    for (const Run& run : runs) {
      for (int64_t i = run.begin; out.channels_inner && i < run.end; ++i) {
        A* to = out.data + i * out.pixel;
        if (run.label == kSkip) {
          std::fill_n(to, d, A(0));
        } else {
          std::copy_n(upstream_.by_class.data() + run.label * d, d, to);
        }
      }
      for (int64_t c = 0; !out.channels_inner && c < d; ++c) {
        A* to = out.data + c * out.channel;
        const A g = run.label == kSkip ? A(0) : upstream_.by_channel[c * classes + run.label];
        std::fill(to + run.begin, to + run.end, g);
      }
    }
  }

 private:
  void channels_inner(const Tile<const A>& z, const std::vector<Run>& runs, const Tile<A>& out) {
    const int64_t d = upstream_.channels;
    for (const Run& run : runs) {
      for (int64_t i = run.begin; i < run.end; ++i) {
        A* to = out.data + i * out.pixel;
        if (run.label == kSkip) {
          std::fill_n(to, d, A(0));
          continue;
        }
        const A* row = z.data + i * z.pixel;
        const A* g = upstream_.by_class.data() + run.label * d;
        const A square = normalize_ ? dot(row, row, d) : A(0), projection = normalize_ ? dot(row, g, d) : A(0);
        const RowGradient<A> gradient(square, projection, upstream_.squares[run.label], normalize_);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) {
          to[c] = gradient.alpha * g[c] + gradient.beta * row[c];
        }
      }
    }
  }

  void pixels_inner(const Tile<const A>& z, const std::vector<Run>& runs, int64_t count, const Tile<A>& out) {
    const int64_t d = upstream_.channels, classes = upstream_.classes;
    projection_.assign(count, A(0));
    square_.assign(count, A(0));
    for (int64_t c = 0; normalize_ && c < d; ++c) {
      const A* row = z.data + c * z.channel;
      for (const Run& run : runs) {
        const A g = run.label == kSkip ? A(0) : upstream_.by_channel[c * classes + run.label];
        for (int64_t i = run.begin; i < run.end; ++i) {
          square_[i] += row[i] * row[i];
          projection_[i] += g * row[i];
        }
      }
    }
    for (const Run& run : runs) {
      for (int64_t i = run.begin; run.label != kSkip && i < run.end; ++i) {
        const RowGradient<A> gradient(square_[i], projection_[i], upstream_.squares[run.label], normalize_);
        square_[i] = gradient.alpha;  // the buffers are done with: they carry alpha and beta from here on
        projection_[i] = gradient.beta;
      }
    }
    for (int64_t c = 0; c < d; ++c) {
      const A* row = z.data + c * z.channel;
      A* to = out.data + c * out.channel;
      for (const Run& run : runs) {
        if (run.label == kSkip) {
          std::fill(to + run.begin, to + run.end, A(0));
          continue;
        }
        const A g = upstream_.by_channel[c * classes + run.label];
        for (int64_t i = run.begin; i < run.end; ++i) {
          to[i] = square_[i] * g + projection_[i] * row[i];
        }
      }
    }
  }

  const Upstream<A>& upstream_;
  bool normalize_;
  std::vector<A> square_, projection_;
};

// Where one row segment of gradients is written: in place where dtype and strides allow, else through a buffer.
template <typename T>
class TileWriter {
  using A = Accumulator<T>;

 public:
  TileWriter(Features<T> gradient, int64_t channels, bool channels_inner)
      : g_(gradient), d_(channels), channels_inner_(channels_inner) {}

  Tile<A> begin(int64_t b, int64_t y, int64_t x, int64_t count) {
    target_ = g_.at(b, y, x);
    count_ = count;
    in_place_ = std::is_same_v<T, A> && (channels_inner_ ? g_.channel : g_.column) == 1;
    if constexpr (std::is_same_v<T, A>) {
      if (in_place_) {
        return channels_inner_ ? Tile<A>{target_, g_.column, 1, true} : Tile<A>{target_, 1, g_.channel, false};
      }
    }
    buffer_.resize(count * d_);
    return packed_tile(buffer_.data(), count, d_, channels_inner_);
  }

  void end() {
    if (!in_place_) {
      store(buffer_.data());
    }
  }

  // Writes a packed tile of `count` pixels from (b, y, x) on.
  void write(int64_t b, int64_t y, int64_t x, int64_t count, const A* tile) {
    target_ = g_.at(b, y, x);
    count_ = count;
    store(tile);
  }

 private:
  void store(const A* tile) {
    const int64_t outer = channels_inner_ ? count_ : d_, inner = channels_inner_ ? d_ : count_;
    const int64_t outer_stride = channels_inner_ ? g_.column : g_.channel;
    const int64_t inner_stride = channels_inner_ ? g_.channel : g_.column;
    for (int64_t o = 0; o < outer; ++o) {
      for (int64_t i = 0; i < inner; ++i) {
        target_[o * outer_stride + i * inner_stride] = static_cast<T>(tile[o * inner + i]);
      }
    }
  }

  Features<T> g_;
  int64_t d_;
  bool channels_inner_, in_place_ = false;
  T* target_ = nullptr;
  int64_t count_ = 0;
  std::vector<A> buffer_;
};

template <typename T>
void backward_same_grid(Features<const T> z, const Labels& labels, const Shape& shape,
                        const Upstream<Accumulator<T>>& upstream, bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const Segments segments(shape.batch, shape.height, shape.width, shape.channels);
  const int64_t elements = segments.total * segments.pixels * shape.channels;
  for_each_chunk(segments.total, elements, [&](int64_t, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, nullptr, nullptr);
    TileWriter<T> writer(gradient, shape.channels, reader.channels_inner());
    TileGradient<A> rows(upstream, normalize);
    std::vector<int32_t> codes(segments.pixels);
    std::vector<Run> runs;
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, y, x, count] = segments[unit];
      labels.read(b, y, x, count, codes.data());
      find_runs(codes, count, runs);
      const Tile<A> out = writer.begin(b, y, x, count);
      if (normalize || upstream.with_squares) {
        rows.compute(reader.read(b, y, x, count), runs, count, out);
      } else {
        rows.broadcast(runs, out);
      }
      writer.end();
    }
  });
}

// Plain rows without squares on another grid: dZ = A^T grad_sums; the features are not read.
template <typename T>
void backward_adjoint(const Labels& labels, const Shape& shape, const Upstream<Accumulator<T>>& upstream,
                      bool channels_inner, Features<T> gradient) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const Segments segments(shape.batch, shape.height, shape.width, shape.channels);
  const int64_t d = shape.channels;
  for_each_chunk(segments.total, segments.total * segments.pixels * d, [&](int64_t, int64_t begin, int64_t end) {
    AdjointWeights<A> weights(labels, shape, rows, columns);
    TileWriter<T> writer(gradient, d, channels_inner);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, i, x, count] = segments[unit];
      weights.compute(b, i, x, count);
      const Tile<A> out = writer.begin(b, i, x, count);
      const int64_t outer = channels_inner ? count : d, inner = channels_inner ? d : count;
      const int64_t stride = channels_inner ? out.pixel : out.channel;
      for (int64_t o = 0; o < outer; ++o) {
        A* to = out.data + o * stride;
        std::fill_n(to, inner, A(0));
        for (const int32_t k : weights.classes()) {
          if (channels_inner) {
            axpy(weights.of_class(k)[o], upstream.by_class.data() + k * d, to, d);
          } else {
            axpy(upstream.by_channel[o * shape.classes + k], weights.of_class(k), to, count);
          }
        }
      }
      writer.end();
    }
  });
}

// One label row's gradients brought back to the feature columns: the adjoint of the interpolation along the row.
template <typename A>
void add_to_columns(const Tile<const A>& tile, const Axis<A>& columns, int64_t x, int64_t count, int64_t d,
                    int64_t width, A* out) {
  for (int64_t i = 0; tile.channels_inner && i < count; ++i) {
    const A* row = tile.data + i * tile.pixel;
    axpy(columns.lower_weight[x + i], row, out + columns.lower[x + i] * d, d);
    axpy(columns.upper_weight[x + i], row, out + columns.upper[x + i] * d, d);
  }
  for (int64_t c = 0; !tile.channels_inner && c < d; ++c) {
    const A* row = tile.data + c * tile.channel - x;
    A* to = out + c * width;
    for (int64_t i = x; i < x + count; ++i) {
      to[columns.lower[i]] += columns.lower_weight[i] * row[i];
      to[columns.upper[i]] += columns.upper_weight[i] * row[i];
    }
  }
}

// Everything else on another grid: each strip of feature rows gathers from the label rows that touch it.
template <typename T>
void backward_interpolated(Features<const T> z, const Labels& labels, const Shape& shape,
                           const Upstream<Accumulator<T>>& upstream, bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const Segments segments(1, 1, shape.label_width, shape.channels);
  const int64_t d = shape.channels, row_size = shape.width * d;
  const int64_t strips = divide_up(shape.height, kStripRows);
  const int64_t elements = shape.batch * shape.label_height * shape.label_width * d;
  for_each_chunk(shape.batch * strips, elements, [&](int64_t, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    TileWriter<T> writer(gradient, d, reader.channels_inner());
    TileGradient<A> row_gradients(upstream, normalize);
    std::vector<int32_t> codes(segments.pixels);
    std::vector<Run> runs;
    std::vector<A> tile(segments.pixels * d), label_row(row_size), strip(kStripRows * row_size);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / strips, top = (unit % strips) * kStripRows;
      const int64_t bottom = std::min(top + kStripRows, shape.height);
      std::fill(strip.begin(), strip.end(), A(0));
      for (int64_t y = rows.first(top); y < rows.last(bottom); ++y) {
        std::fill(label_row.begin(), label_row.end(), A(0));
        for (int64_t part = 0; part < segments.total; ++part) {
          const auto segment = segments[part];
          labels.read(b, y, segment.begin, segment.count, codes.data());
          find_runs(codes, segment.count, runs);
          const Tile<A> out = packed_tile(tile.data(), segment.count, d, reader.channels_inner());
          row_gradients.compute(reader.interpolate(b, y, segment.begin, segment.count), runs, segment.count, out);
          add_to_columns<A>({out.data, out.pixel, out.channel, out.channels_inner}, columns, segment.begin,
                            segment.count, d, shape.width, label_row.data());
        }
        for (int64_t i = std::max(top, rows.lower[y]); i < std::min(bottom, rows.upper[y] + 1); ++i) {
          axpy(rows.weight(y, i), label_row.data(), strip.data() + (i - top) * row_size, row_size);
        }
      }
      for (int64_t i = top; i < bottom; ++i) {
        writer.write(b, i, 0, shape.width, strip.data() + (i - top) * row_size);
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> class_sums(Tensor features, Tensor labels, int64_t num_classes,
                                              int64_t ignore_index, bool normalize, bool squares) {
  const Shape shape = checked_shape(features, labels, num_classes);
  const ScalarType type = accumulator_type(features.scalar_type());
  Tensor sums = torch::stable::new_zeros(features, {shape.classes, shape.channels}, type);
  Tensor counts = torch::stable::new_zeros(features, {shape.classes}, ScalarType::Long);
  Tensor square_sums = torch::stable::new_zeros(features, {squares ? shape.classes : 0}, type);
  const Labels codes(labels, shape.classes, ignore_index);
  count_labels(codes, shape, static_cast<int64_t*>(counts.mutable_data_ptr()));
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Totals totals(shape);
    if (shape.same_grid() || normalize || squares) {
      sum_rows(view<T>(features), codes, shape, normalize, squares, totals);
    } else {
      sum_adjoint(view<T>(features), codes, shape, totals);
    }
    reduce_chunks(totals.sums, static_cast<A*>(sums.mutable_data_ptr()));
    if (squares) {
      reduce_chunks(totals.squares, static_cast<A*>(square_sums.mutable_data_ptr()));
    }
  });
  return {sums, counts, square_sums};
}

Tensor class_sums_backward(std::optional<Tensor> grad_sums, std::optional<Tensor> grad_squares, Tensor features,
                           Tensor labels, int64_t ignore_index, bool normalize) {
  const Shape shape = checked_shape(grad_sums, grad_squares, features, labels);
  Tensor gradient = torch::stable::empty_like(features);
  const Labels codes(labels, shape.classes, ignore_index);
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Upstream<Accumulator<T>> upstream(grad_sums, grad_squares, shape);
    const Features<const T> z = view<T>(features);
    const Features<T> out = mutable_view<T>(gradient);
    if (shape.same_grid()) {
      backward_same_grid(z, codes, shape, upstream, normalize, out);
    } else if (normalize || grad_squares) {
      backward_interpolated(z, codes, shape, upstream, normalize, out);
    } else {
      backward_adjoint(codes, shape, upstream, z.channels_inner(), out);
    }
  });
  return gradient;
}

}  // namespace in2nect::cpu
