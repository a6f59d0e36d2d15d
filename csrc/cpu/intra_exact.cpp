// The intra-class loss over every pair of labelled pixels: sum_i a_i log D_i and its gradient, to which the positive
// term's is added before it is rounded to the features' dtype. Time O(N^2 d) (pair_set.h); memory beyond the gradient
// two copies of the labelled rows in the accumulation type (pair_set.h), and at d = 64 some 0.4 MiB a thread.
//
// Ignored pixels are left out of the rows, so what they hold is never read.
#include "intra_exact.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/tensors.h"
#include "pair_set.h"
#include "views.h"

namespace in2nect::cpu {
namespace {

// Pixels that a thread packs at once: 64 rows of 64 numbers are 16 KiB, which stay in a first-level cache while the
// channels of an image are written across them.
constexpr int64_t kPatch = 64;
// Patches of a chunk, the unit of parallel packing; of each the number of labelled pixels before it is kept.
constexpr int64_t kChunkPatches = 16;

// The pixels of a grid in row-major order, in patches along its rows, the patches in chunks.
class Patches {
 public:
  Patches(const Tensor& labels, int64_t classes, int64_t ignore_index)
      : labels_(labels, classes, ignore_index),
        height_(labels.size(1)),
        width_(labels.size(2)),
        per_row_(divide_up(width_, kPatch)),
        total_(labels.size(0) * height_ * per_row_),
        first_(divide_up(total_, kChunkPatches) + 1) {
    // a chunk's own number first, then the sum of those before
    for_each_chunk([&](int64_t chunk) {
      int64_t found = 0;
      for_each_patch(chunk, [&](const Patch& patch) { found += patch.labelled; });
      first_[chunk + 1] = found;
    });
    for (size_t chunk = 1; chunk < first_.size(); ++chunk) {
      first_[chunk] += first_[chunk - 1];
    }
  }

  struct Patch {
    int64_t image, row, column, count;  // of its first pixel; pixels
    int64_t pixel;                      // flat index of the first
    int64_t labelled;                   // pixels that have a class
    int32_t classes[kPatch];
  };

  int64_t labelled() const {
    return first_.back();
  }

  // Calls body(patch, index of its first labelled pixel among all), in parallel over chunks.
  template <typename Body>
  void for_each(const Body& body) const {
    for_each_chunk([&](int64_t chunk) {
      int64_t first = first_[chunk];
      for_each_patch(chunk, [&](const Patch& patch) {
        body(patch, first);
        first += patch.labelled;
      });
    });
  }

 private:
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    torch::stable::parallel_for(0, divide_up(total_, kChunkPatches), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        body(chunk);
      }
    });
  }

  template <typename Body>
  void for_each_patch(int64_t chunk, const Body& body) const {
    Patch patch;
    for (int64_t p = chunk * kChunkPatches; p < std::min((chunk + 1) * kChunkPatches, total_); ++p) {
      const int64_t line = p / per_row_;
      patch.image = line / height_;
      patch.row = line % height_;
      patch.column = p % per_row_ * kPatch;
      patch.count = std::min(kPatch, width_ - patch.column);
      patch.pixel = line * width_ + patch.column;
      labels_.read(patch.image, patch.row, patch.column, patch.count, patch.classes);
      patch.labelled = patch.count - std::count(patch.classes, patch.classes + patch.count, kSkip);
      body(patch);
    }
  }

  Labels labels_;
  int64_t height_, width_, per_row_, total_;
  std::vector<int64_t> first_;
};

void check(const Tensor& features, const Tensor& labels, const Tensor& weights, const Tensor& anchors,
           double temperature) {
  require(features.dim() == 4 && labels.dim() == 3 && features.size(0) == labels.size(0) &&
              features.size(2) == labels.size(1) && features.size(3) == labels.size(2),
          "intra_exact: features must be (B, d, h, w) and labels (B, h, w)");
  require_labels("intra_exact", labels.scalar_type());
  const ScalarType type = accumulator_type(features.scalar_type());
  require(weights.dim() == 1 && weights.scalar_type() == type && anchors.dim() == 1 &&
              anchors.size(0) == weights.size(0) && anchors.scalar_type() == type,
          "intra_exact: weights and anchors must be (K,) ", torch::headeronly::toString(type));
  require(temperature > 0, "intra_exact: temperature must be positive, got ", temperature);
}

// A small tensor's numbers, (K,) or (K, d), side by side.
template <typename A>
std::vector<A> numbers(const Tensor& tensor) {
  const int64_t columns = tensor.dim() == 2 ? tensor.size(1) : 1;
  const int64_t column_stride = tensor.dim() == 2 ? tensor.stride(1) : 0;
  const A* data = static_cast<const A*>(tensor.const_data_ptr());
  std::vector<A> out(tensor.size(0) * columns);
  for (int64_t k = 0; k < tensor.size(0); ++k) {
    for (int64_t c = 0; c < columns; ++c) {
      out[k * columns + c] = data[k * tensor.stride(0) + c * column_stride];
    }
  }
  return out;
}

// The labelled rows, as the tiles take them, with their classes and (of unit rows) norms.
template <typename T>
class LabelledRows {
  using A = Accumulator<T>;

 public:
  LabelledRows(const Tensor& features, const Patches& patches, double temperature, bool normalize, bool reduced)
      : set(patches.labelled(), features.size(1), format(reduced)),
        classes(set.count()),
        norms(normalize ? set.count() : 0) {
    const Features<const T> z = view<T>(features);
    const double scale = PairSet<A>::scale(temperature);
    patches.for_each([&](const Patches::Patch& patch, int64_t first) {
      if constexpr (kBf16) {
        if (set.format() == Format::kHalves) {
          read(z, patch, first, [&](int64_t i, int64_t c, T number) { set.half_row(i)[c] = number.x; });
          for (int64_t i = first; i < first + patch.labelled; ++i) {
            const auto number = [&](int64_t c) { return T(set.half_row(i)[c], T::from_bits()); };
            set.factor(i) = static_cast<A>(normalize ? scale / norm_of(i, number) : scale);
          }
          return;
        }
      }
      read(z, patch, first, [&](int64_t i, int64_t c, T number) { set.row(i)[c] = static_cast<A>(number); });
      for (int64_t i = first; i < first + patch.labelled; ++i) {
        A* row = set.row(i);
        const double factor = normalize ? scale / norm_of(i, [&](int64_t c) { return row[c]; }) : scale;
        for (int64_t c = 0; c < set.depth(); ++c) {
          row[c] = static_cast<A>(factor * static_cast<double>(row[c]));
        }
      }
    });
  }

  // One number a row, by its class.
  Buffer<A> by_class(const std::vector<A>& values) const {
    Buffer<A> out(set.count());
    for (int64_t i = 0; i < set.count(); ++i) {
      out[i] = values[classes[i]];
    }
    return out;
  }

  PairSet<A> set;
  Buffer<int32_t> classes;
  Buffer<A> norms;

 private:
  static constexpr bool kBf16 = std::is_same_v<T, torch::headeronly::BFloat16>;

  static Format format(bool reduced) {
    return kBf16 ? half_format() : std::is_same_v<T, float> ? float_format(reduced) : Format::kWide;
  }

  // Calls store(row, channel, number) for the labelled pixels of a patch, walking memory as it lies.
  template <typename Store>
  void read(const Features<const T>& z, const Patches::Patch& patch, int64_t first, const Store& store) {
    const T* source = z.at(patch.image, patch.row, patch.column);
    int64_t to[kPatch];
    for (int64_t p = 0, next = first; p < patch.count; ++p) {
      to[p] = patch.classes[p] == kSkip ? kSkip : next;
      if (to[p] != kSkip) {
        classes[next++] = patch.classes[p];
      }
    }
    if (z.channels_inner()) {
      for (int64_t p = 0; p < patch.count; ++p) {
        for (int64_t c = 0; to[p] != kSkip && c < set.depth(); ++c) {
          store(to[p], c, source[p * z.column + c * z.channel]);
        }
      }
      return;
    }
    for (int64_t c = 0; c < set.depth(); ++c) {
      for (int64_t p = 0; p < patch.count; ++p) {
        if (to[p] != kSkip) {
          store(to[p], c, source[p * z.column + c * z.channel]);
        }
      }
    }
  }

  // Keeps the norm of row i, and gives it, or what stands for that of a zero row. In double: the square of a float32
  // row overflows from 1e19 on.
  template <typename Number>
  double norm_of(int64_t i, const Number& number) {
    double square = 0;
    for (int64_t c = 0; c < set.depth(); ++c) {
      const double value = static_cast<double>(number(c));
      square += value * value;
    }
    norms[i] = static_cast<A>(std::sqrt(square));
    return std::max(std::sqrt(square), kZeroNorm);
  }
};

}  // namespace

std::tuple<Tensor, Tensor> intra_exact(Tensor features, Tensor labels, Tensor weights, Tensor anchors,
                                       int64_t ignore_index, double temperature, bool normalize, bool reduced) {
  check(features, labels, weights, anchors, temperature);
  Tensor total = torch::stable::new_zeros(weights, {1});
  Tensor log_d = torch::stable::new_zeros(weights, {labels.numel()});
  const Patches patches(labels, weights.size(0), ignore_index);
  dispatch_features("intra_exact", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    LabelledRows<T> rows(features, patches, temperature, normalize, reduced);
    Buffer<A> packed(rows.set.count());
    PairSums<A>(rows.set, nullptr, rows.by_class(numbers<A>(weights)).data()).log_d(packed.data());
    const std::vector<A> a = numbers<A>(anchors);
    double sum = 0;
    for (int64_t i = 0; i < rows.set.count(); ++i) {
      const A of_row = a[rows.classes[i]];
      sum += of_row > 0 ? static_cast<double>(of_row) * static_cast<double>(packed[i]) : 0.0;
    }
    *static_cast<A*>(total.mutable_data_ptr()) = static_cast<A>(sum);
    A* out = static_cast<A*>(log_d.mutable_data_ptr());
    patches.for_each([&](const Patches::Patch& patch, int64_t first) {
      for (int64_t p = 0; p < patch.count; ++p) {
        if (patch.classes[p] != kSkip) {
          out[patch.pixel + p] = packed[first++];
        }
      }
    });
  });
  return {torch::stable::select(total, 0, 0), log_d};
}

Tensor intra_exact_backward(Tensor features, Tensor labels, Tensor log_d, Tensor weights, Tensor anchors,
                            Tensor positive, Tensor own, int64_t ignore_index, double temperature, bool normalize,
                            bool reduced) {
  check(features, labels, weights, anchors, temperature);
  const int64_t d = features.size(1);
  const ScalarType type = weights.scalar_type();
  require(log_d.dim() == 1 && log_d.size(0) == labels.numel() && log_d.scalar_type() == type && log_d.is_contiguous(),
          "intra_exact_backward: log_d must be (", labels.numel(), ",) and contiguous");
  require(positive.dim() == 2 && positive.size(0) == weights.size(0) && positive.size(1) == d &&
              positive.scalar_type() == type && own.dim() == 1 && own.size(0) == weights.size(0) &&
              own.scalar_type() == type,
          "intra_exact_backward: positive must be (K, d) and own (K,)");
  Tensor gradient = torch::stable::empty_like(features);
  const Patches patches(labels, weights.size(0), ignore_index);
  dispatch_features("intra_exact", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    LabelledRows<T> rows(features, patches, temperature, normalize, reduced);
    Buffer<A> packed(rows.set.count());
    const A* all_log_d = static_cast<const A*>(log_d.const_data_ptr());
    patches.for_each([&](const Patches::Patch& patch, int64_t first) {
      for (int64_t p = 0; p < patch.count; ++p) {
        if (patch.classes[p] != kSkip) {
          packed[first++] = all_log_d[patch.pixel + p];
        }
      }
    });
    PairSums<A> sums(rows.set, nullptr, rows.by_class(numbers<A>(weights)).data());
    sums.differentiate(rows.by_class(numbers<A>(anchors)).data(), packed.data());
    const std::vector<A> of_class = numbers<A>(positive), of_own = numbers<A>(own);
    const A from_tiles = static_cast<A>(PairSums<A>::gradient_scale(temperature));
    const A to_unit = static_cast<A>(1 / PairSet<A>::scale(temperature));
    const Features<T> out = mutable_view<T>(gradient);
    patches.for_each([&](const Patches::Patch& patch, int64_t first) {
      std::vector<A> patch_gradient(kPatch * d), row(d);
      for (int64_t p = 0, i = first; p < patch.count; ++p) {
        if (patch.classes[p] == kSkip) {
          continue;
        }
        // du = sum_j g_ij u_j / tau - positive + own u; then through u = z / |z|
        A* to = patch_gradient.data() + p * d;
        rows.set.read(i, row.data());
        const A* u = row.data();  // times the scale
        const A* from = sums.gradient(i);
        const A* centre = of_class.data() + patch.classes[p] * d;
        const A pull = of_own[patch.classes[p]] * to_unit;
        A projection = 0;
#pragma omp simd reduction(+ : projection)
        for (int64_t c = 0; c < d; ++c) {
          to[c] = from_tiles * from[c] - centre[c] + pull * u[c];
          projection += to[c] * u[c];
        }
        if (normalize) {
          const bool zero = rows.norms[i] <= static_cast<A>(kZeroNorm);
          const A inverse = zero ? A(0) : 1 / rows.norms[i];
          projection *= to_unit * to_unit;
          for (int64_t c = 0; c < d; ++c) {
            to[c] = inverse * (to[c] - projection * u[c]);
          }
        }
        ++i;
      }
      T* target = out.at(patch.image, patch.row, patch.column);
      const auto write = [&](int64_t p, int64_t c) {
        target[p * out.column + c * out.channel] = static_cast<T>(patch_gradient[p * d + c]);
      };
      if (out.channels_inner()) {
        for (int64_t p = 0; p < patch.count; ++p) {
          for (int64_t c = 0; c < d; ++c) {
            write(p, c);
          }
        }
      } else {
        for (int64_t c = 0; c < d; ++c) {
          for (int64_t p = 0; p < patch.count; ++p) {
            write(p, c);
          }
        }
      }
    });
  });
  return gradient;
}

}  // namespace in2nect::cpu
