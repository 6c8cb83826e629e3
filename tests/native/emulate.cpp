// The kernel as plain C++. Each thread of a block is a fiber, which runs up to the next __syncthreads() and waits for the others.
#include <ucontext.h>

#include <cstdlib>
#include <functional>
#include <vector>

struct Dimension {
  unsigned x;
};
static Dimension blockIdx, threadIdx, blockDim, gridDim;
static ucontext_t block, threads[256];
static std::function<void()> kernel;
static unsigned finished;
static void enter() {
  kernel();
  finished++;
}
static void __syncthreads() { swapcontext(&threads[threadIdx.x], &block); }

#define __global__
#define __launch_bounds__(...)
#include "chain.cu"

// Another order of threads shows where a barrier is missing.
extern "C" void emulate(bool is_descending, unsigned blocks, unsigned size, const Plan<float>* image, const float* packed,
                        const float* input, int64_t in_stride, const float* context, int64_t context_stride, float* out,
                        float* log_det, uint8_t* failed, int64_t rows, float* memory) {
  gridDim.x = blocks, blockDim.x = size;
  kernel = [&] {
    jacobiflow_chain(image, packed, input, in_stride, context, context_stride, out, log_det, failed, rows, memory);
  };
  const size_t stack = 1 << 17;
  std::vector<char> stacks(stack * size);
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    for (unsigned i = 0; i < size; i++) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = &stacks[stack * i], threads[i].uc_stack.ss_size = stack, threads[i].uc_link = &block;
      makecontext(&threads[i], enter, 0);
    }
    for (finished = 0; finished < size;) {
      if (finished) std::abort();  // some threads have ended, and others wait for them
      for (unsigned i = 0; i < size; i++) {
        threadIdx.x = is_descending ? size - 1 - i : i;
        swapcontext(&block, &threads[threadIdx.x]);
      }
    }
  }
}
