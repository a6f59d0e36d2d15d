// Which tiles meet in which order, and which of the two ways to sum exponentials is right for the rows; see pair_set.h.
#include "pair_set.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include "../common/tensors.h"
#include "capability.h"

namespace in2nect::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Rows of a tile. 192: coefficients of 144 KiB stay in a second-level cache with both blocks' rows; 96 below 8,192
// rows, so that a round has enough pairs for the threads.
constexpr int64_t kTile = 192, kSmallTile = 96, kSmallSet = 8192;
// Tiles a side of a block: beyond 32,768 rows of 64 numbers the rows no longer fit into a third-level cache with their
// gradient, and a block of 4 x 4 tiles reads a quarter of what single tiles read.
constexpr int64_t kBlockTiles = 4, kLargeSet = 32768;
static_assert(kTile % kTileUnit == 0 && kSmallTile % kTileUnit == 0);

// Numbers of a thread's part of a split, some microseconds' work.
constexpr int64_t kSplitGrain = 32768;

float from_bf16(Bf16 bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float number;
  std::memcpy(&number, &wide, sizeof(number));
  return number;
}

// To the nearest, ties to even; of finite numbers.
Bf16 to_bf16(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Rows of bfloat16 are multiplied before their factors, which for unit rows are 1 / |z|: the products of the rows and
// of the factors must stay in float32's range.
constexpr double kLargestSquare = 1e37;

// How far, in powers of two, the terms of a row may lie below 1 and still be summed with the constant shift: a row's
// sum and its reciprocal stay normal numbers, as do their products with weights.
template <typename A>
constexpr double kRange = sizeof(A) == 4 ? 60.0 : 480.0;

template <typename A>
const PairTiles<A>& tiles() {
  const auto choose = [](const PairTiles<float>& f, const PairTiles<double>& d) -> const PairTiles<A>& {
    if constexpr (std::is_same_v<A, float>) {
      return f;
    } else {
      return d;
    }
  };
#ifdef IN2NECT_X86
  if (capability() >= Capability::kAvx512) {
    return choose(avx512::pair_tiles_float, avx512::pair_tiles_double);
  }
  if (capability() >= Capability::kAvx2) {
    return choose(avx2::pair_tiles_float, avx2::pair_tiles_double);
  }
#endif
  return choose(portable::pair_tiles_float, portable::pair_tiles_double);
}

#ifdef IN2NECT_X86
const HalfTiles& half_tiles() {
  switch (capability()) {
    case Capability::kAmx:
      return amx::half_tiles;
    case Capability::kAmxEmulated:
      return amx_emulated::half_tiles;
    default:
      return avx512_bf16::half_tiles;
  }
}
#endif

struct BlockPair {
  int64_t i, j;
};

// All pairs of anchors' and keys' blocks, numbered by rounds in which no block is twice.
class KeysOrder {
 public:
  KeysOrder(int64_t anchors, int64_t keys) : anchors_(anchors), keys_(keys) {}

  int64_t size() const {
    return anchors_ * keys_;
  }
  BlockPair operator[](int64_t n) const {
    const int64_t fewer = std::min(anchors_, keys_), more = std::max(anchors_, keys_);
    const int64_t one = n % fewer, other = (one + n / fewer) % more;
    return anchors_ <= keys_ ? BlockPair{one, other} : BlockPair{other, one};
  }

 private:
  int64_t anchors_, keys_;
};

// All pairs of one set's blocks, each block with itself first, then in rounds in which no block is twice: the circle
// method of tournaments. An odd number of blocks has a guest, with whom the block that meets it rests.
class TournamentOrder {
 public:
  explicit TournamentOrder(int64_t blocks)
      : blocks_(blocks), circle_(blocks - 1 + blocks % 2), pairs_(blocks / 2), rests_(blocks % 2) {}

  int64_t size() const {
    return blocks_ + circle_ * pairs_;
  }
  BlockPair operator[](int64_t n) const {
    if (n < blocks_) {
      return {n, n};
    }
    const int64_t round = (n - blocks_) / pairs_, k = (n - blocks_) % pairs_ + rests_;
    if (k == 0) {
      return {round, circle_};  // with the one who stays outside of the circle
    }
    return {(round + k) % circle_, (round - k + circle_) % circle_};
  }

 private:
  int64_t blocks_, circle_, pairs_, rests_;
};

// Threads take the pairs of an order one by one, and wait where a block is still with another thread. A block meets its
// partners in the order's sequence whatever the number of threads, so what is added to it has the same bits. Unlike
// with a barrier after each round, a thread that the system has taken off its core holds up those alone who need its
// blocks. It cannot come to a standstill: of the pairs under way, the first waits for none.
template <typename Order>
class Turns {
 public:
  // Of one set, `keys` is 0; else its blocks are numbered after the anchors'.
  Turns(const Order& order, int64_t anchors, int64_t keys)
      : order_(order), first_key_(keys == 0 ? 0 : anchors), issued_(anchors + keys), done_(anchors + keys) {}

  // Calls body(pair) until none is left.
  template <typename Body>
  void work(const Body& body) {
    while (true) {
      BlockPair pair;
      int64_t turn_i, turn_j;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (next_ == order_.size()) {
          return;
        }
        pair = order_[next_++];
        turn_i = issued_[pair.i]++;
        turn_j = issued_[first_key_ + pair.j]++;
      }
      std::atomic<int64_t>&done_i = done_[pair.i], &done_j = done_[first_key_ + pair.j];
      const bool one_block = &done_i == &done_j;
      wait(done_i, turn_i);
      wait(done_j, one_block ? turn_i : turn_j);
      body(pair);
      done_i.store(turn_i + 1, std::memory_order_release);
      done_j.store(turn_j + 1, std::memory_order_release);
    }
  }

 private:
  static void wait(const std::atomic<int64_t>& done, int64_t turn) {
    while (done.load(std::memory_order_acquire) != turn) {
      std::this_thread::yield();
    }
  }

  const Order& order_;
  std::mutex mutex_;
  int64_t next_ = 0;
  int64_t first_key_;
  std::vector<int64_t> issued_;
  std::vector<std::atomic<int64_t>> done_;
};

}  // namespace

Format half_format() {
  return capability() >= Capability::kAvx512Bf16 ? Format::kHalves : Format::kWide;
}

// Two planes cost three products: AVX512-BF16, at twice float32's rate, would lose by them.
Format float_format(bool reduced) {
  return reduced && capability() >= Capability::kAmx ? Format::kSplit : Format::kWide;
}

template <typename A>
PairSet<A>::PairSet(int64_t count, int64_t depth, Format format) : format_(format), count_(count), depth_(depth) {
  const int64_t align = kRowBytes / static_cast<int64_t>(format == Format::kWide ? sizeof(A) : sizeof(Bf16));
  stride_ = divide_up(std::max<int64_t>(depth, 1), align) * align;
  tile_ = count < kSmallSet ? kSmallTile : kTile;
  block_ = count < kLargeSet ? tile_ : tile_ * kBlockTiles;
  padded_ = divide_up(count, block_) * block_;
  // what the caller does not write: the ends of rows, and the padding
  const auto clear_rest = [&](const auto& rows) {
    for (int64_t i = 0; i < count_ && depth_ < stride_; ++i) {
      std::fill(rows.data() + i * stride_ + depth_, rows.data() + (i + 1) * stride_, 0);
    }
    std::fill(rows.data() + count_ * stride_, rows.data() + padded_ * stride_, 0);
  };
  if (format == Format::kHalves) {
    planes_[0] = Buffer<Bf16>(padded_ * stride_);
    clear_rest(planes_[0]);
  } else {
    rows_ = Buffer<A>(padded_ * stride_);
    clear_rest(rows_);
  }
  if (format != Format::kWide) {
    factor_ = Buffer<A>(padded_, static_cast<A>(format == Format::kSplit ? 1 : 0));
  }
  shift_ = Buffer<A>(padded_, A(0));
}

template <typename A>
double PairSet<A>::scale(double temperature) {
  return std::sqrt(kLog2E / temperature);
}

template <typename A>
void PairSet<A>::read(int64_t i, A* out) const {
  if (format_ != Format::kHalves) {
    std::copy_n(row(i), depth_, out);
    return;
  }
  for (int64_t c = 0; c < depth_; ++c) {
    out[c] = factor_[i] * static_cast<A>(from_bf16(half_row(i)[c]));
  }
}

template <typename A>
double PairSet<A>::half_square(int64_t i) const {
  double square = 0;
  if (format_ != Format::kHalves) {
    const A* numbers = row(i);
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < depth_; ++c) {
      square += static_cast<double>(numbers[c]) * static_cast<double>(numbers[c]);
    }
    return square / 2;
  }
  const Bf16* halves = half_row(i);
#pragma omp simd reduction(+ : square)
  for (int64_t c = 0; c < depth_; ++c) {
    const double number = static_cast<double>(from_bf16(halves[c]));
    square += number * number;
  }
  const double factor = static_cast<double>(factor_[i]);
  return factor * factor * square / 2;
}

template <typename A>
void PairSet<A>::widen() {
  rows_ = Buffer<A>(padded_ * stride_, A(0));
  for (int64_t i = 0; i < count_; ++i) {
    read(i, row(i));
  }
  planes_[0] = Buffer<Bf16>();
  format_ = Format::kWide;
}

template <typename A>
void PairSet<A>::split() {
  for (Buffer<Bf16>& plane : planes_) {
    plane = Buffer<Bf16>(padded_ * stride_);
  }
  torch::stable::parallel_for(0, padded_ * stride_, kSplitGrain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float number = static_cast<float>(rows_[n]);
      planes_[0][n] = to_bf16(number);
      planes_[1][n] = to_bf16(number - from_bf16(planes_[0][n]));
    }
  });
}

template <typename A>
Side<A> PairSet<A>::side(int64_t first) const {
  return {row(first),         at(shift_, first), at(omega_, first),
          at(rho_, first),    at(peak_, first),  at(sums_, first),
          at(gradient_, first * stride_)};
}

template <typename A>
HalfSide PairSet<A>::half_side(int64_t first) const {
  if constexpr (std::is_same_v<A, float>) {
    return {{at(planes_[0], first * stride_), at(planes_[1], first * stride_)},
            at(factor_, first),
            at(shift_, first),
            at(omega_, first),
            at(rho_, first),
            at(sums_, first),
            at(gradient_, first * stride_)};
  } else {
    return {};
  }
}

template <typename A>
double PairSums<A>::gradient_scale(double temperature) {
  return 1 / (temperature * PairSet<A>::scale(temperature));
}

template <typename A>
PairSums<A>::PairSums(PairSet<A>& anchors, PairSet<A>* keys, const A* weights)
    : anchors_(anchors), keys_(keys) {
  way_ = choose(weights);
}

// Sets the shifts and weights of the rows.
template <typename A>
typename PairSums<A>::Way PairSums<A>::choose(const A* weights) {
  PairSet<A>& keys = this->keys();
  double lowest = kInfinity, highest = 0, lightest = kInfinity, heaviest = 0, unsound = 0;
  for (PairSet<A>* set : {&anchors_, keys_}) {
    for (int64_t i = 0; set != nullptr && i < set->count_; ++i) {
      const double square = set->half_square(i);
      set->shift_[i] = static_cast<A>(square);
      lowest = std::min(lowest, square);
      highest = std::max(highest, square);
      unsound += square - square;  // 0, or NaN
    }
  }
  bool own = keys_ == nullptr;  // whether each row is a key of itself, so that its sum has a term of 2^0
  for (int64_t j = 0; j < keys.count_; ++j) {
    const double weight = static_cast<double>(weights[j]);
    unsound += weight - weight;
    own = own && weight > 0;
    heaviest = std::max(heaviest, weight);
    lightest = weight > 0 ? std::min(lightest, weight) : lightest;
  }
  if (unsound != 0) {
    return Way::kNotFinite;
  }
  if (heaviest == 0) {
    return Way::kNoKey;
  }
  // |v_i . v_j| <= 2 sqrt(shift_i shift_j), so exponents lie above -(sqrt(shift_i) + sqrt(shift_j))^2
  const double farthest = std::log2(heaviest / lightest) + (highest - lowest) + (own ? 0 : 4 * highest);
  bool products_fit = true;
  for (PairSet<A>* set : {&anchors_, keys_}) {
    for (int64_t i = 0; set != nullptr && set->format_ == Format::kHalves && i < set->count_; ++i) {
      const double factor = static_cast<double>(set->factor_[i]), of_factor = factor * factor;
      products_fit = products_fit && of_factor < kLargestSquare &&
                     2 * static_cast<double>(set->shift_[i]) < kLargestSquare * of_factor;
    }
  }
  for (PairSet<A>* set : {&anchors_, keys_}) {
    if (set != nullptr && set->format_ == Format::kHalves && (farthest > kRange<A> || !products_fit)) {
      set->widen();
    }
  }
  if (farthest > kRange<A>) {
    for (int64_t j = 0; j < keys.padded_; ++j) {
      keys.shift_[j] = static_cast<A>(j < keys.count_ ? std::log2(static_cast<double>(weights[j])) : -kInfinity);
    }
    return Way::kRunningMaximum;
  }
  log2_scale_ = std::log2(heaviest) + highest;
  for (PairSet<A>* set : {&anchors_, keys_}) {
    if (set != nullptr && set->format_ == Format::kSplit) {
      set->split();
    }
  }
  anchors_.omega_ = Buffer<A>(anchors_.padded_, A(0));  // of anchors that are no keys it stays so
  keys.omega_ = Buffer<A>(keys.padded_, A(0));
  for (int64_t j = 0; j < keys.count_; ++j) {
    const double shift = static_cast<double>(keys.shift_[j]);
    keys.omega_[j] = static_cast<A>(static_cast<double>(weights[j]) * std::exp2(shift - log2_scale_));
  }
  return Way::kConstantShift;
}

template <typename A>
void PairSums<A>::run(Step step) {
  PairSet<A>& keys = this->keys();
  const TileShape shape = anchors_.shape(keys);
  const bool constant = way_ == Way::kConstantShift;
#ifdef IN2NECT_X86
  if constexpr (std::is_same_v<A, float>) {
    if (constant && anchors_.format_ != Format::kWide) {
      const HalfTiles& of_halves = half_tiles();
      const auto tile = step == Step::kForward ? of_halves.forward : of_halves.backward;
      for_each_tile(of_halves.scratch(shape, anchors_.format_ == Format::kSplit ? 2 : 1),
                    [&](int64_t i, int64_t j, Pairs pairs, void* scratch) {
                      tile(anchors_.half_side(i), keys.half_side(j), shape, pairs, scratch);
                    });
      return;
    }
  }
#endif
  const PairTiles<A>& wide = tiles<A>();
  const auto tile = step == Step::kPeaks     ? wide.peaks
                    : step == Step::kForward ? (constant ? wide.forward : wide.peaked_forward)
                                             : (constant ? wide.backward : wide.peaked_backward);
  for_each_tile(wide.scratch(shape) * static_cast<int64_t>(sizeof(A)),
                [&](int64_t i, int64_t j, Pairs pairs, void* scratch) {
                  tile(anchors_.side(i), keys.side(j), shape, pairs, static_cast<A*>(scratch));
                });
}

// Calls tile(first row of i, of j, what they are to each other, scratch memory) for all pairs of tiles.
template <typename A>
template <typename Tile>
void PairSums<A>::for_each_tile(int64_t scratch_bytes, const Tile& tile) {
  const int64_t blocks = anchors_.block_count(), key_blocks = keys_ != nullptr ? keys_->block_count() : 0;
  const auto in_order = [&](const auto& order) {
    Turns turns(order, blocks, key_blocks);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), order.size());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const Buffer<char> scratch(scratch_bytes);
        turns.work([&](const BlockPair& pair) {
          meet(pair.i, pair.j, [&](int64_t i, int64_t j, Pairs pairs) { tile(i, j, pairs, scratch.data()); });
        });
      }
    });
  };
  if (keys_ != nullptr) {
    in_order(KeysOrder(blocks, key_blocks));
  } else {
    in_order(TournamentOrder(blocks));
  }
}

// The tiles of two blocks; of a block with itself each pair of tiles once.
template <typename A>
template <typename Tile>
void PairSums<A>::meet(int64_t i, int64_t j, const Tile& tile) const {
  const PairSet<A>& keys = this->keys();
  const bool one_block = keys_ == nullptr && i == j;
  for (int64_t row = 0; row < anchors_.block_; row += anchors_.tile_) {
    for (int64_t column = one_block ? row : 0; column < keys.block_; column += keys.tile_) {
      const Pairs pairs = keys_ != nullptr                ? Pairs::kKeys
                          : one_block && row == column ? Pairs::kDiagonal
                                                          : Pairs::kOneSet;
      tile(i * anchors_.block_ + row, j * keys.block_ + column, pairs);
    }
  }
}

template <typename A>
void PairSums<A>::log_d(A* out) {
  if (way_ == Way::kNoKey || way_ == Way::kNotFinite) {
    std::fill_n(out, anchors_.count_, static_cast<A>(way_ == Way::kNoKey ? -kInfinity : std::nan("")));
    return;
  }
  anchors_.sums_ = Buffer<double>(anchors_.padded_, 0.0);
  if (way_ == Way::kConstantShift) {
    run(Step::kForward);
    for (int64_t i = 0; i < anchors_.count_; ++i) {
      const double exponent = static_cast<double>(anchors_.shift_[i]) + log2_scale_ + std::log2(anchors_.sums_[i]);
      out[i] = static_cast<A>(kLn2 * exponent);
    }
    return;
  }
  anchors_.peak_ = Buffer<A>(anchors_.padded_, static_cast<A>(-kInfinity));
  run(Step::kPeaks);
  for (int64_t i = 0; i < anchors_.padded_; ++i) {
    // a row whose every exponent is -inf, or that is padding: any finite peak keeps NaN away
    anchors_.peak_[i] = std::isfinite(anchors_.peak_[i]) ? anchors_.peak_[i] : A(0);
  }
  run(Step::kForward);
  for (int64_t i = 0; i < anchors_.count_; ++i) {
    out[i] = static_cast<A>(kLn2 * (static_cast<double>(anchors_.peak_[i]) + std::log2(anchors_.sums_[i])));
  }
}

template <typename A>
void PairSums<A>::differentiate(const A* a, const A* log_d) {
  for (PairSet<A>* set : {&anchors_, keys_}) {
    if (set != nullptr) {
      const A start = static_cast<A>(way_ == Way::kNotFinite ? std::nan("") : 0.0);
      set->gradient_ = Buffer<A>(set->padded_ * set->stride_, start);
    }
  }
  if (way_ == Way::kNoKey || way_ == Way::kNotFinite) {
    return;
  }
  const bool constant = way_ == Way::kConstantShift;
  keys().rho_ = Buffer<A>(keys().padded_, A(0));  // of keys that are no anchors it stays so
  anchors_.rho_ = Buffer<A>(anchors_.padded_, A(0));
  if (!constant) {
    // of rows through which nothing flows it stays so: 2^(x - inf) is 0, where 2^x may be infinite, and NaN times 0
    anchors_.peak_ = Buffer<A>(anchors_.padded_, static_cast<A>(kInfinity));
  }
  for (int64_t i = 0; i < anchors_.count_; ++i) {
    const double log2_d = static_cast<double>(log_d[i]) * kLog2E;
    if (std::isinf(log2_d) || a[i] == A(0)) {
      continue;  // no key, or no weight in the loss: nothing flows
    }
    if (constant) {
      const double exponent = static_cast<double>(anchors_.shift_[i]) + log2_scale_ - log2_d;
      anchors_.rho_[i] = static_cast<A>(static_cast<double>(a[i]) * std::exp2(exponent));
    } else {
      anchors_.rho_[i] = a[i];
      anchors_.peak_[i] = static_cast<A>(log2_d);
    }
  }
  run(Step::kBackward);
}

template class PairSet<float>;
template class PairSet<double>;
template class PairSums<float>;
template class PairSums<double>;

}  // namespace in2nect::cpu
