// Threads that share work, and wait for each other between its steps.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace jacobiflow {

// All `size` threads of a team arrive, then all go on. They spin, since steps take microseconds. If the last one has no
// core, because of other programs, they yield and then sleep: threads that only yield can keep it waiting for seconds.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    if (size_ == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; spins < 4096; spins++)
      if (phase_.load(std::memory_order_acquire) != phase) return;
    const auto since = std::chrono::steady_clock::now();
    while (phase_.load(std::memory_order_acquire) == phase) {
      if (std::chrono::steady_clock::now() - since < std::chrono::microseconds(100))
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

 private:
  const int size_;
  std::atomic<int> arrived_{0}, phase_{0};
};

struct Range {
  int first, last;
};

// The part of `total` for member `rank` of `size`, in multiples of `unit`.
inline Range share(int total, int rank, int size, int unit = 1) {
  const long units = (total + unit - 1) / unit;
  const int first = (int)(units * rank / size) * unit, last = (int)(units * (rank + 1) / size) * unit;
  return {first < total ? first : total, last < total ? last : total};
}

// Calls run(rank) for each rank below `size`, each in its own thread, once all threads have started: they may wait for
// each other. If one cannot start, none runs, and std::system_error is thrown.
template <typename Run>
void in_new_threads(int size, const Run& run) {
  enum { waiting, running, cancelled };
  std::atomic<int> state{waiting};
  std::vector<std::thread> others;
  const auto finish = [&](int decision) {
    state.store(decision, std::memory_order_release);
    if (decision == running) run(0);
    for (std::thread& other : others) other.join();
  };
  try {
    others.reserve(size - 1);
    for (int rank = 1; rank < size; rank++)
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

// Functions of the OpenMP library that PyTorch has loaded, null if there is none. This library is not linked with OpenMP:
// PyTorch's wheels bring their own, and a second one would be a second pool of threads for the same cores.
struct OpenMP {
  void (*parallel)(void (*member)(void*), void* data, unsigned threads, unsigned flags);
  int (*threads)();
  int (*rank)();
};
inline OpenMP openmp;
const pid_t loaded_in = getpid();

// As `in_new_threads`, in the OpenMP threads of PyTorch: these may still spin after its latest operation, and would take
// the cores of new ones for some milliseconds. Returns false if nothing ran: after a fork, which leaves a pool without
// threads, or inside another parallel region, which has one thread.
template <typename Run>
bool in_pool(int size, const Run& run) {
  if (!openmp.parallel || getpid() != loaded_in) return false;
  struct Team {
    const int size;
    const Run& run;
    bool ran;
  } team{size, run, false};
  const auto member = [](void* data) {
    Team& team = *static_cast<Team*>(data);
    if (openmp.threads() != team.size) return;
    const int rank = openmp.rank();
    if (rank == 0) team.ran = true;
    team.run(rank);
  };
  openmp.parallel(member, &team, size, 0);
  return team.ran;
}

template <typename Run>
void in_threads(int size, const Run& run) {
  if (size == 1)
    run(0);
  else if (!in_pool(size, run))
    in_new_threads(size, run);
}

}  // namespace jacobiflow
