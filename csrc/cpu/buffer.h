// Memory of an operator's own: aligned to a cache line, not initialised, freed with its owner.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace in2nect::cpu {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size) {
    constexpr size_t kLine = 64;
    const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + kLine - 1) / kLine * kLine;
    data_.reset(static_cast<T*>(std::aligned_alloc(kLine, std::max(bytes, kLine))));
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  Buffer(int64_t size, T value) : Buffer(size) {
    std::fill_n(data_.get(), size, value);
  }

  T* data() const {
    return data_.get();
  }
  int64_t size() const {
    return size_;
  }
  T& operator[](int64_t i) const {
    return data_.get()[i];
  }

 private:
  struct Free {
    void operator()(T* data) const {
      std::free(data);
    }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace in2nect::cpu
