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

// Returns 1 if a number changes; then not all are copied.
template <typename T, typename Source, typename Element>
int32_t store(const WeightCopy* matrices, int count, bool is_packed, int num_threads) {
  std::atomic<bool> is_exact{true};
  const int32_t status = status_of([&] {
    in_threads(num_threads, [&](int rank) {
      int panel = 0;
      for (const WeightCopy* m = matrices; m != matrices + count; m++)
        for (int first = 0; first < m->outputs; first += panel_columns<T>)
          if (panel++ % num_threads == rank && is_exact &&
              !store_panel<T>((const Source*)m->values, m->outputs, m->inputs, first, is_packed, (Element*)m->stored))
            is_exact = false;
    });
  });
  return status ? status : !is_exact;
}

}  // namespace jacobiflow

using namespace jacobiflow;

#pragma GCC visibility push(default)  // the functions that Python calls
extern "C" {

int32_t jacobiflow_lanes() { return float_lanes; }

void jacobiflow_use_openmp(const OpenMP* functions) { openmp = *functions; }

// Copies matrices to panels, or row after row, in their own format or from float32 to 16 bits. Returns 0, 1 if a number would
// change, or -1 without enough memory or threads.
int32_t jacobiflow_store(const WeightCopy* matrices, int32_t count, int32_t from, int32_t to, int32_t is_packed, int32_t threads) {
  const bool is_converted = from != to;
  switch ((WeightFormat)to) {
    case WeightFormat::float64: return store<double, double, double>(matrices, count, is_packed, threads);
    case WeightFormat::float32: return store<float, float, float>(matrices, count, is_packed, threads);
    case WeightFormat::bfloat16:
      return is_converted ? store<float, float, BFloat16>(matrices, count, is_packed, threads)
                          : store<float, BFloat16, BFloat16>(matrices, count, is_packed, threads);
    default:
      return is_converted ? store<float, float, Float16>(matrices, count, is_packed, threads)
                          : store<float, Float16, Float16>(matrices, count, is_packed, threads);
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
