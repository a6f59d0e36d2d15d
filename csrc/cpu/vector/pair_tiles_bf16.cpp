// The pairwise loss on one tile of bfloat16 rows; compiled for AVX512-BF16, for AMX, and for AMX with its eight tile
// registers emulated (tests of that mathematics where there is no such chip).
//
// All three multiply pairs of neighbouring bfloat16 numbers into float32: a factor is broadcast, or lies in rows; the
// other lies in pairs, (k / 2, column) of 32 bits. AVX512-BF16 accumulates 12 rows of two vectors, AMX 2 x 2 squares of
// 16 x 16. Both leave strips of x in the first-level cache, where exponential, weights and sums are done as in
// pair_tiles.cpp. The backward rounds the coefficients to bfloat16 twice: g_ij f_j by rows, for the gradient of i, and
// g_ij f_i in pairs of rows, for that of j.
#include "pair_tiles_bf16.h"

#include <immintrin.h>

#include "vec.h"

namespace in2nect::cpu::IN2NECT_CAPABILITY {
namespace {

using Vector = Vec<float>;
typedef uint32_t Pair __attribute__((may_alias));  // two bfloat16 numbers, the first in the low half
constexpr int kWide = kLanes<float>;
static_assert(kWide == 16);

constexpr int kPanel = 32;  // columns of a strip: two vectors, or two squares
#ifdef IN2NECT_TILE_REGISTERS
constexpr int kStrip = 32;  // rows of a strip: two squares
#else
constexpr int kStrip = 12;  // 24 of 32 registers accumulate
#endif
static_assert(kTileUnit % kStrip == 0 && kTileUnit % kPanel == 0);
// Columns of g that one sweep of a product takes, as in pair_tiles.cpp.
constexpr int64_t kSweep = 96;

IN2NECT_INLINE Vector load_pairs(const Pair* p) {
  return load(reinterpret_cast<const float*>(p));
}

typedef Bf16 Halves __attribute__((vector_size(32)));
typedef Bf16 UnalignedHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef Pair Words __attribute__((vector_size(64)));

IN2NECT_INLINE Halves load_halves(const Bf16* p) {
  return *reinterpret_cast<const UnalignedHalves*>(p);
}

IN2NECT_INLINE void store_halves(Bf16* p, Halves halves) {
  *reinterpret_cast<UnalignedHalves*>(p) = halves;
}

IN2NECT_INLINE void store_pairs(Pair* p, Words words) {
  store(reinterpret_cast<float*>(p), reinterpret_cast<Vector>(words));
}

IN2NECT_INLINE Halves round_to_bf16(Vector v) {
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(v));
}

IN2NECT_INLINE Vector widen(Halves halves) {
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
}

// Rows 2 r and 2 r + 1 side by side, the first in the low halves.
IN2NECT_INLINE Words interleave(Halves even, Halves odd) {
  return __builtin_convertvector(even, Words) | (__builtin_convertvector(odd, Words) << 16);
}

// Scratch memory, in planes where the rows are: coefficients, the rows of both blocks in pairs, a panel, a strip.
struct Scratch {
  Bf16* g_rows[2] = {};                   // (rows, columns): g_ij f_j
  Pair* g_pairs[2] = {};                  // (rows / 2, columns): g_ij f_i
  Pair *keys[2] = {}, *anchors[2] = {};   // (columns / 2, stride), (rows / 2, stride)
  Pair* panel[2] = {};                    // (stride / 2, kPanel)
  Pair* turned[2] = {};                   // (stride, rows / 2): the anchors' channels by rows; tile registers alone
  float *strip, *row_sums, *column_sums;  // (kStrip, kPanel), (rows, kWide), (columns,)
  int64_t bytes;

  Scratch(void* memory, const TileShape& shape, int planes) {
    bytes = 0;
    const auto take = [&](int64_t size) {
      char* taken = memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
      bytes += (size + 63) / 64 * 64;
      return taken;
    };
    const int64_t half = shape.stride / 2;
    for (int p = 0; p < planes; ++p) {
      g_rows[p] = reinterpret_cast<Bf16*>(take(shape.rows * shape.columns * 2));
      g_pairs[p] = reinterpret_cast<Pair*>(take(shape.rows * shape.columns * 2));
      keys[p] = reinterpret_cast<Pair*>(take(shape.columns * half * 4));
      anchors[p] = reinterpret_cast<Pair*>(take(shape.rows * half * 4));
      panel[p] = reinterpret_cast<Pair*>(take(half * kPanel * 4));
#ifdef IN2NECT_TILE_REGISTERS
      turned[p] = reinterpret_cast<Pair*>(take(shape.rows * half * 4));
#endif
    }
    strip = reinterpret_cast<float*>(take(kPanel * kPanel * 4));
    row_sums = reinterpret_cast<float*>(take(shape.rows * kWide * 4));
    column_sums = reinterpret_cast<float*>(take(shape.columns * 4));
  }
};

IN2NECT_INLINE int planes_of(const HalfSide& side) {
  return side.rows[1] != nullptr ? 2 : 1;
}

// to[c][r] = from[r][c], of 32 bits; both sides multiples of 16.
void turn(const Pair* from, int64_t from_stride, int64_t rows, int64_t columns, Pair* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kWide) {
    for (int64_t c = 0; c < columns; c += kWide) {
      Vector square[kWide];
#pragma GCC unroll 16
      for (int k = 0; k < kWide; ++k) {
        square[k] = load_pairs(from + (r + k) * from_stride + c);
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int k = 0; k < kWide; ++k) {
        store_pairs(to + (c + k) * to_stride + r, reinterpret_cast<Words>(square[k]));
      }
    }
  }
}

// pairs[r / 2][c] = rows r and r + 1 at channel c.
void pair_rows(const Bf16* rows, int64_t count, int64_t stride, Pair* pairs) {
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t c = 0; c < stride; c += kWide) {
      const Halves even = load_halves(rows + r * stride + c), odd = load_halves(rows + (r + 1) * stride + c);
      store_pairs(pairs + r / 2 * stride + c, interleave(even, odd));
    }
  }
}

// One operand of a product, in one or two planes.
struct Operand {
  const Pair* plane[2];
  int64_t stride;  // in pairs
};

// high . high, then of two planes high . low and low . high
IN2NECT_INLINE int products(int planes) {
  return planes == 1 ? 1 : 3;
}
IN2NECT_INLINE int left_plane(int product) {
  return product == 2 ? 1 : 0;
}
IN2NECT_INLINE int right_plane(int product) {
  return product == 1 ? 1 : 0;
}

#ifdef IN2NECT_TILE_REGISTERS

#ifdef IN2NECT_EMULATE_TILES
// What the instructions do, but for the order of their sums: registers of 16 rows of 64 bytes.
struct TileRegisters {
  Pair tile[8][16][16];

  void zero(int t) {
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < 16; ++c) {
        tile[t][r][c] = 0;
      }
    }
  }
  void load(int t, const void* base, int64_t stride) {
    for (int r = 0; r < 16; ++r) {
      __builtin_memcpy(tile[t][r], static_cast<const char*>(base) + r * stride, 64);
    }
  }
  void store(int t, void* base, int64_t stride) const {
    for (int r = 0; r < 16; ++r) {
      __builtin_memcpy(static_cast<char*>(base) + r * stride, tile[t][r], 64);
    }
  }
  static float part(Pair pair, int which) {
    const Pair bits = which == 0 ? pair << 16 : pair & 0xFFFF0000U;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  void multiply(int c, int a, int b) {
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        float sum;
        __builtin_memcpy(&sum, &tile[c][m][n], 4);
        for (int k = 0; k < 16; ++k) {
          sum += part(tile[a][m][k], 0) * part(tile[b][k][n], 0);
          sum += part(tile[a][m][k], 1) * part(tile[b][k][n], 1);
        }
        __builtin_memcpy(&tile[c][m][n], &sum, 4);
      }
    }
  }
};
#define TILE_ZERO(t) registers.zero(t)
#define TILE_LOAD(t, base, stride) registers.load(t, base, stride)
#define TILE_STORE(t, base, stride) registers.store(t, base, stride)
#define TILE_MULTIPLY(c, a, b) registers.multiply(c, a, b)
struct TilesInUse {};
#else
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
// Eight registers of 16 rows of 64 bytes, for as long as it lives.
struct TilesInUse {
  TilesInUse() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    static_assert(sizeof(configuration) == 64);
    // compilers take the instruction to read 8 bytes of the 64
    __asm__ volatile("" : : "r"(&configuration) : "memory");
    _tile_loadconfig(&configuration);
  }
  ~TilesInUse() {
    _tile_release();
  }
};
#endif

// out (32, 32) = a . b over `depth` numbers: a by rows of pairs, b in pairs (depth / 2, column).
IN2NECT_INLINE void multiply_block(const Operand& a, const Operand& b, int64_t depth, int planes,
                                   float* out) {
#ifdef IN2NECT_EMULATE_TILES
  TileRegisters registers;
#endif
  __asm__ volatile("" : : : "memory");  // nor do they know that loads of registers read memory
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  const int64_t a_bytes = a.stride * 4, b_bytes = b.stride * 4;
  for (int product = 0; product < products(planes); ++product) {
    const Pair* left = a.plane[left_plane(product)];
    const Pair* right = b.plane[right_plane(product)];
    for (int64_t k = 0; k < depth / 2; k += 16) {
      TILE_LOAD(4, left + k, a_bytes);
      TILE_LOAD(5, left + 16 * a.stride + k, a_bytes);
      TILE_LOAD(6, right + k * b.stride, b_bytes);
      TILE_LOAD(7, right + k * b.stride + 16, b_bytes);
      TILE_MULTIPLY(0, 4, 6);
      TILE_MULTIPLY(1, 4, 7);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, out, kPanel * 4);
  TILE_STORE(1, out + 16, kPanel * 4);
  TILE_STORE(2, out + 16 * kPanel, kPanel * 4);
  TILE_STORE(3, out + 16 * kPanel + 16, kPanel * 4);
}

#else

struct TilesInUse {};

// acc[r][v] += sum_k a[r * row + k * step] . b[k * width + 16 v], of pairs
template <int V>
IN2NECT_INLINE void multiply(const Pair* a, int64_t row, int64_t step, const Pair* b, int64_t width, int64_t pairs,
                             Vector (&acc)[kStrip][V]) {
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      columns[v] = reinterpret_cast<__m512bh>(load_pairs(b + k * width + v * kWide));
    }
#pragma GCC unroll 12
    for (int r = 0; r < kStrip; ++r) {
      const __m512bh factor = reinterpret_cast<__m512bh>(Words{} + a[r * row + k * step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], factor, columns[v]);
      }
    }
  }
}

#endif

// Calls body(first row, first column) with a strip of z_i . z_j in scratch.strip.
template <typename Body>
IN2NECT_INLINE void for_each_strip(const HalfSide& i, const HalfSide& j, const TileShape& shape, const Scratch& scratch,
                                   const Body& body) {
  const int planes = planes_of(i);
  const int64_t half = shape.stride / 2;
  for (int64_t column = 0; column < shape.columns; column += kPanel) {
    for (int p = 0; p < planes; ++p) {
      turn(reinterpret_cast<const Pair*>(j.rows[p] + column * shape.stride), half, kPanel, half, scratch.panel[p],
           kPanel);
    }
    for (int64_t row = 0; row < shape.rows; row += kStrip) {
      const auto rows = [&](int p) { return reinterpret_cast<const Pair*>(i.rows[p]) + row * half; };
#ifdef IN2NECT_TILE_REGISTERS
      multiply_block({{rows(0), planes == 2 ? rows(1) : nullptr}, half}, {{scratch.panel[0], scratch.panel[1]}, kPanel},
                     shape.stride, planes, scratch.strip);
#else
      Vector x[kStrip][2] = {};
      for (int product = 0; product < products(planes); ++product) {
        multiply<2>(rows(left_plane(product)), half, 1, scratch.panel[right_plane(product)], kPanel, half, x);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kStrip; ++r) {
        store(scratch.strip + r * kPanel, x[r][0]);
        store(scratch.strip + r * kPanel + kWide, x[r][1]);
      }
#endif
      body(row, column);
    }
  }
}

// e_ij of a row and 16 columns.
IN2NECT_INLINE Vector exponential(const HalfSide& i, const HalfSide& j, int64_t r, int64_t c, const float* strip) {
  return Exp2<float>::of(load(strip) * (i.factor[r] * load(j.factor + c)) - load(j.shift + c) - i.shift[r]);
}

void forward(const HalfSide& i, const HalfSide& j, const TileShape& shape, Pairs pairs, void* memory) {
  const Scratch scratch(memory, shape, planes_of(i));
  const TilesInUse tiles;
  (void)tiles;
  clear(scratch.row_sums, shape.rows * kWide);
  clear(scratch.column_sums, shape.columns);
  for_each_strip(i, j, shape, scratch, [&](int64_t row, int64_t column) {
    Vector of_columns[2] = {};
    for (int r = 0; r < kStrip; ++r) {
      Vector of_row = {};
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t c = column + v * kWide;
        const Vector e = exponential(i, j, row + r, c, scratch.strip + r * kPanel + v * kWide);
        of_row += e * load(j.omega + c);
        of_columns[v] += e * i.omega[row + r];
      }
      add(scratch.row_sums + (row + r) * kWide, of_row);
    }
    add(scratch.column_sums + column, of_columns[0]);
    add(scratch.column_sums + column + kWide, of_columns[1]);
  });
  for (int64_t r = 0; r < shape.rows; ++r) {
    i.sums[r] += horizontal_sum<float>(load(scratch.row_sums + r * kWide));
  }
  for (int64_t c = 0; pairs == Pairs::kOneSet && c < shape.columns; ++c) {
    j.sums[c] += static_cast<double>(scratch.column_sums[c]);
  }
}

// Stores a vector of coefficients, rounded, into each plane: what the first leaves over goes to the second.
template <typename Store>
IN2NECT_INLINE void split(Vector g, int planes, const Store& store_plane) {
  for (int p = 0; p < planes; ++p) {
    const Halves rounded = round_to_bf16(g);
    store_plane(p, rounded);
    g -= widen(rounded);
  }
}

// gradient (rows, stride) += g (rows, depth) . v (depth, stride); of two ways to lay out g:
//   by rows   g_ij f_j, pairs of neighbouring j
//   mirrored  g_ij f_i in pairs of rows i: the product is with g's mirror image
template <bool kMirrored>
IN2NECT_INLINE void add_product(const Scratch& scratch, const TileShape& shape, int planes, float* gradient) {
  const int64_t rows = kMirrored ? shape.columns : shape.rows, depth = kMirrored ? shape.rows : shape.columns;
  const auto g = [&](int p) {
    return kMirrored ? scratch.g_pairs[p] : reinterpret_cast<const Pair*>(scratch.g_rows[p]);
  };
  Pair* const* v = kMirrored ? scratch.anchors : scratch.keys;
#ifdef IN2NECT_TILE_REGISTERS
  for (int64_t c = 0; c < shape.stride; c += kPanel) {
    for (int64_t row = 0; row < rows; row += kPanel) {
      if constexpr (kMirrored) {  // (channel, row): the channels of the anchors by rows, times g in pairs
        const int64_t half = shape.rows / 2;
        const auto turned = [&](int p) { return scratch.turned[p] + c * half; };
        multiply_block({{turned(0), planes == 2 ? turned(1) : nullptr}, half},
                       {{g(0) + row, planes == 2 ? g(1) + row : nullptr}, shape.columns}, depth, planes, scratch.strip);
        Pair* square = reinterpret_cast<Pair*>(scratch.strip);
        Pair mirrored[kPanel * kPanel];
        turn(square, kPanel, kPanel, kPanel, mirrored, kPanel);
        __builtin_memcpy(square, mirrored, sizeof(mirrored));
      } else {
        const int64_t half = shape.columns / 2;
        multiply_block({{g(0) + row * half, planes == 2 ? g(1) + row * half : nullptr}, half},
                       {{v[0] + c, planes == 2 ? v[1] + c : nullptr}, shape.stride}, depth, planes, scratch.strip);
      }
      for (int r = 0; r < kPanel; ++r) {
        float* to = gradient + (row + r) * shape.stride + c;
        add(to, load(scratch.strip + r * kPanel));
        add(to + kWide, load(scratch.strip + r * kPanel + kWide));
      }
    }
  }
#else
  const int64_t row_step = kMirrored ? 1 : shape.columns / 2, step = kMirrored ? shape.columns : 1;
  for (int64_t k = 0; k < depth; k += kSweep) {
    for (int64_t c = 0; c < shape.stride; c += kPanel) {
      for (int64_t row = 0; row < rows; row += kStrip) {
        Vector sum[kStrip][2] = {};
        for (int product = 0; product < products(planes); ++product) {
          multiply<2>(g(left_plane(product)) + row * row_step + k / 2 * step, row_step, step,
                      v[right_plane(product)] + k / 2 * shape.stride + c, shape.stride, kSweep / 2, sum);
        }
#pragma GCC unroll 12
        for (int r = 0; r < kStrip; ++r) {
          float* to = gradient + (row + r) * shape.stride + c;
          add(to, sum[r][0]);
          add(to + kWide, sum[r][1]);
        }
      }
    }
  }
#endif
}

void backward(const HalfSide& i, const HalfSide& j, const TileShape& shape, Pairs pairs, void* memory) {
  const int planes = planes_of(i);
  const Scratch scratch(memory, shape, planes);
  const TilesInUse tiles;
  (void)tiles;
  for_each_strip(i, j, shape, scratch, [&](int64_t row, int64_t column) {
    for (int r = 0; r < kStrip; r += 2) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const int64_t c = column + v * kWide;
        Vector g[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          const int64_t n = row + r + k;
          const Vector weights = i.rho[n] * load(j.omega + c) + i.omega[n] * load(j.rho + c);
          g[k] = exponential(i, j, n, c, scratch.strip + (r + k) * kPanel + v * kWide) * weights;
          split(g[k] * load(j.factor + c), planes, [&](int p, Halves rounded) {
            store_halves(scratch.g_rows[p] + n * shape.columns + c, rounded);
          });
        }
        Vector even = g[0] * i.factor[row + r], odd = g[1] * i.factor[row + r + 1];
        for (int p = 0; p < planes; ++p) {
          const Halves low = round_to_bf16(even), high = round_to_bf16(odd);
          store_pairs(scratch.g_pairs[p] + (row + r) / 2 * shape.columns + c, interleave(low, high));
          even -= widen(low);
          odd -= widen(high);
        }
      }
    }
  });
  for (int p = 0; p < planes; ++p) {
    pair_rows(j.rows[p], shape.columns, shape.stride, scratch.keys[p]);
    if (pairs != Pairs::kDiagonal) {
      pair_rows(i.rows[p], shape.rows, shape.stride, scratch.anchors[p]);
#ifdef IN2NECT_TILE_REGISTERS
      turn(scratch.anchors[p], shape.stride, shape.rows / 2, shape.stride, scratch.turned[p], shape.rows / 2);
#endif
    }
  }
  add_product<false>(scratch, shape, planes, i.gradient);
  if (pairs != Pairs::kDiagonal) {
    add_product<true>(scratch, shape, planes, j.gradient);
  }
}

int64_t scratch(const TileShape& shape, int planes) {
  return Scratch(nullptr, shape, planes).bytes;
}

}  // namespace

extern const HalfTiles half_tiles = {scratch, forward, backward};

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
