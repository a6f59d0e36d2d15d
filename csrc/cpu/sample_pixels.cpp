// Up to m pixels of each class, uniform without replacement, on the CPU: those with the smallest hash (../common/hash.h).
//
// The labels are read once, in place, whatever their strides. A pixel becomes a candidate of its class if its hash is
// below the class's threshold, the m-th smallest hash so far; 2 m candidates are cut back to m, which lowers the
// threshold. Of n pixels about m (1 + log(n / m)) ever are candidates, so the cost is O(N + K m log m), nearly all of it
// the hash. Memory: at most 2 m candidates a class and chunk, and never more than there are pixels.
//
// Determinism: the m smallest are a set, so neither the cuts nor the threads can change it; equal hashes order by pixel.
#include "sample_pixels.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/hash.h"
#include "../common/tensors.h"

namespace in2nect::cpu {
namespace {

// Pixels of which another chunk pays: some 30 us, beside the candidates that every chunk collects anew.
constexpr int64_t kChunkPixels = 32768;
// Candidates beyond m before they are cut back, however small m is.
constexpr int64_t kLeastSlack = 64;

struct Candidate {
  uint64_t hash;
  int64_t pixel;

  bool operator<(const Candidate& other) const {
    return hash < other.hash || (hash == other.hash && pixel < other.pixel);
  }
};

// Keeps the `wanted` smallest, in no order.
void cut_back(std::vector<Candidate>& candidates, int64_t wanted) {
  if (static_cast<int64_t>(candidates.size()) > wanted) {
    std::nth_element(candidates.begin(), candidates.begin() + (wanted - 1), candidates.end());
    candidates.resize(wanted);
  }
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

// The candidates of one chunk, by class.
class Draw {
 public:
  Draw(uint64_t stream, int64_t classes, int64_t wanted, int64_t ignore_index)
      : stream_(stream),
        wanted_(wanted),
        limit_(wanted + std::max(wanted, kLeastSlack)),
        thresholds_(classes + 1, std::numeric_limits<uint64_t>::max()),
        candidates_(classes) {
    thresholds_[classes] = 0;  // of labels that are no class: no hash is below it
    if (ignore_index >= 0 && ignore_index < classes) {
      thresholds_[ignore_index] = 0;
    }
  }

  template <typename L>
  void add_line(const L* labels, int64_t stride, int64_t pixel, int64_t count) {
    const uint64_t none = candidates_.size();
    for (int64_t i = 0; i < count; ++i) {
      // negative labels become huge
      const uint64_t k = std::min(static_cast<uint64_t>(static_cast<int64_t>(labels[i * stride])), none);
      const uint64_t hash = hash_pixel(stream_, pixel + i);
      if (hash < thresholds_[k]) {
        add(k, {hash, pixel + i});
      }
    }
  }

  std::vector<Candidate>& of_class(int64_t k) {
    return candidates_[k];
  }

 private:
  // Pixels come in ascending order: of equal hashes the first stays, as `<` in add_line has it.
  void add(uint64_t k, const Candidate& candidate) {
    std::vector<Candidate>& own = candidates_[k];
    own.push_back(candidate);
    if (static_cast<int64_t>(own.size()) == limit_) {
      cut_back(own, wanted_);
      thresholds_[k] = own.back().hash;
    }
  }

  uint64_t stream_;
  int64_t wanted_, limit_;
  std::vector<uint64_t> thresholds_;
  std::vector<std::vector<Candidate>> candidates_;
};

// One class's candidates of all chunks, sorted into its row.
void merge(std::vector<Draw>& draws, int64_t k, int64_t wanted, int64_t per_class, int64_t* row) {
  std::vector<Candidate> all = std::move(draws.front().of_class(k));
  for (size_t i = 1; i < draws.size(); ++i) {
    const std::vector<Candidate>& more = draws[i].of_class(k);
    all.insert(all.end(), more.begin(), more.end());
  }
  cut_back(all, wanted);
  std::sort(all.begin(), all.end());
  for (const Candidate& candidate : all) {
    *row++ = candidate.pixel;
    --per_class;
  }
  std::fill_n(row, per_class, int64_t{-1});
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
  const int64_t pixels = labels.numel();
  const int64_t wanted = std::min(per_class, std::max<int64_t>(pixels, 1));
  // a chunk keeps a list a class: with more chunks than pixels / classes the lists would outgrow the labels
  const int64_t chunks = std::clamp<int64_t>(pixels / std::max(kChunkPixels, num_classes), 1,
                                             torch::stable::get_num_threads());
  std::vector<Draw> draws(chunks, Draw(stream, num_classes, wanted, ignore_index));
  const LabelLines lines(labels);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const auto scan = [&](const auto* data) {
        lines.for_each(chunk * pixels / chunks, (chunk + 1) * pixels / chunks,
                       [&](int64_t pixel, int64_t offset, int64_t stride, int64_t count) {
                         draws[chunk].add_line(data + offset, stride, pixel, count);
                       });
      };
      switch (labels.scalar_type()) {
        case ScalarType::Byte:
          scan(static_cast<const uint8_t*>(labels.const_data_ptr()));
          break;
        case ScalarType::Int:
          scan(static_cast<const int32_t*>(labels.const_data_ptr()));
          break;
        default:
          scan(static_cast<const int64_t*>(labels.const_data_ptr()));
      }
    }
  });
  int64_t* rows = static_cast<int64_t*>(drawn.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 1024 / wanted);
  torch::stable::parallel_for(0, num_classes, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      merge(draws, k, wanted, per_class, rows + k * per_class);
    }
  });
  return drawn;
}

}  // namespace in2nect::cpu
