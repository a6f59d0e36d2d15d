// Stands before torch's header of this name: its parallel_for on std::thread, which ThreadSanitizer understands, where
// the hand-over of work inside libgomp is no synchronisation to it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t threads = 1;

inline uint32_t get_num_threads() {
  return threads;
}

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t part = std::max((end - begin + threads - 1) / int64_t{threads}, grain);
  std::vector<std::thread> pool;
  for (int64_t first = begin; first < end; first += part) {
    pool.emplace_back([&body, first, last = std::min(first + part, end)] { body(first, last); });
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
}

}  // namespace torch::stable
