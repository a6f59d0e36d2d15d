// Labels as classes, read and checked by the loops of vector/class_sums.h, and counted.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "views.h"

namespace in2nect::cpu {

// Lanes of the widest vector: room that loops over whole blocks need behind their last pixel.
constexpr int64_t kMostLanes = 16;

// The classes of neighbouring pixels, kSkip for one that belongs to none.
class Codes {
 public:
  Codes(const Labels& labels, int64_t classes, int64_t ignore, int64_t pixels)
      : labels_(labels), classes_(classes), ignore_(ignore), codes_(pixels + 2 * kMostLanes) {}

  // Of `count` pixels from (b, y, x) on; returns how many are strays.
  int64_t read(int64_t b, int64_t y, int64_t x, int64_t count) {
    const void* from = labels_.at(b, y, x);
    switch (labels_.type()) {
      case ScalarType::Byte:
        return read(static_cast<const uint8_t*>(from), loops().labels.bytes, count);
      case ScalarType::Int:
        return read(static_cast<const int32_t*>(from), loops().labels.ints, count);
      default:
        return read(static_cast<const int64_t*>(from), loops().labels.longs, count);
    }
  }
  int32_t* data() {
    return codes_.data();
  }
  int32_t operator[](int64_t i) const {
    return codes_[i];
  }

 private:
  template <typename L, typename Loop>
  int64_t read(const L* from, const Loop& loop, int64_t count) {
    if (labels_.column() == 1) {
      return loop(from, count, classes_, ignore_, codes_.data());
    }
    gathered_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      gathered_[i] = static_cast<int64_t>(from[i * labels_.column()]);
    }
    return loops().labels.longs(gathered_.data(), count, classes_, ignore_, codes_.data());
  }

  const Labels& labels_;
  int64_t classes_, ignore_;
  std::vector<int32_t> codes_;
  std::vector<int64_t> gathered_;
};

// Counts the codes of a tile, and which classes they are.
class Counter {
 public:
  explicit Counter(int64_t classes) : classes_(classes), counts_(kTables * (classes + 1)) {}

  void add(const int32_t* codes, int64_t count, int64_t* totals) {
    present_.clear();
    loops().labels.count(codes, count, counts_.data() + 1, classes_ + 1);
    for (int64_t k = 0; k < classes_; ++k) {
      int64_t found = 0;
      for (int64_t table = 0; table < kTables; ++table) {
        int32_t& own = counts_[table * (classes_ + 1) + 1 + k];
        found += own;
        own = 0;
      }
      if (found > 0) {
        totals[k] += found;
        present_.push_back(static_cast<int32_t>(k));
      }
    }
  }
  const std::vector<int32_t>& present() const {
    return present_;
  }

 private:
  static constexpr int64_t kTables = 4;
  int64_t classes_;
  std::vector<int32_t> counts_, present_;
};

}  // namespace in2nect::cpu
