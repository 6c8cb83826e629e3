// The gradients of a chain's weights, biases, scales and shifts, as sums over rows.
#pragma once

#include "chain.h"
#include "tile.h"
#include "transpose.h"

namespace jacobiflow {

// Adds g x (units, columns of x) for g (units, rows) and x (rows, stride) to sums (units, stride).
template <typename T, int vectors>
void add_outer_product(const T* g, const T* x, int units, int rows, int stride, T* sums) {
  using S = Simd<T>;
  constexpr int count = sum_registers / 4;
  typename S::Vector s[count][vectors];
  const T* of[count];
  for (int u = 0; u < count; u++) {
    of[u] = g + (size_t)std::min(u, units - 1) * rows;  // the last one again, for sums that are not written
    for (int v = 0; v < vectors; v++) s[u][v] = S::load(sums + (size_t)std::min(u, units - 1) * stride + v * S::lanes);
  }
  for (int row = 0; row < rows; row++) {
    typename S::Vector values[vectors];
    for (int v = 0; v < vectors; v++) values[v] = S::load(x + (size_t)row * stride + v * S::lanes);
    for (int u = 0; u < count; u++)
      for (int v = 0; v < vectors; v++) s[u][v] += values[v] * of[u][row];
  }
  for (int u = 0; u < std::min(count, units); u++)
    for (int v = 0; v < vectors; v++) S::store(sums + (size_t)u * stride + v * S::lanes, s[u][v]);
}

// Does the same for the first `columns` columns, 4 vectors at a time.
template <typename T>
void add_outer_product(const T* g, const T* x, int units, int columns, int rows, int stride, T* sums) {
  constexpr int width = 4 * Simd<T>::lanes;
  for (int column = 0; column < columns; column += width) {
    const T* from = x + column;
    T* to = sums + column;
    switch ((std::min(columns - column, width) + Simd<T>::lanes - 1) / Simd<T>::lanes) {
      case 1: add_outer_product<T, 1>(g, from, units, rows, stride, to); break;
      case 2: add_outer_product<T, 2>(g, from, units, rows, stride, to); break;
      case 3: add_outer_product<T, 3>(g, from, units, rows, stride, to); break;
      default: add_outer_product<T, 4>(g, from, units, rows, stride, to);
    }
  }
}

// Offsets of the sums over rows for an operation's weight (units, stride) and bias (units, lanes).
struct GradientLayout {
  bool has_any = false;
  int stride = 0;
  size_t weight = 0, bias = 0;
};

// Holds the gradients of a chain's tensors, with separate sums for each thread.
template <typename T>
class TensorGradients {
 public:
  using S = Simd<T>;

  TensorGradients(const Chain<T>& chain, const GradientArgs& args, int threads) : chain(chain), args(args) {
    for_all([&](const Transform&, int, const OperationLayout& layout) {
      GradientLayout s;
      s.has_any = gradient(layout.weight_index) || gradient(layout.bias_index);
      s.stride = (layout.inputs + S::lanes - 1) / S::lanes * S::lanes;
      s.weight = size, s.bias = size + (size_t)layout.units * s.stride;
      if (s.has_any) size += num_sums(layout, s);
      max_inputs = std::max(max_inputs, s.stride);
      layouts.push_back(s);
    });
    for (int i = 0; size && i < threads; i++) memory.emplace_back(size);
    for (Buffer<T>& sums : memory) std::memset(sums.get(), 0, sizeof(T) * size);
  }

  int max_inputs = 0;  // of a layer, in whole vectors

  T* of_thread(int rank) { return size ? memory[rank].get() : nullptr; }

  const GradientLayout& of(int transform, int operation) const { return layouts[chain.first_layouts[transform] + operation]; }

  // Adds up the sums of all threads and writes the gradients of the tensors. Masked entries get 0.
  void write() {
    size_t position = 0;
    for_all([&](const Transform& t, int j, const OperationLayout& layout) {
      const GradientLayout& s = layouts[position++];
      if (!s.has_any) return;
      T* sums = memory[0].get();
      for (size_t rank = 1; rank < memory.size(); rank++)
        for (size_t k = s.weight; k < s.weight + num_sums(layout, s); k++) sums[k] += memory[rank].get()[k];
      if (t.kind == TransformKind::lu_linear) {
        j ? write_lower(t, layout, s) : write_upper(t, layout, s);
      } else if (is_constant(t)) {
        for (int i = 0; i < layout.units; i++)
          std::copy_n(sums + s.weight + (size_t)i * s.stride, layout.inputs, gradient(layout.weight_index) + i * layout.inputs);
      } else if (t.num_operations) {
        write_layer(t, t.operations[j], layout, s);
      } else {
        write_numbers(sums + s.weight, t.scale_stride, gradient(layout.weight_index));
        write_numbers(sums + s.bias, t.shift_stride, gradient(layout.bias_index));
      }
    });
  }

 private:
  const Chain<T>& chain;
  const GradientArgs& args;
  std::vector<GradientLayout> layouts;
  std::vector<Buffer<T>> memory;
  size_t size = 0;

  // Calls use(transform, index of the layout in the transform, layout) for all layouts of the chain.
  template <typename Use>
  void for_all(const Use& use) {
    for (int i = 0; i < chain.call.count; i++)
      for (size_t j = 0; j < chain.num_layouts(i); j++) use(chain.call.transforms[i], (int)j, chain.of(i, (int)j));
  }

  static size_t num_sums(const OperationLayout& layout, const GradientLayout& s) {
    return (size_t)layout.units * (s.stride + S::lanes);
  }

  // Returns null if the tensor needs no gradient, or for index -1.
  T* gradient(int index) const {
    return index < 0 || !args.grad_tensors ? nullptr : static_cast<T*>(args.grad_tensors[index]);
  }

  static T total(const T* sums) { return S::sum(S::load(sums)); }

  void write_numbers(const T* sums, int stride, T* to) const {
    if (!to) return;
    for (int f = 0; f < chain.call.features; f++) {
      const T sum = total(sums + (size_t)f * S::lanes);
      to[f * stride] = f && !stride ? to[0] + sum : sum;
    }
  }

  void write_lower(const Transform& t, const OperationLayout& layout, const GradientLayout& s) const {
    T *entries = gradient(layout.weight_index), *shift = gradient(layout.bias_index);
    for (int i = 0; i < t.features; i++) {
      if (entries) entries = std::copy_n(memory[0].get() + s.weight + (size_t)i * s.stride, i, entries);
      if (shift) shift[i] = total(memory[0].get() + s.bias + (size_t)i * S::lanes);
    }
  }

  void write_upper(const Transform& t, const OperationLayout& layout, const GradientLayout& s) const {
    T *entries = gradient(layout.weight_index), *to_diagonal = gradient(layout.bias_index);
    const T* diagonal = chain.bias(layout);
    for (int i = 0; i < t.features; i++) {
      const T* row = memory[0].get() + s.weight + (size_t)i * s.stride;
      if (entries) entries = std::copy_n(row + i + 1, t.features - i - 1, entries);
      const T slope = diagonal[i] > T(20) ? T(1) : S::sigmoid(S::broadcast(diagonal[i]))[0];
      if (to_diagonal) to_diagonal[i] = row[i] * slope;
    }
  }

  void write_layer(const Transform& t, const Operation& o, const OperationLayout& layout, const GradientLayout& s) const {
    T *weight = gradient(layout.weight_index), *bias = gradient(layout.bias_index);
    const int32_t* columns = o.kind == OperationKind::linear ? chain.rows(t, o.source) : nullptr;
    const int num_read = o.ready[t.steps - 1];  // nothing reads the units after these
    const T* base = memory[0].get();
    for (int unit = 0; unit < o.units; unit++) {
      const int64_t row = (int64_t)o.rows[unit] * layout.inputs;
      const int read = unit >= num_read ? 0 : columns ? chain.reads(layout, unit) : layout.inputs;
      if (bias) bias[o.rows[unit]] = unit < num_read ? total(base + s.bias + (size_t)unit * S::lanes) : T(0);
      if (!weight) continue;
      const T* from = base + s.weight + (size_t)unit * s.stride;
      std::memset(weight + row, 0, sizeof(T) * layout.inputs);
      for (int k = 0; k < read; k++) {
        const int column = columns ? columns[k] : k;
        if (!o.mask || o.mask[row + column]) weight[row + column] = from[k];
      }
    }
  }
};

}  // namespace jacobiflow
