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
//
// Labels are read once, and checked as they are: the number of strays, neither a class nor the ignored one, goes to the
// caller. The inner loops are in vector/class_sums.cpp; here is what is cut, read, kept and written.
#include "class_sums.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/class_sums.h"
#include "chunks.h"
#include "codes.h"
#include "interpolation.h"
#include "loops.h"
#include "memory.h"
#include "views.h"

namespace in2nect::cpu {
namespace {

// Partial results a call is cut into: enough for 64 threads ...
constexpr int64_t kMaxChunks = 64;
// ... each of at least so many times the K x d totals that it must keep, zero and add.
constexpr int64_t kChunkTotals = 8;
// Elements of a tile that is read twice: 128 KiB of float32, so that it stays in a second-level cache.
constexpr int64_t kTileElements = 32768;
// Pixels of a tile: float32 sums run over at most this many terms (a lane: kBlockTerms) before they go to a double.
constexpr int64_t kMinTilePixels = 32, kMaxTilePixels = 512, kBlockTerms = 128;
// Channels and pixels that one pass over a piece of the labels writes the plain gradient of: 64 KiB of float32 a
// channel, so that memory is written in its order, and a fresh page while it is still in a cache.
constexpr int64_t kWrittenChannels = 16, kWrittenPixels = 16384;
// Classes of a tile up to which each channel is read once a few of them; beyond, the classes' own pixels are gathered.
constexpr int64_t kStreamedClasses = 14;
// Of such tiles there are at least so many where they need not be too short for that; their codes, 4 bytes a pixel,
// stay in a second-level cache.
constexpr int64_t kStreamedTiles = 8, kLeastStreamedPixels = 4096, kMostStreamedPixels = 65536;
// Feature rows a thread gathers the gradient of at once; one label row in eight ratios is interpolated twice.
constexpr int64_t kStripRows = 8;

// Rows of features: channels inner (pixel i at data + i * pixel, channels adjacent) or pixels inner (channel c at
// data + c * channel, pixels adjacent).
template <typename P>
struct Tile {
  P* data;
  int64_t pixel, channel;
  bool channels_inner;
};

template <typename P>
Tile<P> packed_tile(P* data, int64_t pixels, int64_t channels, bool channels_inner) {
  return channels_inner ? Tile<P>{data, channels, 1, true} : Tile<P>{data, 1, std::max(pixels, kMostLanes), false};
}

// Elements that packed_tile occupies.
int64_t packed_size(int64_t pixels, int64_t channels) {
  return std::max(pixels, kMostLanes) * channels;
}

// ---- fixed cuts of the work -----------------------------------------------------------------------------------------

// Pixels of a tile that is read more than once.
int64_t tile_pixels(int64_t channels) {
  return std::clamp(kTileElements / std::max<int64_t>(channels, 1), kMinTilePixels, kMaxTilePixels);
}

// Pixels of a tile whose channels are streamed: long, for memory is read fastest in long pieces, but some for each
// thread.
int64_t streamed_pixels(int64_t total) {
  return std::clamp(total / kStreamedTiles, kLeastStreamedPixels, kMostStreamedPixels);
}

int64_t chunks_of(int64_t units, int64_t elements, int64_t totals) {
  return std::min({units, kMaxChunks, std::max<int64_t>(1, elements / std::max<int64_t>(1, kChunkTotals * totals))});
}

// ---- forward --------------------------------------------------------------------------------------------------------

// What the chunks found, each its own.
struct Totals {
  int64_t chunks, classes, channels;
  std::vector<double> sums, squares;  // (chunks, K, d) and (chunks, K)
  std::vector<int64_t> counts, strays;

  Totals(int64_t chunks, const Shape& shape)
      : chunks(chunks),
        classes(shape.classes),
        channels(shape.channels),
        sums(chunks * classes * channels),
        squares(chunks * classes),
        counts(chunks * classes),
        strays(chunks) {}

  double* sums_of(int64_t chunk) {
    return sums.data() + chunk * classes * channels;
  }
  double* squares_of(int64_t chunk) {
    return squares.data() + chunk * classes;
  }
  int64_t* counts_of(int64_t chunk) {
    return counts.data() + chunk * classes;
  }
};

// One row segment of features, on their own grid or interpolated, as a tile; owns the buffers that needs.
template <typename T>
class TileReader {
  using A = Accumulator<T>;
  using S = Stored<T>;

 public:
  TileReader(Features<const T> features, const Shape& shape, const Axis<A>* rows, const Axis<A>* columns)
      : z_(features), d_(shape.channels), rows_(rows), columns_(columns) {}

  bool channels_inner() const {
    return z_.channels_inner();
  }

  // use(tile) with `count` pixels from (b, y, x) of the features' grid: as stored where strides allow, else copied.
  template <typename Use>
  void read(int64_t b, int64_t y, int64_t x, int64_t count, const Use& use) {
    const S* data = reinterpret_cast<const S*>(z_.at(b, y, x));
    if (channels_inner() && z_.channel == 1) {
      return use(Tile<const S>{data, z_.column, 1, true});
    }
    if (!channels_inner() && z_.column == 1 && count >= loops_of<S>().lanes) {
      return use(Tile<const S>{data, 1, z_.channel, false});
    }
    tile_.resize(packed_size(count, d_));
    load(b, y, x, count, tile_.data());
    use(packed_tile<const A>(tile_.data(), count, d_, channels_inner()));
  }

  // `count` pixels from (b, y, x) of the labels' grid: first blend two feature rows, then neighbours along the row.
  Tile<const A> interpolate(int64_t b, int64_t y, int64_t x, int64_t count) {
    const int64_t left = columns_->lower[x];
    const int64_t width = columns_->upper[x + count - 1] - left + 1;
    const Tile<A> blended = blend_rows(b, y, left, width);
    tile_.resize(packed_size(count, d_));
    const Tile<A> tile = packed_tile(tile_.data(), count, d_, channels_inner());
    for (int64_t i = 0; channels_inner() && i < count; ++i) {
      const A* lower = blended.data + (columns_->lower[x + i] - left) * d_;  // [d]
      const A* upper = blended.data + (columns_->upper[x + i] - left) * d_;
      loops_of<A>().blend(lower, upper, columns_->lower_weight[x + i], columns_->upper_weight[x + i], d_,
                          tile.data + i * d_);
    }
    for (int64_t c = 0; !channels_inner() && c < d_; ++c) {
      const A* row = blended.data + c * blended.channel - left;
      A* out = tile.data + c * tile.channel;
      for (int64_t i = x; i < x + count; ++i) {
        out[i - x] = columns_->lower_weight[i] * row[columns_->lower[i]] +
                     columns_->upper_weight[i] * row[columns_->upper[i]];
      }
    }
    return {tile.data, tile.pixel, tile.channel, tile.channels_inner};
  }

 private:
  // lower_weight * row below + upper_weight * row above, over feature columns left .. left + width
  Tile<A> blend_rows(int64_t b, int64_t y, int64_t left, int64_t width) {
    blended_.resize(packed_size(width, d_));
    const Tile<A> out = packed_tile(blended_.data(), width, d_, channels_inner());
    const A low = rows_->lower_weight[y], high = rows_->upper_weight[y];
    const int64_t inner = channels_inner() ? d_ : width, outer = channels_inner() ? width : d_;
    if ((channels_inner() ? z_.channel : z_.column) == 1) {
      const S* below = reinterpret_cast<const S*>(z_.at(b, rows_->lower[y], left));
      const S* above = reinterpret_cast<const S*>(z_.at(b, rows_->upper[y], left));
      const int64_t from = channels_inner() ? z_.column : z_.channel, to = channels_inner() ? out.pixel : out.channel;
      for (int64_t o = 0; o < outer; ++o) {
        loops_of<S>().blend(below + o * from, above + o * from, low, high, inner, out.data + o * to);
      }
      return out;
    }
    above_.resize(blended_.size());
    load(b, rows_->lower[y], left, width, blended_.data());
    load(b, rows_->upper[y], left, width, above_.data());
    loops_of<A>().blend(blended_.data(), above_.data(), low, high, blended_.size(), blended_.data());
    return out;
  }

  void load(int64_t b, int64_t y, int64_t x, int64_t count, A* out) const {
    const T* source = z_.at(b, y, x);
    const Tile<A> tile = packed_tile(out, count, d_, channels_inner());
    for (int64_t c = 0; !channels_inner() && c < d_; ++c) {
      for (int64_t i = 0; i < count; ++i) {
        tile.data[c * tile.channel + i] = static_cast<A>(source[c * z_.channel + i * z_.column]);
      }
    }
    for (int64_t i = 0; channels_inner() && i < count; ++i) {
      for (int64_t c = 0; c < d_; ++c) {
        tile.data[i * tile.pixel + c] = static_cast<A>(source[c * z_.channel + i * z_.column]);
      }
    }
  }

  Features<const T> z_;
  int64_t d_;
  const Axis<A>*rows_, *columns_;
  std::vector<A> tile_, blended_, above_;
};

// Adds tiles to the doubles of a chunk.
template <typename A>
class TileSums {
 public:
  TileSums(const Shape& shape, int64_t pixels, bool normalize, bool squares, double* sums, double* square_sums)
      : d_(shape.channels),
        normalize_(normalize),
        squares_(squares),
        sums_(sums),
        square_sums_(square_sums),
        norms_(normalize || squares ? std::max(pixels, kMostLanes) : 0),
        scale_(normalize ? std::max(pixels, kMostLanes) : 0),
        rows_((shape.classes + 1) * d_),
        row_squares_(shape.classes + 1) {}

  // `codes` with room for two blocks behind; `present` are the classes among them.
  template <typename S>
  void add(const Tile<const S>& tile, int64_t count, int32_t* codes, const std::vector<int32_t>& present) {
    const auto& run = loops_of<S>();
    if (!norms_.empty() && tile.channels_inner) {
      run.norms_channels(tile.data, tile.pixel, count, d_, norms_.data());
    } else if (!norms_.empty()) {
      run.norms_pixels(tile.data, tile.channel, count, d_, norms_.data());
    }
    if (normalize_) {
      arithmetic<A>().unit_scales(norms_.data(), count, scale_.data());
    }
    const A* scale = normalize_ ? scale_.data() : nullptr;
    if (tile.channels_inner) {
      run.add_pixels(tile.data, tile.pixel, count, d_, codes, scale, squares_ ? norms_.data() : nullptr,
                     rows_.data() + d_, row_squares_.data() + 1);
      for (const int32_t k : present) {
        arithmetic<A>().flush(rows_.data() + (k + 1) * d_, d_, sums_ + k * d_);
        arithmetic<A>().flush(row_squares_.data() + k + 1, 1, square_sums_ + k);
      }
      return;
    }
    present_.clear();
    for (const int32_t k : present) {
      present_.push_back({k, 0});
    }
    const int64_t classes = static_cast<int64_t>(present.size());
    if (classes <= kStreamedClasses) {
      run.add_streams(tile.data, tile.channel, count, d_, present_.data(), classes, codes, scale, sums_, d_);
      if (squares_) {  // the norms are one channel more
        loops_of<A>().add_streams(norms_.data(), 0, count, 1, present_.data(), classes, codes, nullptr, square_sums_,
                                  1);
      }
      return;
    }
    blocks_.resize(count + kMostLanes);
    loops().labels.find_blocks(codes, count, run.lanes, present_.data(), classes, blocks_.data());
    run.add_blocks(tile.data, tile.channel, d_, blocks_.data(), present_.data(), classes, codes, scale, sums_, d_,
                   count);
    if (squares_) {  // the norms are one channel more
      loops_of<A>().add_blocks(norms_.data(), 0, 1, blocks_.data(), present_.data(), classes, codes, nullptr,
                               square_sums_, 1, count);
    }
  }

 private:
  int64_t d_;
  bool normalize_, squares_;
  double *sums_, *square_sums_;
  std::vector<A> norms_, scale_;
  std::vector<A> rows_, row_squares_;  // channels inner: a tile's sums, behind a row for the pixels of no class
  std::vector<ClassOfBlocks> present_;
  std::vector<Block> blocks_;
};

// Weights of the feature pixels [x, x + count) of row i in the sums of each class: rows of the adjoint A, (K, count).
template <typename A>
class AdjointWeights {
 public:
  AdjointWeights(const Labels& labels, const Shape& shape, int64_t ignore, int64_t pixels, const Axis<A>& rows,
                 const Axis<A>& columns)
      : rows_(rows),
        columns_(columns),
        weights_(shape.classes * pixels),
        seen_(shape.classes),
        codes_(labels, shape.classes, ignore, shape.label_width) {}

  void compute(int64_t b, int64_t i, int64_t x, int64_t count) {
    clear(count);
    const int64_t begin = columns_.first(x), end = columns_.last(x + count);
    for (int64_t y = rows_.first(i); y < rows_.last(i + 1); ++y) {
      codes_.read(b, y, begin, end - begin);
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

  const Axis<A>&rows_, &columns_;
  std::vector<A> weights_;
  std::vector<char> seen_;
  Codes codes_;
  std::vector<int32_t> touched_;
};

// sums += weights x rows of a tile; `row` and `sum` are scratch of `count` and d.
template <typename A, typename S>
void add_weighted(const Tile<const S>& tile, const AdjointWeights<A>& weights, int64_t count, int64_t d, A* row, A* sum,
                  double* sums) {
  for (int64_t c = 0; !tile.channels_inner && c < d; ++c) {
    loops_of<S>().widen(tile.data + c * tile.channel, count, row);
    for (const int32_t k : weights.classes()) {
      sums[k * d + c] += static_cast<double>(arithmetic<A>().dot(weights.of_class(k), row, count));
    }
  }
  for (const int32_t k : weights.classes()) {
    if (!tile.channels_inner) {
      break;
    }
    const A* weight = weights.of_class(k);
    for (int64_t i = 0; i < count; ++i) {
      if (weight[i] == A(0)) {
        continue;
      }
      if constexpr (std::is_same_v<S, A>) {
        arithmetic<A>().axpy(weight[i], tile.data + i * tile.pixel, d, sum);
      } else {
        loops_of<S>().widen(tile.data + i * tile.pixel, d, row);
        arithmetic<A>().axpy(weight[i], row, d, sum);
      }
    }
    arithmetic<A>().flush(sum, d, sums + k * d);
  }
}

// Every row of the labels' grid, interpolated where the grids differ.
template <typename T>
Totals sum_rows(Features<const T> z, const Labels& labels, const Shape& given, int64_t ignore, bool normalize,
                bool squares) {
  using A = Accumulator<T>;
  const Shape shape = as_lines(given, z, labels);
  const int64_t d = shape.channels;
  const bool once = shape.same_grid() && !normalize && !squares && !z.channels_inner() && z.column == 1;
  const int64_t pixels = !once ? tile_pixels(d)
                         : shape.classes <= kStreamedClasses
                             ? streamed_pixels(shape.batch * shape.height * shape.width)
                             : kBlockTerms * loops_of<Stored<T>>().lanes;
  const Axis<A> rows(shape.same_grid() ? 0 : shape.height, shape.same_grid() ? 0 : shape.label_height);
  const Axis<A> columns(shape.same_grid() ? 0 : shape.width, shape.same_grid() ? 0 : shape.label_width);
  const Segments segments(shape.batch, shape.label_height, shape.label_width, pixels);
  const int64_t elements = segments.total * segments.pixels * d;
  Totals totals(chunks_of(segments.total, elements, shape.classes * d), shape);
  for_each_chunk(totals.chunks, segments.total, elements, [&](int64_t chunk, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    Codes codes(labels, shape.classes, ignore, segments.pixels);
    Counter counter(shape.classes);
    TileSums<A> sums(shape, segments.pixels, normalize, squares, totals.sums_of(chunk), totals.squares_of(chunk));
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, y, x, count] = segments[unit];
      totals.strays[chunk] += codes.read(b, y, x, count);
      counter.add(codes.data(), count, totals.counts_of(chunk));
      const auto add = [&, pixels = count](const auto& tile) {
        sums.add(tile, pixels, codes.data(), counter.present());
      };
      if (shape.same_grid()) {
        reader.read(b, y, x, count, add);
      } else {
        add(reader.interpolate(b, y, x, count));
      }
    }
  });
  return totals;
}

// Plain rows on another grid: the weights of each feature pixel in each class, times the features.
template <typename T>
Totals sum_adjoint(Features<const T> z, const Labels& labels, const Shape& shape, int64_t ignore) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const int64_t d = shape.channels;
  const Segments segments(shape.batch, shape.height, shape.width, tile_pixels(d));
  const int64_t elements = segments.total * segments.pixels * d;
  Totals totals(chunks_of(segments.total, elements, shape.classes * d), shape);
  for_each_chunk(totals.chunks, segments.total, elements, [&](int64_t chunk, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    AdjointWeights<A> weights(labels, shape, ignore, segments.pixels, rows, columns);
    std::vector<A> row(std::max(segments.pixels, d)), sum(d);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, i, x, count] = segments[unit];
      weights.compute(b, i, x, count);
      reader.read(b, i, x, count, [&, pixels = count](const auto& tile) {
        add_weighted(tile, weights, pixels, d, row.data(), sum.data(), totals.sums_of(chunk));
      });
    }
  });
  return totals;
}

// Counts and strays alone.
Totals count_labels(const Labels& labels, const Shape& shape, int64_t ignore) {
  const int64_t rows = shape.batch * shape.label_height;
  Totals totals(std::min(rows, kMaxChunks), {0, 0, 0, 0, 0, 0, shape.classes});
  for_each_chunk(totals.chunks, rows, rows * shape.label_width, [&](int64_t chunk, int64_t begin, int64_t end) {
    Codes codes(labels, shape.classes, ignore, shape.label_width);
    Counter counter(shape.classes);
    for (int64_t row = begin; row < end; ++row) {
      totals.strays[chunk] += codes.read(row / shape.label_height, row % shape.label_height, 0, shape.label_width);
      counter.add(codes.data(), shape.label_width, totals.counts_of(chunk));
    }
  });
  return totals;
}

// ---- backward -------------------------------------------------------------------------------------------------------

// Tables of `rows` rows and an empty one before the first, for code kSkip; and room for what loops read behind.
template <typename A>
class Behind {
 public:
  Behind(int64_t rows, int64_t width) : offset_(width), numbers_((rows + 1) * width + kPermuted) {}
  A* data() {
    return numbers_.data() + offset_;
  }
  const A* data() const {
    return numbers_.data() + offset_;
  }

 private:
  int64_t offset_;
  std::vector<A> numbers_;
};

// The upstream gradients by class, in two orders: sums (K, d) for channels inner, and (d, K), each row behind a
// zero and `pitch` from the last, for pixels inner; squares (K,).
template <typename A>
struct Upstream {
  int64_t classes, channels, pitch;
  Behind<A> by_class, squares;
  std::vector<A> channel_rows;
  bool with_squares;

  Upstream(const std::optional<Tensor>& grad_sums, const std::optional<Tensor>& grad_squares, const Shape& shape)
      : classes(shape.classes),
        channels(shape.channels),
        pitch(std::max(classes + 1, kPermuted)),
        by_class(classes, channels),
        squares(classes, 1),
        channel_rows(channels * pitch),
        with_squares(grad_squares.has_value()) {
    for (int64_t k = 0; grad_squares && k < classes; ++k) {
      squares.data()[k] = static_cast<const A*>(grad_squares->const_data_ptr())[k * grad_squares->stride(0)];
    }
    for (int64_t k = 0; grad_sums && k < classes; ++k) {
      const A* row = static_cast<const A*>(grad_sums->const_data_ptr()) + k * grad_sums->stride(0);
      for (int64_t c = 0; c < channels; ++c) {
        by_class.data()[k * channels + c] = channel_rows[c * pitch + 1 + k] = row[c * grad_sums->stride(1)];
      }
    }
  }
  // Element k is class k's.
  const A* of_channel(int64_t c) const {
    return channel_rows.data() + c * pitch + 1;
  }
};

// Row gradients of tiles into `out`; zero where a pixel has no class.
template <typename A>
class TileGradient {
 public:
  TileGradient(const Upstream<A>& upstream, bool normalize, int64_t pixels)
      : upstream_(upstream), normalize_(normalize), scratch_((4 + upstream.channels) * pixels) {}

  template <typename S>
  void compute(const Tile<const S>& z, const int32_t* codes, int64_t count, const Tile<A>& out) {
    const int64_t d = upstream_.channels;
    if (z.channels_inner) {
      loops_of<S>().gradient_channels(z.data, z.pixel, count, d, codes, upstream_.by_class.data(),
                                      upstream_.squares.data(), normalize_, out.data, out.pixel);
    } else {
      loops_of<S>().gradient_pixels(z.data, z.channel, count, d, codes, upstream_.of_channel(0),
                                    upstream_.pitch, upstream_.squares.data(), upstream_.classes, normalize_,
                                    scratch_.data(), out.data, out.channel);
    }
  }

 private:
  const Upstream<A>& upstream_;
  bool normalize_;
  std::vector<A> scratch_;
};

// Where one row segment of gradients is written: in place where dtype and strides allow, else through a buffer.
template <typename T>
class TileWriter {
  using A = Accumulator<T>;
  using S = Stored<T>;

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
    buffer_.resize(packed_size(count, d_));
    return packed_tile(buffer_.data(), count, d_, channels_inner_);
  }

  void end() {
    if (!in_place_) {
      store(packed_tile<const A>(buffer_.data(), count_, d_, channels_inner_));
    }
  }

  // Writes a tile of `count` pixels from (b, y, x) on.
  void write(int64_t b, int64_t y, int64_t x, int64_t count, const Tile<const A>& tile) {
    target_ = g_.at(b, y, x);
    count_ = count;
    store(tile);
  }

 private:
  void store(const Tile<const A>& tile) {
    const int64_t outer = channels_inner_ ? count_ : d_, inner = channels_inner_ ? d_ : count_;
    const int64_t from = channels_inner_ ? tile.pixel : tile.channel;
    const int64_t outer_stride = channels_inner_ ? g_.column : g_.channel;
    const int64_t inner_stride = channels_inner_ ? g_.channel : g_.column;
    for (int64_t o = 0; o < outer; ++o) {
      const A* row = tile.data + o * from;
      T* to = target_ + o * outer_stride;
      if (inner_stride == 1) {
        loops_of<S>().narrow(row, inner, reinterpret_cast<S*>(to));
        continue;
      }
      for (int64_t i = 0; i < inner; ++i) {
        to[i * inner_stride] = static_cast<T>(row[i]);
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

// Rows of the upstream gradient in the features' dtype, where a pixel's gradient is its class's row: (K, d), (d, K).
template <typename T>
struct RoundedUpstream {
  Behind<T> by_class;
  std::vector<T> channel_rows;

  explicit RoundedUpstream(const Upstream<Accumulator<T>>& upstream)
      : by_class(upstream.classes, upstream.channels), channel_rows(upstream.channel_rows.size()) {
    for (int64_t i = 0; i < upstream.classes * upstream.channels; ++i) {
      by_class.data()[i] = static_cast<T>(upstream.by_class.data()[i]);
    }
    for (size_t i = 0; i < channel_rows.size(); ++i) {
      channel_rows[i] = static_cast<T>(upstream.channel_rows[i]);
    }
  }
};

// out[i] = table[codes[i]] for `count` pixels.
template <typename T>
void pick(const T* table, int64_t classes, const int32_t* codes, int64_t count, T* out) {
  if constexpr (sizeof(T) == 2) {
    loops().labels.pick16(reinterpret_cast<const uint16_t*>(table), classes, codes, count,
                          reinterpret_cast<uint16_t*>(out));
  } else if constexpr (sizeof(T) == 4) {
    loops().labels.pick32(reinterpret_cast<const uint32_t*>(table), classes, codes, count,
                          reinterpret_cast<uint32_t*>(out));
  } else {
    loops().labels.pick64(reinterpret_cast<const uint64_t*>(table), classes, codes, count,
                          reinterpret_cast<uint64_t*>(out));
  }
}

// Plain rows without squares on one grid: dz = g_k whatever z is, which is not read. Memory is written in its order.
template <typename T>
void backward_plain(const Labels& labels, const Shape& given, int64_t ignore,
                    const Upstream<Accumulator<T>>& upstream, Features<T> gradient) {
  const Shape shape = as_lines(given, gradient, labels);
  const RoundedUpstream<T> rows(upstream);
  const bool channels_inner = gradient.channels_inner();
  const int64_t d = shape.channels, group = channels_inner ? std::max<int64_t>(d, 1) : kWrittenChannels;
  const int64_t pixels = channels_inner ? tile_pixels(d) : kWrittenPixels;
  const Segments segments(1, shape.height, shape.width, pixels);
  const int64_t groups = divide_up(d, group), units = shape.batch * groups * segments.total;
  const int64_t elements = shape.batch * segments.total * segments.pixels * d;
  for_each_chunk(std::min(units, kMaxChunks), units, elements, [&](int64_t, int64_t begin, int64_t end) {
    Codes codes(labels, shape.classes, ignore, segments.pixels);
    std::vector<T> line(segments.pixels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / (groups * segments.total), first = unit / segments.total % groups * group;
      const auto [_, y, x, count] = segments[unit % segments.total];
      codes.read(b, y, x, count);
      T* to = gradient.at(b, y, x);
      for (int64_t i = 0; channels_inner && i < count; ++i) {
        const T* row = rows.by_class.data() + codes[i] * d;
        if (gradient.channel == 1) {
          std::memcpy(static_cast<void*>(to + i * gradient.column), row, d * sizeof(T));
          continue;
        }
        for (int64_t c = 0; c < d; ++c) {
          to[i * gradient.column + c * gradient.channel] = row[c];
        }
      }
      for (int64_t c = first; !channels_inner && c < std::min(first + group, d); ++c) {
        const T* table = rows.channel_rows.data() + c * upstream.pitch + 1;
        T* plane = to + c * gradient.channel;
        if (gradient.column == 1) {
          pick(table, shape.classes, codes.data(), count, plane);
          continue;
        }
        pick(table, shape.classes, codes.data(), count, line.data());
        for (int64_t i = 0; i < count; ++i) {
          plane[i * gradient.column] = line[i];
        }
      }
    }
  });
}

// Unit rows or squares on one grid.
template <typename T>
void backward_same_grid(Features<const T> z, const Labels& labels, const Shape& given, int64_t ignore,
                        const Upstream<Accumulator<T>>& upstream, bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const Shape both = as_lines(given, z, labels);
  const Shape shape = gradient.row == given.width * gradient.column ? both : given;
  const Segments segments(shape.batch, shape.height, shape.width, tile_pixels(shape.channels));
  const int64_t elements = segments.total * segments.pixels * shape.channels;
  const int64_t chunks = std::min(segments.total, kMaxChunks);
  for_each_chunk(chunks, segments.total, elements, [&](int64_t, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, nullptr, nullptr);
    TileWriter<T> writer(gradient, shape.channels, reader.channels_inner());
    TileGradient<A> rows(upstream, normalize, segments.pixels);
    Codes codes(labels, shape.classes, ignore, segments.pixels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, y, x, count] = segments[unit];
      codes.read(b, y, x, count);
      const Tile<A> out = writer.begin(b, y, x, count);
      reader.read(b, y, x, count, [&, pixels = count](const auto& tile) {
        rows.compute(tile, codes.data(), pixels, out);
      });
      writer.end();
    }
  });
}

// Plain rows without squares on another grid: dZ = A^T grad_sums; the features are not read.
template <typename T>
void backward_adjoint(const Labels& labels, const Shape& shape, int64_t ignore,
                      const Upstream<Accumulator<T>>& upstream, bool channels_inner, Features<T> gradient) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const int64_t d = shape.channels;
  const Segments segments(shape.batch, shape.height, shape.width, tile_pixels(d));
  const int64_t elements = segments.total * segments.pixels * d, chunks = std::min(segments.total, kMaxChunks);
  for_each_chunk(chunks, segments.total, elements, [&](int64_t, int64_t begin, int64_t end) {
    AdjointWeights<A> weights(labels, shape, ignore, segments.pixels, rows, columns);
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
            arithmetic<A>().axpy(weights.of_class(k)[o], upstream.by_class.data() + k * d, d, to);
          } else {
            arithmetic<A>().axpy(upstream.of_channel(o)[k], weights.of_class(k), count, to);
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
    arithmetic<A>().axpy(columns.lower_weight[x + i], row, d, out + columns.lower[x + i] * d);
    arithmetic<A>().axpy(columns.upper_weight[x + i], row, d, out + columns.upper[x + i] * d);
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
void backward_interpolated(Features<const T> z, const Labels& labels, const Shape& shape, int64_t ignore,
                           const Upstream<Accumulator<T>>& upstream, bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const Axis<A> rows(shape.height, shape.label_height), columns(shape.width, shape.label_width);
  const int64_t d = shape.channels, row_size = shape.width * d;
  const Segments segments(1, 1, shape.label_width, tile_pixels(d));
  const int64_t strips = divide_up(shape.height, kStripRows);
  const int64_t elements = shape.batch * shape.label_height * shape.label_width * d;
  const int64_t units = shape.batch * strips;
  for_each_chunk(std::min(units, kMaxChunks), units, elements, [&](int64_t, int64_t begin, int64_t end) {
    TileReader<T> reader(z, shape, &rows, &columns);
    TileWriter<T> writer(gradient, d, reader.channels_inner());
    TileGradient<A> row_gradients(upstream, normalize, segments.pixels);
    Codes codes(labels, shape.classes, ignore, segments.pixels);
    std::vector<A> tile(packed_size(segments.pixels, d)), label_row(row_size), strip(kStripRows * row_size);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / strips, top = (unit % strips) * kStripRows;
      const int64_t bottom = std::min(top + kStripRows, shape.height);
      std::fill(strip.begin(), strip.end(), A(0));
      for (int64_t y = rows.first(top); y < rows.last(bottom); ++y) {
        std::fill(label_row.begin(), label_row.end(), A(0));
        for (int64_t part = 0; part < segments.total; ++part) {
          const auto segment = segments[part];
          codes.read(b, y, segment.begin, segment.count);
          const Tile<A> out = packed_tile(tile.data(), segment.count, d, reader.channels_inner());
          row_gradients.compute(reader.interpolate(b, y, segment.begin, segment.count), codes.data(), segment.count,
                                out);
          add_to_columns<A>({out.data, out.pixel, out.channel, out.channels_inner}, columns, segment.begin,
                            segment.count, d, shape.width, label_row.data());
        }
        for (int64_t i = std::max(top, rows.lower[y]); i < std::min(bottom, rows.upper[y] + 1); ++i) {
          arithmetic<A>().axpy(rows.weight(y, i), label_row.data(), row_size, strip.data() + (i - top) * row_size);
        }
      }
      for (int64_t i = top; i < bottom; ++i) {
        writer.write(b, i, 0, shape.width, {strip.data() + (i - top) * row_size, reader.channels_inner() ? d : 1,
                                            reader.channels_inner() ? 1 : shape.width, reader.channels_inner()});
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, int64_t> class_sums(Tensor features, Tensor labels, int64_t num_classes,
                                                       int64_t ignore_index, bool normalize, bool squares) {
  const Shape shape = checked_shape(features, labels, num_classes);
  const ScalarType type = accumulator_type(features.scalar_type());
  Tensor sums = torch::stable::new_empty(features, {shape.classes, shape.channels}, type);
  Tensor counts = torch::stable::new_empty(features, {shape.classes}, ScalarType::Long);
  Tensor square_sums = torch::stable::new_empty(features, {squares ? shape.classes : 0}, type);
  const Labels view_of_labels(labels, shape.classes, ignore_index);
  int64_t strays = 0;
  const auto keep_counts = [&](const Totals& totals) {
    reduce_chunks(totals.counts, totals.chunks, shape.classes, static_cast<int64_t*>(counts.mutable_data_ptr()));
    reduce_chunks(totals.strays, totals.chunks, 1, &strays);
  };
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const bool by_rows = shape.same_grid() || normalize || squares;
    const Totals totals = by_rows
                              ? sum_rows(view<T>(features), view_of_labels, shape, ignore_index, normalize, squares)
                              : sum_adjoint(view<T>(features), view_of_labels, shape, ignore_index);
    keep_counts(by_rows ? totals : count_labels(view_of_labels, shape, ignore_index));
    reduce_chunks(totals.sums, totals.chunks, shape.classes * shape.channels,
                  static_cast<A*>(sums.mutable_data_ptr()));
    if (squares) {
      reduce_chunks(totals.squares, totals.chunks, shape.classes, static_cast<A*>(square_sums.mutable_data_ptr()));
    }
  });
  return {sums, counts, square_sums, strays};
}

Tensor class_sums_backward(std::optional<Tensor> grad_sums, std::optional<Tensor> grad_squares, Tensor features,
                           Tensor labels, int64_t ignore_index, bool normalize) {
  const Shape shape = checked_shape(grad_sums, grad_squares, features, labels);
  Tensor gradient = torch::stable::empty_like(features);
  const Labels view_of_labels(labels, shape.classes, ignore_index);
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Upstream<Accumulator<T>> upstream(grad_sums, grad_squares, shape);
    const Features<const T> z = view<T>(features);
    const Features<T> out = mutable_view<T>(gradient);
    advise_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * static_cast<int64_t>(sizeof(T)));
    const bool by_rows = normalize || upstream.with_squares;
    if (shape.same_grid() && by_rows) {
      backward_same_grid(z, view_of_labels, shape, ignore_index, upstream, normalize, out);
    } else if (shape.same_grid()) {
      backward_plain(view_of_labels, shape, ignore_index, upstream, out);
    } else if (by_rows) {
      backward_interpolated(z, view_of_labels, shape, ignore_index, upstream, normalize, out);
    } else {
      backward_adjoint(view_of_labels, shape, ignore_index, upstream, z.channels_inner(), out);
    }
  });
  return gradient;
}

}  // namespace in2nect::cpu
