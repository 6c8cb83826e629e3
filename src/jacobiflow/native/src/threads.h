// Threads that share work and wait for each other between its steps.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#include "lanes.h"

namespace jacobiflow {

// Returns the part of [0, total) for a thread, in multiples of `unit`.
inline Range partition(int total, int rank, int num_threads, int unit = 1) {
  const int64_t units = (total + unit - 1) / unit;
  const int first = (int)(units * rank / num_threads) * unit, last = (int)(units * (rank + 1) / num_threads) * unit;
  return {std::min(first, total), std::min(last, total)};
}

// Makes each thread wait until all have arrived. They spin, because steps take microseconds. If another program has the core of
// the last thread, the others yield and then sleep: threads that only yield can keep it waiting for seconds.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads(num_threads) {}

  void wait() {
    if (num_threads == 1) return;
    const int before = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == num_threads - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(before + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; spins < 4096; spins++)
      if (phase.load(std::memory_order_acquire) != before) return;
    const auto since = std::chrono::steady_clock::now();
    while (phase.load(std::memory_order_acquire) == before) {
      if (std::chrono::steady_clock::now() - since < std::chrono::microseconds(100))
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  const int num_threads;
  std::atomic<int> arrived{0}, phase{0};
};

// Calls run(rank) in a new thread for each rank, once all threads have started, so that they may wait for each other. If one
// cannot start, none runs, and std::system_error is thrown.
template <typename Run>
void in_new_threads(int num_threads, const Run& run) {
  enum { waiting, running, cancelled };
  std::atomic<int> state{waiting};
  std::vector<std::thread> others;
  const auto finish = [&](int decision) {
    state.store(decision, std::memory_order_release);
    if (decision == running) run(0);
    for (std::thread& other : others) other.join();
  };
  try {
    others.reserve(num_threads - 1);
    for (int rank = 1; rank < num_threads; rank++)
      others.emplace_back([&, rank] {
        while (state.load(std::memory_order_acquire) == waiting) std::this_thread::yield();
        if (state.load(std::memory_order_relaxed) == running) run(rank);
      });
  } catch (...) {
    finish(cancelled);
    throw;
  }
  finish(running);
}

// Functions of the OpenMP library that PyTorch has loaded; null without one. This library is not linked with OpenMP, because
// PyTorch's wheels bring their own, and a second one would have a second pool of threads for the same cores.
struct OpenMP {
  void (*parallel)(void (*member)(void*), void* data, unsigned threads, unsigned flags);
  int (*threads)();
  int (*rank)();
};
inline OpenMP openmp;
const pid_t loaded_in = getpid();

// Does the same in the OpenMP threads of PyTorch. These may still spin after its latest operation, and would take the cores
// of new threads for some milliseconds. Returns false if nothing ran: after a fork, which leaves a pool without threads, or
// inside another parallel region, which has one thread.
template <typename Run>
bool in_pool(int num_threads, const Run& run) {
  if (!openmp.parallel || getpid() != loaded_in) return false;
  struct Team {
    const int num_threads;
    const Run& run;
    bool ran;
  } team{num_threads, run, false};
  const auto member = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    if (openmp.threads() != team.num_threads) return;
    const int rank = openmp.rank();
    if (rank == 0) team.ran = true;
    team.run(rank);
  };
  openmp.parallel(member, &team, num_threads, 0);
  return team.ran;
}

// Returns run(), or -1 without enough memory or threads.
template <typename Run>
int64_t result_of(const Run& run) {
  try {
    return run();
  } catch (const std::exception&) {
    return -1;
  }
}

// Calls run(rank) for each rank below `num_threads`, in threads that may wait for each other.
template <typename Run>
void in_threads(int num_threads, const Run& run) {
  if (num_threads == 1)
    run(0);
  else if (!in_pool(num_threads, run))
    in_new_threads(num_threads, run);
}

}  // namespace jacobiflow
