// Clocks for the loop of src/jacobiflow/native, whose sources are compiled with this file before them and are not changed:
// the time between two waits of a thread belongs to the step that it has just done, and waiting is timed too.
#include <atomic>
#include <chrono>

#include "simd.h"
#define Barrier Meeting
#include "team.h"
#undef Barrier

namespace jacobiflow {

using Time = std::chrono::steady_clock::time_point;
inline Time now() { return std::chrono::steady_clock::now(); }

// What a layer does between its waits, then the output of a token and the embedding of the next one.
enum Piece { qkv, attention, projection, up, down, ends, norms, waiting, pieces };
inline std::atomic<int64_t> nanoseconds[pieces];
inline int depth;

// Of one thread. Its first wait is behind the embedding of the first token.
struct Clocks {
  int64_t spent[pieces] = {};
  int waits = 0;
  Time last = now();

  void add(Piece piece, Time since, Time until) { spent[piece] += std::chrono::nanoseconds(until - since).count(); }

  Piece step() const {
    const int index = (waits + 5 * depth) % (5 * depth + 1);
    return index == 5 * depth ? ends : Piece(index % 5);
  }

  void give() {
    for (int i = 0; i < pieces; i++) nanoseconds[i] += spent[i];
    *this = Clocks{};
  }
};

struct ThreadsClocks : Clocks {
  ~ThreadsClocks() { give(); }
};
inline thread_local ThreadsClocks clocks;

class Barrier : public Meeting {
 public:
  using Meeting::Meeting;

  void wait() {
    const Time arrived = now();
    clocks.add(clocks.step(), clocks.last, arrived);
    Meeting::wait();
    clocks.last = now();
    clocks.add(waiting, arrived, clocks.last);
    clocks.waits++;
  }
};

// Until the end of the expression that it is made in. Its time is taken out of that of the step around it.
struct Norm {
  const Time since = now();

  ~Norm() {
    const Time until = now();
    clocks.add(norms, since, until);
    clocks.last += until - since;
  }
};

// In the threads of the pool, which the loop has too.
inline void in_all_threads(void (*run)(void*)) {
  if (openmp.parallel) openmp.parallel(run, nullptr, 0, 0);
}

}  // namespace jacobiflow

extern "C" inline __attribute__((used)) void profile_start(int32_t layers) {
  jacobiflow::depth = layers;
  jacobiflow::in_all_threads([](void*) { static_cast<jacobiflow::Clocks&>(jacobiflow::clocks) = jacobiflow::Clocks{}; });
  for (auto& total : jacobiflow::nanoseconds) total = 0;
}

// Nanoseconds by piece, over all threads.
extern "C" inline __attribute__((used)) void profile_take(int64_t* out) {
  jacobiflow::in_all_threads([](void*) { jacobiflow::clocks.give(); });
  for (int i = 0; i < jacobiflow::pieces; i++) out[i] = jacobiflow::nanoseconds[i];
}

#define layer_norm(...) (Norm(), layer_norm(__VA_ARGS__))
#ifdef WITHOUT_GELU
#define gelu(v) (v)
#endif
