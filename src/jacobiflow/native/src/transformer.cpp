// Calls from Python: the inverse of a block with a transformer, and the packing of weights.
#include "transformer.h"

#include <exception>

namespace jacobiflow {

extern template void solve_transformer<float>(const TransformerArgs<float>&);
extern template void solve_transformer<double>(const TransformerArgs<double>&);

// Returns 0 after run(), or -1 without enough memory or threads.
template <typename Run>
int32_t status_of(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

template <typename T, typename Element>
int32_t pack_panels(const void* weight, int outputs, int inputs, void* packed, int max_threads) {
  const int panels = (outputs + panel_columns<T> - 1) / panel_columns<T>, num_threads = std::min(max_threads, panels);
  return status_of([&] {
    in_threads(num_threads, [&](int rank) {
      for (int i = rank; i < panels; i += num_threads)
        pack<T>((const Element*)weight, outputs, inputs, i * panel_columns<T>, (Element*)packed);
    });
  });
}

}  // namespace jacobiflow

using namespace jacobiflow;

#pragma GCC visibility push(default)  // the functions that Python calls
extern "C" {

int32_t jacobiflow_lanes() { return float_lanes; }

void jacobiflow_use_openmp(const OpenMP* functions) { openmp = *functions; }

// Packs a weight (outputs, inputs). Returns 0, or -1 without enough memory or threads.
int32_t jacobiflow_pack(const void* weight, int32_t outputs, int32_t inputs, int32_t format, void* packed,
                        int32_t max_threads) {
  switch ((WeightFormat)format) {
    case WeightFormat::float64: return pack_panels<double, double>(weight, outputs, inputs, packed, max_threads);
    case WeightFormat::float32: return pack_panels<float, float>(weight, outputs, inputs, packed, max_threads);
    default: return pack_panels<float, uint16_t>(weight, outputs, inputs, packed, max_threads);
  }
}

// Returns 0, or -1 without enough memory or threads: then x is unchanged.
int32_t jacobiflow_solve_transformer(const void* args, int32_t is_double) {
  return status_of([&] {
    if (is_double)
      solve_transformer(*(const TransformerArgs<double>*)args);
    else
      solve_transformer(*(const TransformerArgs<float>*)args);
  });
}
}
#pragma GCC visibility pop
