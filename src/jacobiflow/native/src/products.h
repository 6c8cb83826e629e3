// Products of matrices whose rows are samples: values are (units, rows), and a row is a vector lane.
#pragma once

#include <algorithm>
#include <utility>

#include "lanes.h"

namespace jacobiflow {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 24;  // of 32, for sums
#else
constexpr int registers = 12;  // of 16
#endif

// Entry (i, k) of a matrix is entries[i * over + k * along].
template <typename T>
struct Matrix {
  const T* entries;
  int over, along;
};

// Adds the products of `count` rows of a matrix with inputs [from, to). With few sums the processor waits for each
// addition, so some inputs have separate sums.
template <typename T, int count, int vectors>
void add_products(Matrix<T> m, const T* in, int from, int to, typename Lanes<T>::Vector (&sums)[count][vectors]) {
  using L = Lanes<T>;
  constexpr int rows = L::count * vectors, ways = count * vectors >= 8 ? 1 : count * vectors >= 4 ? 2 : 4;
  typename L::Vector others[ways][count][vectors] = {};
  int k = from;
  for (; k + ways <= to; k += ways)
    for (int way = 0; way < ways; way++) {
      const T *x = in + (size_t)(k + way) * rows, *entries = m.entries + (size_t)(k + way) * m.along;
      for (int v = 0; v < vectors; v++) {
        const typename L::Vector values = L::load(x + v * L::count);
        for (int u = 0; u < count; u++) (way ? others[way] : sums)[u][v] += values * entries[(size_t)u * m.over];
      }
    }
  for (; k < to; k++)
    for (int v = 0; v < vectors; v++)
      for (int u = 0; u < count; u++)
        sums[u][v] += L::load(in + (size_t)k * rows + v * L::count) * m.entries[(size_t)u * m.over + (size_t)k * m.along];
  for (int way = 1; way < ways; way++)
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) sums[u][v] += others[way][u][v];
}

constexpr int most_units = 8;  // that are computed together

// Computes units [first, last): finish(vector, start(unit - first, vector) + products with some inputs), and writes unit
// `first` to the start of `out`. inputs(first, last) is the range for units from `first` to `last`.
template <typename T, int vectors, typename Inputs, typename Start, typename Finish,
          int count = std::min(registers / vectors, most_units)>
void multiply(Matrix<T> m, int first, int last, const Inputs& inputs, const T* in, T* out, const Start& start,
              const Finish& finish, int unit = -1) {
  using L = Lanes<T>;
  if (unit < 0) unit = first;
  for (; unit + count <= last; unit += count) {
    typename L::Vector sums[count][vectors];
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) sums[u][v] = start(unit + u - first, v);
    const Range range = inputs(unit, unit + count - 1);
    add_products<T>({m.entries + (size_t)unit * m.over, m.over, m.along}, in, range.first, range.last, sums);
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++)
        L::store(out + ((size_t)(unit + u - first) * vectors + v) * L::count, finish(v, sums[u][v]));
  }
  if constexpr (count > 1)
    if (unit < last)
      multiply<T, vectors, Inputs, Start, Finish, count - 1>(m, first, last, inputs, in, out, start, finish, unit);
}

// Exchanges the lanes of `b` whose index lacks the bit `step` for those of `a` that have it.
template <int step, typename Vector, int... i>
void exchange_lanes(Vector& a, Vector& b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i);
  const Vector low = a, high = b;
  a = __builtin_shufflevector(low, high, (i & step ? count + i - step : i)...);
  b = __builtin_shufflevector(low, high, (i & step ? count + i : i + step)...);
}

// Transposes as many vectors as one has lanes.
template <typename T, int step = 1>
void transpose(typename Lanes<T>::Vector (&v)[Lanes<T>::count]) {
  constexpr int count = Lanes<T>::count;
  for (int k = 0; k < count; k++)
    if (!(k & step)) exchange_lanes<step>(v[k], v[k + step], std::make_integer_sequence<int, count>());
  if constexpr (2 * step < count) transpose<T, 2 * step>(v);
}

// Copies values (units, rows) to (rows, stride), whose columns from `units` on are 0; both sizes are whole vectors.
template <typename T>
void transpose(const T* from, int units, int rows, T* to, int stride) {
  using L = Lanes<T>;
  for (int unit = 0; unit < stride; unit += L::count)
    for (int row = 0; row < rows; row += L::count) {
      typename L::Vector block[L::count];
      for (int i = 0; i < L::count; i++)
        block[i] = unit + i < units ? L::load(from + (size_t)(unit + i) * rows + row) : typename L::Vector{};
      transpose<T>(block);
      for (int i = 0; i < L::count; i++) L::store(to + (size_t)(row + i) * stride + unit, block[i]);
    }
}

// Adds g x (units, columns of x) for g (units, rows) and x (rows, stride) to sums (units, stride).
template <typename T, int vectors>
void add_outer_product(const T* g, const T* x, int units, int rows, int stride, T* sums) {
  using L = Lanes<T>;
  constexpr int count = registers / 4;
  typename L::Vector s[count][vectors];
  const T* of[count];
  for (int u = 0; u < count; u++) {
    of[u] = g + (size_t)std::min(u, units - 1) * rows;  // the last one again, for sums that are not written
    for (int v = 0; v < vectors; v++) s[u][v] = L::load(sums + (size_t)std::min(u, units - 1) * stride + v * L::count);
  }
  for (int row = 0; row < rows; row++) {
    typename L::Vector values[vectors];
    for (int v = 0; v < vectors; v++) values[v] = L::load(x + (size_t)row * stride + v * L::count);
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) s[u][v] += values[v] * of[u][row];
  }
  for (int u = 0; u < std::min(count, units); u++)
    for (int v = 0; v < vectors; v++) L::store(sums + (size_t)u * stride + v * L::count, s[u][v]);
}

// The same for the first `columns` columns, in blocks of as many units as fit the registers.
template <typename T>
void add_outer_product(const T* g, const T* x, int units, int columns, int rows, int stride, T* sums) {
  constexpr int width = 4 * Lanes<T>::count;
  for (int column = 0; column < columns; column += width) {
    const T* from = x + column;
    T* to = sums + column;
    switch ((std::min(columns - column, width) + Lanes<T>::count - 1) / Lanes<T>::count) {
      case 1: add_outer_product<T, 1>(g, from, units, rows, stride, to); break;
      case 2: add_outer_product<T, 2>(g, from, units, rows, stride, to); break;
      case 3: add_outer_product<T, 3>(g, from, units, rows, stride, to); break;
      default: add_outer_product<T, 4>(g, from, units, rows, stride, to);
    }
  }
}

}  // namespace jacobiflow
