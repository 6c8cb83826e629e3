// Matrix products for tiles: values are (units, rows), and a row is a vector lane.
#pragma once

#include "vector_math.h"

namespace jacobiflow {

// Entry (i, k) of a matrix is entries[i * row_stride + k * column_stride].
template <typename T>
struct Matrix {
  const T* entries;
  int row_stride, column_stride;
};

// Adds the products of `count` rows of a matrix with inputs [from, to). With few sums the processor would wait for each
// addition, so inputs are added in several independent sums.
template <typename T, int count, int vectors>
void add_products(Matrix<T> m, const T* in, int from, int to, typename Simd<T>::Vector (&sums)[count][vectors]) {
  using S = Simd<T>;
  constexpr int rows = S::lanes * vectors, unroll = count * vectors >= 8 ? 1 : count * vectors >= 4 ? 2 : 4;
  typename S::Vector others[unroll][count][vectors] = {};
  int k = from;
  for (; k + unroll <= to; k += unroll)
    for (int part = 0; part < unroll; part++) {
      const T *x = in + (size_t)(k + part) * rows, *entries = m.entries + (size_t)(k + part) * m.column_stride;
      for (int v = 0; v < vectors; v++) {
        const typename S::Vector values = S::load(x + v * S::lanes);
        for (int u = 0; u < count; u++) (part ? others[part] : sums)[u][v] += values * entries[(size_t)u * m.row_stride];
      }
    }
  for (; k < to; k++)
    for (int v = 0; v < vectors; v++)
      for (int u = 0; u < count; u++)
        sums[u][v] += S::load(in + (size_t)k * rows + v * S::lanes) *
                      m.entries[(size_t)u * m.row_stride + (size_t)k * m.column_stride];
  for (int part = 1; part < unroll; part++)
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) sums[u][v] += others[part][u][v];
}

constexpr int max_units = 8;  // computed together

// Computes units [first, last) as finish(vector, start(unit - first, vector) + products with inputs), and writes unit `first`
// to the start of `out`. inputs(first, last) returns the range of inputs for units from `first` to `last`.
template <typename T, int vectors, typename Inputs, typename Start, typename Finish,
          int count = std::min(sum_registers / vectors, max_units)>
void multiply(Matrix<T> m, int first, int last, const Inputs& inputs, const T* in, T* out, const Start& start,
              const Finish& finish, int unit = -1) {
  using S = Simd<T>;
  if (unit < 0) unit = first;
  for (; unit + count <= last; unit += count) {
    typename S::Vector sums[count][vectors];
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) sums[u][v] = start(unit + u - first, v);
    const Range range = inputs(unit, unit + count - 1);
    const Matrix<T> block{m.entries + (size_t)unit * m.row_stride, m.row_stride, m.column_stride};
    add_products<T>(block, in, range.first, range.last, sums);
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++)
        S::store(out + ((size_t)(unit + u - first) * vectors + v) * S::lanes, finish(v, sums[u][v]));
  }
  if constexpr (count > 1)
    if (unit < last)
      multiply<T, vectors, Inputs, Start, Finish, count - 1>(m, first, last, inputs, in, out, start, finish, unit);
}

// A triangular matrix in full storage. Its transpose has the strides the other way round.
template <typename T, int vectors>
struct Triangle {
  using S = Simd<T>;
  static constexpr int rows = S::lanes * vectors;
  const Matrix<T> matrix;
  const int size;
  const bool is_lower;

  Triangle transposed() const {
    return {{matrix.entries, matrix.column_stride, matrix.row_stride}, size, !is_lower};
  }

  // Computes the product with x (size, rows).
  void multiply(const T* x, T* out) const {
    jacobiflow::multiply<T, vectors>(
        matrix, 0, size, [&](int first, int last) { return is_lower ? Range{0, last + 1} : Range{first, size}; }, x, out,
        [](int, int) { return typename S::Vector{}; }, [](int, auto sum) { return sum; });
  }

  // Replaces x (size, rows) by the solution of the system whose right side it is.
  void solve(T* x) const {
    for (int k = 0; k < size; k++) {
      const int i = is_lower ? k : size - 1 - k;
      const T diagonal = matrix.entries[(size_t)i * (matrix.row_stride + matrix.column_stride)];
      T* at = x + (size_t)i * rows;
      jacobiflow::multiply<T, vectors>(
          matrix, i, i + 1, [&](int, int) { return is_lower ? Range{0, i} : Range{i + 1, size}; }, x, at,
          [](int, int) { return typename S::Vector{}; },
          [&](int v, auto sum) { return (S::load(at + v * S::lanes) - sum) / diagonal; });
    }
  }
};

}  // namespace jacobiflow
