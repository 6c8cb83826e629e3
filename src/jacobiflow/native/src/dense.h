// Dense layers on weights that are stored in 64, 32 or 16 bits, in panels or as PyTorch has them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "boundary.h"
#include "threads.h"
#include "transpose.h"

namespace jacobiflow {

enum class BFloat16 : uint16_t {};  // the bits of a number
enum class Float16 : uint16_t {};

inline Halves load_halves(const void* from) {
  Halves v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Converts a vector of stored numbers to the type of the sums. Every conversion is exact.
inline Vector widen(const float* from) { return Simd<float>::load(from); }

inline Simd<double>::Vector widen(const double* from) { return Simd<double>::load(from); }

inline Vector widen(const BFloat16* from) { return (Vector)(__builtin_convertvector(load_halves(from), Bits) << 16); }

inline Vector widen(const Float16* from) { return from_half(load_halves(from)); }

template <typename T>
constexpr int panel_columns = Simd<T>::lanes * panel_vectors;  // columns of a weight that lie side by side

template <typename T>
inline int padded(int n) {
  return (n + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes;
}

// Converts a vector of sums' type to stored numbers. A number that 16 bits cannot represent becomes another one.
inline Vector narrow(Vector v, float) { return v; }

inline Simd<double>::Vector narrow(Simd<double>::Vector v, double) { return v; }

inline Halves narrow(Vector v, BFloat16) { return __builtin_convertvector((Bits)v >> 16, Halves); }

inline Halves narrow(Vector v, Float16) { return to_half(v); }

// Copies outputs from `first` on of a weight (outputs, inputs) to a panel (inputs, width), or to rows of whole vectors. The
// last panel may be narrower. Returns false if a number changes.
template <typename T, typename Source, typename Element>
bool store_panel(const Source* weight, int outputs, int inputs, int first, bool is_packed, Element* stored) {
  using S = Simd<T>;
  using Bits = typename S::Bits;
  constexpr int lanes = S::lanes;
  const int width = std::min(padded<T>(outputs - first), panel_columns<T>);
  Bits changed{};
  for (int k = 0; k < inputs; k += lanes)
    for (int j = first; j < first + width; j += lanes) {
      const int rows = std::min(outputs - j, lanes), columns = std::min(inputs - k, lanes);
      typename S::Vector block[lanes] = {};
      for (int i = 0; i < rows; i++) {
        const Source* from = weight + (int64_t)(j + i) * inputs + k;
        Source numbers[lanes] = {};
        if (columns < lanes) from = (const Source*)std::memcpy(numbers, from, sizeof(Source) * columns);
        block[i] = widen(from);
      }
      if (is_packed) transpose<T>(block);
      for (int i = 0; i < (is_packed ? columns : rows); i++) {
        const int64_t offset = is_packed ? (int64_t)first * inputs + (int64_t)(k + i) * width + (j - first)
                                         : (int64_t)(j + i) * inputs + k;
        const auto numbers = narrow(block[i], Element());
        std::memcpy(stored + offset, &numbers, sizeof numbers);
        changed |= (Bits)widen(stored + offset) ^ (Bits)block[i];
      }
    }
  bool is_changed = false;
  for (int lane = 0; lane < lanes; lane++) is_changed |= changed[lane] != 0;
  return !is_changed;
}

// Multiplies `rows` rows by `vectors` vectors of a panel's columns, with all sums in registers. With few rows, even and odd
// inputs have separate sums, so that additions do not wait for each other.
template <int rows, int vectors, typename T, typename Element>
inline void multiply_tile(const T* x, int stride, const Element* weight, int width, int inputs,
                          typename Simd<T>::Vector* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr int unroll = rows <= 2 ? 2 : 1, count = Simd<T>::lanes;
  Vector sums[unroll][rows][vectors] = {};
  int k = 0;
  for (; k + unroll <= inputs; k += unroll)
    for (int part = 0; part < unroll; part++) {
      const Element* w = weight + (int64_t)(k + part) * width;
      Vector columns[vectors];
      for (int v = 0; v < vectors; v++) columns[v] = widen(w + v * count);
      for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[part][r][v] += x[(int64_t)r * stride + k + part] * columns[v];
    }
  for (; k < inputs; k++)
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++)
        sums[0][r][v] += x[(int64_t)r * stride + k] * widen(weight + (int64_t)k * width + v * count);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++)
      out[r * panel_vectors + v] = unroll == 1 ? sums[0][r][v] : sums[0][r][v] + sums[unroll - 1][r][v];
}

// Does the same for a weight (outputs, inputs) as PyTorch has it, with whole vectors of inputs. It prefetches the weights,
// because a row is often a page of memory.
template <int rows, typename T, typename Element>
inline void multiply_rows(const T* x, int stride, const Element* weight, int inputs, int vectors,
                          typename Simd<T>::Vector* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr int unroll = rows <= 2 ? 2 : 1, count = Simd<T>::lanes, outputs = panel_vectors;
  for (int first = 0; first < vectors * count; first += outputs) {
    Vector sums[unroll][rows][outputs] = {};
    const Element* w = weight + (int64_t)first * inputs;
    const Element* ahead = first + 3 * outputs <= vectors * count ? w + (int64_t)2 * outputs * inputs : w;
    const auto add = [&](int part, int k) {
      Vector columns[outputs];
      for (int o = 0; o < outputs; o++) {
        columns[o] = widen(w + (int64_t)o * inputs + k);
        __builtin_prefetch(ahead + (int64_t)o * inputs + k);
      }
      for (int r = 0; r < rows; r++) {
        const Vector values = Simd<T>::load(x + (int64_t)r * stride + k);
        for (int o = 0; o < outputs; o++) sums[part][r][o] += values * columns[o];
      }
    };
    int k = 0;
    for (; k + unroll * count <= inputs; k += unroll * count)
      for (int part = 0; part < unroll; part++) add(part, k + part * count);
    for (; k < inputs; k += count) add(0, k);
    for (int r = 0; r < rows; r++)
      for (int o = 0; o < outputs; o++) {
        if (unroll > 1) sums[0][r][o] += sums[unroll - 1][r][o];
        out[r * panel_vectors + (first + o) / count][(first + o) % count] = Simd<T>::sum(sums[0][r][o]);
      }
  }
}

// Multiplies up to `tile_rows` rows by up to `panel_vectors` vectors of columns. It has many callers, so it is not inlined.
template <typename T, typename Element>
[[gnu::noinline]] void multiply(const T* x, int stride, const void* weight, int64_t start, int width, int inputs, int rows,
                                int vectors, bool is_packed, typename Simd<T>::Vector* out) {
  const auto each = [&](auto number) {
    constexpr int r = decltype(number)::value;
    const Element* w = (const Element*)weight + start;
    if (!is_packed) return multiply_rows<r>(x, stride, w, inputs, vectors, out);
    switch (vectors) {
      case 1: return multiply_tile<r, 1>(x, stride, w, width, inputs, out);
      case 2: return multiply_tile<r, 2>(x, stride, w, width, inputs, out);
    }
    if constexpr (panel_vectors == 4) {
      if (vectors == 3) return multiply_tile<r, 3>(x, stride, w, width, inputs, out);
      return multiply_tile<r, 4>(x, stride, w, width, inputs, out);
    }
  };
  switch (rows) {
    case 1: return each(std::integral_constant<int, 1>());
    case 2: return each(std::integral_constant<int, 2>());
    case 3: return each(std::integral_constant<int, 3>());
    case 4: return each(std::integral_constant<int, 4>());
    case 5: return each(std::integral_constant<int, 5>());
    case 6: return each(std::integral_constant<int, 6>());
  }
}

// Multiplies x (rows, inputs) by some outputs of a weight (outputs, inputs), the first of which is a multiple of a vector's
// length. Calls use(row, output, vector of sums) for each vector of outputs.
template <typename T, typename Use>
inline void dense(const T* x, int stride, const Weight& weight, int inputs, int outputs, int rows, Range columns,
                  const Use& use) {
  constexpr int count = Simd<T>::lanes;
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  for (int column = columns.first; column < columns.last;) {
    const int start = column / panel_columns<T> * panel_columns<T>;
    const int width = std::min(padded<T>(outputs - start), panel_columns<T>);
    const int last = std::min(start + width, columns.last), vectors = (last - column + count - 1) / count;
    const int64_t at = weight.is_packed ? (int64_t)start * inputs + (column - start) : (int64_t)column * inputs;
    for (int i = 0; i < tiles; i++) {
      const int row = (int)((int64_t)rows * i / tiles), height = (int)((int64_t)rows * (i + 1) / tiles) - row;
      typename Simd<T>::Vector out[tile_rows * panel_vectors];
      const auto run = [&](auto element) {
        multiply<T, decltype(element)>(x + (int64_t)row * stride, stride, weight.values, at, width, inputs, height, vectors,
                                       weight.is_packed, out);
      };
      if constexpr (std::is_same<T, double>::value) {
        run(double());
      } else {
        switch (weight.format) {
          case WeightFormat::bfloat16: run(BFloat16()); break;
          case WeightFormat::float16: run(Float16()); break;
          default: run(float());
        }
      }
      for (int r = 0; r < height; r++)
        for (int v = 0; v < vectors; v++) use(row + r, column + v * count, out[r * panel_vectors + v]);
    }
    column += vectors * count;
  }
}

}  // namespace jacobiflow
