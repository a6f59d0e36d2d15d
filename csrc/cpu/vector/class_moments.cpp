// The inner loops of class_moments; see class_moments.h for what each does. Two products carry the cost: `outer`, whose
// register tile of accumulators runs along the pixels of both factors, and `inner`, whose runs along the depth.
#include "class_moments.h"

#include "vec.h"

namespace in2nect::cpu::IN2NECT_CAPABILITY {
namespace {

// Accumulators of a register tile: 24 of AVX-512's 32 registers, 12 of the others' 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kInnerRows = 12, kOuterRows = 6, kOuterColumns = 4;
#else
constexpr int kInnerRows = 6, kOuterRows = 4, kOuterColumns = 3;
#endif
constexpr int kInnerVectors = 2, kRestRows = 4;
static_assert(kInnerVectors * kLanes<float> <= kMomentsPad);
// A row no longer than this counts as zero, as in ../../common/tensors.h.
constexpr double kZeroNorm = 1e-12, kZeroSquare = kZeroNorm * kZeroNorm;
// Numbers that a block of the loops below keeps in the first-level cache.
constexpr int64_t kBlock = 256;

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

template <typename A>
void transpose_all(const A* from, int64_t stride, int64_t rows, int64_t columns, A* to, int64_t pitch) {
  constexpr int64_t kSide = kLanes<A>;
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t c = 0; c < columns; c += kSide) {
      if (r + kSide > rows || c + kSide > columns) {
        for (int64_t i = r; i < smaller(r + kSide, rows); ++i) {
          for (int64_t j = c; j < smaller(c + kSide, columns); ++j) {
            to[j * pitch + i] = from[i * stride + j];
          }
        }
        continue;
      }
      Vec<A> square[kSide];
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        square[i] = load(from + (r + i) * stride + c);
      }
      transpose<A>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        store(to + (c + i) * pitch + r, square[i]);
      }
    }
  }
}

// Rows first .. first + kRows of the product, those beyond m computed as the last, and not kept.
template <typename A, int kRows>
void inner_rows(const A* a, int64_t row, int64_t step, int64_t first, int64_t m, int64_t depth, const A* b,
                int64_t b_pitch, int64_t count, A* out, int64_t out_pitch, bool accumulate) {
  constexpr int64_t kWidth = kInnerVectors * kLanes<A>;
  const A* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = a + smaller(first + r, m - 1) * row;
  }
  for (int64_t x = 0; x < count; x += kWidth) {
    Vec<A> sums[kRows][kInnerVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vec<A> columns[kInnerVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kInnerVectors; ++v) {
        columns[v] = load(b + k * b_pitch + x + v * kLanes<A>);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const A factor = rows[r][k * step];
#pragma GCC unroll 2
        for (int v = 0; v < kInnerVectors; ++v) {
          sums[r][v] += factor * columns[v];
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      if (first + r < m) {
        A* to = out + (first + r) * out_pitch + x;
#pragma GCC unroll 2
        for (int v = 0; v < kInnerVectors; ++v) {
          const Vec<A> before = accumulate ? load(to + v * kLanes<A>) : Vec<A>{};
          store(to + v * kLanes<A>, before + sums[r][v]);
        }
      }
    }
  }
}

template <typename A>
void inner(const A* a, int64_t row, int64_t step, int64_t m, int64_t depth, const A* b, int64_t b_pitch,
           int64_t count, A* out, int64_t out_pitch, bool accumulate) {
  // A block of b's columns stays in the second-level cache while all rows pass over it.
  for (int64_t x = 0; x < count; x += kBlock) {
    const int64_t some = smaller(kBlock, count - x);
    int64_t i = 0;
    for (; i + kInnerRows <= m; i += kInnerRows) {
      inner_rows<A, kInnerRows>(a, row, step, i, m, depth, b + x, b_pitch, some, out + x, out_pitch, accumulate);
    }
    for (; i < m; i += kRestRows) {
      inner_rows<A, kRestRows>(a, row, step, i, m, depth, b + x, b_pitch, some, out + x, out_pitch, accumulate);
    }
  }
}

template <typename A>
inline double sum_of(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return static_cast<double>(lanes[0]);
}

// Pixels that a lane sums before its sum goes to a double; also what the columns' part of the second-level cache holds.
template <typename A>
constexpr int64_t kOuterPixels = 128 * kLanes<A>;

template <typename A>
void outer(const A* a, int64_t a_pitch, int64_t m, const A* b, int64_t b_pitch, int64_t n, int64_t count, double* out,
           int64_t stride, bool triangle) {
  for (int64_t begin = 0; begin < count; begin += kOuterPixels<A>) {
    const int64_t end = smaller(begin + kOuterPixels<A>, count);
    for (int64_t i = 0; i < m; i += kOuterRows) {
      for (int64_t j = triangle ? i / kOuterColumns * kOuterColumns : 0; j < n; j += kOuterColumns) {
        const A* rows[kOuterRows];
        const A* columns[kOuterColumns];
        for (int r = 0; r < kOuterRows; ++r) {
          rows[r] = a + smaller(i + r, m - 1) * a_pitch;
        }
        for (int c = 0; c < kOuterColumns; ++c) {
          columns[c] = b + smaller(j + c, n - 1) * b_pitch;
        }
        Vec<A> sums[kOuterRows][kOuterColumns] = {};
        for (int64_t x = begin; x < end; x += kLanes<A>) {
          Vec<A> right[kOuterColumns];
#pragma GCC unroll 4
          for (int c = 0; c < kOuterColumns; ++c) {
            right[c] = load(columns[c] + x);
          }
#pragma GCC unroll 6
          for (int r = 0; r < kOuterRows; ++r) {
            const Vec<A> left = load(rows[r] + x);
#pragma GCC unroll 4
            for (int c = 0; c < kOuterColumns; ++c) {
              sums[r][c] += left * right[c];
            }
          }
        }
        for (int r = 0; r < kOuterRows && i + r < m; ++r) {
          for (int c = 0; c < kOuterColumns && j + c < n; ++c) {
            out[(i + r) * stride + j + c] += sum_of<A>(sums[r][c]);
          }
        }
      }
    }
  }
}

template <typename A>
void combine(const A* const* coefficients, const A* const* rows, int64_t terms, int64_t pitch, int64_t d,
             int64_t count, A* out, int64_t out_pitch) {
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t x = 0; x < count; x += kLanes<A>) {
      Vec<A> sum = load(coefficients[0] + x) * load(rows[0] + c * pitch + x);
      for (int64_t t = 1; t < terms; ++t) {
        sum += load(coefficients[t] + x) * load(rows[t] + c * pitch + x);
      }
      store(out + c * out_pitch + x, sum);
    }
  }
}

// ---- pairs of cells -------------------------------------------------------------------------------------------------

template <typename A, typename Out>
void pairs_of(const A* z, const A* y, int64_t below, int64_t pitch, int64_t d, int64_t count, Out* out,
              int64_t out_pitch) {
  for (int64_t x = 0; x < count; x += kBlock) {
    const int64_t some = smaller(kBlock, count - x);
    Out sums[kPairs][kBlock] = {};
    for (int64_t c = 0; c < d; ++c) {
      const A* left = z + c * pitch + x;
      const A* right = y + c * pitch + x;
      const A* under = right + below;
#pragma omp simd
      for (int64_t i = 0; i < some; ++i) {
        const Out own = static_cast<Out>(left[i]), next = static_cast<Out>(left[i + 1]);
        sums[kSelf][i] += own * static_cast<Out>(right[i]);
        sums[kRight][i] += own * static_cast<Out>(right[i + 1]);
        sums[kDown][i] += own * static_cast<Out>(under[i]);
        sums[kDiagonal][i] += own * static_cast<Out>(under[i + 1]);
        sums[kAcross][i] += next * static_cast<Out>(under[i]);
      }
    }
    for (int64_t pair = 0; pair < kPairs; ++pair) {
      for (int64_t i = 0; i < some; ++i) {
        out[pair * out_pitch + x + i] = sums[pair][i];
      }
    }
  }
}

template <typename A>
void gram(const A* z, int64_t below, int64_t pitch, int64_t d, int64_t count, double* out, int64_t out_pitch) {
  pairs_of<A, double>(z, z, below, pitch, d, count, out, out_pitch);
}

// ---- label rows -----------------------------------------------------------------------------------------------------

template <typename A>
void blend(const A* cells, int64_t below, A t, int64_t count, A* out) {
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    out[x] = (1 - t) * cells[x] + t * cells[x + below];
  }
}

template <typename P>
void blend_pairs(const P* pairs, int64_t pitch, int64_t below, P t, int64_t count, P* self, P* right) {
  const P upper = (1 - t) * (1 - t), between = t * (1 - t), lower = t * t;
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    self[x] = upper * pairs[x] + 2 * between * pairs[kDown * pitch + x] + lower * pairs[x + below];
    right[x] = upper * pairs[kRight * pitch + x] +
               between * (pairs[kDiagonal * pitch + x] + pairs[kAcross * pitch + x]) +
               lower * pairs[kRight * pitch + x + below];
  }
}

template <typename A>
void interpolate(const A* cells, const int32_t* lower, const A* weight, int64_t count, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = (1 - weight[i]) * cells[lower[i]] + weight[i] * cells[lower[i] + 1];
  }
}

template <typename P, typename A>
void interpolate_pairs(const P* self, const P* right, const int32_t* lower, const A* weight, int64_t count, P* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const P high = static_cast<P>(weight[i]), low = 1 - high;
    out[i] = low * (low * self[lower[i]] + 2 * high * right[lower[i]]) + high * high * self[lower[i] + 1];
  }
}

template <typename A>
void gather(const A* values, const A* weight, const int32_t* begin, int64_t cells, A* out) {
  A carried = 0;
  for (int64_t j = 0; j < cells; ++j) {
    A low = carried, high = 0;
    for (int32_t i = begin[j]; i < begin[j + 1]; ++i) {
      const A upper = weight[i] * values[i];
      low += values[i] - upper;
      high += upper;
    }
    out[j] = low;
    carried = high;
  }
  out[cells] = carried;
}

template <typename A>
void gather_pairs(const A* values, const A* weight, const int32_t* begin, int64_t cells, A* self, A* right) {
  A carried = 0;
  for (int64_t j = 0; j < cells; ++j) {
    A low = carried, between = 0, high = 0;
    for (int32_t i = begin[j]; i < begin[j + 1]; ++i) {
      const A upper = weight[i] * values[i], lower = values[i] - upper;
      low += (1 - weight[i]) * lower;
      between += weight[i] * lower;
      high += weight[i] * upper;
    }
    self[j] = low;
    right[j] = between;
    carried = high;
  }
  self[cells] = carried;
  right[cells] = 0;
}

template <typename A>
void spread(const A* row, int64_t below, A t, int64_t count, A* cells) {
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    cells[x] += (1 - t) * row[x];
  }
  if (t == 0) {
    return;
  }
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    cells[x + below] += t * row[x];
  }
}

template <typename A>
void spread_pairs(const A* self, const A* right, int64_t pitch, int64_t below, A t, int64_t count, A* pairs) {
  const A upper = (1 - t) * (1 - t), between = t * (1 - t), lower = t * t;
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    pairs[x] += upper * self[x];
    pairs[kRight * pitch + x] += upper * right[x];
  }
  if (t == 0) {
    return;
  }
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    pairs[kDown * pitch + x] += between * self[x];
    pairs[kDiagonal * pitch + x] += between * right[x];
    pairs[kAcross * pitch + x] += between * right[x];
  }
#pragma omp simd
  for (int64_t x = 0; x < count; ++x) {
    pairs[x + below] += lower * self[x];
    pairs[kRight * pitch + x + below] += lower * right[x];
  }
}

// ---- pixels ---------------------------------------------------------------------------------------------------------

// alpha = 1 / |z|, of a zero row `of_zero`, and |alpha z|^2.
template <typename A>
void find_scales(const MomentsPixels<A>& pixels, double of_zero) {
#pragma omp simd
  for (int64_t i = 0; i < pixels.count; ++i) {
    const double square = pixels.squares[i];
    const bool zero = square <= kZeroSquare;  // not of a NaN
    const double found = zero ? of_zero : 1 / __builtin_sqrt(zero ? 1.0 : square);
    pixels.alpha[i] = static_cast<A>(found);
    pixels.unit_squares[i] = static_cast<A>(found * found * (square < 0 ? 0.0 : square));
  }
}

// One row a class: alpha, or 1, where a pixel is of the class.
template <typename A>
void one_hot(const MomentsPixels<A>& pixels, int64_t classes, bool scaled, A* out) {
  for (int64_t k = 0; k < classes; ++k) {
    const int32_t own = static_cast<int32_t>(k);
    A* to = out + k * pixels.pitch;
#pragma omp simd
    for (int64_t i = 0; i < pixels.count; ++i) {
      const A value = scaled ? pixels.alpha[i] : A(1);
      to[i] = pixels.codes[i] == own ? value : A(0);
    }
  }
}

template <typename A>
void moments(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool sums, bool by_class,
             double* squares) {
  find_scales(pixels, 1 / kZeroNorm);
  one_hot(pixels, classes.number, true, pixels.linear);
  if (sums) {
    one_hot(pixels, classes.number, false, pixels.linear + classes.number * pixels.pitch);
  }
  for (int64_t i = 0; squares != nullptr && i < pixels.count; ++i) {
    squares[pixels.codes[i]] += static_cast<double>(pixels.unit_squares[i]);
  }
  if (!by_class) {
#pragma omp simd
    for (int64_t i = 0; i < pixels.count; ++i) {
      pixels.pairs[i] = classes.weights[pixels.codes[i]] * pixels.alpha[i] * pixels.alpha[i];
    }
    return;
  }
  for (int64_t k = 0; k < classes.number; ++k) {
    const A weight = classes.weights[k];
    const A* own = pixels.linear + k * pixels.pitch;
    A* to = pixels.pairs + k * pixels.pairs_pitch;
#pragma omp simd
    for (int64_t i = 0; i < pixels.count; ++i) {
      to[i] = weight * own[i] * pixels.alpha[i];
    }
  }
}

inline float natural_log(float x) {
  return __builtin_logf(x);
}
inline double natural_log(double x) {
  return __builtin_log(x);
}

// softmax[k] = a p_k of the exponents alpha z.c_k + alpha^2 z^T V_k z; returns sum a LSE if asked.
template <typename A>
double find_softmax(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool curved, bool sum) {
  const A log2_e = static_cast<A>(1.4426950408889634074);
  double found = 0;
  for (int64_t i = 0; i < pixels.count; i += kLanes<A>) {
    const Vec<A> scale = load(pixels.alpha + i);
    Vec<A> top = broadcast<A>(-__builtin_inff());
    for (int64_t k = 0; k < classes.number; ++k) {
      Vec<A> exponent = scale * load(pixels.numbers + k * pixels.pitch + i);
      if (curved) {
        exponent += scale * scale * load(pixels.forms[k] + i);
      }
      store(pixels.softmax + k * pixels.pitch + i, exponent);
      top = largest<A>(exponent, top);
    }
    Vec<A> total = {};
    for (int64_t k = 0; k < classes.number; ++k) {
      A* to = pixels.softmax + k * pixels.pitch + i;
      const Vec<A> term = Exp2<A>::of((load(to) - top) * log2_e);
      store(to, term);
      total += term;
    }
    Vec<A> anchors = {};
    const int64_t lanes = smaller(kLanes<A>, pixels.count - i);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      anchors[lane] = classes.anchors[pixels.codes[i + lane]];
    }
    const Vec<A> factor = anchors / total;
    for (int64_t k = 0; k < classes.number; ++k) {
      A* to = pixels.softmax + k * pixels.pitch + i;
      store(to, factor * load(to));
    }
    for (int64_t lane = 0; sum && lane < lanes; ++lane) {
      if (pixels.codes[i + lane] >= 0 && anchors[lane] != 0) {
        found += static_cast<double>(anchors[lane] * (top[lane] + natural_log(total[lane])));
      }
    }
  }
  return found;
}

template <typename A>
double mixtures(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool by_class, bool sum) {
  find_scales(pixels, 1 / kZeroNorm);
  const double found = find_softmax(pixels, classes, by_class, sum);
  for (int64_t k = 0; k < classes.number; ++k) {
    const A* shares = pixels.softmax + k * pixels.pitch;
    A* linear = pixels.linear + k * pixels.pitch;
#pragma omp simd
    for (int64_t i = 0; i < pixels.count; ++i) {
      linear[i] = shares[i] * pixels.alpha[i];
    }
    A* pairs = pixels.pairs + k * pixels.pairs_pitch;
#pragma omp simd
    for (int64_t i = 0; i < (by_class ? pixels.count : 0); ++i) {
      pairs[i] = linear[i] * pixels.alpha[i];
    }
  }
  return found;
}

template <typename A>
void gradient(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool sums, bool by_class) {
  const int64_t number = classes.number, pitch = pixels.pitch, count = pixels.count;
  find_scales(pixels, 0.0);
  find_softmax(pixels, classes, by_class, false);
  one_hot(pixels, number, true, pixels.linear + number * pitch);
  if (sums) {
    one_hot(pixels, number, false, pixels.linear + 2 * number * pitch);
  }
  // pairs[0] gathers du.u, less own |u|^2 and what is not linear in the softmax.
  A* along = pixels.pairs;
  const A* const alpha = pixels.alpha;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    along[i] = classes.own[pixels.codes[i]] * pixels.unit_squares[i];
  }
  for (int64_t k = 0; k < number; ++k) {
    const A* shares = pixels.softmax + k * pitch;
    const A *logit = pixels.numbers + k * pitch, *constant = pixels.numbers + (number + k) * pitch;
    const A* of_class = pixels.linear + (number + k) * pitch;
    A* linear = pixels.linear + k * pitch;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      linear[i] = shares[i] * alpha[i];
      along[i] += linear[i] * logit[i] + of_class[i] * constant[i];
    }
    if (!by_class) {
      continue;
    }
    const A *curvature = pixels.forms[k], *matrix = pixels.forms[number + k];
    A* curved = pixels.pairs + (1 + k) * pixels.pairs_pitch;
    A* of_matrix = pixels.pairs + (1 + number + k) * pixels.pairs_pitch;
    const A scale = classes.scales[k];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      curved[i] = 2 * linear[i] * alpha[i];
      of_matrix[i] = scale * of_class[i] * alpha[i];
      along[i] += curved[i] * curvature[i] + of_matrix[i] * matrix[i];
    }
  }
  if (!by_class) {
    const A* form = pixels.forms[0];
    A* of_matrix = pixels.pairs + pixels.pairs_pitch;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      of_matrix[i] = classes.scales[pixels.codes[i]] * alpha[i] * alpha[i];
      along[i] += of_matrix[i] * form[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    along[i] = pixels.codes[i] < 0 ? A(0) : alpha[i] * alpha[i] * (classes.own[pixels.codes[i]] - along[i]);
  }
}

template <typename A>
constexpr ClassMomentsLoops<A> loops() {
  return {transpose_all<A>,
          inner<A>,
          outer<A>,
          combine<A>,
          gram<A>,
          pairs_of<A, A>,
          blend<A>,
          blend_pairs<double>,
          blend_pairs<A>,
          interpolate<A>,
          interpolate_pairs<double, A>,
          interpolate_pairs<A, A>,
          gather<A>,
          gather_pairs<A>,
          spread<A>,
          spread_pairs<A>,
          moments<A>,
          mixtures<A>,
          gradient<A>};
}

}  // namespace

extern const ClassMomentsTable class_moments_table;
const ClassMomentsTable class_moments_table = {loops<float>(), loops<double>()};

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
