// Chains of transforms, masked autoregressive ones and couplings among them, in both directions, exact to rounding, and their
// gradients. A tile of rows goes through all transforms without leaving the cache, and a row is a vector lane. Units of a layer
// are sorted by the first step that can compute them, so that each is computed once.
#pragma once

#include "backward.h"
#include "forward.h"

namespace jacobiflow {

// Divides rows into tiles of 4 vectors. The last tile has 1 vector if that is enough.
template <typename T>
struct Tiles {
  static constexpr int rows = 4 * Simd<T>::lanes;
  const int64_t all_rows, count;
  const int max_rows;  // of a tile
  const int num_threads;

  // `work` is the number of multiplications for each row. A thread has at least a million of them.
  Tiles(const ChainArgs& call, int64_t work)
      : all_rows(call.rows), count((call.rows + rows - 1) / rows),
        max_rows(call.rows > rows / 4 ? rows : rows / 4),
        num_threads((int)std::max<int64_t>(
            1, std::min({(int64_t)call.num_threads, count, 1 + work * call.rows / 1000000}))) {}

  // Calls use(first row of the tile, its number of rows, its vectors as a constant).
  template <typename Use>
  void visit(int64_t tile, const Use& use) const {
    const int64_t first = tile * rows;
    const int count = (int)std::min<int64_t>(rows, all_rows - first);
    if (count > rows / 4)
      use(first, count, std::integral_constant<int, 4>());
    else
      use(first, count, std::integral_constant<int, 1>());
  }
};

// Computes all rows, and returns the number of rows that are not finite.
template <typename T>
int64_t evaluate(const ChainArgs& call) {
  if (!call.rows && !call.packed) return 0;
  Chain<T> chain(call);
  chain.pack();
  if (!chain.is_finite) {
    std::memset(call.failed, 1, call.rows);
    const int64_t numbers = call.is_by_feature ? call.features : 1;
    std::fill_n(static_cast<T*>(call.out), call.rows * call.features, Simd<T>::nan);
    if (call.log_det) std::fill_n(static_cast<T*>(call.log_det), call.rows * numbers, Simd<T>::nan);
    return call.rows;
  }
  const Tiles<T> tiles(call, chain.work);
  std::atomic<int64_t> next{0};
  const size_t size = chain.tile_units * tiles.max_rows;
  const Buffer<T> memory(size * tiles.num_threads);
  in_threads(tiles.num_threads, [&](int rank) {
    for (int64_t tile; (tile = next++) < tiles.count;)
      tiles.visit(tile, [&](int64_t first, int count, auto vectors) {
        T* activations = static_cast<T*>(call.activations);
        if (activations) activations += first * chain.activation_units;
        ForwardTile<T, vectors>(chain, memory.get() + rank * size).run(first, count, activations);
      });
  });
  return std::count(call.failed, call.failed + call.rows, 1);
}

// Computes gradients from the packed weights of `evaluate`, and from its activations or, if it has stored none, new ones.
template <typename T>
void differentiate(const GradientArgs& args) {
  const ChainArgs& call = *args.chain;
  Chain<T> chain(call);
  const Tiles<T> tiles(call, 3 * chain.work);
  TensorGradients<T> tensors(chain, args, tiles.num_threads);
  // A tile computes its values again, then its gradients, in this memory.
  const size_t recomputed = call.activations ? 0 : chain.activation_units;
  const size_t size = (recomputed + std::max(chain.tile_units, gradient_units(chain, tensors))) * tiles.max_rows;
  const Buffer<T> memory(size * tiles.num_threads);
  in_threads(tiles.num_threads, [&](int rank) {  // each thread has its own tiles, so that all runs add in one order
    const int64_t last = tiles.count * (rank + 1) / tiles.num_threads;
    for (int64_t tile = tiles.count * rank / tiles.num_threads; tile < last; tile++)
      tiles.visit(tile, [&](int64_t first, int count, auto vectors) {
        T *values = memory.get() + rank * size, *rest = values + recomputed * tiles.max_rows;
        if (call.activations)
          values = static_cast<T*>(call.activations) + first * chain.activation_units;
        else
          ForwardTile<T, vectors>(chain, rest).run(first, count, values);
        BackwardTile<T, vectors>(chain, args, tensors, tensors.of_thread(rank), rest).run(first, count, values);
      });
  });
  tensors.write();
}

}  // namespace jacobiflow
