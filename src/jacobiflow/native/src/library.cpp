// The functions that Python calls. The templates are compiled in files of their own, at once.
#include "masked.h"
#include "transformer.h"

namespace jacobiflow {

extern template int64_t evaluate<float>(const ChainArgs&);
extern template int64_t evaluate<double>(const ChainArgs&);
extern template void differentiate<float>(const GradientArgs&);
extern template void differentiate<double>(const GradientArgs&);
extern template void solve_transformer<float>(const TransformerArgs<float>&);
extern template void solve_transformer<double>(const TransformerArgs<double>&);

// Returns 1 if a number changes; then not all are copied.
template <typename T, typename Source, typename Element>
int64_t store(const WeightCopy* weights, int count, int num_threads) {
  std::atomic<bool> is_exact{true};
  return result_of([&]() -> int64_t {
    in_threads(num_threads, [&](int rank) {
      int panel = 0;
      for (const WeightCopy* w = weights; w != weights + count; w++)
        for (int first = 0; first < w->outputs; first += panel_columns<T>)
          if (panel++ % num_threads == rank && is_exact &&
              !store_panel<T>((const Source*)w->source, w->outputs, w->inputs, first, w->copy.is_packed,
                              (Element*)w->copy.values))
            is_exact = false;
    });
    return !is_exact;
  });
}

}  // namespace jacobiflow

using namespace jacobiflow;

#pragma GCC visibility push(default)
extern "C" {

int32_t jacobiflow_lanes() { return float_lanes; }

void jacobiflow_use_openmp(const OpenMP* functions) { openmp = *functions; }

// Copies weights, all to one format: their own, or 16 bits from float32. Returns 0, 1 if a number would change, or -1 without
// enough memory or threads.
int64_t jacobiflow_store(const WeightCopy* weights, int32_t count, int32_t source_format, int32_t num_threads) {
  const WeightFormat from = (WeightFormat)source_format, to = weights->copy.format;
  switch (to) {
    case WeightFormat::float64: return store<double, double, double>(weights, count, num_threads);
    case WeightFormat::float32: return store<float, float, float>(weights, count, num_threads);
    case WeightFormat::bfloat16:
      return from == to ? store<float, BFloat16, BFloat16>(weights, count, num_threads)
                        : store<float, float, BFloat16>(weights, count, num_threads);
    default:
      return from == to ? store<float, Float16, Float16>(weights, count, num_threads)
                        : store<float, float, Float16>(weights, count, num_threads);
  }
}

// Returns 0, or -1 without enough memory or threads: then x is unchanged.
int64_t jacobiflow_solve_transformer(const void* args, int32_t is_double) {
  return result_of([&]() -> int64_t {
    if (is_double)
      solve_transformer(*(const TransformerArgs<double>*)args);
    else
      solve_transformer(*(const TransformerArgs<float>*)args);
    return 0;
  });
}

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
    sizes[1] = (int64_t)chain.activation_units;
    return 0;
  });
}
}
#pragma GCC visibility pop
