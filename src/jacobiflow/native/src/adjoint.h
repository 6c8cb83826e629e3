// Gradients of a chain: from those of its results at a tile of rows to those of the rows, their contexts and the weights.
#pragma once

#include "tile.h"

namespace jacobiflow {

// Where sums over rows lie that become the gradients of an operation's weight (units, stride) and bias (units, lanes), or
// of the scale and the shift (features, lanes) of a transform without a network.
struct SumLayout {
  bool has_any = false;
  int stride = 0;
  size_t weight = 0, bias = 0;
};

// The gradients of a chain's tensors, summed by each thread.
template <typename T>
class TensorGradients {
 public:
  using L = Lanes<T>;

  TensorGradients(const Chain<T>& chain, const GradientArgs& args, int threads) : chain(chain), args(args) {
    for_all([&](const Transform& t, int, int j, const OperationLayout& layout) {
      SumLayout s;
      if (j < 0) {
        s.has_any = gradient(t, 0) || gradient(t, 1);
        s.weight = size, s.bias = size + (size_t)chain.call.features * L::count;
        if (s.has_any) size += (size_t)2 * chain.call.features * L::count;
      } else if (const Operation& o = t.operations[j]; o.weight >= 0) {
        s.has_any = gradient(t, o.weight) || gradient(t, o.bias);
        s.stride = (layout.inputs + L::count - 1) / L::count * L::count;
        s.weight = size, s.bias = size + (size_t)o.units * s.stride;
        if (s.has_any) size += (size_t)o.units * (s.stride + L::count);
        most_inputs = std::max(most_inputs, s.stride);
      }
      layouts.push_back(s);
    });
    for (int i = 0; size && i < threads; i++) memory.emplace_back(size);
    for (Buffer<T>& sums : memory) std::memset(sums.get(), 0, sizeof(T) * size);
  }

  int most_inputs = 0;  // of a layer whose gradient is needed, in whole vectors

  T* of_thread(int rank) { return size ? memory[rank].get() : nullptr; }

  const SumLayout& of(int transform, int operation) const {
    return layouts[chain.position(transform, std::max(operation, 0))];
  }

  // Adds up what threads have summed, and writes it to the tensors' gradients; masked entries get 0.
  void write() {
    for_all([&](const Transform& t, int i, int j, const OperationLayout& layout) {
      const SumLayout& s = of(i, j);
      if (!s.has_any) return;
      const int units = j < 0 ? chain.call.features : t.operations[j].units;
      const size_t count = j < 0 ? (size_t)2 * units * L::count : (size_t)units * (s.stride + L::count);
      T* sums = memory[0].get() + s.weight;
      for (size_t rank = 1; rank < memory.size(); rank++)
        for (size_t k = 0; k < count; k++) sums[k] += memory[rank].get()[s.weight + k];
      if (j < 0) {
        write_numbers(sums, t.scale_stride, gradient(t, 0));
        write_numbers(sums + (size_t)units * L::count, t.shift_stride, gradient(t, 1));
      } else {
        write_layer(t, t.operations[j], layout, s);
      }
    });
  }

 private:
  const Chain<T>& chain;
  const GradientArgs& args;
  std::vector<SumLayout> layouts;
  std::vector<Buffer<T>> memory;
  size_t size = 0;

  // Calls use(transform, its index, operation, its layout) for each operation, with -1 for a transform without a network.
  template <typename Use>
  void for_all(const Use& use) {
    for (int i = 0; i < chain.call.count; i++) {
      const Transform& t = chain.call.transforms[i];
      for (int j = 0; j < chain.layout_count(t); j++) use(t, i, t.operation_count ? j : -1, chain.of(i, j));
    }
  }

  // Null if the tensor needs none.
  T* gradient(const Transform& t, int tensor) const {
    return tensor < 0 || !args.grad_tensors ? nullptr : static_cast<T*>(args.grad_tensors[t.first_tensor + tensor]);
  }

  static T total(const T* lanes) {
    T sum = 0;
    for (int i = 0; i < L::count; i++) sum += lanes[i];
    return sum;
  }

  void write_numbers(const T* sums, int stride, T* to) const {
    if (!to) return;
    for (int f = 0; f < chain.call.features; f++) {
      const T sum = total(sums + (size_t)f * L::count);
      to[f * stride] = f && !stride ? to[0] + sum : sum;
    }
  }

  void write_layer(const Transform& t, const Operation& o, const OperationLayout& layout, const SumLayout& s) const {
    T *weight = gradient(t, o.weight), *bias = gradient(t, o.bias);
    const int32_t* columns = o.kind == OperationKind::linear ? chain.rows(t, o.source) : nullptr;
    const int all = o.ready[t.steps - 1];  // later units are read by nothing
    const T* base = memory[0].get();
    for (int unit = 0; unit < o.units; unit++) {
      const int64_t row = (int64_t)o.rows[unit] * layout.inputs;
      const int read = unit >= all ? 0 : columns ? chain.reads(layout, unit) : layout.inputs;
      if (bias) bias[o.rows[unit]] = unit < all ? total(base + s.bias + (size_t)unit * L::count) : T(0);
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

// One thread's memory for the gradients of a tile of `vectors` vectors of rows, which lie as the values do.
template <typename T, int vectors>
class Adjoint {
 public:
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  static constexpr int rows = L::count * vectors;

  Adjoint(const Chain<T>& chain, const GradientArgs& args, TensorGradients<T>& tensors, int rank)
      : chain(chain), call(chain.call), args(args), tensors(tensors), sums(tensors.of_thread(rank)),
        features((size_t)call.features * rows), copy((size_t)call.features * rows),
        log_det((size_t)(call.is_by_feature ? call.features : 1) * rows), context((size_t)call.context_features * rows),
        context_gradient((size_t)call.context_features * rows), gradients(chain.most_gradient_units * rows),
        transposed((size_t)tensors.most_inputs * rows), bins(spline_memory<T>(call)) {}

  // Adds the gradients of rows [first, first + count), whose values the forward direction has left in `activations`.
  void run(int64_t first, int count, const T* activations) {
    values = activations;
    const int by_feature = call.is_by_feature ? call.features : 1;
    load(args.grad_out, first, call.features, count, features.get());
    load(args.grad_log_det, first, by_feature, count, log_det.get());
    if (call.context_features)
      load_rows(static_cast<const T*>(call.context) + first * call.context_stride, call.context_stride,
                call.context_features, count, rows, context.get());
    std::memset(context_gradient.get(), 0, sizeof(T) * call.context_features * rows);
    for (int i = call.count - 1; i >= 0; i--) {
      index = call.is_inverse ? call.count - 1 - i : i;
      const Transform& t = call.transforms[index];
      inverts = chain.inverts(t);
      needs_features = i > 0 || args.grad_input || inverts;
      if (t.kind == TransformKind::permutation)
        permute(t, !inverts, rows, features.get(), copy.get());
      else if (!t.operation_count)
        without_network(t);
      else
        masked(t);
    }
    if (args.grad_input)
      store_rows(features.get(), call.features, count, rows, static_cast<T*>(args.grad_input) + first * call.features);
    if (args.grad_context)
      store_rows(context_gradient.get(), call.context_features, count, rows,
                 static_cast<T*>(args.grad_context) + first * call.context_features);
  }

 private:
  const Chain<T>& chain;
  const ChainArgs& call;
  const GradientArgs& args;
  TensorGradients<T>& tensors;
  T* const sums;
  Buffer<T> features, copy, log_det, context, context_gradient, gradients, transposed, bins;
  const T* values = nullptr;  // the tile's activations
  int index = 0;              // of the transform
  bool inverts = false, needs_features = false;

  // Loads (count, columns), or zeros from null; rows beyond `count` are 0, so that they add nothing to sums.
  static void load(const void* from, int64_t first, int columns, int count, T* to) {
    std::memset(to, 0, sizeof(T) * columns * rows);
    const T* values = static_cast<const T*>(from);
    for (int column = 0; values && column < columns; column++)
      for (int row = 0; row < count; row++) to[(size_t)column * rows + row] = values[(first + row) * columns + column];
  }

  Vector log_det_of(int feature, int v) const {
    return L::load(log_det.get() + (size_t)(call.is_by_feature ? feature : 0) * rows + v * L::count);
  }

  // The values of this transform, derivatives beside them, and their gradients.
  const T* value_of(int value) const { return values + chain.value(index, value) * rows; }
  T* gradient_of(int value) { return gradients.get() + chain.gradient(index, value) * rows; }
  const T* slopes_of(const OperationLayout& layout) const { return values + layout.slopes * rows; }
  T* context_layer_gradient(const OperationLayout& layout) { return gradients.get() + layout.layer_gradient * rows; }

  void without_network(const Transform& t) {
    const OperationLayout& layout = chain.of(index, 0);
    const SumLayout& to = tensors.of(index, -1);
    const T *scales = chain.weight(layout), *shifts = chain.bias(layout);
    for (int f = 0; f < call.features; f++) {
      const T scale = scales[f], shift = shifts[f];
      Vector of_scale{}, of_shift{};
      for (int v = 0; v < vectors; v++) {
        T* at = features.get() + (size_t)f * rows + v * L::count;
        const Vector x = L::load(value_of(0) + (size_t)f * rows + v * L::count);
        Gradients<Vector> g{L::load(at), log_det_of(f, v)};
        if (t.kind == TransformKind::normal) {
          if (inverts) g.log_slope = -g.log_slope;
          const Vector standard = (x - shift) / scale, change = g.log_slope * standard / scale;
          L::store(at, g.value - change);
          of_shift += change;
          of_scale += change * standard - g.log_slope / scale;
        } else {
          const Vector result = inverts ? g.value / scale : g.value * scale;
          if (inverts) g = {-result, -g.log_slope};
          L::store(at, result);
          of_shift += g.value;
          of_scale += g.value * x + g.log_slope / scale;
        }
      }
      if (to.has_any) {
        add_to(sums + to.weight + (size_t)f * L::count, of_scale);
        add_to(sums + to.bias + (size_t)f * L::count, of_shift);
      }
    }
  }

  static void add_to(T* at, Vector v) { L::store(at, L::load(at) + v); }

  // From the last step to the first. J is triangular, so that J^T v = g can be solved in this order if the transform was
  // inverted: what later features' parameters add to the gradient of a feature is known before its own are needed.
  void masked(const Transform& t) {
    std::memset(gradient_of(0), 0, sizeof(T) * chain.units(t, 0) * rows);
    const int length = chain.lengths[index];
    for (int begin = (t.steps - 1) / length * length; begin >= 0; begin -= length) {
      const int end = std::min(begin + length, t.steps);
      for (int i = t.starts[begin]; i < t.starts[end]; i++) elementwise(t, i);
      backpropagate(t, begin, end);
    }
    if (!inverts && needs_features)
      for (int i = 0; i < t.features; i++)
        for (int v = 0; v < vectors; v++)
          add_to(features.get() + (size_t)t.order[i] * rows + v * L::count,
                 L::load(gradient_of(0) + (size_t)(t.context + i) * rows + v * L::count));
    if (args.grad_context) add_context_gradients(t);
    for (int j = 0; j < t.operation_count; j++)
      if (tensors.of(index, j).has_any) add_weight_gradients(t, j);
  }

  void elementwise(const Transform& t, int i) {
    const size_t offset = (size_t)i * t.parameters * rows, input = (size_t)(t.context + i) * rows;
    for (int v = 0; v < vectors; v++) {
      T* at = features.get() + (size_t)t.order[i] * rows + v * L::count;
      const Parameters<T> p{value_of(t.operation_count) + offset + v * L::count, rows};
      T* to = gradient_of(t.operation_count) + offset + v * L::count;
      const Vector x = L::load(value_of(0) + input + v * L::count);
      Gradients<Vector> g{L::load(at), log_det_of(t.order[i], v)};
      if (inverts) g.value += L::load(gradient_of(0) + input + v * L::count);
      L::store(at, is_spline(t) ? Spline<T>(t, p, inverts, bins.get()).differentiate(x, g, to)
                                : Affine<T>::differentiate(t, p, inverts, x, g, to));
    }
  }

  // Computes the gradients of all units that are computed at steps [begin, end), from those of the units that read them.
  void backpropagate(const Transform& t, int begin, int end) {
    for (int j = t.operation_count - 1; j >= 0; j--) {
      const Operation& o = t.operations[j];
      const OperationLayout& layout = chain.of(index, j);
      const int first = chain.ready(t, j + 1, begin - 1), last = chain.ready(t, j + 1, end - 1);
      const size_t at = (size_t)first * rows, size = (size_t)(last - first) * rows;
      T* g = gradient_of(j + 1) + at;
      const T *slopes = slopes_of(layout) + at, *weights = chain.bias(layout) + first;
      // Adds terms to the gradients of the same units of a value, or sets these if no later operation reads the value.
      const auto propagate = [&](int value, bool adds, const auto& term) {
        T* to = gradient_of(value) + at;
        for (size_t i = 0; i < size; i += L::count)
          L::store(to + i, term(i, L::load(g + i)) + (adds ? L::load(to + i) : Vector{}));
      };
      const auto unchanged = [](size_t, Vector g) { return g; };
      switch (o.kind) {
        case OperationKind::linear:
          multiply_by_slopes(o.function, value_of(j + 1) + at, slopes, g, size);
          through_layer(t, j, begin, end);
          break;
        case OperationKind::activation:
          multiply_by_slopes(o.function, value_of(j + 1) + at, slopes, g, size);
          propagate(o.source, layout.is_source_read_later, unchanged);
          break;
        case OperationKind::sum:
          propagate(o.source, layout.is_source_read_later, unchanged);
          propagate(o.other, layout.is_other_read_later, unchanged);
          break;
        case OperationKind::extrapolation:
          propagate(o.source, layout.is_source_read_later,
                    [&](size_t i, Vector g) { return g * (weights[i / rows] + T(1)); });
          propagate(o.other, layout.is_other_read_later, [&](size_t i, Vector g) { return -g * weights[i / rows]; });
          break;
        case OperationKind::add_context: {
          T* of_layer = context_layer_gradient(layout) + at;
          std::memcpy(of_layer, g, sizeof(T) * size);
          multiply_by_slopes(o.function, slopes, slopes, of_layer, size);
          propagate(o.source, layout.is_source_read_later, unchanged);
          break;
        }
        case OperationKind::gate_context: {
          T* of_layer = context_layer_gradient(layout) + at;
          const T* value = value_of(o.source) + at;
          for (size_t i = 0; i < size; i += L::count) L::store(of_layer + i, L::load(g + i) * L::load(value + i));
          multiply_by_slopes(Activation::sigmoid, slopes, slopes, of_layer, size);
          propagate(o.source, layout.is_source_read_later, [&](size_t i, Vector g) { return g * L::load(slopes + i); });
        }
      }
    }
  }

  // The gradients of inputs that are known from step `begin` on, before `end`: weight^T g.
  void through_layer(const Transform& t, int j, int begin, int end) {
    const Operation& o = t.operations[j];
    const OperationLayout& layout = chain.of(index, j);
    int first = chain.ready(t, o.source, begin - 1), last = chain.ready(t, o.source, end - 1);
    if (!o.source && !args.grad_context) first = std::max(first, t.context);
    if (!o.source && !needs_features) last = std::min(last, t.context);
    T* to = gradient_of(o.source) + (size_t)first * rows;
    const int all = o.ready[t.steps - 1];
    const bool adds = !o.source || layout.is_source_read_later;
    multiply<T, vectors>(
        Matrix<T>{chain.weight(layout), 1, layout.inputs}, first, last,
        [&](int input, int) { return Range{chain.readers(layout, input), all}; }, gradient_of(j + 1), to,
        [&](int unit, int v) { return adds ? L::load(to + (size_t)unit * rows + v * L::count) : Vector{}; },
        [](int, Vector sum) { return sum; });
  }

  void add_context_gradients(const Transform& t) {
    for (int i = 0; i < t.context; i++)
      for (int v = 0; v < vectors; v++)
        add_to(context_gradient.get() + (size_t)(t.input_rows[i] - t.context_start) * rows + v * L::count,
               L::load(gradient_of(0) + (size_t)i * rows + v * L::count));
    for (int j = 0; j < t.operation_count; j++) {
      const Operation& o = t.operations[j];
      if (o.weight < 0 || o.kind == OperationKind::linear) continue;
      const OperationLayout& layout = chain.of(index, j);
      const Range units{0, o.ready[t.steps - 1]};
      T* to = context_gradient.get();
      multiply<T, vectors>(
          Matrix<T>{chain.weight(layout), 1, layout.inputs}, 0, layout.inputs, [&](int, int) { return units; },
          context_layer_gradient(layout), to,
          [&](int unit, int v) { return L::load(to + (size_t)unit * rows + v * L::count); },
          [](int, Vector sum) { return sum; });
    }
  }

  void add_weight_gradients(const Transform& t, int j) {
    const Operation& o = t.operations[j];
    const OperationLayout& layout = chain.of(index, j);
    const SumLayout& s = tensors.of(index, j);
    const bool is_linear = o.kind == OperationKind::linear;
    const T* g = is_linear ? gradient_of(j + 1) : context_layer_gradient(layout);
    const T* in = is_linear ? value_of(o.source) : context.get();
    transpose<T>(in, is_linear ? chain.ready(t, o.source, t.steps - 1) : layout.inputs, rows, transposed.get(), s.stride);
    constexpr int count = registers / 4;
    const int all = o.ready[t.steps - 1];
    for (int unit = 0; unit < all; unit += count) {
      const int units = std::min(count, all - unit);
      const int read = is_linear ? chain.reads(layout, unit + units - 1) : layout.inputs;
      add_outer_product(g + (size_t)unit * rows, transposed.get(), units, read, rows, s.stride,
                        sums + s.weight + (size_t)unit * s.stride);
      for (int u = unit; u < unit + units; u++)
        for (int v = 0; v < vectors; v++)
          add_to(sums + s.bias + (size_t)u * L::count, L::load(g + (size_t)u * rows + v * L::count));
    }
  }
};

}  // namespace jacobiflow
