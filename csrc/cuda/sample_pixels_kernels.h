// Draws up to m pixels a class, those with the smallest hash of (seed, step, pixel index), with no host
// synchronisation: O(N) time, two reads of the labels, and O(K m) memory. As kernels/sample_pixels.py does: rather than
// sorting N hashes it keeps those below a threshold that lets through a little more than m of each class, and ranks
// these. A class of which chance lets through too few or too many is drawn again by radix select, so the result is
// always the reference's. Everything that depends on data is decided on the device; launches depend on sizes alone.
//
// Determinism: candidates are appended in any order (integer atomics), and ranked by (hash, index), which are distinct.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/hash.h"
#include "device.h"

namespace in2nect::cuda {

// Of n_k hashes, uniform in [0, 2^63), those below 2^63 (m + slack) / n_k number m + slack in the mean. They are fewer
// than m, or more than m + 2 slack, with a chance of at most exp(-slack^2 / (2 m + 2 slack)) and
// exp(-slack^2 / (2 m + 8/3 slack)) (Chernoff's and Bernstein's bounds): below exp(-26) = 5e-12 for every m.
constexpr double kSlackDeviations = 8, kSlackLeast = 64;

constexpr int kSampleThreads = 256;
// Pixels that a thread loads at once, so that several loads are under way.
constexpr int kSampleBatch = 4;
// Blocks at most: 8 of 256 threads fill a multiprocessor, and no chip has more than 192.
constexpr int64_t kSampleBlocks = 8 * 192;
// Classes whose counts a block keeps in 16 KiB of shared memory; more go to global memory at once.
constexpr int kSharedClasses = 4096;
// Radix select: 63 bits are 7 digits of 9.
constexpr int kDigitBits = 9, kDigits = 1 << kDigitBits;
constexpr int kSelectThreads = 1024;
constexpr unsigned kFullWarp = 0xffffffff;

constexpr uint64_t kLargestHash = (uint64_t{1} << kHashBits) - 1;

template <typename Label>
struct PixelLabels {
  const Label* data;  // contiguous
  int64_t count;
  int64_t classes, ignore_index;

  // -1 for a pixel that belongs to no class.
  __device__ int class_of(Label label) const {
    const auto k = static_cast<int64_t>(label);
    return k >= 0 && k < classes && k != ignore_index ? static_cast<int>(k) : -1;
  }
};

// What is known of each class: K numbers each, and K x capacity candidates.
struct Candidates {
  unsigned long long* counts;  // pixels
  unsigned long long* found;   // pixels whose hash is within the threshold
  uint64_t* thresholds;
  uint64_t* hashes;
  int64_t* pixels;
  int64_t capacity;
};

// n_k. A warp whose pixels are of one class, as most are in real labels, adds once.
template <typename Label>
__global__ void __launch_bounds__(kSampleThreads) sample_count(PixelLabels<Label> labels, Candidates candidates) {
  const bool shared = labels.classes <= kSharedClasses;
  auto* block_counts = reinterpret_cast<unsigned*>(dynamic_shared());  // far fewer than 2^32 pixels a block
  const int classes = static_cast<int>(labels.classes);
  for (int k = threadIdx.x; shared && k < classes; k += kSampleThreads) {
    block_counts[k] = 0;
  }
  __syncthreads();
  const auto add = [&](int k, unsigned pixels) {
    if (shared) {
      atomicAdd(block_counts + k, pixels);
    } else {
      atomicAdd(candidates.counts + k, static_cast<unsigned long long>(pixels));
    }
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSampleThreads * kSampleBatch;
  const int lane = threadIdx.x % 32;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kSampleThreads * kSampleBatch; start < labels.count;
       start += stride) {
    int k[kSampleBatch];
#pragma unroll
    for (int b = 0; b < kSampleBatch; ++b) {
      const int64_t i = start + b * kSampleThreads + threadIdx.x;
      k[b] = i < labels.count ? labels.class_of(labels.data[i]) : -1;
    }
#pragma unroll
    for (int b = 0; b < kSampleBatch; ++b) {
      const int first = __shfl_sync(kFullWarp, k[b], 0);
      if (__all_sync(kFullWarp, k[b] == first)) {
        if (lane == 0 && first >= 0) {
          add(first, 32);
        }
      } else if (k[b] >= 0) {
        add(k[b], 1);
      }
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; shared && k < classes; k += kSampleThreads) {
    if (block_counts[k] > 0) {
      atomicAdd(candidates.counts + k, static_cast<unsigned long long>(block_counts[k]));
    }
  }
}

// The threshold of each class, the largest hash of a candidate: 2^63 expected / n_k; and a sample of -1.
static __global__ void __launch_bounds__(kSampleThreads)
    sample_open(Candidates candidates, int64_t classes, double expected, int64_t* sample, int64_t slots) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSampleThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSampleThreads + threadIdx.x;
  for (int64_t k = first; k < classes; k += stride) {
    const double share = expected / static_cast<double>(candidates.counts[k] > 0 ? candidates.counts[k] : 1);
    // below 1 is at most 1 - 2^-53, whose product with 2^63 fits
    candidates.thresholds[k] = share < 1 ? static_cast<uint64_t>(share * 0x1p63) : kLargestHash;
  }
  for (int64_t slot = first; slot < slots; slot += stride) {
    sample[slot] = -1;
  }
}

// Appends each pixel whose hash is within its class's threshold, in no particular order.
template <typename Label>
__global__ void __launch_bounds__(kSampleThreads)
    sample_candidates(PixelLabels<Label> labels, const int64_t* seed, Candidates candidates) {
  const uint64_t stream = hash_stream(seed[0], seed[1]);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kSampleThreads * kSampleBatch;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kSampleThreads * kSampleBatch; start < labels.count;
       start += stride) {
    int k[kSampleBatch];
#pragma unroll
    for (int b = 0; b < kSampleBatch; ++b) {
      const int64_t i = start + b * kSampleThreads + threadIdx.x;
      k[b] = i < labels.count ? labels.class_of(labels.data[i]) : -1;
    }
#pragma unroll
    for (int b = 0; b < kSampleBatch; ++b) {
      const int64_t i = start + b * kSampleThreads + threadIdx.x;
      const uint64_t hash = hash_pixel(stream, i);
      if (k[b] < 0 || hash > candidates.thresholds[k[b]]) {
        continue;
      }
      const auto slot = static_cast<int64_t>(atomicAdd(candidates.found + k[b], 1ULL));
      if (slot < candidates.capacity) {
        candidates.hashes[k[b] * candidates.capacity + slot] = hash;
        candidates.pixels[k[b] * candidates.capacity + slot] = i;
      }
    }
  }
}

// Where a class's candidates are too few or too many: the m-th smallest hash, digit by digit from the highest, and then
// those up to it, of which there are m, or m + 1 where two pixels share that hash. One block a class, 8 passes over the
// labels; nearly always there is nothing to do.
template <typename Label>
__global__ void __launch_bounds__(kSelectThreads)
    sample_repair(PixelLabels<Label> labels, const int64_t* seed, Candidates candidates, int64_t per_class) {
  __shared__ unsigned long long histogram[kDigits];
  __shared__ unsigned long long selected[2];  // the digits found so far; how many are wanted of the next ones
  const int k = static_cast<int>(blockIdx.x);
  const unsigned long long count = candidates.counts[k];
  const auto most = static_cast<unsigned long long>(per_class);
  const unsigned long long wanted = count < most ? count : most, found = candidates.found[k];
  if (found >= wanted && found <= static_cast<unsigned long long>(candidates.capacity)) {
    return;
  }
  const uint64_t stream = hash_stream(seed[0], seed[1]);
  if (threadIdx.x == 0) {
    selected[0] = 0;
    selected[1] = wanted;
  }
  for (int shift = kHashBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kSelectThreads) {
      histogram[digit] = 0;
    }
    __syncthreads();
    const uint64_t prefix = selected[0];
    for (int64_t i = threadIdx.x; i < labels.count; i += kSelectThreads) {
      const uint64_t hash = hash_pixel(stream, i);
      if (labels.class_of(labels.data[i]) == k && (hash >> shift >> kDigitBits) == prefix) {
        atomicAdd(histogram + (hash >> shift) % kDigits, 1ULL);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 0;
      while (digit < kDigits - 1 && histogram[digit] < selected[1]) {
        selected[1] -= histogram[digit++];
      }
      selected[0] = prefix << kDigitBits | static_cast<unsigned>(digit);
    }
    __syncthreads();
  }
  const uint64_t limit = selected[0];
  if (threadIdx.x == 0) {
    candidates.found[k] = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < labels.count; i += kSelectThreads) {
    const uint64_t hash = hash_pixel(stream, i);
    if (labels.class_of(labels.data[i]) == k && hash <= limit) {
      const auto slot = static_cast<int64_t>(atomicAdd(candidates.found + k, 1ULL));
      candidates.hashes[k * candidates.capacity + slot] = hash;
      candidates.pixels[k * candidates.capacity + slot] = i;
    }
  }
}

// Each candidate to its place: as many as there are candidates of its class before it by (hash, index). O(capacity^2)
// comparisons a class, from shared memory: microseconds for m in the hundreds, milliseconds from some 30,000 on.
static __global__ void __launch_bounds__(kSampleThreads)
    sample_rank(Candidates candidates, int64_t blocks_per_class, int64_t per_class, int64_t* sample) {
  __shared__ uint64_t hashes[kSampleThreads];
  __shared__ int64_t pixels[kSampleThreads];
  const int64_t k = blockIdx.x / blocks_per_class;
  const int64_t slot = blockIdx.x % blocks_per_class * kSampleThreads + threadIdx.x;
  const auto found = static_cast<int64_t>(candidates.found[k]);
  const int64_t row = k * candidates.capacity;
  const uint64_t hash = slot < found ? candidates.hashes[row + slot] : 0;
  const int64_t pixel = slot < found ? candidates.pixels[row + slot] : 0;
  int64_t rank = 0;
  for (int64_t start = 0; start < found; start += kSampleThreads) {
    const int size = static_cast<int>(found - start < kSampleThreads ? found - start : kSampleThreads);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < size) {
      hashes[threadIdx.x] = candidates.hashes[row + start + threadIdx.x];
      pixels[threadIdx.x] = candidates.pixels[row + start + threadIdx.x];
    }
    __syncthreads();
    for (int other = 0; other < size; ++other) {
      rank += hashes[other] < hash || (hashes[other] == hash && pixels[other] < pixel);
    }
  }
  if (slot < found && rank < per_class) {
    sample[k * per_class + rank] = pixel;
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Candidates kept of each class.
inline int64_t sample_capacity(int64_t per_class, double slack) {
  return static_cast<int64_t>(std::ceil(static_cast<double>(per_class) + 2 * slack)) + 1;
}

inline double sample_slack(int64_t per_class) {
  return kSlackDeviations * std::sqrt(static_cast<double>(per_class)) + kSlackLeast;
}

// Bytes of scratch memory: counts, found, thresholds; hashes and pixels of the candidates.
inline int64_t sample_scratch(int64_t classes, int64_t capacity) {
  return classes * (3 + 2 * capacity) * static_cast<int64_t>(sizeof(uint64_t));
}

// Writes `sample`, (K, m) int64. `scratch` holds sample_scratch() bytes, of which the first 2 K numbers are zero.
template <typename Label>
void sample_pixels(PixelLabels<Label> labels, int64_t per_class, const int64_t* seed, double slack, void* scratch,
                   int64_t* sample, Stream stream) {
  const int64_t classes = labels.classes, capacity = sample_capacity(per_class, slack);
  auto* numbers = static_cast<uint64_t*>(scratch);
  Candidates candidates{};
  candidates.counts = static_cast<unsigned long long*>(scratch);
  candidates.found = candidates.counts + classes;
  candidates.thresholds = numbers + 2 * classes;
  candidates.hashes = numbers + 3 * classes;
  candidates.pixels = reinterpret_cast<int64_t*>(numbers + (3 + capacity) * classes);
  candidates.capacity = capacity;

  const auto grid = [](int64_t items, int64_t per_block) {
    return dim3(static_cast<unsigned>(std::clamp<int64_t>((items + per_block - 1) / per_block, 1, kSampleBlocks)));
  };
  const dim3 over_pixels = grid(labels.count, int64_t{kSampleThreads} * kSampleBatch);
  const size_t counts_bytes = classes <= kSharedClasses ? static_cast<size_t>(classes) * sizeof(unsigned) : 0;
  launch(sample_count<Label>, over_pixels, kSampleThreads, counts_bytes, stream, labels, candidates);
  launch(sample_open, grid(classes * per_class, kSampleThreads), kSampleThreads, 0, stream, candidates, classes,
         static_cast<double>(per_class) + slack, sample, classes * per_class);
  launch(sample_candidates<Label>, over_pixels, kSampleThreads, 0, stream, labels, seed, candidates);
  launch(sample_repair<Label>, dim3(static_cast<unsigned>(classes)), kSelectThreads, 0, stream, labels, seed,
         candidates, per_class);
  const int64_t blocks_per_class = (capacity + kSampleThreads - 1) / kSampleThreads;
  launch(sample_rank, dim3(static_cast<unsigned>(classes * blocks_per_class)), kSampleThreads, 0, stream, candidates,
         blocks_per_class, per_class, sample);
}

}  // namespace in2nect::cuda
