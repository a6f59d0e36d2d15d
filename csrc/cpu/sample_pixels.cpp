// Up to m pixels of each class, uniform without replacement, on the CPU: those of smallest hash (../common/hash.h).
//
// Hashes are uniform: of n_k pixels, those below (m + slack) / n_k of the hash's range are a few more than m, and the m
// smallest are among them. So the labels are read twice, in place, whatever their strides: to count, and to collect
// pixels below their class's threshold, which are then sorted. A class that falls short (once in 50,000) is collected
// again with a higher threshold. Cost O(N + K m log m), nearly all of it the hash; memory O(K m), and never more than
// O(N) beside the result.
//
// Determinism: the m smallest are a set, so neither cuts nor threads can change it; equal hashes order by pixel.
#include "sample_pixels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/hash.h"
#include "../common/tensors.h"

namespace in2nect::cpu {
namespace {

// Pixels below which another chunk costs more than it saves: some 40 us of work.
constexpr int64_t kChunkPixels = 32768;
// Pixels of the result below which another thread costs more than it saves to sort: some 30 us of work.
constexpr int64_t kRowGrain = 1024;
// No hash reaches it: the threshold of a class of which every pixel is wanted.
constexpr uint64_t kEveryHash = uint64_t{1} << 63;
// How much a threshold grows for a class that fell short.
constexpr uint64_t kGrowth = 4;

struct Candidate {
  uint64_t hash;
  int64_t pixel;

  bool operator<(const Candidate& other) const {
    return hash < other.hash || (hash == other.hash && pixel < other.pixel);
  }
};

// The hash below which about m + 4 sqrt(m) + 8 of n pixels lie: four standard deviations above m, so that fewer than m
// lie there once in 50,000.
uint64_t first_threshold(int64_t m, int64_t n) {
  const double expected = static_cast<double>(m) + 4 * std::sqrt(static_cast<double>(m)) + 8;
  const double share = expected / static_cast<double>(std::max<int64_t>(n, 1));
  return share < 1 ? static_cast<uint64_t>(share * static_cast<double>(kEveryHash)) : kEveryHash;
}

// Labels of any shape as lines of evenly spaced pixels in row-major order: one line where they are contiguous.
class LabelLines {
 public:
  explicit LabelLines(const Tensor& labels) {
    for (int64_t axis = 0; axis < labels.dim(); ++axis) {
      const int64_t size = labels.size(axis), stride = labels.stride(axis);
      if (size == 1) {
        continue;
      }
      if (!sizes_.empty() && strides_.back() == size * stride) {
        sizes_.back() *= size;
        strides_.back() = stride;
      } else {
        sizes_.push_back(size);
        strides_.push_back(stride);
      }
    }
    if (sizes_.empty()) {
      sizes_.push_back(1);
      strides_.push_back(1);
    }
  }

  // Calls body(pixel, offset, stride, count) for the lines that make up the pixels [begin, end).
  template <typename Body>
  void for_each(int64_t begin, int64_t end, const Body& body) const {
    const int64_t width = sizes_.back(), stride = strides_.back();
    while (begin < end) {
      const int64_t x = begin % width, count = std::min(end - begin, width - x);
      int64_t line = begin / width, offset = x * stride;
      for (size_t axis = sizes_.size() - 1; axis-- > 0;) {
        offset += line % sizes_[axis] * strides_[axis];
        line /= sizes_[axis];
      }
      body(begin, offset, stride, count);
      begin += count;
    }
  }

 private:
  std::vector<int64_t> sizes_, strides_;
};

// Class of a label, and num_classes for one that is none; negative labels become huge.
template <typename L>
uint64_t slot(L label, uint64_t num_classes) {
  return std::min(static_cast<uint64_t>(static_cast<int64_t>(label)), num_classes);
}

// What one chunk of the pixels holds; slot K is that of labels which are no class.
class Chunk {
 public:
  explicit Chunk(int64_t classes) : classes_(classes), counts_(kWays * (classes + 1)), candidates_(classes) {}

  template <typename L>
  void count_line(const L* labels, int64_t stride, int64_t count) {
    int64_t i = 0;
    for (; i + kWays <= count; i += kWays) {
      for (int64_t way = 0; way < kWays; ++way) {
        ++counts_[slot(labels[(i + way) * stride], classes_) * kWays + way];
      }
    }
    for (; i < count; ++i) {
      ++counts_[slot(labels[i * stride], classes_) * kWays];
    }
  }

  // Every pixel is hashed, also one of no class: a branch would cost more. Hash and comparison are one scalar loop:
  // hashed apart, eight at a time by AVX-512, they take three quarters of the time, but by SSE2, which has no 64-bit
  // product, half as much again.
  template <typename L>
  void collect_line(uint64_t stream, const std::vector<uint64_t>& thresholds, const L* labels, int64_t stride,
                    int64_t pixel, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t k = slot(labels[i * stride], classes_);
      const uint64_t hash = hash_pixel(stream, pixel + i);
      if (hash < thresholds[k]) {
        candidates_[k].push_back({hash, pixel + i});
      }
    }
  }

  int64_t count(int64_t k) const {
    int64_t total = 0;
    for (int64_t way = 0; way < kWays; ++way) {
      total += counts_[k * kWays + way];
    }
    return total;
  }
  std::vector<Candidate>& candidates(int64_t k) {
    return candidates_[k];
  }

 private:
  // Counters a class: neighbours are mostly of one class, and would wait for each other's sum.
  static constexpr int64_t kWays = 4;
  uint64_t classes_;
  std::vector<int64_t> counts_;
  std::vector<std::vector<Candidate>> candidates_;
};

// The `wanted` smallest of one class's candidates into its row of m pixels, then -1; false where there are fewer yet.
bool fill_row(std::vector<Chunk>& chunks, int64_t k, int64_t wanted, int64_t per_class, int64_t* row) {
  std::vector<Candidate> all;
  for (Chunk& chunk : chunks) {
    std::vector<Candidate>& own = chunk.candidates(k);
    all.insert(all.end(), own.begin(), own.end());
    own.clear();
  }
  if (static_cast<int64_t>(all.size()) < wanted) {
    return false;
  }
  std::sort(all.begin(), all.end());
  for (int64_t i = 0; i < wanted; ++i) {
    row[i] = all[i].pixel;
  }
  std::fill(row + wanted, row + per_class, int64_t{-1});
  return true;
}

// Draws from labels of one type; rows is (K, m).
template <typename L>
void draw(const L* labels, const LabelLines& lines, int64_t pixels, int64_t classes, int64_t per_class, uint64_t stream,
          int64_t ignore_index, int64_t* rows) {
  // A chunk keeps a list a class: with more chunks than pixels / classes the lists would outgrow the labels.
  const int64_t most = torch::stable::get_num_threads();
  const int64_t cuts = std::clamp<int64_t>(pixels / std::max(kChunkPixels, classes), 1, most);
  std::vector<Chunk> chunks(cuts, Chunk(classes));
  const auto for_each_line = [&](const auto& body) {
    torch::stable::parallel_for(0, cuts, 1, [&](int64_t first, int64_t last) {
      for (int64_t cut = first; cut < last; ++cut) {
        lines.for_each(cut * pixels / cuts, (cut + 1) * pixels / cuts,
                       [&](int64_t pixel, int64_t offset, int64_t stride, int64_t count) {
                         body(chunks[cut], labels + offset, stride, pixel, count);
                       });
      }
    });
  };
  for_each_line([](Chunk& chunk, const L* line, int64_t stride, int64_t, int64_t count) {
    chunk.count_line(line, stride, count);
  });

  std::vector<int64_t> wanted(classes);
  std::vector<uint64_t> thresholds(classes + 1);  // 0, below which no hash is, once a class has its row
  std::vector<char> missing(classes, 1);
  for (int64_t k = 0; k < classes; ++k) {
    int64_t n = 0;
    for (const Chunk& chunk : chunks) {
      n += k == ignore_index ? 0 : chunk.count(k);
    }
    wanted[k] = std::min(per_class, n);
    thresholds[k] = n > 0 ? first_threshold(wanted[k], n) : 0;
  }
  const int64_t grain = std::max<int64_t>(1, kRowGrain / std::min(per_class, std::max<int64_t>(pixels, 1)));
  while (std::any_of(missing.begin(), missing.end(), [](char is_missing) { return is_missing; })) {
    for_each_line([&](Chunk& chunk, const L* line, int64_t stride, int64_t pixel, int64_t count) {
      chunk.collect_line(stream, thresholds, line, stride, pixel, count);
    });
    torch::stable::parallel_for(0, classes, grain, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        if (missing[k]) {
          missing[k] = !fill_row(chunks, k, wanted[k], per_class, rows + k * per_class);
          thresholds[k] = missing[k] ? std::min(thresholds[k], kEveryHash / kGrowth) * kGrowth : 0;
        }
      }
    });
  }
}

}  // namespace

Tensor sample_pixels(Tensor labels, int64_t num_classes, int64_t per_class, Tensor seed, int64_t ignore_index) {
  require_labels("sample_pixels", labels.scalar_type());
  require(num_classes >= 1, "sample_pixels: num_classes must be at least 1, got ", num_classes);
  require(per_class >= 1, "sample_pixels: per_class must be at least 1, got ", per_class);
  require(seed.dim() == 1 && seed.size(0) == 2 && seed.scalar_type() == ScalarType::Long,
          "sample_pixels: seed must be (2,) int64, seed and step, got ", seed.dim(), " dimensions of ",
          torch::headeronly::toString(seed.scalar_type()));
  const int64_t* values = static_cast<const int64_t*>(seed.const_data_ptr());
  const uint64_t stream = hash_stream(values[0], values[seed.stride(0)]);
  Tensor drawn = torch::stable::new_empty(labels, {num_classes, per_class}, ScalarType::Long);
  const LabelLines lines(labels);
  const auto draw_from = [&](const auto* data) {
    draw(data, lines, labels.numel(), num_classes, per_class, stream, ignore_index,
         static_cast<int64_t*>(drawn.mutable_data_ptr()));
  };
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      draw_from(static_cast<const uint8_t*>(labels.const_data_ptr()));
      break;
    case ScalarType::Int:
      draw_from(static_cast<const int32_t*>(labels.const_data_ptr()));
      break;
    default:
      draw_from(static_cast<const int64_t*>(labels.const_data_ptr()));
  }
  return drawn;
}

}  // namespace in2nect::cpu
