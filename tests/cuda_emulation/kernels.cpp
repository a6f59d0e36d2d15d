// The kernels of csrc/cuda/*_kernels.h, emulated on the CPU, as C functions over pointers, which
// tests/ops/test_cuda_emulated.py builds and calls.
#include <cstdlib>
#include <deque>

#include "../../csrc/cuda/pair_logsumexp_kernels.h"
#include "../../csrc/cuda/sample_pixels_kernels.h"

namespace {

using namespace in2nect;
using namespace in2nect::cuda;

// Scratch memory, which begins as NaN.
class Scratch {
 public:
  void* operator()(int64_t bytes) const {
    auto& block = blocks_.emplace_back(static_cast<size_t>(bytes + 15) / 16 * 2 + 2, ~uint64_t{0});
    const auto address = (reinterpret_cast<uintptr_t>(block.data()) + 15) / 16 * 16;
    return reinterpret_cast<void*>(address);
  }

 private:
  mutable std::deque<std::vector<uint64_t>> blocks_;
};

template <typename Function>
void dispatch(int type, const Function& function) {
  switch (type) {
    case 0:
      return function(float{});
    case 1:
      return function(double{});
    case 2:
      return function(BFloat16{});
    default:
      return function(Half{});
  }
}

struct Arguments {
  const void *anchors, *keys;
  int64_t anchor_count, key_count, dim, anchor_strides[2], key_strides[2];
  const void *weights, *grad;
  void* log_d;
  double temperature;
  void *grad_anchors, *grad_keys;
};

// Gradients have the strides of their rows.
template <typename T>
Gradient<T> gradient(void* data, const Arguments& call, const int64_t (&strides)[2]) {
  return {static_cast<T*>(data), call.dim, strides[0], strides[1]};
}

}  // namespace

extern "C" void emulated_pair_logsumexp(int type, const Arguments* call, int backward) {
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Scratch scratch;
    const Matrix<T> anchors{static_cast<const T*>(call->anchors), call->anchor_count, call->dim,
                            call->anchor_strides[0], call->anchor_strides[1]};
    const Matrix<T> others{static_cast<const T*>(call->keys), call->key_count, call->dim, call->key_strides[0],
                           call->key_strides[1]};
    const Matrix<T>* keys = call->keys == nullptr ? nullptr : &others;
    const Vector<A> weights{static_cast<const A*>(call->weights), call->key_count, 1};
    if (backward == 0) {
      pair_logsumexp<T>(anchors, keys, weights, call->temperature, static_cast<A*>(call->log_d), scratch, nullptr);
    } else {
      const Vector<A> grad{static_cast<const A*>(call->grad), call->anchor_count, 1};
      pair_logsumexp_backward<T>(grad, static_cast<const A*>(call->log_d), anchors, keys, weights, call->temperature,
                                 gradient<T>(call->grad_anchors, *call, call->anchor_strides),
                                 gradient<T>(call->grad_keys, *call, call->key_strides), scratch, nullptr);
    }
  });
}

// A slack below zero is the operator's own; a small one has classes drawn again.
extern "C" void emulated_sample_pixels(const int64_t* labels, int64_t pixels, int64_t classes, int64_t per_class,
                                       const int64_t* seed, int64_t ignore_index, double slack, int64_t* sample) {
  slack = slack < 0 ? sample_slack(per_class) : slack;
  const int64_t bytes = sample_scratch(classes, sample_capacity(per_class, slack));
  std::vector<uint64_t> scratch(static_cast<size_t>(bytes) / sizeof(uint64_t), ~uint64_t{0});
  std::fill_n(scratch.begin(), 2 * classes, 0);
  sample_pixels(PixelLabels<int64_t>{labels, pixels, classes, ignore_index}, per_class, seed, slack, scratch.data(),
                sample, nullptr);
}
