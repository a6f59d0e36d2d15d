// Runs the block pairs of csrc/cpu/pair_set.cpp on 1 to 8 threads, for ThreadSanitizer; exits with 1 where the results
// are not the same bits. docs/development.md has the command. Takes a second.
#include "../../csrc/cpu/pair_set.h"

#include <torch/csrc/stable/ops.h>

#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

namespace {

using in2nect::cpu::Format;
using in2nect::cpu::PairSet;
using in2nect::cpu::PairSums;

constexpr int64_t kDepth = 9;

template <typename A>
PairSet<A> normal_rows(int64_t count, unsigned seed, double length) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, length);
  PairSet<A> set(count, kDepth, Format::kWide);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < kDepth; ++c) {
      set.row(i)[c] = static_cast<A>(normal(generator));
    }
  }
  return set;
}

// log D of the anchors and every gradient; without keys, of one set.
template <typename A>
std::vector<A> results(int64_t anchors, int64_t keys, double length) {
  PairSet<A> rows = normal_rows<A>(anchors, 1, length);
  std::optional<PairSet<A>> columns;
  if (keys > 0) {
    columns.emplace(normal_rows<A>(keys, 2, length));
  }
  const int64_t columns_count = keys > 0 ? keys : anchors;
  const std::vector<A> weights(columns_count, A(1) / static_cast<A>(columns_count)), upstream(anchors, A(1));
  std::vector<A> out(anchors);
  PairSums<A> sums(rows, columns ? &*columns : nullptr, weights.data());
  sums.log_d(out.data());
  sums.differentiate(upstream.data(), std::vector<A>(out).data());
  for (int64_t i = 0; i < anchors; ++i) {
    out.insert(out.end(), sums.gradient(i), sums.gradient(i) + kDepth);
  }
  for (int64_t j = 0; j < keys; ++j) {
    out.insert(out.end(), sums.key_gradient(j), sums.key_gradient(j) + kDepth);
  }
  return out;
}

template <typename A>
bool same_bits(int64_t anchors, int64_t keys, double length) {
  torch::stable::threads = 1;
  const std::vector<A> expected = results<A>(anchors, keys, length);
  bool same = true;
  for (const uint32_t threads : {2, 3, 8}) {
    torch::stable::threads = threads;
    const std::vector<A> found = results<A>(anchors, keys, length);
    same = same && std::memcmp(found.data(), expected.data(), found.size() * sizeof(A)) == 0;
  }
  std::printf("%zu-byte numbers, %ld anchors, %ld keys, length %.1f: %s\n", sizeof(A), static_cast<long>(anchors),
              static_cast<long>(keys), length, same ? "same bits" : "other bits");
  return same;
}

}  // namespace

int main() {
  bool same = true;
  for (const double length : {0.3, 6.0}) {  // the constant shift, and the running maximum
    same = same_bits<float>(1500, 0, length) && same;
    same = same_bits<float>(700, 500, length) && same;
    same = same_bits<double>(900, 0, length) && same;
  }
  return same ? 0 : 1;
}
