// log D of packed rows and its gradient, by tiles: the part that pair_logsumexp and intra_exact share.
//
//   log D_i = log sum_j w_j exp(u_i . u_j / tau)
//
// One set of N rows costs N^2/2 exponentials and 0.5 G forward, and as many with 1.5 G backward, G = 2 N^2 d: a pair of
// blocks serves both. Blocks meet in the order of a tournament, so threads add to the rows' own sums and gradients: no
// copies for each thread, no atomic sums, and the same bits for any number of threads. Memory: the rows in their
// format, their gradient in the accumulation type, and a tile of scratch a thread.
#pragma once

#include <cstdint>

#include "buffer.h"
#include "vector/pair_tiles.h"
#include "vector/pair_tiles_bf16.h"

namespace in2nect::cpu {

// How rows are multiplied.
enum class Format {
  kWide,    // in the accumulation type
  kHalves,  // bfloat16 rows as they came, with a factor each
  kSplit,   // float32 rows as two planes of bfloat16: 16 bits of their mantissas
};

// The fastest one that keeps what rows of bfloat16 hold; of float32 rows, if `reduced`, what torch's "high" precision
// of products does.
Format half_format();
Format float_format(bool reduced);

// Rows packed for the tiles, padded with rows that count for nothing.
template <typename A>
class PairSet {
 public:
  PairSet(int64_t count, int64_t depth, Format format);

  // Where the caller writes u_i, `depth` numbers times scale(temperature), in double: the scale rounded to float32
  // would be another temperature. The rest of the row is 0.
  A* row(int64_t i) const {
    return rows_.data() + i * stride_;
  }
  // Of kHalves: where the caller writes the bits of z_i, and the factor that makes it u_i times scale(temperature).
  Bf16* half_row(int64_t i) const {
    return planes_[0].data() + i * stride_;
  }
  A& factor(int64_t i) const {
    return factor_[i];
  }
  // u_i times scale(temperature), of any format.
  void read(int64_t i, A* out) const;

  static double scale(double temperature);

  int64_t count() const {
    return count_;
  }
  int64_t depth() const {
    return depth_;
  }
  Format format() const {
    return format_;
  }

 private:
  template <typename>
  friend class PairSums;

  int64_t block_count() const {
    return padded_ / block_;
  }
  template <typename T>
  T* at(const Buffer<T>& buffer, int64_t offset) const {
    return buffer.data() == nullptr ? nullptr : buffer.data() + offset;
  }
  Side<A> side(int64_t first) const;
  HalfSide half_side(int64_t first) const;
  TileShape shape(const PairSet& keys) const {
    return {tile_, keys.tile_, depth_, stride_};
  }
  double half_square(int64_t i) const;  // |v_i|^2 / 2
  void widen();                         // kHalves to kWide
  void split();                         // the planes of kSplit

  Format format_;
  int64_t count_, depth_, stride_, tile_, block_, padded_;
  Buffer<A> rows_, factor_, shift_, omega_, rho_, peak_, gradient_;
  Buffer<Bf16> planes_[2];
  Buffer<double> sums_;
};

// log D of anchors over keys; of one set where `keys` is null.
template <typename A>
class PairSums {
 public:
  // `weights` are those of the keys, w_j >= 0. The rows must have been written, in one format; rows of bfloat16 become
  // wide here where the constant shift does not serve.
  PairSums(PairSet<A>& anchors, PairSet<A>* keys, const A* weights);

  void log_d(A* out);
  // Works out the gradients of sum_i a_i log D_i; times gradient_scale(temperature) they are with respect to u.
  void differentiate(const A* a, const A* log_d);
  static double gradient_scale(double temperature);
  const A* gradient(int64_t anchor) const {
    return anchors_.gradient_.data() + anchor * anchors_.stride_;
  }
  const A* key_gradient(int64_t key) const {
    return keys().gradient_.data() + key * anchors_.stride_;
  }

 private:
  enum class Way { kConstantShift, kRunningMaximum, kNoKey, kNotFinite };

  PairSet<A>& keys() const {
    return keys_ != nullptr ? *keys_ : anchors_;
  }
  enum class Step { kForward, kBackward, kPeaks };

  Way choose(const A* weights);
  void run(Step step);
  template <typename Tile>
  void for_each_tile(int64_t scratch_bytes, const Tile& tile);
  template <typename Tile>
  void meet(int64_t i, int64_t j, const Tile& tile) const;

  PairSet<A>& anchors_;
  PairSet<A>* keys_;
  Way way_ = Way::kNoKey;
  double log2_scale_ = 0;  // of the keys' weights: omega_j = w_j 2^(shift_j - log2_scale)
};

extern template class PairSet<float>;
extern template class PairSet<double>;
extern template class PairSums<float>;
extern template class PairSums<double>;

}  // namespace in2nect::cpu
