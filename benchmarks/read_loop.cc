// How fast threads read memory: adds up arrays of 64-bit numbers, one array after the other, and prints bytes per second.
//
//     read_loop BYTES ARRAYS THREADS

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main(int, char** arguments) {
  const int64_t words = std::atoll(arguments[1]) / 8, arrays = std::atoll(arguments[2]), threads = std::atoll(arguments[3]);
  std::vector<std::vector<uint64_t>> data(arrays, std::vector<uint64_t>(words, 1));
  std::vector<uint64_t> sums(threads * 8);
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> running;
    for (int64_t t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        uint64_t sum = 0;
        for (const auto& array : data) {
          for (int64_t i = words * t / threads; i < words * (t + 1) / threads; ++i) sum += array[i];
        }
        sums[8 * t] = sum;
      });
    }
    for (auto& thread : running) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double rate = 8.0 * static_cast<double>(words * arrays) / seconds.count();
    best = rate > best ? rate : best;
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all += sum;
  std::printf("%.0f\n", all == static_cast<uint64_t>(words * arrays) ? best : 0.0);
}
