// log D_i = log sum_j w_j exp(anchors_i . keys_j / tau) and its gradient; of one set where there are no keys. Time
// O(N M d), memory O((N + M) d): rows in the accumulation type, and in the backward their gradient; see pair_set.h.
#include "pair_logsumexp.h"

#include <torch/csrc/stable/ops.h>

#include "../common/tensors.h"
#include "pair_set.h"

namespace in2nect::cpu {
namespace {

constexpr int64_t kGrainElements = 32768;  // below which another thread costs more than it saves

void check(const Tensor& anchors, const std::optional<Tensor>& keys, const Tensor& weights, double temperature) {
  const Tensor& columns = keys ? *keys : anchors;
  require(anchors.dim() == 2 && columns.dim() == 2 && anchors.size(1) == columns.size(1),
          "pair_logsumexp: anchors and keys must be (N, d) and (M, d)");
  require(columns.scalar_type() == anchors.scalar_type(), "pair_logsumexp: keys must have the anchors' dtype, got ",
          torch::headeronly::toString(columns.scalar_type()), " and ",
          torch::headeronly::toString(anchors.scalar_type()));
  const ScalarType type = accumulator_type(anchors.scalar_type());
  require(weights.dim() == 1 && weights.size(0) == columns.size(0) && weights.scalar_type() == type,
          "pair_logsumexp: weights must be (", columns.size(0), ",) ", torch::headeronly::toString(type));
  require(temperature > 0, "pair_logsumexp: temperature must be positive, got ", temperature);
}

// Calls body(first, last) on ranges of rows.
template <typename Body>
void for_rows(int64_t rows, int64_t depth, const Body& body) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(depth, 1)), body);
}

// The format that rows of T are multiplied in; anchors and keys have the same.
template <typename T>
Format format_of(bool reduced) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    return half_format();
  } else {
    return std::is_same_v<T, float> ? float_format(reduced) : Format::kWide;
  }
}

template <typename T>
PairSet<Accumulator<T>> pack(const Tensor& rows, double temperature, bool reduced) {
  using A = Accumulator<T>;
  PairSet<A> set(rows.size(0), rows.size(1), format_of<T>(reduced));
  const double scale = PairSet<A>::scale(temperature);
  const T* data = static_cast<const T*>(rows.const_data_ptr());
  const int64_t row_stride = rows.stride(0), column_stride = rows.stride(1);
  for_rows(set.count(), set.depth(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = data + i * row_stride;
      if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
        if (set.format() == Format::kHalves) {
          set.factor(i) = static_cast<A>(scale);
          for (int64_t c = 0; c < set.depth(); ++c) {
            set.half_row(i)[c] = from[c * column_stride].x;
          }
          continue;
        }
      }
      for (int64_t c = 0; c < set.depth(); ++c) {
        set.row(i)[c] = static_cast<A>(scale * static_cast<double>(from[c * column_stride]));
      }
    }
  });
  return set;
}

// A vector's numbers, copied where they do not lie side by side.
template <typename A>
Buffer<A> numbers(const Tensor& vector) {
  Buffer<A> out(vector.size(0));
  const A* data = static_cast<const A*>(vector.const_data_ptr());
  for (int64_t i = 0; i < vector.size(0); ++i) {
    out[i] = data[i * vector.stride(0)];
  }
  return out;
}

template <typename T, typename Row>
void unpack(int64_t depth, Accumulator<T> scale, const Row& row, Tensor& out) {
  T* data = static_cast<T*>(out.mutable_data_ptr());
  const int64_t row_stride = out.stride(0), column_stride = out.stride(1);
  for_rows(out.size(0), depth, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < depth; ++c) {
        data[i * row_stride + c * column_stride] = static_cast<T>(scale * row(i)[c]);
      }
    }
  });
}

}  // namespace

Tensor pair_logsumexp(Tensor anchors, std::optional<Tensor> keys, Tensor weights, double temperature,
                      bool reduced) {
  check(anchors, keys, weights, temperature);
  Tensor out = torch::stable::new_empty(weights, {anchors.size(0)});
  dispatch_features("pair_logsumexp", anchors.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PairSet<A> rows = pack<T>(anchors, temperature, reduced);
    std::optional<PairSet<A>> columns;
    if (keys) {
      columns.emplace(pack<T>(*keys, temperature, reduced));
    }
    PairSums<A> sums(rows, columns ? &*columns : nullptr, numbers<A>(weights).data());
    sums.log_d(static_cast<A*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_logsumexp_backward(Tensor grad, Tensor log_d, Tensor anchors,
                                                   std::optional<Tensor> keys, Tensor weights, double temperature,
                                                   bool reduced) {
  check(anchors, keys, weights, temperature);
  require(grad.dim() == 1 && grad.size(0) == anchors.size(0) && grad.scalar_type() == weights.scalar_type() &&
              log_d.dim() == 1 && log_d.size(0) == anchors.size(0) && log_d.scalar_type() == weights.scalar_type(),
          "pair_logsumexp_backward: grad and log_d must be (", anchors.size(0), ",) ",
          torch::headeronly::toString(weights.scalar_type()));
  Tensor grad_anchors = torch::stable::empty_like(anchors);
  Tensor grad_keys =
      keys ? torch::stable::empty_like(*keys) : torch::stable::new_empty(anchors, {0, anchors.size(1)});
  dispatch_features("pair_logsumexp", anchors.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    PairSet<A> rows = pack<T>(anchors, temperature, reduced);
    std::optional<PairSet<A>> columns;
    if (keys) {
      columns.emplace(pack<T>(*keys, temperature, reduced));
    }
    PairSums<A> sums(rows, columns ? &*columns : nullptr, numbers<A>(weights).data());
    sums.differentiate(numbers<A>(grad).data(), numbers<A>(log_d).data());
    const A scale = static_cast<A>(PairSums<A>::gradient_scale(temperature));
    unpack<T>(rows.depth(), scale, [&](int64_t i) { return sums.gradient(i); }, grad_anchors);
    if (keys) {
      unpack<T>(rows.depth(), scale, [&](int64_t j) { return sums.key_gradient(j); }, grad_keys);
    }
  });
  return {grad_anchors, grad_keys};
}

}  // namespace in2nect::cpu
