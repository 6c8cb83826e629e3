// Causal attention of one token to the keys and values of all tokens up to it.
#pragma once

#include "dense.h"

namespace jacobiflow {

// Holds the keys and values of all layers, rows and heads. Keys are (length / lanes, head_size, lanes), so that a vector has
// one channel of several positions. Values are (length, padded head_size).
template <typename T>
class KeyValueCache {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int lanes = S::lanes;

  KeyValueCache(T* memory, int rows, int heads, int head_size, int length)
      : memory(memory), rows(rows), heads(heads), head_size(head_size), value_stride(padded<T>(head_size)), length(length) {}

  // Stores the key and the value of one position.
  void store(int layer, int row, int head, int position, const T* key, const T* value) const {
    T* keys = keys_of(layer, row, head);
    T* to = keys + (int64_t)(position / lanes) * head_size * lanes + position % lanes;
    for (int d = 0; d < head_size; d++) to[d * lanes] = key[d];
    std::memcpy(values_of(keys) + (int64_t)position * value_stride, value, sizeof(T) * head_size);
  }

  // Writes softmax(scale query K) V over positions up to `last`. `logits` is a buffer of the padded length.
  void attend(int layer, int row, int head, int last, const T* query, T scale, T* logits, T* out) const {
    const T *keys = keys_of(layer, row, head), *values = values_of(keys);
    scale *= T(1.44269504088896340736);  // log2(e): logits are to the base 2
    Vector maximum = S::broadcast(-S::infinity);
    for (int block = 0; block <= last / lanes; block++) {
      const T* k = keys + (int64_t)block * head_size * lanes;
      Vector sums[4] = {};
      int d = 0;
      for (; d + 4 <= head_size; d += 4)
        for (int i = 0; i < 4; i++) sums[i] += query[d + i] * S::load(k + (d + i) * lanes);
      for (; d < head_size; d++) sums[0] += query[d] * S::load(k + d * lanes);
      Vector logit = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale;
      if (block == last / lanes)
        for (int i = last % lanes + 1; i < lanes; i++) logit[i] = -S::infinity;
      maximum = logit > maximum ? logit : maximum;
      S::store(logits + block * lanes, logit);
    }
    T largest = maximum[0];
    for (int i = 1; i < lanes; i++) largest = maximum[i] > largest ? maximum[i] : largest;
    Vector total{};
    for (int block = 0; block <= last / lanes; block++) {
      const Vector weight = S::exp2_of_negative(S::load(logits + block * lanes) - largest);
      S::store(logits + block * lanes, weight);
      total += weight;
    }
    const T normaliser = T(1) / S::sum(total);
    for (int first = 0; first < head_size; first += 4 * lanes) {
      const int vectors = std::min((value_stride - first) / lanes, 4);
      Vector sums[2][4] = {};
      for (int j = 0; j <= last; j++)
        for (int v = 0; v < vectors; v++)
          sums[j % 2][v] += logits[j] * S::load(values + (int64_t)j * value_stride + first + v * lanes);
      for (int v = 0; v < vectors; v++) {
        const Vector value = (sums[0][v] + sums[1][v]) * normaliser;
        std::memcpy(out + first + v * lanes, &value, sizeof(T) * std::min(head_size - first - v * lanes, lanes));
      }
    }
  }

 private:
  T* const memory;
  const int rows, heads, head_size, value_stride, length;

  T* keys_of(int layer, int row, int head) const {
    const int64_t size = (int64_t)head_size * padded<T>(length) + (int64_t)value_stride * length;
    return memory + (((int64_t)layer * rows + row) * heads + head) * size;
  }

  T* values_of(const T* keys) const { return const_cast<T*>(keys) + (int64_t)head_size * padded<T>(length); }
};

// Rotates pairs of channels by angles whose cosine and sine are in `rotation`.
template <typename T>
void rotate(T* x, int size, const T* rotation) {
  for (int d = 0; d < size; d += 2) {
    const T even = x[d], odd = x[d + 1];
    x[d] = even * rotation[d] - odd * rotation[d + 1];
    x[d + 1] = odd * rotation[d] + even * rotation[d + 1];
  }
}

}  // namespace jacobiflow
