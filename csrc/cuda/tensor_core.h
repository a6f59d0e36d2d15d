// Tiles of rows in shared memory and their products by tensor cores, for the four dtypes of rows. Two products:
//
//     s += own others^T         own and others are tiles of rows, in shared memory
//     gradient += p others      p is s after some arithmetic, still in the registers that held s
//
// The second reads p as its left operand where it lies: a product over keys may take the keys in any order, so the
// layout of the left operand is matched by how the right one is loaded, and nothing is exchanged between threads.
//
// bfloat16 and float16 are multiplied as they are, with float32 sums, but for p of float16 rows: coefficients leave
// float16's range, so both become TF32, which holds every float16. float32 is three TF32 products of upper and lower
// parts (float32's quality: the parts' rounding is below 2^-22); float64 its own.
//
// Of a 16 x 8 tile of s or of the gradient, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next:
// elements 0, 1 of the upper row, 2, 3 of the lower.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/tensors.h"
#include "device.h"

namespace in2nect::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kStepBytes = 32;  // of a row, that one step of a product takes: 16, 8 or 4 numbers

// Bytes between rows of a tile of `width` numbers (128 bytes or a multiple): 16 beyond, which spreads the 8 rows of an
// 8 x 16-byte matrix over all 32 banks; 32 for float64, whose lanes load 8 bytes each.
template <typename T>
__host__ __device__ constexpr int row_bytes(int width) {
  return width * static_cast<int>(sizeof(T)) + (sizeof(T) == 8 ? 32 : 16);
}

// x = upper + lower, to 22 bits. Tensor cores ignore the last 13 bits of each.
struct Parts {
  uint32_t upper, lower;
};

__device__ inline Parts parts(float x) {
  const uint32_t upper = (bits_of(x) + 0x1000) & 0xffffe000;
  return {upper, bits_of(x - float_of(upper))};
}

// 16 rows, and 8 rows, of kStepBytes each.
template <typename T>
struct Left {
  uint32_t r[4];
};
template <>
struct Left<float> {
  uint32_t upper[4], lower[4];
};
template <>
struct Left<double> {
  double r[2];
};
template <typename T>
struct Right {
  uint32_t r[2];
};
template <>
struct Right<float> {
  uint32_t upper[2], lower[2];
};
template <>
struct Right<double> {
  double r;
};

template <typename T>
__device__ void load_left(Left<T>& to, const char* tile, int stride, int byte, int lane) {
  if constexpr (std::is_same_v<T, double>) {
    for (int half = 0; half < 2; ++half) {
      to.r[half] = *reinterpret_cast<const double*>(tile + (lane / 4 + 8 * half) * stride + byte + lane % 4 * 8);
    }
  } else {
    const char* row = tile + lane % 16 * stride + byte + lane / 16 * 16;
    if constexpr (std::is_same_v<T, float>) {
      uint32_t raw[4];
      load_matrices(raw, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Parts part = parts(float_of(raw[i]));
        to.upper[i] = part.upper;
        to.lower[i] = part.lower;
      }
    } else {
      load_matrices(to.r, row);
    }
  }
}

// Two of them: rows 0 to 7 and 8 to 15 of the tile.
template <typename T>
__device__ void load_right(Right<T> (&to)[2], const char* tile, int stride, int byte, int lane) {
  if constexpr (std::is_same_v<T, double>) {
    for (int half = 0; half < 2; ++half) {
      to[half].r = *reinterpret_cast<const double*>(tile + (lane / 4 + 8 * half) * stride + byte + lane % 4 * 8);
    }
  } else {
    uint32_t raw[4];
    load_matrices(raw, tile + (lane / 16 * 8 + lane % 8) * stride + byte + lane / 8 % 2 * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        const Parts part = parts(float_of(raw[i]));
        to[i / 2].upper[i % 2] = part.upper;
        to[i / 2].lower[i % 2] = part.lower;
      } else {
        to[i / 2].r[i % 2] = raw[i];
      }
    }
  }
}

__device__ inline void multiply(float (&c)[4], const Left<BFloat16>& a, const Right<BFloat16>& b) {
  multiply_bfloat16(c, a.r, b.r);
}

__device__ inline void multiply(float (&c)[4], const Left<Half>& a, const Right<Half>& b) {
  multiply_half(c, a.r, b.r);
}

// The small products first.
__device__ inline void multiply_parts(float (&c)[4], const Left<float>& a, const Right<float>& b) {
  multiply_tf32(c, a.lower, b.upper);
  multiply_tf32(c, a.upper, b.lower);
  multiply_tf32(c, a.upper, b.upper);
}

__device__ inline void add(float (&c)[4], const float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i] += x[i];
  }
}

// Tensor cores round their sums towards zero, which over many steps is a bias well above float32's own error: here they
// sum one step alone, and the steps are added to the nearest.
__device__ inline void multiply(float (&c)[4], const Left<float>& a, const Right<float>& b) {
  float step[4] = {};
  multiply_parts(step, a, b);
  add(c, step);
}

__device__ inline void multiply(double (&c)[4], const Left<double>& a, const Right<double>& b) {
  multiply_double(c[0], c[1], a.r[0], b.r);
  multiply_double(c[2], c[3], a.r[1], b.r);
}

// s += own others^T: 16 ROWS own rows, 8 COLUMNS other ones, WIDTH numbers each.
template <typename T, int WIDTH, int ROWS, int COLUMNS>
__device__ void add_similarities(Accumulator<T> (&s)[ROWS][COLUMNS][4], const char* own, const char* others, int lane) {
  constexpr int kStride = row_bytes<T>(WIDTH);
  // all steps at once, but for float32, whose steps are independent and would take every register
  constexpr int kSteps = WIDTH * static_cast<int>(sizeof(T)) / kStepBytes;
  [[maybe_unused]] constexpr int kUnroll = std::is_same_v<T, float> ? 2 / ROWS : kSteps;
#pragma unroll kUnroll
  for (int byte = 0; byte < kSteps * kStepBytes; byte += kStepBytes) {
    Left<T> a[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      load_left<T>(a[m], own + m * 16 * kStride, kStride, byte, lane);
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      Right<T> b[2];
      load_right<T>(b, others + n * 8 * kStride, kStride, byte, lane);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        multiply(s[m][n], a[m], b[0]);
        multiply(s[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// p as the left operand of TF32 products over 8 keys, in the order of keys 0, 2, 4, 6, 1, 3, 5, 7.
__device__ inline void left_of(uint32_t (&to)[4], const float (&p)[4]) {
  to[0] = bits_of(p[0]);
  to[1] = bits_of(p[2]);
  to[2] = bits_of(p[1]);
  to[3] = bits_of(p[3]);
}

// gradient += p others: 16 ROWS own rows, 8 COLUMNS other ones, WIDTH numbers each.
template <typename T, int WIDTH, int ROWS, int COLUMNS>
__device__ void add_gradient(Accumulator<T> (&gradient)[ROWS][WIDTH / 8][4],
                             const Accumulator<T> (&p)[ROWS][COLUMNS][4], const char* others, int lane) {
  constexpr int kStride = row_bytes<T>(WIDTH);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t a[ROWS][2][4];  // bfloat16: 16 keys, in [0]; float16: twice 8 keys in TF32
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
        if constexpr (std::is_same_v<T, BFloat16>) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            a[m][0][i] = pack_bfloat16(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1]);
          }
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            left_of(a[m][half], p[m][n + half]);
#pragma unroll
            for (uint32_t& x : a[m][half]) {
              x += 0x1000;  // rounds to TF32 (half up); its last bits are not read
            }
          }
        }
      }
#pragma unroll
      for (int w = 0; w < WIDTH / 8; w += 2) {
        uint32_t raw[4];  // keys 0 to 7 and 8 to 15 of 8 columns of the rows, and of the next 8
        load_transposed(raw, others + (n * 8 + lane % 16) * kStride + w * 16 + lane / 16 * 16);
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          if constexpr (std::is_same_v<T, BFloat16>) {
            const uint32_t b[2] = {raw[2 * next], raw[2 * next + 1]};
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
              multiply_bfloat16(gradient[m][w + next], a[m][0], b);
            }
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const uint32_t keys = raw[2 * next + half];
              const uint32_t b[2] = {bits_of(low_half(keys)), bits_of(high_half(keys))};
#pragma unroll
              for (int m = 0; m < ROWS; ++m) {
                multiply_tf32(gradient[m][w + next], a[m][half], b);
              }
            }
          }
        }
      }
    }
  } else {
    // float32: the sum of this tile alone, then added to the nearest, for the reason that multiply() has
    [[maybe_unused]] float tile[ROWS][WIDTH / 8][4] = {};
    const char* lane_rows = others + lane % 4 * 2 * kStride + lane / 4 * static_cast<int>(sizeof(T));
#pragma unroll
    for (int n = 0; n < COLUMNS; ++n) {
      Left<float> a[ROWS];
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
          uint32_t whole[4];
          left_of(whole, p[m][n]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const Parts part = parts(float_of(whole[i]));
            a[m].upper[i] = part.upper;
            a[m].lower[i] = part.lower;
          }
        }
      }
#pragma unroll
      for (int w = 0; w < WIDTH / 8; ++w) {
        const char* key = lane_rows + n * 8 * kStride + w * 8 * static_cast<int>(sizeof(T));
        const T even = *reinterpret_cast<const T*>(key), odd = *reinterpret_cast<const T*>(key + kStride);
        if constexpr (std::is_same_v<T, float>) {
          const Parts first = parts(even), second = parts(odd);
          const Right<float> b{{first.upper, second.upper}, {first.lower, second.lower}};
#pragma unroll
          for (int m = 0; m < ROWS; ++m) {
            multiply_parts(tile[m][w], a[m], b);
          }
        } else {
#pragma unroll
          for (int m = 0; m < ROWS; ++m) {
            auto& c = gradient[m][w];
            multiply_double(c[0], c[1], p[m][n][0], even);
            multiply_double(c[2], c[3], p[m][n][2], even);
            multiply_double(c[0], c[1], p[m][n][1], odd);
            multiply_double(c[2], c[3], p[m][n][3], odd);
          }
        }
      }
    }
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int m = 0; m < ROWS; ++m) {
#pragma unroll
        for (int w = 0; w < WIDTH / 8; ++w) {
          add(gradient[m][w], tile[m][w]);
        }
      }
    }
  }
}

}  // namespace in2nect::cuda
