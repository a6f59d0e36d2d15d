// Calls the kernels of sample_pixels_kernels.h, which says what they do and cost, on tensors and the current stream.
// What is launched depends on sizes alone, and nothing waits for the device, so that a CUDA graph can hold it.
#include "sample_pixels.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../common/tensors.h"
#include "sample_pixels_kernels.h"
#include "stream.h"

namespace in2nect::cuda {
namespace {

template <typename Function>
void dispatch_labels(ScalarType type, const Function& function) {
  require_labels("sample_pixels", type);
  if (type == ScalarType::Byte) {
    function(uint8_t{});
  } else if (type == ScalarType::Int) {
    function(int32_t{});
  } else {
    function(int64_t{});
  }
}

}  // namespace

Tensor sample_pixels(Tensor labels, int64_t num_classes, int64_t per_class, Tensor seed, int64_t ignore_index) {
  require(num_classes >= 1 && num_classes <= INT32_MAX, "sample_pixels: num_classes must be at least 1, got ",
          num_classes);
  require(per_class >= 1, "sample_pixels: per_class must be at least 1, got ", per_class);
  require(seed.dim() == 1 && seed.size(0) == 2 && seed.scalar_type() == ScalarType::Long,
          "sample_pixels: seed must be (2,) int64, seed and step; got ", seed.dim(), " dimensions of ",
          torch::headeronly::toString(seed.scalar_type()));
  require(seed.get_device_index() == labels.get_device_index(), "sample_pixels: labels are on cuda:",
          labels.get_device_index(), " and the seed on cuda:", seed.get_device_index(), "; move them to one device");
  const torch::stable::accelerator::DeviceGuard guard(labels.get_device_index());
  const double slack = sample_slack(per_class);
  const Tensor flat = torch::stable::contiguous(labels), pair = torch::stable::contiguous(seed);
  Tensor sample = torch::stable::new_empty(labels, {num_classes, per_class}, ScalarType::Long);
  Tensor scratch = torch::stable::new_empty(
      labels, {sample_scratch(num_classes, sample_capacity(per_class, slack))}, ScalarType::Byte);
  const Stream stream = current_stream(labels);
  STD_CUDA_CHECK(cudaMemsetAsync(scratch.mutable_data_ptr(), 0,
                                 static_cast<size_t>(2 * num_classes) * sizeof(uint64_t), stream));
  dispatch_labels(labels.scalar_type(), [&](auto element) {
    using Label = decltype(element);
    sample_pixels(
        PixelLabels<Label>{static_cast<const Label*>(flat.const_data_ptr()), flat.numel(), num_classes, ignore_index},
        per_class, static_cast<const int64_t*>(pair.const_data_ptr()), slack, scratch.mutable_data_ptr(),
        static_cast<int64_t*>(sample.mutable_data_ptr()), stream);
  });
  return sample;
}

}  // namespace in2nect::cuda
