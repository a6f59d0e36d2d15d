// The tiles of the pairwise loss: what is done with a block of rows against a block of columns, s = rows . columns, and
// the table of these functions that each build of pair_tiles.cpp fills in. The blocks are of `Side`s that lie packed.
//
// All exponents are of two. Rows are packed as v = sqrt(log2(e) / tau) u, so that x_ij = v_i . v_j is the exponent.
//   constant shift:    e_ij = 2^(x_ij - shift_i - shift_j), symmetric, <= 1 (shift = |v|^2 / 2): one exponential serves
//                      row i and column j
//   running maximum:   2^(x_ij + log_weight_j - peak_i): two exponentials, right for any rows
#pragma once

#include <cstdint>

namespace in2nect::cpu {

// A block of packed rows, and what belongs to each of them; which fields are used is said at each function.
template <typename A>
struct Side {
  const A* rows;      // (count, stride), 0 beyond the depth
  const A* shift;     // with the constant shift: shift_i;  else log2 of the weight, -inf where the row is no key
  const A* omega;     // constant shift: the weight as a key, times 2^shift, scaled so that the largest is 1
  const A* rho;       // backward: constant shift: a_i / sum_j omega_j e_ij;  else a_i
  A* peak;            // else: the row's largest exponent; in the backward log2 D_i
  double* sums;       // forward: sum_j omega_j e_ij, or sum_j 2^(x_ij + log_weight_j - peak_i)
  A* gradient;        // (count, stride): sum_j g_ij v_j is added
};

struct TileShape {
  int64_t rows, columns;  // multiples of kTileUnit
  int64_t depth, stride;  // of a row: how many numbers are its own, and how many it takes in memory
};

// Rows of a block are a multiple of this: of the rows and the columns of every build's register tile.
constexpr int64_t kTileUnit = 96;
// A row's stride is a multiple of this many bytes: the widest vector.
constexpr int64_t kRowBytes = 64;

enum class Pairs {
  kOneSet,    // i and j are two blocks of one set: each is the other's key, g_ij = g_ji, results go to both
  kDiagonal,  // i and j are one block: every pair is there twice, results go to i
  kKeys,      // i are anchors and j keys: peaks and sums go to i, gradients to both
};

template <typename A>
struct PairTiles {
  // Numbers of scratch memory that a tile takes.
  int64_t (*scratch)(const TileShape&);
  // Constant shift: the sums; then the gradient, g_ij = e_ij (rho_i omega_j + rho_j omega_i). Anchors that are no keys
  // have omega 0, and keys that are no anchors rho 0.
  void (*forward)(const Side<A>& i, const Side<A>& j, const TileShape&, Pairs, A* scratch);
  void (*backward)(const Side<A>& i, const Side<A>& j, const TileShape&, Pairs, A* scratch);
  // Running maximum: the peaks; with them the sums; then the gradient, g_ij = a_i 2^(x_ij + log_weight_j - log2 D_i),
  // plus g_ji within one set.
  void (*peaks)(const Side<A>& i, const Side<A>& j, const TileShape&, Pairs, A* scratch);
  void (*peaked_forward)(const Side<A>& i, const Side<A>& j, const TileShape&, Pairs, A* scratch);
  void (*peaked_backward)(const Side<A>& i, const Side<A>& j, const TileShape&, Pairs, A* scratch);
};

#define IN2NECT_PAIR_TILES(capability)             \
  namespace capability {                           \
  extern const PairTiles<float> pair_tiles_float;  \
  extern const PairTiles<double> pair_tiles_double; \
  }
IN2NECT_PAIR_TILES(portable)
#ifdef IN2NECT_X86
IN2NECT_PAIR_TILES(avx2)
IN2NECT_PAIR_TILES(avx512)
#endif
#undef IN2NECT_PAIR_TILES

}  // namespace in2nect::cpu
