// Runs a loop over integers in threads.
#pragma once

#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace stagemix {

// Cuts 0 .. count - 1 into `threads` consecutive ranges and calls work(part, begin, end) for each at once.
// The first exception of a part is thrown here, after all have ended.
template <class Work>
void in_parallel(std::uint64_t count, unsigned threads, Work work) {
  std::vector<std::exception_ptr> failures(threads);
  const auto run = [&](unsigned part) {
    const std::uint64_t share = count / threads, rest = count % threads;
    const std::uint64_t begin = part * share + (part < rest ? part : rest);
    try {
      work(part, begin, begin + share + (part < rest ? 1 : 0));
    } catch (...) {
      failures[part] = std::current_exception();
    }
  };
  std::vector<std::thread> running;
  running.reserve(threads);
  for (unsigned part = 1; part < threads; ++part) {
    try {
      running.emplace_back(run, part);
    } catch (const std::system_error&) {
      run(part);  // the machine grants no more threads: this one does that part too
    }
  }
  run(0);
  for (std::thread& thread : running) thread.join();
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
}

}  // namespace stagemix
