// Calls the kernels of pair_logsumexp_kernels.h, which says what they compute and cost, on tensors and the current
// stream. Rows of which 16 bytes cannot be copied at a time (an odd width, a transposed view) are copied first.
#include "pair_logsumexp.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "../common/tensors.h"
#include "pair_logsumexp_kernels.h"
#include "stream.h"

namespace in2nect::cuda {
namespace {

// Device memory that is freed with this object, after which the allocator gives it to later work of the same stream
// alone.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  void* operator()(int64_t bytes) const {
    return tensors_.emplace_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)).mutable_data_ptr();
  }

 private:
  const Tensor& like_;
  mutable std::vector<Tensor> tensors_;
};

void check(const char* name, const Tensor& anchors, const std::optional<Tensor>& keys, const Tensor& weights,
           double temperature) {
  const Tensor& columns = keys ? *keys : anchors;
  require(anchors.dim() == 2 && columns.dim() == 2 && anchors.size(1) == columns.size(1), name,
          ": anchors and keys must be (N, d) and (M, d), got ", anchors.dim(), " and ", columns.dim(),
          " dimensions, the last ", anchors.size(anchors.dim() - 1), " and ", columns.size(columns.dim() - 1));
  require(anchors.size(1) <= INT32_MAX / 16, name, ": rows of ", anchors.size(1), " numbers are too wide");
  require(anchors.scalar_type() == columns.scalar_type(), name, ": anchors are ",
          torch::headeronly::toString(anchors.scalar_type()), " and keys ",
          torch::headeronly::toString(columns.scalar_type()), "; bring them to one dtype");
  const ScalarType type = accumulator_type(anchors.scalar_type());
  require(weights.dim() == 1 && weights.size(0) == columns.size(0) && weights.scalar_type() == type, name,
          ": weights must be (", columns.size(0), ",) ", torch::headeronly::toString(type));
  require(temperature > 0, name, ": temperature must be positive, got ", temperature);
  require(columns.get_device_index() == anchors.get_device_index() &&
              weights.get_device_index() == anchors.get_device_index(),
          name, ": anchors are on cuda:", anchors.get_device_index(), ", keys on cuda:", columns.get_device_index(),
          " and weights on cuda:", weights.get_device_index(), "; move them to one device");
}

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
Gradient<T> gradient(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.size(1), t.stride(0), t.stride(1)};
}

template <typename A>
Vector<A> vector(const Tensor& t) {
  return {static_cast<const A*>(t.const_data_ptr()), t.size(0), t.stride(0)};
}

}  // namespace

Tensor pair_logsumexp(Tensor anchors, std::optional<Tensor> keys, Tensor weights, double temperature) {
  check("pair_logsumexp", anchors, keys, weights, temperature);
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  Tensor log_d =
      torch::stable::new_empty(anchors, {anchors.size(0)}, accumulator_type(anchors.scalar_type()));
  const Scratch scratch(anchors);
  dispatch_features("pair_logsumexp", anchors.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Matrix<T> others = matrix<T>(keys ? *keys : anchors);
    pair_logsumexp<T>(matrix<T>(anchors), keys ? &others : nullptr, vector<A>(weights), temperature,
                      static_cast<A*>(log_d.mutable_data_ptr()), scratch, current_stream(anchors));
  });
  return log_d;
}

std::tuple<Tensor, Tensor> pair_logsumexp_backward(Tensor grad, Tensor log_d, Tensor anchors,
                                                   std::optional<Tensor> keys, Tensor weights, double temperature) {
  check("pair_logsumexp_backward", anchors, keys, weights, temperature);
  const ScalarType type = accumulator_type(anchors.scalar_type());
  for (const Tensor* per_anchor : {&grad, &log_d}) {
    require(per_anchor->dim() == 1 && per_anchor->size(0) == anchors.size(0) && per_anchor->scalar_type() == type,
            "pair_logsumexp_backward: grad and log_d must be (", anchors.size(0), ",) ",
            torch::headeronly::toString(type));
    require(per_anchor->get_device_index() == anchors.get_device_index(),
            "pair_logsumexp_backward: grad and log_d must be on cuda:", anchors.get_device_index(),
            ", the anchors' device");
  }
  const torch::stable::accelerator::DeviceGuard guard(anchors.get_device_index());
  Tensor grad_anchors = torch::stable::empty_like(anchors);
  Tensor grad_keys =
      keys ? torch::stable::empty_like(*keys) : torch::stable::new_empty(anchors, {0, anchors.size(1)});
  const Tensor exponents = torch::stable::contiguous(log_d);
  const Scratch scratch(anchors);
  dispatch_features("pair_logsumexp_backward", anchors.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Matrix<T> others = matrix<T>(keys ? *keys : anchors);
    pair_logsumexp_backward<T>(vector<A>(grad), static_cast<const A*>(exponents.const_data_ptr()), matrix<T>(anchors),
                               keys ? &others : nullptr, vector<A>(weights), temperature,
                               gradient<T>(grad_anchors), gradient<T>(grad_keys), scratch, current_stream(anchors));
  });
  return {grad_anchors, grad_keys};
}

}  // namespace in2nect::cuda
