// A chain of transforms: its packed weights, and where its values lie in memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "activations.h"
#include "products.h"
#include "threads.h"

namespace jacobiflow {

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : data_(static_cast<T*>(::operator new(sizeof(T) * (size + 1), alignment))) {}
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, alignment); }
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t alignment{64};
  T* data_;
};

inline bool reads_context(const Operation& o) {
  return o.kind == OperationKind::add_context || o.kind == OperationKind::gate_context;
}

inline bool reads_value(const Operation& o, int value) {
  const bool reads_other = o.kind == OperationKind::sum || o.kind == OperationKind::guidance;
  return o.source == value || (reads_other && o.other == value);
}

// Returns whether the network reads only features that stay as they are.
inline bool is_coupling(const Transform& t) { return t.num_operations && t.inputs < t.features; }

// Returns whether tensors are the parameters of the features.
inline bool is_constant(const Transform& t) { return t.kind >= TransformKind::masked_affine && !t.num_operations; }

// Returns the numbers of parameters that these tensors have for each feature.
inline std::vector<int> tensor_sizes(const Transform& t) {
  if (t.kind == TransformKind::masked_affine) return {1, 1};
  if (t.kind == TransformKind::rational_linear) return {t.bins, t.bins, t.bins - 1, t.bins};
  return {t.bins, t.bins, t.parameters - 2 * t.bins};
}

// Where the numbers of an operation lie. An affine transform without a network has one layout: its scale is a weight with one
// input for each feature, and its shift the bias. lu_linear has two: U with its diagonal before the softplus as bias, and L with
// the shift. If tensors are the parameters, each of them is a weight.
struct OperationLayout {
  int weight_index = -1, bias_index = -1;  // in ChainArgs.tensors; -1 without one
  int units = 0, inputs = 0;               // rows and columns of the weight
  size_t weight = 0;                       // offset in the packed weights: (units, inputs), sorted by step
  size_t bias = 0;                         // offset in the packed weights: (units), sorted by step
  const void* in_place = nullptr;          // the weight itself if it is not packed
  bool is_stored = false;                  // the backward pass reads its value
  bool has_slopes = false;                 // the backward pass reads the derivatives of its activation
  size_t place = 0;                        // first unit of its value in a tile's memory if it is not stored
  size_t sums = 0;                         // first unit in a tile's memory of the sums that it starts from
  size_t value = 0;                        // first unit in a tile's activations
  size_t slopes = 0;                       // first unit in a tile's activations of the derivatives
  size_t gradient = 0;                     // first unit in a transform's gradients
  size_t layer_gradient = 0;               // first unit in a transform's gradients of the layer of the context
  size_t reads = 0;                        // offset in `ranges`: for each unit, the end of the inputs that it reads
  size_t readers = 0;                      // offset in `ranges`: for each input, the first unit that reads it
  bool is_source_read_later = false;       // a later operation reads its source
  bool is_other_read_later = false;        // a later operation reads its second source
};

constexpr int block_steps = 32;  // steps of an inverse after which the sums of later units start anew

// A chain as a call evaluates it: its packed weights, and the place of each value in a tile's memory.
template <typename T>
class Chain {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;

  explicit Chain(const ChainArgs& call) : call(call), packed(static_cast<const T*>(call.packed)) {
    shares_context = call.context_features && !call.packed && has_equal_rows();
    for (int i = 0; i < call.count; i++) {
      const Transform& t = call.transforms[i];
      first_layouts.push_back((int)layouts.size());
      inputs.push_back((int)activation_units);
      activation_units += gradient_units = units(t, 0);
      used = 2 * call.features + call.context_features + units(t, 0);
      lengths.push_back(inverts(t) ? 1 : group(t));
      for (int j = 0; j < t.num_operations; j++) layouts.push_back(layout_of(t, j));
      if (t.kind == TransformKind::affine || t.kind == TransformKind::normal)
        layouts.push_back(tensor_layout(t, 0, 1, call.features, 1));
      if (t.kind == TransformKind::lu_linear) {
        layouts.push_back(tensor_layout(t, 1, 2, t.features, t.features));
        layouts.push_back(tensor_layout(t, 0, 3, t.features, t.features));
        work += (int64_t)t.features * t.features;
      }
      if (is_constant(t)) {
        max_constants = std::max(max_constants, t.parameters);
        int tensor = 0;
        for (int size : tensor_sizes(t)) layouts.push_back(tensor_layout(t, tensor++, -1, t.features - t.identity, size));
      }
      max_gradient_units = std::max(max_gradient_units, gradient_units);
      tile_units = std::max(tile_units, used);
      max_bins = std::max(max_bins, t.bins);
    }
    first_layouts.push_back((int)layouts.size());
    tile_units += feature_units();
  }

  // Packs the weights, into memory of the caller if it has given some.
  void pack() {
    if (!to_packed) packed = to_packed = memory.emplace_back(packed_size).get();
    std::atomic<int> next{0};
    in_threads((int)std::min<int64_t>(call.num_threads, 1 + work / 200000), [&](int) {
      for (int i; (i = next++) < call.count;) {
        const Transform& t = call.transforms[i];
        for (int j = 0; j < t.num_operations; j++) pack(t, t.operations[j], layouts[first_layouts[i] + j]);
        if (t.kind == TransformKind::lu_linear)
          pack_lu(t, of(i, 0), of(i, 1));
        else if (is_constant(t))
          for (size_t k = 0; k < num_layouts(i); k++) pack_parameters(of(i, (int)k));
        else if (!t.num_operations && num_layouts(i))
          pack_numbers(t, of(i, 0));
      }
    });
  }

  const ChainArgs call;
  bool shares_context = false;     // biases have the context, which all rows share
  int max_bins = 0;                // most bins of a transform
  int max_constants = 0;           // most parameters in tensors of a feature
  int64_t work = 0;                // multiplications for each row
  size_t packed_size = 0;          // in numbers
  size_t tile_units = 0;           // units of a tile's memory, which ends with `feature_units`
  size_t activation_units = 0;     // units of a tile's activations
  size_t max_gradient_units = 0;   // most units of the gradients of a transform
  std::vector<OperationLayout> layouts;
  std::vector<int> first_layouts;  // for each transform, and the end
  std::vector<int> lengths;        // for each transform, the number of steps that are computed together
  std::vector<int> inputs;         // for each transform, the first unit of its input in a tile's activations
  std::vector<int> ranges;
  const T* packed;                 // weights, null before they are packed
  std::atomic<bool> is_finite{true};

  size_t num_layouts(int transform) const { return first_layouts[transform + 1] - first_layouts[transform]; }

  const OperationLayout& of(int transform, int operation) const { return layouts[first_layouts[transform] + operation]; }

  bool is_stored(int transform, int value) const { return !value || of(transform, value - 1).is_stored; }

  // Return the first unit of a value in a tile's activations, and of its gradient in the transform's gradients.
  size_t value(int transform, int value) const { return value ? of(transform, value - 1).value : inputs[transform]; }
  size_t gradient(int transform, int value) const { return value ? of(transform, value - 1).gradient : 0; }

  // Return the end of the inputs that a unit of a layer reads, and the first unit that reads an input.
  int reads(const OperationLayout& layout, int unit) const { return ranges[layout.reads + unit]; }
  int readers(const OperationLayout& layout, int input) const { return ranges[layout.readers + input]; }

  const T* weight(const OperationLayout& layout) const {
    return layout.in_place ? static_cast<const T*>(layout.in_place) : packed + layout.weight;
  }
  const T* bias(const OperationLayout& layout) const { return packed + layout.bias; }

  // Calls use(index, parameter, its tensor, its column) for the parameters of a feature that are in tensors.
  template <typename Use>
  void each_parameter(int transform, int feature, const Use& use) const {
    for (int k = 0, p = 0; k < (int)num_layouts(transform); k++)
      for (int i = 0; i < of(transform, k).inputs; i++, p++) {
        const OperationLayout& layout = of(transform, k);
        use(p, weight(layout)[(size_t)feature * layout.inputs + i], k, i);
      }
  }

  // Returns L or U of lu_linear, for tiles of `vectors` vectors.
  template <int vectors>
  Triangle<T, vectors> triangle(int transform, bool is_lower) const {
    const OperationLayout& layout = of(transform, is_lower);
    return {{weight(layout), layout.inputs, 1}, layout.units, is_lower};
  }

  int units(const Transform& t, int value) const {
    if (value) return t.operations[value - 1].units;
    return t.num_operations ? t.context + t.features : t.kind == TransformKind::permutation ? 0 : call.features;
  }

  static const int32_t* rows(const Transform& t, int value) { return value ? t.operations[value - 1].rows : t.input_rows; }

  // Returns the number of units of a value that can be computed once the features before `step` are solved.
  static int ready(const Transform& t, int value, int step) {
    return step < 0 ? 0 : (value ? t.operations[value - 1].ready : t.input_ready)[step];
  }

  // Returns the number of units of a tile for the transform of a feature: two for each bin, and the parameters in tensors.
  size_t feature_units() const { return (size_t)2 * max_bins + max_constants; }

  bool inverts(const Transform& t) const { return call.is_inverse != t.is_inverted; }

  // Returns the first input of a sum. A context that all rows share is in the bias already.
  int first_input(const Transform& t, const Operation& o) const { return shares_context && !o.source ? t.context : 0; }

 private:
  std::vector<Buffer<T>> memory;
  size_t gradient_units = 0, used = 0;  // units of the present transform's gradients, and of a tile's memory
  T* to_packed = static_cast<T*>(call.packed);

  // Returns the most units that `length` steps add.
  static size_t max_new_units(const Operation& o, int steps, int length) {
    int max_units = 0;
    for (int step = 0; step < steps; step += length) {
      const int last = std::min(step + length, steps) - 1;
      max_units = std::max(max_units, o.ready[last] - (step ? o.ready[step - 1] : 0));
    }
    return max_units;
  }

  // Returns a layout with memory for a packed weight and bias; the indices are those in the transform's tensors, or -1.
  OperationLayout tensor_layout(const Transform& t, int weight, int bias, int units, int inputs) {
    OperationLayout layout;
    layout.weight_index = weight < 0 ? -1 : t.first_tensor + weight;
    layout.bias_index = bias < 0 ? -1 : t.first_tensor + bias;
    layout.units = units;
    if (weight < 0 && bias < 0) return layout;
    layout.inputs = weight < 0 ? 0 : inputs;
    layout.bias = packed_size;
    layout.weight = packed_size + units;
    packed_size += (size_t)units * (layout.inputs + 1);
    return layout;
  }

  OperationLayout layout_of(const Transform& t, int j) {
    const Operation& o = t.operations[j];
    const int num_inputs = reads_context(o) ? call.context_features : o.source ? units(t, o.source) : t.context + t.inputs;
    OperationLayout layout = tensor_layout(t, o.weight, o.bias, o.units, num_inputs);
    work += (int64_t)o.units * layout.inputs;
    const bool is_activated = o.activation != Activation::identity;
    layout.has_slopes = needs_slopes(o.activation) || (reads_context(o) && is_activated);
    layout.is_stored = o.is_kept || j + 1 == t.num_operations || (is_activated && !layout.has_slopes);
    for (int k = j + 1; k < t.num_operations; k++) {
      const Operation& later = t.operations[k];
      layout.is_stored |= later.kind == OperationKind::gate_context && later.source == j + 1;
      layout.is_source_read_later |= reads_value(later, o.source);
      layout.is_other_read_later |= reads_value(later, o.other);
    }
    layout.place = used;
    layout.sums = used += o.is_kept ? o.units : max_new_units(o, t.steps, lengths.back());
    if (inverts(t) && t.steps > block_steps) used += max_new_units(o, t.steps, block_steps);
    layout.value = activation_units;
    layout.slopes = activation_units += layout.is_stored ? o.units : 0;
    activation_units += layout.has_slopes ? o.units : 0;
    layout.gradient = gradient_units;
    layout.layer_gradient = gradient_units += o.units;
    gradient_units += reads_context(o) ? o.units : 0;
    if (o.kind == OperationKind::linear) {
      layout.reads = ranges.size();
      for (int step = 0; step < t.steps; step++) ranges.resize(layout.reads + o.ready[step], ready(t, o.source, step));
      layout.readers = ranges.size();
      for (int step = 0; step < t.steps; step++)
        ranges.resize(layout.readers + ready(t, o.source, step), ready(t, j + 1, step - 1));
    }
    return layout;
  }

  // Returns the number of steps that the forward direction computes together, so that their units fill the registers.
  static int group(const Transform& t) {
    int min_units = (t.features - t.identity) * std::max(t.parameters, 1);
    for (int i = 0; i < t.num_operations; i++)
      if (t.operations[i].kind == OperationKind::linear) min_units = std::min(min_units, t.operations[i].units);
    return std::max(1, std::min(t.steps, 12 * t.steps / std::max(min_units, 1)));
  }

  bool has_equal_rows() const {
    const T* context = static_cast<const T*>(call.context);
    if (call.context_stride)
      for (int64_t row = 1; row < call.rows; row++)
        if (std::memcmp(context, context + row * call.context_stride, sizeof(T) * call.context_features)) return false;
    return true;
  }

  // Returns null for index -1.
  const T* tensor(int index) const { return index < 0 ? nullptr : static_cast<const T*>(call.tensors[index]); }

  // Adds 0, or NaN if a value is not finite. The libraries multiply weights by masks, so a masked one gives NaN too.
  static void add_non_finite(const T* values, int64_t size, Vector& non_finite) {
    int64_t i = 0;
    for (; i + S::lanes <= size; i += S::lanes) non_finite += S::load(values + i) * T(0);
    for (; i < size; i++) non_finite[0] += values[i] * T(0);
  }

  void pack_numbers(const Transform& t, const OperationLayout& layout) {
    const T *scale = tensor(layout.weight_index), *shift = tensor(layout.bias_index);
    for (int f = 0; f < call.features; f++) {
      to_packed[layout.weight + f] = scale[f * t.scale_stride];
      to_packed[layout.bias + f] = shift[f * t.shift_stride];
    }
  }

  void pack_parameters(const OperationLayout& layout) {
    std::copy_n(tensor(layout.weight_index), (size_t)layout.units * layout.inputs, to_packed + layout.weight);
  }

  void pack_lu(const Transform& t, const OperationLayout& of_upper, const OperationLayout& of_lower) {
    const T *lower = tensor(of_lower.weight_index), *upper = tensor(of_upper.weight_index);
    const T *diagonal = tensor(of_upper.bias_index), *shift = tensor(of_lower.bias_index);
    T *to_lower = to_packed + of_lower.weight, *to_upper = to_packed + of_upper.weight;
    for (int i = 0; i < t.features; i++)
      for (int j = 0; j < t.features; j++) {
        *to_lower++ = j < i ? *lower++ : T(j == i);
        *to_upper++ = j > i ? *upper++ : j < i ? T(0) : S::softplus(S::broadcast(diagonal[i]), 1, 20)[0] + (T)t.min_scale;
      }
    std::copy_n(diagonal, t.features, to_packed + of_upper.bias);
    std::copy_n(shift, t.features, to_packed + of_lower.bias);
  }

  // Returns whether a weight can be read where it is: a layer of a coupling whose units and inputs are in the order of its rows
  // and columns. The backward pass needs a copy, since the weight may have changed by then.
  bool is_readable(const Transform& t, const Operation& o) const {
    if (!is_coupling(t) || call.packed || o.weight < 0 || o.mask || (o.kind == OperationKind::linear && !o.source)) return false;
    for (int unit = 0; unit < o.units; unit++)
      if (o.rows[unit] != unit) return false;
    return true;
  }

  void pack(const Transform& t, const Operation& o, OperationLayout& layout) {
    const T *weight = tensor(layout.weight_index), *bias = tensor(layout.bias_index);
    if (!weight && !bias) return;
    // Values that are not finite make all rows of a dense layer fail, so there is no need to look for them.
    const bool is_in_place = is_readable(t, o);
    if (is_in_place) layout.in_place = weight;
    Vector non_finite{};
    if (bias) add_non_finite(bias, o.units, non_finite);
    const T* shared = shares_context ? static_cast<const T*>(call.context) : nullptr;
    const int32_t* columns = o.kind == OperationKind::linear ? rows(t, o.source) : nullptr;
    const int context = shared && columns && !o.source ? t.context : 0, all = o.ready[t.steps - 1];
    for (int unit = 0; unit < o.units; unit++) {
      const int64_t row = (int64_t)o.rows[unit] * layout.inputs;
      const T* from = weight + row;
      if (!is_in_place) add_non_finite(from, layout.inputs, non_finite);
      if (unit >= all) continue;  // nothing reads it
      T total = bias ? bias[o.rows[unit]] : 0;
      T* to = to_packed + layout.weight + (size_t)unit * layout.inputs;
      if (columns && !is_in_place) {
        // Units and inputs are multiplied in blocks, whose other entries are 0.
        const int read = reads(layout, unit), last = std::min(unit + max_units, all) - 1;
        const int beyond = std::max(reads(layout, last), read + max_units);
        gather(from, o.mask ? o.mask + row : nullptr, columns, read, to);
        std::fill(to + read, to + std::min(beyond, layout.inputs), T(0));
        for (int k = 0; k < context; k++) total += to[k] * shared[columns[k] - t.context_start];
      } else if (weight && !columns) {
        if (!is_in_place) std::memcpy(to, from, sizeof(T) * layout.inputs);
        for (int k = 0; shared && k < layout.inputs; k++) total += from[k] * shared[k];
      }
      to_packed[layout.bias + unit] = total;
    }
    for (int lane = 0; lane < S::lanes; lane++)
      if (non_finite[lane] != 0) is_finite = false;
  }

  static void gather(const T* from, const uint8_t* mask, const int32_t* columns, int count, T* __restrict to) {
    if (mask)
      for (int k = 0; k < count; k++) to[k] = mask[columns[k]] ? from[columns[k]] : T(0);
    else
      for (int k = 0; k < count; k++) to[k] = from[columns[k]];
  }
};

}  // namespace jacobiflow
