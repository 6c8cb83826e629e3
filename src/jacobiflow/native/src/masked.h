// Chains of transforms, masked autoregressive ones and couplings among them, in both directions, exact to rounding, and their
// gradients. A tile of rows goes through all transforms without leaving the cache, and a row is a vector lane. Units of a layer
// are sorted by the first step that can compute them, so that each is computed once.
#pragma once

#include <memory>
#include <tuple>

#include "backward.h"
#include "forward.h"

namespace jacobiflow {

// Divides rows into tiles of 4 vectors. The last tile has 1 vector if that is enough.
template <typename T>
struct Tiles {
  static constexpr int rows = 4 * Simd<T>::lanes;
  const int64_t all_rows, count;
  const int num_threads;

  // `work` is the number of multiplications for each row. A thread has at least a million of them.
  Tiles(const ChainArgs& call, int64_t work)
      : all_rows(call.rows), count((call.rows + rows - 1) / rows),
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

// Makes one thread's tiles of 1 vector and of 4 vectors when they are first needed.
template <template <typename, int> class TileKind, typename T>
class EachSize {
 public:
  template <int vectors, typename... Arguments>
  TileKind<T, vectors>& get(Arguments&&... arguments) {
    auto& memory = std::get<std::unique_ptr<TileKind<T, vectors>>>(sizes);
    if (!memory) memory = std::make_unique<TileKind<T, vectors>>(arguments...);
    return *memory;
  }

 private:
  std::tuple<std::unique_ptr<TileKind<T, 1>>, std::unique_ptr<TileKind<T, 4>>> sizes;
};

// Calls run(rank) in threads, and throws std::bad_alloc if one of them does.
template <typename Run>
void in_guarded_threads(int num_threads, const Run& run) {
  std::atomic<bool> has_memory{true};
  in_threads(num_threads, [&](int rank) {
    try {
      run(rank);
    } catch (const std::bad_alloc&) {
      has_memory = false;
    }
  });
  if (!has_memory) throw std::bad_alloc();
}

// Computes all rows, and returns the number of rows that are not finite.
template <typename T>
int64_t evaluate(const ChainArgs& call) {
  if (!call.rows) return 0;
  Chain<T> chain(call);
  chain.pack();
  if (!chain.is_finite) {
    std::memset(call.failed, 1, call.rows);
    const int64_t size = call.rows * call.features;
    std::fill_n(static_cast<T*>(call.out), size, Simd<T>::nan);
    if (call.log_det)
      std::fill_n(static_cast<T*>(call.log_det), call.is_by_feature ? size : call.rows, Simd<T>::nan);
    return call.rows;
  }
  const Tiles<T> tiles(call, chain.work);
  std::atomic<int64_t> next{0};
  in_guarded_threads(tiles.num_threads, [&](int) {
    EachSize<ForwardTile, T> tile_of;
    for (int64_t tile; (tile = next++) < tiles.count;)
      tiles.visit(tile, [&](int64_t first, int count, auto vectors) {
        T* activations = static_cast<T*>(call.activations);
        if (activations) activations += first * chain.tile_units;
        tile_of.template get<vectors>(chain, activations != nullptr).run(first, count, activations);
      });
  });
  return std::count(call.failed, call.failed + call.rows, 1);
}

// Computes gradients from the packed weights of `evaluate`, and from its activations or, if it has stored none, new ones.
template <typename T>
void differentiate(const GradientArgs& args) {
  const ChainArgs& call = *args.chain;
  Chain<T> chain(call);
  chain.use_packed();
  const Tiles<T> tiles(call, 3 * chain.work);
  TensorGradients<T> tensors(chain, args, tiles.num_threads);
  in_guarded_threads(tiles.num_threads, [&](int rank) {  // each thread has its own tiles, so that all runs add in one order
    EachSize<ForwardTile, T> forward;
    EachSize<BackwardTile, T> backward;
    Buffer<T> recomputed(call.activations ? 0 : chain.tile_units * tiles.rows);
    const int64_t last = tiles.count * (rank + 1) / tiles.num_threads;
    for (int64_t tile = tiles.count * rank / tiles.num_threads; tile < last; tile++)
      tiles.visit(tile, [&](int64_t first, int count, auto vectors) {
        const T* activations = recomputed.get();
        if (call.activations)
          activations = static_cast<const T*>(call.activations) + first * chain.tile_units;
        else
          forward.template get<vectors>(chain, true).run(first, count, recomputed.get());
        backward.template get<vectors>(chain, args, tensors, rank).run(first, count, activations);
      });
  });
  tensors.write();
}

}  // namespace jacobiflow
