// The three passes of class_moments over (B, d, h, w) features under (B, H, W) labels on the CPU: the moments of unit
// rows u_i, the log-sum-exps over them, and the gradient; in2nect/ops/class_moments.py has the equations.
//
// Rows lie channels first in a slab that stays in the second-level cache: a piece of the pixels where labels are on the
// features' grid, else a strip of cell rows with a border of one cell. Each pass gives a pixel coefficients by which rows
// are summed (linear in z) and by which products of rows are (quadratic), and the sums are matrix products over a slab.
//
// On another grid a pixel's row is z_p = sum_c beta_pc z_c over four cells, and never formed: its norm and the quadratic
// forms come from the products of neighbouring cells ("pairs"), its logits from the cells', and its coefficients are
// handed back to cells and pairs of cells. So a label pixel costs O(K), whatever d is, and a cell O(d (K + d)).
// |z_p|^2 is summed in double: where neighbours nearly cancel it keeps 16 digits less those of |z_c|^2 / |z_p|^2. Second
// moments in float32 lose as many of their 7 there, for that pixel.
//
// Determinism: work is cut by the shape alone and the cuts are added in order, in double; the gradient is gathered.
#include "class_moments.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/class_sums.h"
#include "buffer.h"
#include "chunks.h"
#include "codes.h"
#include "interpolation.h"
#include "loops.h"
#include "memory.h"
#include "vector/class_moments.h"
#include "views.h"

namespace in2nect::cpu {
namespace {

// Elements of a slab: 512 KiB of float32 where rows are pixels (with 32 pixels in place of 256, adding up the lanes of
// d x d sums took three times as long as all else, at d = 1024), 1 MiB where they are cells, of which fewer rows in a
// strip mean that more label rows are walked twice, once from either side.
constexpr int64_t kSlabElements = 131072, kStripElements = 262144;
constexpr int64_t kMinPixels = 256, kMaxPixels = 1024, kMostStripRows = 16;
// Labels of a piece that is counted.
constexpr int64_t kCountedPixels = 16384;
// Partial results that a call is cut into, and how many numbers they may hold in all: 16 MiB.
constexpr int64_t kMaxChunks = 64, kMaxTotals = 2 * 1024 * 1024;

template <typename A>
const ClassMomentsLoops<A>& moments_loops() {
  const auto of = [](const ClassMomentsTable& table) -> const ClassMomentsLoops<A>& {
    if constexpr (std::is_same_v<A, double>) {
      return table.f64;
    } else {
      return table.f32;
    }
  };
#ifdef IN2NECT_X86
  if (capability() >= Capability::kAvx512) {
    return of(avx512::class_moments_table);
  }
  if (capability() >= Capability::kAvx2) {
    return of(avx2::class_moments_table);
  }
#endif
  return of(portable::class_moments_table);
}

int64_t padded(int64_t count) {
  return divide_up(count, kMomentsPad) * kMomentsPad;
}

// ---- features and labels --------------------------------------------------------------------------------------------

// Moves rows between features and a slab, channels first.
template <typename T>
class Mover {
  using A = Accumulator<T>;
  using S = Stored<T>;

 public:
  explicit Mover(int64_t channels) : d_(channels) {}

  // `count` pixels from (b, y, x) on.
  void load(const Features<const T>& z, int64_t b, int64_t y, int64_t x, int64_t count, A* to, int64_t pitch) {
    const T* source = z.at(b, y, x);
    if (z.channels_inner() && z.channel == 1) {
      if constexpr (std::is_same_v<S, A>) {
        return moments_loops<A>().transpose(source, z.column, count, d_, to, pitch);
      }
      packed_.resize(count * d_);
      for (int64_t i = 0; i < count; ++i) {
        loops_of<S>().widen(reinterpret_cast<const S*>(source + i * z.column), d_, packed_.data() + i * d_);
      }
      return moments_loops<A>().transpose(packed_.data(), d_, count, d_, to, pitch);
    }
    for (int64_t c = 0; c < d_; ++c) {
      const T* from = source + c * z.channel;
      if (z.column == 1) {
        loops_of<S>().widen(reinterpret_cast<const S*>(from), count, to + c * pitch);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        to[c * pitch + i] = static_cast<A>(from[i * z.column]);
      }
    }
  }

  void store(const A* from, int64_t pitch, int64_t count, const Features<T>& z, int64_t b, int64_t y, int64_t x) {
    T* target = z.at(b, y, x);
    if (z.channels_inner() && z.channel == 1) {
      if constexpr (std::is_same_v<S, A>) {
        return moments_loops<A>().transpose(from, pitch, d_, count, target, z.column);
      }
      packed_.resize(count * d_);
      moments_loops<A>().transpose(from, pitch, d_, count, packed_.data(), d_);
      for (int64_t i = 0; i < count; ++i) {
        loops_of<S>().narrow(packed_.data() + i * d_, d_, reinterpret_cast<S*>(target + i * z.column));
      }
      return;
    }
    for (int64_t c = 0; c < d_; ++c) {
      T* to = target + c * z.channel;
      if (z.column == 1) {
        loops_of<S>().narrow(from + c * pitch, count, reinterpret_cast<S*>(to));
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        to[i * z.column] = static_cast<T>(from[c * pitch + i]);
      }
    }
  }

 private:
  int64_t d_;
  std::vector<A> packed_;
};

// The classes that are present, and their places among them.
class Present {
 public:
  template <typename IsPresent>
  Present(int64_t classes, const IsPresent& is_present) : places_(classes + 1, -1) {
    for (int64_t k = 0; k < classes; ++k) {
      if (is_present(k)) {
        places_[k + 1] = static_cast<int32_t>(classes_.size());
        classes_.push_back(k);
      }
    }
  }
  int64_t number() const {
    return static_cast<int64_t>(classes_.size());
  }
  int64_t operator[](int64_t place) const {
    return classes_[place];
  }
  // Codes of classes become places; what is behind the pixels becomes -1.
  void place(int32_t* codes, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      codes[i] = places_[codes[i] + 1];
    }
  }

  // A number a class as a table by place, with a 0 before its first.
  template <typename A>
  std::vector<A> table(const Tensor& by_class) const {
    const A* data = static_cast<const A*>(by_class.const_data_ptr());
    std::vector<A> out(number() + 1);
    for (int64_t k = 0; k < number(); ++k) {
      out[k + 1] = data[classes_[k] * by_class.stride(0)];
    }
    return out;
  }
  // The rows (or matrices) of the present classes, packed; `size` numbers each.
  template <typename A>
  void append(const Tensor& by_class, int64_t size, std::vector<A>& out) const {
    const A* data = static_cast<const A*>(by_class.const_data_ptr());
    for (const int64_t k : classes_) {
      out.insert(out.end(), data + k * size, data + (k + 1) * size);
    }
  }

 private:
  std::vector<int32_t> places_;
  std::vector<int64_t> classes_;
};

// ---- slabs ----------------------------------------------------------------------------------------------------------

// What a pass computes of a slab: so many products of z with rows, quadratic forms, and coefficients of both kinds.
template <typename A>
struct PassSizes {
  int64_t numbers, forms, linear, pairs, classes;
};

// Rows of a piece of an image and what a pass keeps of them. `row` numbers from one row of cells to the next, the first
// at kMomentsPad, so that the number before it is there; [begin, begin + count) are this slab's own.
template <typename A>
struct Slab {
  int64_t channels, row, pitch, begin = 0, count = 0;
  Buffer<A> z, numbers, forms, linear, pairs, y;  // (.., pitch); forms and pairs five rows each
  Buffer<double> gram;

  Slab(int64_t channels, int64_t row, int64_t rows, const PassSizes<A>& sizes)
      : channels(channels),
        row(row),
        pitch(kMomentsPad + row * rows + kMomentsPad),
        z(room(channels), A(0)),
        numbers(room(sizes.numbers), A(0)),
        forms(room(kPairs * sizes.forms), A(0)),
        linear(room(sizes.linear), A(0)),
        pairs(room(kPairs * sizes.pairs), A(0)),
        y(room(sizes.forms > 0 ? channels : 0), A(0)),
        gram(room(kPairs), 0.0) {}

  int64_t row_of_cells(int64_t i) const {
    return kMomentsPad + i * row;
  }
  A* form(int64_t matrix) const {
    return forms.data() + matrix * kPairs * pitch;
  }
  A* pair(int64_t index) const {
    return pairs.data() + index * kPairs * pitch;
  }

 private:
  int64_t room(int64_t rows) const {
    return rows * pitch + 4 * kMomentsPad + row;  // loops run over whole blocks, and one row of cells further
  }
};

// What a pass multiplies rows with: the numbers' (.., d), row by row, and the forms' symmetric matrices (.., d, d).
template <typename A>
struct PassInput {
  std::vector<A> rows, matrices;
  MomentsClasses<A> classes{};
  std::vector<A> weights, anchors, scales, own;  // tables by place, with a 0 before the first

  void set_tables() {
    const auto first = [](const std::vector<A>& table) { return table.empty() ? nullptr : table.data() + 1; };
    classes.weights = first(weights);
    classes.anchors = first(anchors);
    classes.scales = first(scales);
    classes.own = first(own);
  }
};

// Fills slabs: rows, products, and, through a stage, the coefficients.
template <typename T>
class Filler {
  using A = Accumulator<T>;

 public:
  Filler(const Features<const T>& z, const Labels& labels, const Shape& shape, int64_t ignore, const Present& present,
         const PassInput<A>& input, const PassSizes<A>& sizes, int64_t pixels, int64_t pitch)
      : z_(z),
        shape_(shape),
        present_(present),
        input_(input),
        sizes_(sizes),
        codes_(labels, shape.classes, ignore, padded(pixels)),
        mover_(shape.channels),
        pitch_(pitch),
        squares_(pitch_, 0.0),
        alpha_(pitch_, A(0)),
        unit_(pitch_, A(0)),
        softmax_(sizes.classes * pitch_, A(0)),
        forms_(sizes.forms) {}

 protected:
  // The products of the slab's rows with the pass's, and the pairs, of [begin, begin + count).
  void multiply(Slab<A>& slab, int64_t begin, int64_t count, int64_t below) {
    const auto& run = moments_loops<A>();
    const int64_t d = shape_.channels;
    run.inner(input_.rows.data(), d, 1, sizes_.numbers, d, slab.z.data() + begin, slab.pitch, count,
              slab.numbers.data() + begin, slab.pitch, false);
    for (int64_t matrix = 0; matrix < sizes_.forms; ++matrix) {
      run.inner(input_.matrices.data() + matrix * d * d, d, 1, d, d, slab.z.data() + begin, slab.pitch, count,
                slab.y.data() + begin, slab.pitch, false);
      run.forms(slab.z.data() + begin, slab.y.data() + begin, below, slab.pitch, d, count, slab.form(matrix) + begin,
                slab.pitch);
    }
  }

  MomentsPixels<A> pixels(int64_t count) {
    MomentsPixels<A> out{};
    out.count = count;
    out.codes = codes_.data();
    out.alpha = alpha_.data();
    out.unit_squares = unit_.data();
    out.softmax = softmax_.data();
    out.forms = forms_.data();
    return out;
  }

  const Features<const T>& z_;
  const Shape& shape_;
  const Present& present_;
  const PassInput<A>& input_;
  const PassSizes<A> sizes_;
  Codes codes_;
  Mover<T> mover_;
  int64_t pitch_;
  Buffer<double> squares_;
  Buffer<A> alpha_, unit_, softmax_;
  std::vector<const A*> forms_;
};

// Label columns: the cell before each, how far it lies from there to the next, and the first of each cell's.
template <typename A>
struct Columns {
  std::vector<int32_t> lower, begin;
  std::vector<A> weight;

  Columns(int64_t cells, int64_t pixels) : lower(pixels), begin(cells + 1), weight(pixels) {
    const Axis<A> axis(cells, pixels);
    for (int64_t x = 0; x < pixels; ++x) {
      lower[x] = static_cast<int32_t>(axis.lower[x]);
      weight[x] = axis.upper[x] == axis.lower[x] ? A(0) : axis.upper_weight[x];
    }
    for (int64_t j = 0; j <= cells; ++j) {
      begin[j] = static_cast<int32_t>(std::lower_bound(lower.begin(), lower.end(), j) - lower.begin());
    }
  }
};

// Slabs of pixels, labels on the features' grid.
template <typename T>
class PixelFiller : public Filler<T> {
  using A = Accumulator<T>;

 public:
  using Filler<T>::Filler;

  // stage(pixels, own): `own`, because these pixels are in no other slab.
  template <typename Stage>
  void fill(Slab<A>& slab, int64_t b, int64_t y, int64_t x, int64_t count, const Stage& stage) {
    slab.begin = 0;
    slab.count = count;
    this->codes_.read(b, y, x, count);
    this->present_.place(this->codes_.data(), count);
    this->mover_.load(this->z_, b, y, x, count, slab.z.data(), slab.pitch);
    for (int64_t c = 0; c < this->shape_.channels; ++c) {
      A* row = slab.z.data() + c * slab.pitch;
      for (int64_t i = 0; i < count; ++i) {
        row[i] = this->codes_[i] < 0 ? A(0) : row[i];  // an ignored pixel may hold NaN
      }
      std::fill(row + count, row + slab.row, A(0));
    }
    moments_loops<A>().gram(slab.z.data(), 0, slab.pitch, this->shape_.channels, count, slab.gram.data(), slab.pitch);
    this->multiply(slab, 0, count, 0);
    for (int64_t matrix = 0; matrix < this->sizes_.forms; ++matrix) {
      this->forms_[matrix] = slab.form(matrix) + kSelf * slab.pitch;
    }
    MomentsPixels<A> pixels = this->pixels(count);
    pixels.pitch = slab.pitch;
    pixels.pairs_pitch = kPairs * slab.pitch;
    pixels.squares = slab.gram.data() + kSelf * slab.pitch;
    pixels.numbers = slab.numbers.data();
    pixels.linear = slab.linear.data();
    pixels.pairs = slab.pairs.data();
    stage(pixels, true);
  }
};

// Strips of cell rows, labels on another grid. A slab's rows of cells are [top - 1, bottom], each with a number of
// nothing before and behind it.
template <typename T>
class CellFiller : public Filler<T> {
  using A = Accumulator<T>;

 public:
  CellFiller(const Features<const T>& z, const Labels& labels, const Shape& shape, int64_t ignore,
             const Present& present, const PassInput<A>& input, const PassSizes<A>& sizes, const Axis<A>& rows,
             const Columns<A>& columns)
      : Filler<T>(z, labels, shape, ignore, present, input, sizes, shape.label_width,
                  padded(shape.label_width) + kMomentsPad),
        rows_(rows),
        columns_(columns),
        cells_(padded(shape.width + 2), A(0)),
        cells_right_(padded(shape.width + 2), A(0)),
        gram_self_(cells_.size(), 0.0),
        gram_right_(cells_.size(), 0.0),
        numbers_(sizes.numbers * this->pitch_, A(0)),
        form_rows_(sizes.forms * this->pitch_, A(0)),
        linear_(sizes.linear * this->pitch_, A(0)),
        pairs_(sizes.pairs * this->pitch_, A(0)) {}

  // stage(pixels, own): a label row is one strip's own, though two may walk over it.
  template <typename Stage>
  void fill(Slab<A>& slab, int64_t b, int64_t top, int64_t bottom, const Stage& stage) {
    const int64_t rows = bottom - top + 2;
    slab.begin = slab.row_of_cells(1);
    slab.count = (bottom - top) * slab.row;
    load(slab, b, top, bottom);
    multiply_neighbours(slab, rows);
    if (!finite(slab)) {
      drop_untouched(slab, b, top, bottom);
      multiply_neighbours(slab, rows);
    }
    std::fill_n(slab.linear.data(), slab.linear.size(), A(0));
    std::fill_n(slab.pairs.data(), slab.pairs.size(), A(0));
    this->multiply(slab, slab.row_of_cells(0), rows * slab.row, slab.row);
    for (int64_t y = rows_.first(top); y < rows_.last(bottom); ++y) {
      walk(slab, b, y, slab.row_of_cells(rows_.lower[y] - (top - 1)) + 1, rows_.lower[y] >= top, stage);
    }
  }

 private:
  void load(Slab<A>& slab, int64_t b, int64_t top, int64_t bottom) {
    const int64_t w = this->shape_.width;
    std::fill_n(slab.z.data(), slab.z.size(), A(0));
    for (int64_t i = std::max<int64_t>(top - 1, 0); i < std::min(bottom + 1, this->shape_.height); ++i) {
      this->mover_.load(this->z_, b, i, 0, w, slab.z.data() + slab.row_of_cells(i - (top - 1)) + 1,
                        slab.pitch);
    }
  }

  // The last row's products with the row below it are of no use; there is room for them.
  void multiply_neighbours(Slab<A>& slab, int64_t rows) {
    const int64_t begin = slab.row_of_cells(0);
    moments_loops<A>().gram(slab.z.data() + begin, slab.row, slab.pitch, this->shape_.channels, rows * slab.row,
                            slab.gram.data() + begin, slab.pitch);
  }

  // By the squares, which are what is not finite where a row is not.
  static bool finite(const Slab<A>& slab) {
    double sum = 0;  // of what is 0 of a finite number, else NaN
    for (int64_t x = 0; x < slab.pitch; ++x) {
      sum += slab.gram[kSelf * slab.pitch + x] * 0.0;
    }
    return sum == 0;
  }

  // Cells in which no pixel of a class has a weight become zero: they may hold NaN.
  void drop_untouched(Slab<A>& slab, int64_t b, int64_t top, int64_t bottom) {
    std::vector<char> touched(slab.pitch, 0);
    for (int64_t y = rows_.first(top); y < rows_.last(bottom); ++y) {
      this->codes_.read(b, y, 0, this->shape_.label_width);
      const int64_t first = slab.row_of_cells(rows_.lower[y] - (top - 1)) + 1;
      const A down = share(rows_, y);
      for (int64_t x = 0; x < this->shape_.label_width; ++x) {
        const A across = columns_.weight[x];
        for (int corner = 0; this->codes_[x] >= 0 && corner < 4; ++corner) {
          const bool below = corner >= 2, right = corner % 2 == 1;
          if ((below ? down : 1 - down) * (right ? across : 1 - across) != 0) {
            touched[first + columns_.lower[x] + (below ? slab.row : 0) + (right ? 1 : 0)] = 1;
          }
        }
      }
    }
    for (int64_t c = 0; c < slab.channels; ++c) {
      for (int64_t x = 0; x < slab.pitch; ++x) {
        A& number = slab.z[c * slab.pitch + x];
        number = touched[x] ? number : A(0);
      }
    }
  }

  // How far label row y lies from its lower row of cells to the next.
  static A share(const Axis<A>& axis, int64_t y) {
    return axis.upper[y] == axis.lower[y] ? A(0) : axis.upper_weight[y];
  }

  // One label row, between the row of cells at `first` and the next.
  template <typename Stage>
  void walk(Slab<A>& slab, int64_t b, int64_t y, int64_t first, bool own, const Stage& stage) {
    const auto& run = moments_loops<A>();
    const int64_t w = this->shape_.width, width = this->shape_.label_width;
    const A t = share(rows_, y);
    const int32_t* lower = columns_.lower.data();
    const A* weight = columns_.weight.data();
    this->codes_.read(b, y, 0, width);
    this->present_.place(this->codes_.data(), width);

    run.blend_gram(slab.gram.data() + first, slab.pitch, slab.row, static_cast<double>(t), w + 1, gram_self_.data(),
                   gram_right_.data());
    run.interpolate_gram(gram_self_.data(), gram_right_.data(), lower, weight, width, this->squares_.data());
    for (int64_t r = 0; r < this->sizes_.numbers; ++r) {
      run.blend(slab.numbers.data() + r * slab.pitch + first, slab.row, t, w + 1, cells_.data());
      run.interpolate(cells_.data(), lower, weight, width, numbers_.data() + r * this->pitch_);
    }
    for (int64_t matrix = 0; matrix < this->sizes_.forms; ++matrix) {
      A* out = form_rows_.data() + matrix * this->pitch_;
      run.blend_forms(slab.form(matrix) + first, slab.pitch, slab.row, t, w + 1, cells_.data(), cells_right_.data());
      run.interpolate_forms(cells_.data(), cells_right_.data(), lower, weight, width, out);
      this->forms_[matrix] = out;
    }

    MomentsPixels<A> pixels = this->pixels(width);
    pixels.pitch = pixels.pairs_pitch = this->pitch_;
    pixels.squares = this->squares_.data();
    pixels.numbers = numbers_.data();
    pixels.linear = linear_.data();
    pixels.pairs = pairs_.data();
    stage(pixels, own);

    for (int64_t r = 0; r < this->sizes_.linear; ++r) {
      run.gather(linear_.data() + r * this->pitch_, weight, columns_.begin.data(), w, cells_.data());
      run.spread(cells_.data(), slab.row, t, w, slab.linear.data() + r * slab.pitch + first);
    }
    for (int64_t r = 0; r < this->sizes_.pairs; ++r) {
      run.gather_pairs(pairs_.data() + r * this->pitch_, weight, columns_.begin.data(), w, cells_.data(),
                       cells_right_.data());
      run.spread_pairs(cells_.data(), cells_right_.data(), slab.pitch, slab.row, t, w, slab.pair(r) + first);
    }
  }

  const Axis<A>& rows_;
  const Columns<A>& columns_;
  Buffer<A> cells_, cells_right_;
  Buffer<double> gram_self_, gram_right_;
  Buffer<A> numbers_, form_rows_, linear_, pairs_;
};

// ---- passes ---------------------------------------------------------------------------------------------------------

// How a call is cut into slabs.
template <typename T>
struct Cuts {
  using A = Accumulator<T>;

  Cuts(const Shape& given, const Features<const T>& z, const Labels& labels, int64_t totals, const Features<T>* out)
      : same(given.same_grid()), shape(given), segments(0, 0, 0, 1) {
    const int64_t d = std::max<int64_t>(given.channels, 1);
    if (same) {
      shape = out == nullptr || out->row == given.width * out->column ? as_lines(given, z, labels) : given;
      const int64_t pixels = std::clamp(kSlabElements / d, kMinPixels, kMaxPixels);
      segments = Segments(shape.batch, shape.height, shape.width, pixels);
      units = segments.total;
      elements = units * segments.pixels * d;
      row = padded(segments.pixels);
      rows = 1;
    } else {
      row = padded(given.width + 2);
      rows = std::clamp(kStripElements / (row * d) - 2, int64_t{1}, std::min(kMostStripRows, given.height));
      strips = divide_up(given.height, rows);
      units = given.batch * strips;
      elements = given.batch * (given.height * row * d + given.label_height * given.label_width * given.classes);
      rows += 2;
    }
    chunks = std::min({units, kMaxChunks, std::max<int64_t>(1, kMaxTotals / std::max<int64_t>(totals, 1))});
  }

  bool same;
  Shape shape;
  Segments segments;
  int64_t units = 0, elements = 0, strips = 0, chunks, row, rows;  // row, rows: of a slab
};

// A pass: stage(pixels, own, chunk) gives each pixel's coefficients, use(slab, chunk, unit) takes a filled slab.
template <typename T, typename Stage, typename Use>
void run_pass(const Cuts<T>& cuts, const Features<const T>& z, const Labels& labels, int64_t ignore,
              const Present& present, const PassInput<Accumulator<T>>& input, const PassSizes<Accumulator<T>>& sizes,
              const Stage& stage, const Use& use) {
  using A = Accumulator<T>;
  const Shape& shape = cuts.shape;
  const Axis<A> rows(shape.height, cuts.same ? 0 : shape.label_height);
  const Columns<A> columns(shape.width, cuts.same ? 0 : shape.label_width);
  for_each_chunk(cuts.chunks, cuts.units, cuts.elements, [&](int64_t chunk, int64_t begin, int64_t end) {
    Slab<A> slab(shape.channels, cuts.row, cuts.rows, sizes);
    const auto of_chunk = [&](const MomentsPixels<A>& pixels, bool own) { stage(pixels, own, chunk); };
    if (cuts.same) {
      PixelFiller<T> filler(z, labels, shape, ignore, present, input, sizes, cuts.segments.pixels, slab.pitch);
      for (int64_t unit = begin; unit < end; ++unit) {
        const auto [b, y, x, count] = cuts.segments[unit];
        filler.fill(slab, b, y, x, count, of_chunk);
        use(slab, chunk, unit);
      }
      return;
    }
    CellFiller<T> filler(z, labels, shape, ignore, present, input, sizes, rows, columns);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t top = unit % cuts.strips * (cuts.rows - 2);
      filler.fill(slab, unit / cuts.strips, top, std::min(top + cuts.rows - 2, shape.height), of_chunk);
      use(slab, chunk, unit);
    }
  });
}

// sum over the slab's own rows of coefficient r times z, (rows, d), added to `sums`.
template <typename A>
void add_linear(const Slab<A>& slab, int64_t rows, double* sums) {
  moments_loops<A>().outer(slab.linear.data() + slab.begin, slab.pitch, rows, slab.z.data() + slab.begin, slab.pitch,
                           slab.channels, slab.count, sums, slab.channels, false);
}

// The sum of z z^T by coefficients `index`, (d, d): of pixels its upper triangle, of cells half of it, to which its
// transpose is to be added. `scratch` has a slab's room.
template <typename A>
void add_quadratic(const Slab<A>& slab, bool cells, int64_t index, const Buffer<A>& scratch, double* sums) {
  const auto& run = moments_loops<A>();
  A* pair = slab.pair(index);
  const A* z = slab.z.data() + slab.begin;
  const A* self = pair + kSelf * slab.pitch + slab.begin;
  if (!cells) {
    run.combine(&self, &z, 1, slab.pitch, slab.channels, slab.count, scratch.data(), slab.pitch);
  } else {
    A* halved = pair + kSelf * slab.pitch + slab.begin;
    for (int64_t x = 0; x < slab.count; ++x) {
      halved[x] *= A(0.5);
    }
    const int64_t at = slab.begin;
    const A* coefficients[] = {self, pair + kRight * slab.pitch + at, pair + kDown * slab.pitch + at,
                               pair + kDiagonal * slab.pitch + at, pair + kAcross * slab.pitch + at - 1};
    const A* rows[] = {z, z + 1, z + slab.row, z + slab.row + 1, z + slab.row - 1};
    run.combine(coefficients, rows, kPairs, slab.pitch, slab.channels, slab.count, scratch.data(), slab.pitch);
  }
  run.outer(scratch.data(), slab.pitch, slab.channels, z, slab.pitch, slab.channels, slab.count, sums, slab.channels,
            !cells);
}

// sum_c' M_cc' z_c' by coefficients `index`, (d, count), M symmetric.
template <typename A>
void bend(const Slab<A>& slab, bool cells, int64_t index, A* out) {
  const A* pair = slab.pair(index) + slab.begin;
  const A* z = slab.z.data() + slab.begin;
  const int64_t down = slab.row;
  const A* self = pair + kSelf * slab.pitch;
  const A* right = pair + kRight * slab.pitch;
  const A* below = pair + kDown * slab.pitch;
  const A* diagonal = pair + kDiagonal * slab.pitch;
  const A* across = pair + kAcross * slab.pitch;
  if (!cells) {
    return moments_loops<A>().combine(&self, &z, 1, slab.pitch, slab.channels, slab.count, out, slab.pitch);
  }
  const A* coefficients[] = {self,         right,           right - 1, below,          below - down,
                             diagonal,     diagonal - down - 1, across - 1, across - down};
  const A* rows[] = {z,            z + 1,        z - 1,        z + down,    z - down,
                     z + down + 1, z - down - 1, z + down - 1, z - down + 1};
  moments_loops<A>().combine(coefficients, rows, 9, slab.pitch, slab.channels, slab.count, out, slab.pitch);
}

// Completes a (d, d) sum of add_quadratic.
template <typename A>
void complete(const double* sums, int64_t d, bool cells, A* out) {
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = i; j < d; ++j) {
      const double upper = sums[i * d + j];
      out[i * d + j] = out[j * d + i] = static_cast<A>(cells ? upper + sums[j * d + i] : upper);
    }
  }
}

// Pixels of each class, and labels that are neither a class nor the ignored one.
std::vector<int64_t> count_classes(const Labels& labels, const Shape& shape, int64_t ignore, int64_t* strays) {
  const Segments segments(shape.batch, shape.label_height, shape.label_width, kCountedPixels);
  const int64_t chunks = std::min(segments.total, kMaxChunks);
  std::vector<int64_t> counts(chunks * shape.classes), of_chunk(chunks);
  for_each_chunk(chunks, segments.total, segments.total * segments.pixels, [&](int64_t chunk, int64_t begin,
                                                                              int64_t end) {
    Codes codes(labels, shape.classes, ignore, segments.pixels);
    Counter counter(shape.classes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const auto [b, y, x, count] = segments[unit];
      of_chunk[chunk] += codes.read(b, y, x, count);
      counter.add(codes.data(), count, counts.data() + chunk * shape.classes);
    }
  });
  std::vector<int64_t> total(shape.classes);
  reduce_chunks(counts, chunks, shape.classes, total.data());
  reduce_chunks(of_chunk, chunks, 1, strays);
  return total;
}

void require_classes(const char* name, const Tensor& t, std::vector<int64_t> sizes, ScalarType type) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.scalar_type() == type && t.is_contiguous();
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = t.size(static_cast<int64_t>(i)) == sizes[i];
  }
  require(fits, "class_moments: ", name, " has the wrong shape, type or layout; in2nect::class_moments passes it");
}

Tensor zeros(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> class_moments(Tensor features, Tensor labels,
                                                                          int64_t num_classes, int64_t ignore_index,
                                                                          bool sums, bool by_class,
                                                                          std::optional<Tensor> weights) {
  const Shape shape = checked_shape(features, labels, num_classes);
  const ScalarType type = accumulator_type(features.scalar_type());
  const int64_t d = shape.channels, K = shape.classes;
  if (weights.has_value()) {
    require_classes("weights", *weights, {K}, type);
  }
  const Labels view_of_labels(labels, K, ignore_index);
  int64_t strays = 0;
  const std::vector<int64_t> found = count_classes(view_of_labels, shape, ignore_index, &strays);
  Tensor counts = zeros(features, {K}, ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(counts.mutable_data_ptr()));
  Tensor raw = zeros(features, {sums ? K : 0, d}, type), unit = zeros(features, {K, d}, type);
  Tensor squares = zeros(features, {K}, type);
  Tensor second = by_class ? zeros(features, {K, d, d}, type) : zeros(features, {d, d}, type);
  const Present present(K, [&](int64_t k) { return found[k] > 0; });
  const int64_t P = present.number(), matrices = by_class ? P : 1;
  dispatch_features("class_moments", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PassInput<A> input;
    input.classes.number = P;
    input.weights.resize(P + 1);
    const A* given = weights.has_value() ? static_cast<const A*>(weights->const_data_ptr()) : nullptr;
    for (int64_t place = 0; place < P; ++place) {
      const int64_t k = present[place];
      input.weights[place + 1] = given != nullptr ? given[k] : A(1) / static_cast<A>(found[k]);
    }
    input.set_tables();
    const PassSizes<A> sizes{0, 0, sums ? 2 * P : P, matrices, P};
    // of a chunk: sums (linear, d), moments (matrices, d, d), and squares behind one for the pixels of no class
    const int64_t moments_at = sizes.linear * d, squares_at = moments_at + matrices * d * d;
    const int64_t totals = squares_at + P + 1;
    const Features<const T> z = view<T>(features);
    const Cuts<T> cuts(shape, z, view_of_labels, totals, nullptr);
    std::vector<double> partial(cuts.chunks * totals), total(totals);
    run_pass<T>(
        cuts, z, view_of_labels, ignore_index, present, input, sizes,
        [&](const MomentsPixels<A>& pixels, bool own, int64_t chunk) {
          moments_loops<A>().moments(pixels, input.classes, sums, by_class,
                                     own ? partial.data() + chunk * totals + squares_at + 1 : nullptr);
        },
        [&](const Slab<A>& slab, int64_t chunk, int64_t) {
          double* out = partial.data() + chunk * totals;
          const Buffer<A> scratch(d * slab.pitch + 4 * kMomentsPad + slab.row);
          add_linear(slab, sizes.linear, out);
          for (int64_t matrix = 0; matrix < matrices; ++matrix) {
            add_quadratic(slab, !cuts.same, matrix, scratch, out + moments_at + matrix * d * d);
          }
        });
    reduce_chunks(partial, cuts.chunks, totals, total.data());
    for (int64_t place = 0; place < P; ++place) {
      const int64_t k = present[place];
      for (int64_t c = 0; c < d; ++c) {
        static_cast<A*>(unit.mutable_data_ptr())[k * d + c] = static_cast<A>(total[place * d + c]);
        if (sums) {
          static_cast<A*>(raw.mutable_data_ptr())[k * d + c] = static_cast<A>(total[(P + place) * d + c]);
        }
      }
      static_cast<A*>(squares.mutable_data_ptr())[k] = static_cast<A>(total[squares_at + 1 + place]);
    }
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      complete(total.data() + moments_at + matrix * d * d, d, !cuts.same,
               static_cast<A*>(second.mutable_data_ptr()) + (by_class ? present[matrix] : 0) * d * d);
    }
  });
  return {counts, raw, unit, squares, second, strays};
}

std::tuple<Tensor, Tensor, Tensor> class_moments_mixtures(Tensor features, Tensor labels, Tensor centres,
                                                          std::optional<Tensor> curvatures, Tensor present_classes,
                                                          Tensor anchors, int64_t ignore_index) {
  const Shape shape = checked_shape(features, labels, centres.size(0));
  const ScalarType type = accumulator_type(features.scalar_type());
  const int64_t d = shape.channels, K = shape.classes;
  const bool by_class = curvatures.has_value();
  require_classes("centres", centres, {K, d}, type);
  require_classes("present", present_classes, {K}, ScalarType::Bool);
  require_classes("anchors", anchors, {K}, type);
  if (by_class) {
    require_classes("curvatures", *curvatures, {K, d, d}, type);
  }
  const Labels view_of_labels(labels, K, ignore_index);
  Tensor log_d = zeros(features, {1}, type), mixed = zeros(features, {K, d}, type);
  Tensor second = zeros(features, {by_class ? K : 0, d, d}, type);
  const bool* is_present = static_cast<const bool*>(present_classes.const_data_ptr());
  const Present present(K, [&](int64_t k) { return is_present[k]; });
  const int64_t P = present.number(), matrices = by_class ? P : 0;
  dispatch_features("class_moments", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PassInput<A> input;
    input.classes.number = P;
    present.append(centres, d, input.rows);
    if (by_class) {
      present.append(*curvatures, d * d, input.matrices);
    }
    input.anchors = present.table<A>(anchors);
    input.set_tables();
    const PassSizes<A> sizes{P, matrices, P, matrices, P};
    const int64_t moments_at = P * d, loss_at = moments_at + matrices * d * d, totals = loss_at + 1;
    const Features<const T> z = view<T>(features);
    const Cuts<T> cuts(shape, z, view_of_labels, totals, nullptr);
    std::vector<double> partial(cuts.chunks * totals), total(totals);
    run_pass<T>(
        cuts, z, view_of_labels, ignore_index, present, input, sizes,
        [&](const MomentsPixels<A>& pixels, bool own, int64_t chunk) {
          partial[chunk * totals + loss_at] += moments_loops<A>().mixtures(pixels, input.classes, by_class, own);
        },
        [&](const Slab<A>& slab, int64_t chunk, int64_t) {
          double* out = partial.data() + chunk * totals;
          const Buffer<A> scratch(by_class ? d * slab.pitch + 4 * kMomentsPad + slab.row : 0);
          add_linear(slab, P, out);
          for (int64_t matrix = 0; matrix < matrices; ++matrix) {
            add_quadratic(slab, !cuts.same, matrix, scratch, out + moments_at + matrix * d * d);
          }
        });
    reduce_chunks(partial, cuts.chunks, totals, total.data());
    *static_cast<A*>(log_d.mutable_data_ptr()) = static_cast<A>(total[loss_at]);
    for (int64_t place = 0; place < P; ++place) {
      A* to = static_cast<A*>(mixed.mutable_data_ptr()) + present[place] * d;
      std::transform(total.data() + place * d, total.data() + (place + 1) * d, to,
                     [](double sum) { return static_cast<A>(sum); });
      if (by_class) {
        complete(total.data() + moments_at + place * d * d, d, !cuts.same,
                 static_cast<A*>(second.mutable_data_ptr()) + present[place] * d * d);
      }
    }
  });
  return {torch::stable::select(log_d, 0, 0), mixed, second};
}

Tensor class_moments_backward(Tensor features, Tensor labels, Tensor centres, std::optional<Tensor> curvatures,
                              Tensor present_classes, Tensor anchors, Tensor matrices, Tensor scales, Tensor constant,
                              Tensor own, std::optional<Tensor> grad_sums, int64_t ignore_index) {
  const Shape shape = checked_shape(features, labels, centres.size(0));
  const ScalarType type = accumulator_type(features.scalar_type());
  const int64_t d = shape.channels, K = shape.classes;
  const bool by_class = curvatures.has_value(), sums = grad_sums.has_value();
  require_classes("centres", centres, {K, d}, type);
  require_classes("present", present_classes, {K}, ScalarType::Bool);
  require_classes("matrices", matrices, {by_class ? K : 1, d, d}, type);
  require_classes("constant", constant, {K, d}, type);
  for (const Tensor& of_class : {anchors, scales, own}) {
    require_classes("anchors, scales or own", of_class, {K}, type);
  }
  if (by_class) {
    require_classes("curvatures", *curvatures, {K, d, d}, type);
  }
  if (sums) {
    require_classes("grad_sums", *grad_sums, {K, d}, type);
  }
  const Labels view_of_labels(labels, K, ignore_index);
  Tensor gradient = torch::stable::empty_like(features);
  const bool* is_present = static_cast<const bool*>(present_classes.const_data_ptr());
  const Present present(K, [&](int64_t k) { return is_present[k]; });
  const int64_t P = present.number();
  dispatch_features("class_moments", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const int64_t bytes = gradient.numel() * static_cast<int64_t>(sizeof(T));
    if (P == 0) {
      std::fill_n(static_cast<char*>(gradient.mutable_data_ptr()), bytes, 0);
      return;
    }
    advise_huge_pages(gradient.mutable_data_ptr(), bytes);
    PassInput<A> input;
    input.classes.number = P;
    present.append(centres, d, input.rows);
    present.append(constant, d, input.rows);
    const std::vector<A> products = input.rows;  // (2 or 3 P, d): what the linear coefficients multiply
    std::vector<A> outputs = products;
    if (sums) {
      present.append(*grad_sums, d, outputs);
    }
    if (by_class) {
      present.append(*curvatures, d * d, input.matrices);
      present.append(matrices, d * d, input.matrices);
    } else {
      const A* only = static_cast<const A*>(matrices.const_data_ptr());
      input.matrices.assign(only, only + d * d);
    }
    input.anchors = present.table<A>(anchors);
    input.scales = present.table<A>(scales);
    input.own = present.table<A>(own);
    input.set_tables();
    const int64_t forms = by_class ? 2 * P : 1;
    const PassSizes<A> sizes{2 * P, forms, sums ? 3 * P : 2 * P, 1 + forms, P};
    const Features<const T> z = view<T>(features);
    const Features<T> out = mutable_view<T>(gradient);
    const Cuts<T> cuts(shape, z, view_of_labels, 0, &out);
    run_pass<T>(
        cuts, z, view_of_labels, ignore_index, present, input, sizes,
        [&](const MomentsPixels<A>& pixels, bool, int64_t) {
          moments_loops<A>().gradient(pixels, input.classes, sums, by_class);
        },
        [&](const Slab<A>& slab, int64_t, int64_t unit) {
          const auto& run = moments_loops<A>();
          const int64_t room = d * slab.pitch + 4 * kMomentsPad + slab.row;
          const Buffer<A> grad(room), bent(room);
          bend(slab, !cuts.same, 0, grad.data());
          for (int64_t matrix = 0; matrix < forms; ++matrix) {
            bend(slab, !cuts.same, 1 + matrix, bent.data());
            run.inner(input.matrices.data() + matrix * d * d, d, 1, d, d, bent.data(), slab.pitch, slab.count,
                      grad.data(), slab.pitch, true);
          }
          // the rows of `outputs` are the columns of the factor
          run.inner(outputs.data(), 1, d, d, sizes.linear, slab.linear.data() + slab.begin, slab.pitch, slab.count,
                    grad.data(), slab.pitch, true);
          Mover<T> mover(d);
          if (cuts.same) {
            const auto [b, y, x, count] = cuts.segments[unit];
            return mover.store(grad.data(), slab.pitch, count, out, b, y, x);
          }
          const int64_t top = unit % cuts.strips * (cuts.rows - 2);
          for (int64_t i = 0; i < slab.count / slab.row; ++i) {
            mover.store(grad.data() + i * slab.row + 1, slab.pitch, shape.width, out, unit / cuts.strips, top + i, 0);
          }
        });
  });
  return gradient;
}

}  // namespace in2nect::cpu
