// See peak.h. Twelve chains hide a latency of four cycles on two units, and fit into sixteen registers.
#include "peak.h"

#include "vec.h"

namespace in2nect::cpu::IN2NECT_CAPABILITY {
namespace {

constexpr int kChains = 12;

template <typename A>
int64_t multiply_adds(int64_t rounds) {
  volatile A half = A(0.5);  // not a constant, so that nothing is worked out beforehand; x <- x / 2 + 1/2 stays near 1
  const Vec<A> factor = broadcast<A>(half), summand = broadcast<A>(half);
  Vec<A> chains[kChains];
  for (int c = 0; c < kChains; ++c) {
    chains[c] = broadcast<A>(static_cast<A>(c));
  }
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      chains[c] = chains[c] * factor + summand;
    }
  }
  for (int c = 0; c < kChains; ++c) {
    half = chains[c][0];
  }
  return rounds * kChains * kLanes<A> * 2;
}

// x <- 2^-x tends to 0.641 from anywhere in [0, 1].
template <typename A>
int64_t exponentials(int64_t rounds) {
  volatile A start = A(0.5);
  Vec<A> chains[kChains];
  for (int c = 0; c < kChains; ++c) {
    chains[c] = broadcast<A>(start);
  }
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      chains[c] = Exp2<A>::of(-chains[c]);
    }
  }
  for (int c = 0; c < kChains; ++c) {
    start = chains[c][0];
  }
  return rounds * kChains * kLanes<A>;
}

}  // namespace

extern const PeakLoops peak_loops = {multiply_adds<float>, multiply_adds<double>, exponentials<float>,
                                     exponentials<double>};

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
