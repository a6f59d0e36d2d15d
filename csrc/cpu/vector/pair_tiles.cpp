// The pairwise loss on one tile, a block of rows against a block of columns; compiled once a capability.
//
// A register tile of kRows x kVectors vectors accumulates s over the depth, the columns' rows transposed into panels
// that stay in the first-level cache. What follows (exponential, weights, sums) is done on the registers. The backward
// writes its coefficients g, 144 KiB at 192 x 192 in float32, to scratch memory that stays in the second-level cache,
// and multiplies it by both blocks' rows with the same register tile: 3 products, 192 flops a pair at a depth of 64,
// beside some 20 operations for exponential and coefficients.
#include "pair_tiles.h"

#include "vec.h"

namespace in2nect::cpu::IN2NECT_CAPABILITY {
namespace {

// Accumulators: 24 of AVX-512's 32 registers, 12 of the others' 16; kVectors vectors of columns and one broadcast
// beside.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 12, kVectors = 2;
#else
constexpr int kRows = 6, kVectors = 2;
#endif
static_assert(kTileUnit % kRows == 0 && kTileUnit % (kVectors * kVectorBytes / 4) == 0);
// Columns of g that one sweep of a product takes: 96 x 2 vectors of the other factor stay in the first-level cache.
constexpr int64_t kSweep = 96;

template <typename A>
constexpr int kPanel = kVectors * kLanes<A>;  // columns of a panel

// acc[r][v] += sum_k a[r * row + k * step] * b[k * width + v * lanes]
template <typename A, int R, int V>
IN2NECT_INLINE void multiply(const A* a, int64_t row, int64_t step, const A* b, int64_t width, int64_t depth,
                             Vec<A> (&acc)[R][V]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      columns[v] = load(b + k * width + v * kLanes<A>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const A factor = a[r * row + k * step];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        acc[r][v] += factor * columns[v];
      }
    }
  }
}

// panel[k][c] = rows[c][k] for kPanel rows; strides are multiples of the vector, so k may run beyond the depth.
template <typename A>
void fill_panel(const A* rows, const TileShape& shape, A* panel) {
  constexpr int kSide = kLanes<A>;
  for (int64_t k = 0; k < shape.depth; k += kSide) {
    for (int64_t c = 0; c < kPanel<A>; c += kSide) {
      Vec<A> square[kSide];
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) {
        square[r] = load(rows + (c + r) * shape.stride + k);
      }
      transpose<A>(square);
#pragma GCC unroll 16
      for (int r = 0; r < kSide; ++r) {
        store(panel + (k + r) * kPanel<A> + c, square[r]);
      }
    }
  }
}

// Scratch memory of a tile: the coefficients g, a panel, and one vector of sums a row and one number a column.
template <typename A>
struct Scratch {
  A *g, *panel, *row_sums, *column_sums;

  Scratch(A* memory, const TileShape& shape)
      : g(memory),
        panel(g + shape.rows * shape.columns),
        row_sums(panel + kPanel<A> * shape.stride),
        column_sums(row_sums + shape.rows * kLanes<A>) {}
  static int64_t size(const TileShape& shape) {
    return shape.rows * shape.columns + kPanel<A> * shape.stride + shape.rows * kLanes<A> + shape.columns;
  }
};

// Calls body(first row, first column, x) for each register tile of x = rows of i . rows of j.
template <typename A, typename Body>
IN2NECT_INLINE void for_each_register_tile(const Side<A>& i, const Side<A>& j, const TileShape& shape, A* panel,
                                           const Body& body) {
  for (int64_t column = 0; column < shape.columns; column += kPanel<A>) {
    fill_panel(j.rows + column * shape.stride, shape, panel);
    for (int64_t row = 0; row < shape.rows; row += kRows) {
      Vec<A> x[kRows][kVectors] = {};
      multiply(i.rows + row * shape.stride, shape.stride, 1, panel, kPanel<A>, shape.depth, x);
      body(row, column, x);
    }
  }
}

// Sums of a tile into the rows' and, of one set, the columns' totals; `term` gives what row r, column c adds to the row
// and to the column: void term(row, column, x, to_row, to_column).
template <typename A, typename Term>
IN2NECT_INLINE void sum_tile(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory,
                             const Term& term) {
  const Scratch<A> scratch(memory, shape);
  clear(scratch.row_sums, shape.rows * kLanes<A>);
  clear(scratch.column_sums, shape.columns);
  for_each_register_tile(i, j, shape, scratch.panel, [&](int64_t row, int64_t column, Vec<A>(&x)[kRows][kVectors]) {
    Vec<A> of_columns[kVectors] = {};
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec<A> of_row = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        term(row + r, column + v * kLanes<A>, x[r][v], of_row, of_columns[v]);
      }
      add(scratch.row_sums + (row + r) * kLanes<A>, of_row);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      add(scratch.column_sums + column + v * kLanes<A>, of_columns[v]);
    }
  });
  for (int64_t r = 0; r < shape.rows; ++r) {
    i.sums[r] += horizontal_sum<A>(load(scratch.row_sums + r * kLanes<A>));
  }
  for (int64_t c = 0; pairs == Pairs::kOneSet && c < shape.columns; ++c) {
    j.sums[c] += static_cast<double>(scratch.column_sums[c]);
  }
}

// gradient[r] += sum_k g_rk v_k, or with g's mirror image sum_k g_kr v_k, in sweeps over k; the first `width` numbers.
template <typename A, int V, bool kMirrored>
IN2NECT_INLINE void add_columns(const A* g, int64_t g_stride, const A* v, int64_t stride, int64_t rows, int64_t depth,
                                A* gradient) {
  for (int64_t row = 0; row < rows; row += kRows) {
    // from zero, not on top of what is there: thousands of terms one after the other would lose two digits of float32
    Vec<A> sum[kRows][V] = {};
    const A* factors = g + (kMirrored ? row : row * g_stride);
    multiply(factors, kMirrored ? 1 : g_stride, kMirrored ? g_stride : 1, v, stride, depth, sum);
    A* to = gradient + row * stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < V; ++c) {
        add(to + r * stride + c * kLanes<A>, sum[r][c]);
      }
    }
  }
}

template <typename A, bool kMirrored>
void add_product(const A* g, int64_t g_stride, const A* v, const TileShape& shape, int64_t rows, int64_t depth,
                 A* gradient) {
  for (int64_t k = 0; k < depth; k += kSweep) {
    const A* part = g + (kMirrored ? k * g_stride : k);
    const A* keys = v + k * shape.stride;
    int64_t c = 0;
    for (; c + kPanel<A> <= shape.stride; c += kPanel<A>) {
      add_columns<A, kVectors, kMirrored>(part, g_stride, keys + c, shape.stride, rows, kSweep, gradient + c);
    }
    for (; c < shape.stride; c += kLanes<A>) {
      add_columns<A, 1, kMirrored>(part, g_stride, keys + c, shape.stride, rows, kSweep, gradient + c);
    }
  }
}

// The gradient of a tile; `coefficient(row, column, x)` gives a vector of g.
template <typename A, typename Coefficient>
IN2NECT_INLINE void differentiate_tile(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs,
                                       A* memory, const Coefficient& coefficient) {
  const Scratch<A> scratch(memory, shape);
  for_each_register_tile(i, j, shape, scratch.panel, [&](int64_t row, int64_t column, Vec<A>(&x)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = column + v * kLanes<A>;
        store(scratch.g + (row + r) * shape.columns + c, coefficient(row + r, c, x[r][v]));
      }
    }
  });
  add_product<A, false>(scratch.g, shape.columns, j.rows, shape, shape.rows, shape.columns, i.gradient);
  if (pairs != Pairs::kDiagonal) {
    add_product<A, true>(scratch.g, shape.columns, i.rows, shape, shape.columns, shape.rows, j.gradient);
  }
}

template <typename A>
int64_t scratch(const TileShape& shape) {
  return Scratch<A>::size(shape);
}

template <typename A>
void forward(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory) {
  sum_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x, Vec<A>& to_row, Vec<A>& to_column) {
    const Vec<A> e = Exp2<A>::of(x - load(j.shift + c) - i.shift[r]);
    to_row += e * load(j.omega + c);
    to_column += e * i.omega[r];
  });
}

template <typename A>
void backward(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory) {
  differentiate_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x) {
    const Vec<A> e = Exp2<A>::of(x - load(j.shift + c) - i.shift[r]);
    return e * (i.rho[r] * load(j.omega + c) + i.omega[r] * load(j.rho + c));
  });
}

template <typename A>
void peaks(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory) {
  const Scratch<A> scratch(memory, shape);
  for_each_register_tile(i, j, shape, scratch.panel, [&](int64_t row, int64_t column, Vec<A>(&x)[kRows][kVectors]) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = column + v * kLanes<A>;
        const A found = horizontal_max<A>(x[r][v] + load(j.shift + c));
        i.peak[row + r] = found > i.peak[row + r] ? found : i.peak[row + r];
        if (pairs == Pairs::kOneSet) {
          store(j.peak + c, largest<A>(x[r][v] + i.shift[row + r], load(j.peak + c)));
        }
      }
    }
  });
}

template <typename A>
void peaked_forward(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory) {
  if (pairs != Pairs::kOneSet) {
    sum_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x, Vec<A>& to_row, Vec<A>&) {
      to_row += Exp2<A>::of(x + load(j.shift + c) - i.peak[r]);
    });
    return;
  }
  sum_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x, Vec<A>& to_row, Vec<A>& to_column) {
    to_row += Exp2<A>::of(x + load(j.shift + c) - i.peak[r]);
    to_column += Exp2<A>::of(x + i.shift[r] - load(j.peak + c));
  });
}

template <typename A>
void peaked_backward(const Side<A>& i, const Side<A>& j, const TileShape& shape, Pairs pairs, A* memory) {
  if (pairs == Pairs::kKeys) {
    differentiate_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x) {
      return i.rho[r] * Exp2<A>::of(x + load(j.shift + c) - i.peak[r]);
    });
    return;
  }
  differentiate_tile(i, j, shape, pairs, memory, [&](int64_t r, int64_t c, Vec<A> x) {
    return i.rho[r] * Exp2<A>::of(x + load(j.shift + c) - i.peak[r]) +
           load(j.rho + c) * Exp2<A>::of(x + i.shift[r] - load(j.peak + c));
  });
}

template <typename A>
constexpr PairTiles<A> table() {
  return {scratch<A>, forward<A>, backward<A>, peaks<A>, peaked_forward<A>, peaked_backward<A>};
}

}  // namespace

extern const PairTiles<float> pair_tiles_float = table<float>();
extern const PairTiles<double> pair_tiles_double = table<double>();

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
