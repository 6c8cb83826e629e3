// Calls from Python: chains of masked transforms. Code for float and for double has files of its own, to compile at once.
#include "masked.h"

namespace jacobiflow {

extern template int64_t evaluate<float>(const ChainArgs&);
extern template int64_t evaluate<double>(const ChainArgs&);
extern template void differentiate<float>(const GradientArgs&);
extern template void differentiate<double>(const GradientArgs&);

}  // namespace jacobiflow

using namespace jacobiflow;

#pragma GCC visibility push(default)  // the functions that Python calls
extern "C" {

// Returns the number of rows that are not finite, or -1 without enough memory or threads.
int64_t jacobiflow_masked(const ChainArgs* call, int32_t is_double) {
  return result_of([&] { return is_double ? evaluate<double>(*call) : evaluate<float>(*call); });
}

// Returns 0, or -1 without enough memory or threads.
int64_t jacobiflow_masked_gradients(const GradientArgs* args, int32_t is_double) {
  return result_of([&]() -> int64_t {
    is_double ? differentiate<double>(*args) : differentiate<float>(*args);
    return 0;
  });
}

// Sets the size of a chain's packed weights, and of the activations for each row; rows are padded to whole tiles. Returns 0, or
// -1 without enough memory.
int64_t jacobiflow_masked_sizes(const ChainArgs* call, int64_t* sizes) {
  return result_of([&]() -> int64_t {
    const Chain<float> chain(*call);
    sizes[0] = (int64_t)chain.packed_size;
    sizes[1] = (int64_t)chain.tile_units;
    return 0;
  });
}
}
#pragma GCC visibility pop
