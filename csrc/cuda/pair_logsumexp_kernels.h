// log D_i = log sum_j w_j exp(s_ij) of Eq. 6 and its gradient, tile by tile: O(N M d) time, O(N + M) memory beside the
// rows. With s_ij = u_i.u_j / tau:
//
//     log D_i = log sum_j exp(s_ij + log w_j)                                   a running maximum: right for any rows
//     P_rc = a_r exp(s_rc + log w_c - log D_r)  [r an anchor]  +  a_c exp(s_rc + log w_r - log D_c)  [r a key]
//     dL/du_r = (1 / tau) sum_c P_rc u_c                                        every exponent at most 0
//
// Exponents are powers of e until their differences are taken, and only these are brought to powers of two, for one
// multiplication an exponential: log D of some 1,000 (rows of wide norms), or of 20 (a low temperature), would lose on
// the way to powers of two and back what float32 has to lose.
//
// Anchors against keys take two passes backward, over anchors and over keys. A set against itself takes one with both
// terms, since the gradient matrix is symmetric. (The Triton kernels halve the exponentials of the symmetric form by a
// constant shift, and fall back to these formulas where it would underflow; here they are all there is.)
//
// A block owns rows and walks over tiles of the others, whose copies to shared memory run ahead of the products. A
// row's sums stay with one warp from the first tile to the last, in the order of the tiles, so results are the same
// bits every time. Rows wider than a tile come in chunks: their products s are added up before they are used, and each
// block writes one chunk of the gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "tensor_core.h"

namespace in2nect::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kPairWarps = 4, kPairThreads = 32 * kPairWarps;
// Numbers per row are stored up to a multiple of this, so that no tile (of 128 rows at most) needs a check.
constexpr int64_t kRowPadding = 128;
// Shared memory a block may have on every chip: 99 KiB on sm_86 and sm_89.
constexpr size_t kMostSharedBytes = 99 * 1024;
constexpr int kElementThreads = 256;
template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Rows that can be copied 16 bytes at a time: they start at multiples of 16 bytes, and `width` numbers are 16 k bytes.
template <typename T>
struct Rows {
  const char* data;
  int64_t count, stride;  // bytes from row to row
  int width;
};

// What each row of a set brings beside itself, stored up to a multiple of kRowPadding; null where it is not used.
template <typename A>
struct PerRow {
  const A* log_weights;  // of keys; -inf beyond the last
  const A* log_d;         // of anchors; inf where there is no key, and beyond the last: exp(x - inf) is 0
  const A* coefficients;  // of anchors: a_i; 0 beyond the last
};

// What the rows that a block owns are.
enum class Own { kAnchors, kKeys, kBoth };

__host__ __device__ constexpr bool is_anchor(Own own) {
  return own != Own::kKeys;
}

__host__ __device__ constexpr bool is_key(Own own) {
  return own != Own::kAnchors;
}

// Tiles of a kernel: each warp has 16 ROWS of the block's own rows; 8 COLUMNS of the others at a time; WIDTH numbers.
template <typename T, int WIDTH, int ROWS, int COLUMNS>
struct Tile {
  static constexpr int kWidth = WIDTH, kRows = ROWS, kColumns = COLUMNS;
  static constexpr int kWarpRows = 16 * ROWS, kOwn = kPairWarps * kWarpRows, kOthers = 8 * COLUMNS;
  static constexpr int kStride = row_bytes<T>(WIDTH);
  static constexpr int kOwnBytes = kOwn * kStride, kOthersBytes = kOthers * kStride;
  static constexpr int kConstantBytes = kOthers * static_cast<int>(sizeof(Accumulator<T>));
  static_assert(kOwn <= kRowPadding && kOthers <= kRowPadding && WIDTH * sizeof(T) % 128 == 0);
};

// Chosen by the compiled code: no spills, two blocks or more a multiprocessor by registers and, up to 64 numbers a row,
// by the 100 KiB of shared memory of sm_86.
template <typename T>
struct ForwardTile : Tile<T, 64, 2, 8> {};
template <>
struct ForwardTile<float> : Tile<float, 32, 2, 8> {};
template <>
struct ForwardTile<double> : Tile<double, 16, 1, 4> {};

// WIDE: for more than 64 numbers a row, so that up to 128 of the gradient need s only once. kBlocks: how many are to
// fit a multiprocessor by registers; for float32 it also keeps the compiler from running all steps at once.
template <typename T, bool WIDE>
struct BackwardTile : Tile<T, 64, 2, 8> {
  static constexpr int kBlocks = 2;
};
template <typename T>
struct BackwardTile<T, true> : Tile<T, 128, 1, 8> {
  static constexpr int kBlocks = 2;
};
template <bool WIDE>
struct BackwardTile<float, WIDE> : Tile<float, 64, 1, 4> {
  static constexpr int kBlocks = 3;
};
template <bool WIDE>
struct BackwardTile<double, WIDE> : Tile<double, 32, 1, 2> {
  static constexpr int kBlocks = 3;
};

template <typename T>
constexpr bool kHasWideTile = sizeof(T) == 2;

// Copies of a block: its own rows, once if they fit (`resident`), and two stages of [others, numbers per other row,
// and, unless they are resident, own rows], of which one is read while the other is filled.
template <typename T, typename Tile>
class Stages {
 public:
  using A = Accumulator<T>;

  __host__ __device__ static constexpr size_t stage_bytes(int constants, bool resident) {
    return Tile::kOthersBytes + constants * Tile::kConstantBytes + (resident ? 0 : Tile::kOwnBytes);
  }

  __host__ __device__ static constexpr size_t shared_bytes(int constants, bool resident, int chunks) {
    return 2 * stage_bytes(constants, resident) + (resident ? static_cast<size_t>(chunks) * Tile::kOwnBytes : 0);
  }

  static_assert(2 * (Tile::kOthersBytes + 3 * Tile::kConstantBytes + Tile::kOwnBytes) <= kMostSharedBytes);

  // Chunks are read in a circle that ends with `last_chunk`, which so is there when s is complete.
  __device__ Stages(const Rows<T>& own, const Rows<T>& others, int64_t first, int last_chunk, bool resident)
      : own_(own), others_(others), first_(first), resident_(resident) {
    chunks_ = (own.width + Tile::kWidth - 1) / Tile::kWidth;
    start_ = last_chunk + 1 == chunks_ ? 0 : last_chunk + 1;
    tiles_ = (others.count + Tile::kOthers - 1) / Tile::kOthers;
    next_chunk_ = chunk_ = start_;
  }

  __device__ int64_t tiles() const {
    return tiles_;
  }

  __device__ int chunks() const {
    return chunks_;
  }

  // Begins the copies. `constants` name the arrays of numbers per other row.
  template <int CONSTANTS>
  __device__ void begin(const A* const (&constants)[CONSTANTS]) {
    if (tiles_ == 0) {
      return;
    }
    for (int chunk = 0; resident_ && chunk < chunks_; ++chunk) {
      copy_rows<Tile::kOwn>(dynamic_shared() + 2 * stage_bytes(CONSTANTS, true) + chunk * Tile::kOwnBytes, own_, first_,
                            chunk * Tile::kWidth);
    }
    copy_stage(constants);
  }

  // Waits for the next chunk, after which every thread is done with the one before, and begins to copy the one after.
  template <int CONSTANTS>
  __device__ void advance(const A* const (&constants)[CONSTANTS]) {
    await_copies();
    __syncthreads();
    read_ = write_;
    chunk_ = next_chunk_;
    write_ ^= 1;
    next_chunk_ = chunk_ + 1 == chunks_ ? 0 : chunk_ + 1;
    next_tile_ += next_chunk_ == start_ ? 1 : 0;
    if (next_tile_ < tiles_) {
      copy_stage(constants);
    }
  }

  template <int CONSTANTS>
  __device__ const char* others() const {
    return dynamic_shared() + read_ * stage_bytes(CONSTANTS, resident_);
  }

  // Tile::kOthers numbers of each array.
  template <int CONSTANTS>
  __device__ const A* constants() const {
    return reinterpret_cast<const A*>(others<CONSTANTS>() + Tile::kOthersBytes);
  }

  template <int CONSTANTS>
  __device__ const char* own() const {
    const char* rows = resident_ ? dynamic_shared() + 2 * stage_bytes(CONSTANTS, true) + chunk_ * Tile::kOwnBytes
                                 : others<CONSTANTS>() + Tile::kOthersBytes + CONSTANTS * Tile::kConstantBytes;
    return rows + threadIdx.x / 32 * Tile::kWarpRows * Tile::kStride;
  }

 private:
  // Each thread copies one column of 16 bytes, several rows apart.
  template <int COUNT>
  __device__ static void copy_rows(char* to, const Rows<T>& rows, int64_t first, int column) {
    constexpr int kNumbers = 16 / sizeof(T), kPieces = Tile::kWidth / kNumbers, kApart = kPairThreads / kPieces;
    static_assert(COUNT % kApart == 0);
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, number = column + piece * kNumbers;
    const int64_t left = number < rows.width ? rows.count - first - row : 0;
    const char* from = rows.data + (first + row) * rows.stride + static_cast<int64_t>(number) * sizeof(T);
    to += row * Tile::kStride + piece * 16;
#pragma unroll
    for (int i = 0; i < COUNT; i += kApart) {
      copy_16(to + i * Tile::kStride, from, i < left);
      from += kApart * rows.stride;
    }
  }

  template <int CONSTANTS>
  __device__ void copy_stage(const A* const (&constants)[CONSTANTS]) {
    char* stage = dynamic_shared() + write_ * stage_bytes(CONSTANTS, resident_);
    const int64_t first = next_tile_ * Tile::kOthers;
    copy_rows<Tile::kOthers>(stage, others_, first, next_chunk_ * Tile::kWidth);
    stage += Tile::kOthersBytes;
    constexpr int kPieces = Tile::kConstantBytes / 16;
    static_assert(kPieces <= 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int which = 0; which < CONSTANTS; ++which) {
      if (warp == which && lane < kPieces) {
        copy_16(stage + which * Tile::kConstantBytes + lane * 16, constants[which] + first + lane * (16 / sizeof(A)),
                true);
      }
    }
    if (!resident_) {
      copy_rows<Tile::kOwn>(stage + CONSTANTS * Tile::kConstantBytes, own_, first_, next_chunk_ * Tile::kWidth);
    }
  }

  Rows<T> own_, others_;
  int64_t first_, tiles_, next_tile_ = 0;
  int chunks_, start_, chunk_, next_chunk_;
  int read_ = 0, write_ = 0;
  bool resident_;
};

template <typename A>
__device__ A exponential(A x) {
  return power_of_2(x * static_cast<A>(kLog2E));
}

// What is taken off the exponents of a log-sum-exp of numbers of which `largest` is the largest.
template <typename A>
__device__ A base_of(A largest) {
  return largest == -kInfinity<A> ? A(0) : largest;  // no key yet: -inf - -inf would be NaN
}

// log D of 128 anchors a block (64 of float64). Each lane keeps a maximum and a sum over its own
// columns; the four lanes of a row join theirs at the end.
template <typename T>
__global__ void __launch_bounds__(kPairThreads, 2)
    pair_forward(Rows<T> anchors, Rows<T> keys, const Accumulator<T>* log_weights,
                 Accumulator<T> inverse_temperature, bool resident, Accumulator<T>* log_d) {
  using A = Accumulator<T>;
  using Tile = ForwardTile<T>;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::kOwn;
  Stages<T, Tile> stages(anchors, keys, first, (anchors.width + Tile::kWidth - 1) / Tile::kWidth - 1, resident);
  const A* const constants[1] = {log_weights};
  A largest[Tile::kRows][2], sum[Tile::kRows][2];
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
    largest[m][0] = largest[m][1] = -kInfinity<A>;
    sum[m][0] = sum[m][1] = 0;
  }
  stages.begin(constants);
  for (int64_t tile = 0; tile < stages.tiles(); ++tile) {
    A s[Tile::kRows][Tile::kColumns][4] = {};
    for (int chunk = 0; chunk < stages.chunks(); ++chunk) {
      stages.advance(constants);
      add_similarities<T, Tile::kWidth>(s, stages.template own<1>(), stages.template others<1>(), lane);
    }
    const A* log_weight = stages.template constants<1>() + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) {
      const A even = log_weight[n * 8], odd = log_weight[n * 8 + 1];
#pragma unroll
      for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[m][n][i] = fma(s[m][n][i], inverse_temperature, i % 2 == 0 ? even : odd);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        A above = largest[m][lower];
#pragma unroll
        for (int n = 0; n < Tile::kColumns; ++n) {
          above = fmax(above, fmax(s[m][n][2 * lower], s[m][n][2 * lower + 1]));
        }
        const A base = base_of(above);
        A even = sum[m][lower] * exponential(largest[m][lower] - base), odd = 0;
#pragma unroll
        for (int n = 0; n < Tile::kColumns; ++n) {
          even += exponential(s[m][n][2 * lower] - base);
          odd += exponential(s[m][n][2 * lower + 1] - base);
        }
        sum[m][lower] = even + odd;
        largest[m][lower] = above;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      A top = largest[m][lower], total = sum[m][lower];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        const A other_top = __shfl_xor_sync(0xffffffff, top, distance);
        const A other_total = __shfl_xor_sync(0xffffffff, total, distance);
        const A above = fmax(top, other_top), base = base_of(above);
        total = total * exponential(top - base) + other_total * exponential(other_top - base);
        top = above;
      }
      const int64_t row = first + threadIdx.x / 32 * Tile::kWarpRows + m * 16 + lower * 8 + lane / 4;
      if (lane % 4 == 0 && row < anchors.count) {
        log_d[row] = base_of(top) + log(total);
      }
    }
  }
}

// A gradient, (rows, columns) numbers of any strides, counted in numbers.
template <typename T>
struct Gradient {
  T* data;
  int64_t columns, row_stride, column_stride;
};

// Gradient of the block's own rows: chunk blockIdx.y of them.
template <typename T, bool WIDE, Own OWN>
__global__ void __launch_bounds__(kPairThreads, BackwardTile<T, WIDE>::kBlocks)
    pair_backward(Rows<T> own, Rows<T> others, PerRow<Accumulator<T>> per_own, PerRow<Accumulator<T>> per_other,
                  Accumulator<T> inverse_temperature, bool resident, Gradient<T> out) {
  using A = Accumulator<T>;
  using Tile = BackwardTile<T, WIDE>;
  constexpr int kConstants = (is_anchor(OWN) ? 1 : 0) + (is_key(OWN) ? 2 : 0);
  constexpr int kLogD = is_anchor(OWN) ? 1 : 0;  // the arrays' order: log w, log D, a
  const int lane = threadIdx.x % 32, chunk_of_block = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Tile::kOwn;
  const int64_t lane_row = first + threadIdx.x / 32 * Tile::kWarpRows + lane / 4;
  Stages<T, Tile> stages(own, others, first, chunk_of_block, resident);
  const A* constants[kConstants];
  if constexpr (is_anchor(OWN)) {
    constants[0] = per_other.log_weights;
  }
  if constexpr (is_key(OWN)) {
    constants[kLogD] = per_other.log_d;
    constants[kLogD + 1] = per_other.coefficients;
  }
  A log_d[Tile::kRows][2], coefficient[Tile::kRows][2], log_weight[Tile::kRows][2];
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int64_t row = lane_row + m * 16 + lower * 8;
      log_d[m][lower] = is_anchor(OWN) ? per_own.log_d[row] : A(0);
      coefficient[m][lower] = is_anchor(OWN) ? per_own.coefficients[row] : A(0);
      log_weight[m][lower] = is_key(OWN) ? per_own.log_weights[row] : A(0);
    }
  }
  A gradient[Tile::kRows][Tile::kWidth / 8][4] = {};
  stages.begin(constants);
  for (int64_t tile = 0; tile < stages.tiles(); ++tile) {
    A s[Tile::kRows][Tile::kColumns][4] = {};
    for (int chunk = 0; chunk < stages.chunks(); ++chunk) {
      stages.advance(constants);
      add_similarities<T, Tile::kWidth>(s, stages.template own<kConstants>(), stages.template others<kConstants>(),
                                        lane);
    }
    const A* per_column = stages.template constants<kConstants>() + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int lower = i / 2, column = n * 8 + i % 2;
#pragma unroll
        for (int m = 0; m < Tile::kRows; ++m) {
          A p = 0;
          if constexpr (is_anchor(OWN)) {
            p = exponential(fma(s[m][n][i], inverse_temperature, per_column[column]) - log_d[m][lower]);
          }
          if constexpr (OWN == Own::kBoth) {
            p *= coefficient[m][lower];  // of anchors alone the whole sum takes it
          }
          if constexpr (is_key(OWN)) {
            const A other_log_d = per_column[kLogD * Tile::kOthers + column];
            const A other_coefficient = per_column[(kLogD + 1) * Tile::kOthers + column];
            p = fma(other_coefficient,
                    exponential(fma(s[m][n][i], inverse_temperature, log_weight[m][lower]) - other_log_d), p);
          }
          s[m][n][i] = p;
        }
      }
    }
    add_gradient<T, Tile::kWidth>(gradient, s, stages.template others<kConstants>(), lane);
  }
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = lane_row + m * 16 + i / 2 * 8;
      const A scale = (OWN == Own::kAnchors ? coefficient[m][i / 2] : A(1)) * inverse_temperature;
#pragma unroll
      for (int w = 0; w < Tile::kWidth / 8; ++w) {
        const int64_t column = static_cast<int64_t>(chunk_of_block) * Tile::kWidth + w * 8 + lane % 4 * 2 + i % 2;
        if (row < own.count && column < out.columns) {
          out.data[row * out.row_stride + column * out.column_stride] = static_cast<T>(gradient[m][w][i] * scale);
        }
      }
    }
  }
}

// log w of keys, up to the padded count.
template <typename A>
__global__ void pair_key_numbers(const A* weights, int64_t stride, int64_t count, int64_t padded, A* log_weights) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (j < padded) {
    log_weights[j] = j < count ? log(weights[j * stride]) : -kInfinity<A>;
  }
}

// log D and a of anchors, up to the padded count. D = 0, of an anchor without keys, has no gradient.
template <typename A>
__global__ void pair_anchor_numbers(const A* log_d, const A* grad, int64_t stride, int64_t count, int64_t padded,
                                    A* shifts, A* coefficients) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < padded) {
    const A d = i < count ? log_d[i] : -kInfinity<A>;
    shifts[i] = d == -kInfinity<A> ? kInfinity<A> : d;
    coefficients[i] = i < count ? grad[i * stride] : A(0);
  }
}

// Rows of any strides as rows that Stages can copy, filled up with zeros.
template <typename T>
__global__ void pair_pack_rows(const T* rows, int64_t count, int64_t dim, int64_t row_stride, int64_t column_stride,
                               int64_t width, T* packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < count * width) {
    const int64_t row = i / width, column = i % width;
    packed[i] = column < dim ? rows[row * row_stride + column * column_stride] : static_cast<T>(Accumulator<T>(0));
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// (rows, columns) numbers of any strides, counted in numbers.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;
};

template <typename A>
struct Vector {
  const A* data;
  int64_t size, stride;
};

inline dim3 element_blocks(int64_t elements) {
  return dim3(static_cast<unsigned>((elements + kElementThreads - 1) / kElementThreads));
}

inline int64_t padded(int64_t rows) {
  return (rows + kRowPadding - 1) / kRowPadding * kRowPadding;
}

// The rows as they are, if 16 bytes of them can be copied at a time, else a copy. allocate(bytes) gives device memory
// that lasts until the stream has used it, from multiples of 16.
template <typename T, typename Allocate>
Rows<T> as_rows(const Matrix<T>& matrix, const Allocate& allocate, Stream stream) {
  constexpr int64_t kNumbers = 16 / sizeof(T);
  const bool regular = matrix.column_stride == 1 && matrix.columns > 0 && matrix.columns % kNumbers == 0 &&
                       matrix.row_stride % kNumbers == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  const int64_t width = std::max<int64_t>((matrix.columns + kNumbers - 1) / kNumbers * kNumbers, kNumbers);
  if (regular || matrix.rows == 0) {
    return {reinterpret_cast<const char*>(matrix.data), matrix.rows,
            matrix.row_stride * static_cast<int64_t>(sizeof(T)), static_cast<int>(width)};
  }
  auto* packed = static_cast<T*>(allocate(matrix.rows * width * static_cast<int64_t>(sizeof(T))));
  launch(pair_pack_rows<T>, element_blocks(matrix.rows * width), kElementThreads, 0, stream, matrix.data, matrix.rows,
         matrix.columns, matrix.row_stride, matrix.column_stride, width, packed);
  return {reinterpret_cast<const char*>(packed), matrix.rows, width * static_cast<int64_t>(sizeof(T)),
          static_cast<int>(width)};
}

template <typename A, typename Allocate>
void key_numbers(const Vector<A>& weights, PerRow<A>& per_row, const Allocate& allocate, Stream stream) {
  const int64_t size = padded(weights.size);
  if (size > 0) {
    auto* log_weights = static_cast<A*>(allocate(size * static_cast<int64_t>(sizeof(A))));
    launch(pair_key_numbers<A>, element_blocks(size), kElementThreads, 0, stream, weights.data, weights.stride,
           weights.size, size, log_weights);
    per_row.log_weights = log_weights;
  }
}

template <typename A, typename Allocate>
void anchor_numbers(const A* log_d, const Vector<A>& grad, PerRow<A>& per_row, const Allocate& allocate,
                    Stream stream) {
  const int64_t size = padded(grad.size);
  if (size > 0) {
    auto* numbers = static_cast<A*>(allocate(2 * size * static_cast<int64_t>(sizeof(A))));
    launch(pair_anchor_numbers<A>, element_blocks(size), kElementThreads, 0, stream, log_d, grad.data, grad.stride,
           grad.size, size, numbers, numbers + size);
    per_row.log_d = numbers;
    per_row.coefficients = numbers + size;
  }
}

// Writes log D (N,) of anchors (N, d) against keys (M, d), or, with null, themselves.
template <typename T, typename Allocate>
void pair_logsumexp(const Matrix<T>& anchors, const Matrix<T>* keys, const Vector<Accumulator<T>>& weights,
                    double temperature, Accumulator<T>* log_d, const Allocate& allocate, Stream stream) {
  using A = Accumulator<T>;
  using Tile = ForwardTile<T>;
  if (anchors.rows == 0) {
    return;
  }
  const Rows<T> own = as_rows(anchors, allocate, stream);
  const Rows<T> others = keys == nullptr ? own : as_rows(*keys, allocate, stream);
  PerRow<A> per_key{};
  key_numbers(weights, per_key, allocate, stream);
  const int chunks = (own.width + Tile::kWidth - 1) / Tile::kWidth;
  const bool resident = Stages<T, Tile>::shared_bytes(1, true, chunks) <= kMostSharedBytes;
  launch(pair_forward<T>, dim3(static_cast<unsigned>((own.count + Tile::kOwn - 1) / Tile::kOwn)), kPairThreads,
         Stages<T, Tile>::shared_bytes(1, resident, chunks), stream, own, others, per_key.log_weights,
         static_cast<A>(1 / temperature), resident, log_d);
}

// Writes the gradient (N, d) of one set of rows.
template <Own OWN, bool WIDE, typename T>
void launch_backward(const Rows<T>& own, const Rows<T>& others, const PerRow<Accumulator<T>>& per_own,
                     const PerRow<Accumulator<T>>& per_other, double temperature, const Gradient<T>& out,
                     Stream stream) {
  using A = Accumulator<T>;
  using Tile = BackwardTile<T, WIDE>;
  constexpr int kConstants = (is_anchor(OWN) ? 1 : 0) + (is_key(OWN) ? 2 : 0);
  const int chunks = (own.width + Tile::kWidth - 1) / Tile::kWidth;
  const bool resident = Stages<T, Tile>::shared_bytes(kConstants, true, chunks) <= kMostSharedBytes;
  launch(pair_backward<T, WIDE, OWN>,
         dim3(static_cast<unsigned>((own.count + Tile::kOwn - 1) / Tile::kOwn), static_cast<unsigned>(chunks)),
         kPairThreads, Stages<T, Tile>::shared_bytes(kConstants, resident, chunks), stream, own, others, per_own,
         per_other, static_cast<A>(1 / temperature), resident, out);
}

template <Own OWN, typename T>
void choose_backward(const Rows<T>& own, const Rows<T>& others, const PerRow<Accumulator<T>>& per_own,
                     const PerRow<Accumulator<T>>& per_other, double temperature, const Gradient<T>& out,
                     Stream stream) {
  if (own.count == 0 || out.columns == 0) {
    return;
  }
  if constexpr (kHasWideTile<T>) {
    if (own.width > BackwardTile<T, false>::kWidth) {
      return launch_backward<OWN, true>(own, others, per_own, per_other, temperature, out, stream);
    }
  }
  launch_backward<OWN, false>(own, others, per_own, per_other, temperature, out, stream);
}

// Writes the gradients of anchors (N, d) and, where there are any, of keys (M, d).
template <typename T, typename Allocate>
void pair_logsumexp_backward(const Vector<Accumulator<T>>& grad, const Accumulator<T>* log_d, const Matrix<T>& anchors,
                             const Matrix<T>* keys, const Vector<Accumulator<T>>& weights, double temperature,
                             const Gradient<T>& grad_anchors, const Gradient<T>& grad_keys, const Allocate& allocate,
                             Stream stream) {
  PerRow<Accumulator<T>> per_anchor{}, per_key{};
  anchor_numbers(log_d, grad, per_anchor, allocate, stream);
  key_numbers(weights, per_key, allocate, stream);
  const Rows<T> own = as_rows(anchors, allocate, stream);
  if (keys == nullptr) {
    per_anchor.log_weights = per_key.log_weights;
    choose_backward<Own::kBoth>(own, own, per_anchor, per_anchor, temperature, grad_anchors, stream);
    return;
  }
  const Rows<T> others = as_rows(*keys, allocate, stream);
  choose_backward<Own::kAnchors>(own, others, per_anchor, per_key, temperature, grad_anchors, stream);
  choose_backward<Own::kKeys>(others, own, per_key, per_anchor, temperature, grad_keys, stream);
}

}  // namespace in2nect::cuda
