// The tiles of the pairwise loss on rows of bfloat16, as pair_tiles.h has them for float32 and float64; the constant
// shift alone. Rows stay as they came, unnormalised, so nothing is lost to a second rounding: a factor a row goes into
// the exponents and the coefficients, x_ij = f_i f_j z_i . z_j with f = sqrt(log2(e) / tau) / |z|. Coefficients are
// rounded to bfloat16, sums and gradients are in float32.
//
// Rows of float32 come in two planes, v = high + low with 16 bits of it, and f = 1: three products, high . high, high .
// low and low . high, keep what float32 needs up to 2^-16.
#pragma once

#include <cstdint>

#include "pair_tiles.h"

namespace in2nect::cpu {

using Bf16 = uint16_t;  // the bits

struct HalfSide {
  const Bf16* rows[2];  // planes of (count, stride); the second null where there is one
  const float* factor;  // f
  const float *shift, *omega, *rho;
  double* sums;
  float* gradient;  // (count, stride): sum_j g_ij f_j z_j is added
};

struct HalfTiles {
  // Bytes of scratch memory that a tile takes.
  int64_t (*scratch)(const TileShape&, int planes);
  void (*forward)(const HalfSide& i, const HalfSide& j, const TileShape&, Pairs, void* scratch);
  void (*backward)(const HalfSide& i, const HalfSide& j, const TileShape&, Pairs, void* scratch);
};

#ifdef IN2NECT_X86
namespace avx512_bf16 {
extern const HalfTiles half_tiles;
}
namespace amx {
extern const HalfTiles half_tiles;
}
namespace amx_emulated {
extern const HalfTiles half_tiles;
}
#endif

}  // namespace in2nect::cpu
