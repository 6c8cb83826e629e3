// The gradients of a chain's weights, biases, scales and shifts, as sums over rows.
#pragma once

#include "tile.h"

namespace jacobiflow {

// Offsets of one operation's sums over rows: of its weight (units, stride) and bias (units, lanes), or of the scale and the
// shift (features, lanes) of a transform without a network.
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
    for_all([&](const Transform& t, int, int j, const OperationLayout& layout) {
      GradientLayout s;
      if (j < 0) {
        s.has_any = gradient(t, 0) || gradient(t, 1);
        s.weight = size, s.bias = size + (size_t)chain.call.features * S::lanes;
        if (s.has_any) size += (size_t)2 * chain.call.features * S::lanes;
      } else if (const Operation& o = t.operations[j]; o.weight >= 0) {
        s.has_any = gradient(t, o.weight) || gradient(t, o.bias);
        s.stride = (layout.inputs + S::lanes - 1) / S::lanes * S::lanes;
        s.weight = size, s.bias = size + (size_t)o.units * s.stride;
        if (s.has_any) size += (size_t)o.units * (s.stride + S::lanes);
        max_inputs = std::max(max_inputs, s.stride);
      }
      layouts.push_back(s);
    });
    for (int i = 0; size && i < threads; i++) memory.emplace_back(size);
    for (Buffer<T>& sums : memory) std::memset(sums.get(), 0, sizeof(T) * size);
  }

  int max_inputs = 0;  // of a layer whose gradient is needed, in whole vectors

  T* of_thread(int rank) { return size ? memory[rank].get() : nullptr; }

  const GradientLayout& of(int transform, int operation) const {
    return layouts[chain.position(transform, std::max(operation, 0))];
  }

  // Adds up the sums of all threads and writes the gradients of the tensors. Masked entries get 0.
  void write() {
    for_all([&](const Transform& t, int i, int j, const OperationLayout& layout) {
      const GradientLayout& s = of(i, j);
      if (!s.has_any) return;
      const int units = j < 0 ? chain.call.features : t.operations[j].units;
      const size_t count = j < 0 ? (size_t)2 * units * S::lanes : (size_t)units * (s.stride + S::lanes);
      T* sums = memory[0].get() + s.weight;
      for (size_t rank = 1; rank < memory.size(); rank++)
        for (size_t k = 0; k < count; k++) sums[k] += memory[rank].get()[s.weight + k];
      if (j < 0) {
        write_numbers(sums, t.scale_stride, gradient(t, 0));
        write_numbers(sums + (size_t)units * S::lanes, t.shift_stride, gradient(t, 1));
      } else {
        write_layer(t, t.operations[j], layout, s);
      }
    });
  }

 private:
  const Chain<T>& chain;
  const GradientArgs& args;
  std::vector<GradientLayout> layouts;
  std::vector<Buffer<T>> memory;
  size_t size = 0;

  // Calls use(transform, its index, index of the operation, its layout) for each operation. A transform without a network has
  // one call, with -1.
  template <typename Use>
  void for_all(const Use& use) {
    for (int i = 0; i < chain.call.count; i++) {
      const Transform& t = chain.call.transforms[i];
      for (int j = 0; j < chain.layout_count(t); j++) use(t, i, t.num_operations ? j : -1, chain.of(i, j));
    }
  }

  // Returns null if the tensor needs no gradient.
  T* gradient(const Transform& t, int tensor) const {
    return tensor < 0 || !args.grad_tensors ? nullptr : static_cast<T*>(args.grad_tensors[t.first_tensor + tensor]);
  }

  static T total(const T* sums) { return S::sum(S::load(sums)); }

  void write_numbers(const T* sums, int stride, T* to) const {
    if (!to) return;
    for (int f = 0; f < chain.call.features; f++) {
      const T sum = total(sums + (size_t)f * S::lanes);
      to[f * stride] = f && !stride ? to[0] + sum : sum;
    }
  }

  void write_layer(const Transform& t, const Operation& o, const OperationLayout& layout, const GradientLayout& s) const {
    T *weight = gradient(t, o.weight), *bias = gradient(t, o.bias);
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
