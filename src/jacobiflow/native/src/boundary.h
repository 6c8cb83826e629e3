// The structures that cross the boundary between Python and C++. C++ trusts them: boundary.py has checked what they point
// to. When it loads the library it compares its own structures with these, see boundary.cpp.
#pragma once

#include <cstdint>

namespace jacobiflow {

enum class OperationKind : int32_t { linear, activation, sum, add_context, gate_context, extrapolation };

enum class Activation : int32_t { identity, relu, leaky_relu, elu, selu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus };

// Makes one value of a network from earlier ones. Value 0 is the network's input.
struct Operation {
  OperationKind kind;
  int32_t source, other;        // values
  int32_t units;                // of the new value
  int32_t weight, bias;         // indices of the transform's tensors, or -1
  Activation function;            // applied to the result
  int32_t is_kept;              // whether later steps read the value
  double first, second;         // settings of the function
  const uint8_t* mask;          // of the weight, 0 or 1; null if it has none
  const int32_t *rows, *ready;  // (units): the unit's row in the weight; (steps): the number of units each step can compute
};

enum class TransformKind : int32_t {
  permutation, affine, soft_clipped_affine, softplus_affine, sigmoid_affine, clamped_affine, log_affine,
  rational_quadratic, rational_linear, normal
};

enum class SplineBoundary : int32_t { fixed, free, circular };

// x -> y, feature by feature. A masked network gives the parameters from the features of earlier steps. `normal` leaves x as
// it is, and adds its log-density for a normal distribution to the log-determinant: so the base of a flow ends its chain.
struct Transform {
  TransformKind kind;
  int32_t features, steps, parameters, operation_count;
  int32_t context, context_start;  // number of context columns in the network's input, and the first of them
  int32_t first_tensor;            // index in the call's tensors of the transform's first one
  int32_t scale_stride, shift_stride;  // of the two tensors of `affine` and `normal`: 0 for one number, 1 for one per feature
  int32_t bins;
  SplineBoundary ends;                       // derivatives at the ends of a spline
  int32_t is_soft_clipped, has_tails, is_circular;
  int32_t is_reversed;             // whether the chain has its inverse
  double first, second;            // settings of affine transforms
  double low, high, min_width, min_height, min_slope, end_slope, factor, gap, clip;  // of splines
  const Operation* operations;
  const int32_t *order, *starts;   // (features): sorted by step; (steps + 1): where each step starts in it
  const int32_t *input_rows, *input_ready;  // `rows` and `ready` of value 0
};

struct ChainArgs {
  const Transform* transforms;
  const void* const* tensors;
  const void *input, *context;
  void *out, *log_det;              // (rows, features); null, (rows,), or (rows, features) if `is_by_feature`
  uint8_t* failed;                  // (rows): 1 for a row that the library has to compute
  // For gradients, or else null: packed weights, and the values of all rows unless these are to be computed again. Their
  // sizes are those of `jacobiflow_masked_sizes`.
  void *packed, *activations;
  int64_t rows, in_stride, context_stride;  // a stride of 0: the same row for all
  int32_t count, features, context_features, is_inverse, is_by_feature, threads;
};

// Gradients of a loss, from those of a call's results. `chain` is that of the call but without results; null for zeros, or
// for what is not needed.
struct GradientArgs {
  const ChainArgs* chain;
  const void *grad_out, *grad_log_det;  // (rows, features); like `log_det`
  void* const* grad_tensors;            // like `tensors`
  void *grad_input, *grad_context;      // (rows, features); (rows, context_features)
};

enum class WeightFormat : int32_t { float32, float64, bfloat16, float16, int16 };

// A weight (outputs, inputs): in panels of columns, as jacobiflow_pack makes them, or row after row. Output i of int16 is
// multiplied by scales[i], which is otherwise null.
struct Weight {
  const void* values;
  const float* scales;
  WeightFormat format;
  int32_t is_packed;
};

// A layer is an attention and a perceptron, h <- h + attend(norm(h)), h <- h + down(gelu(up(norm(h)))). What follows
// `down_bias` may be null. `condition` (tokens, stride) is added to h before. `query_norm` and `key_norm` are over all heads.
// With `scale` the layer is Prose's, see flows/prose.py: its input is scale * normalised h + shift, its output is
// multiplied by `gate` and added to h, and so is that of a second, gated perceptron.
template <typename T>
struct LayerArgs {
  const T *norm, *norm_bias;
  Weight qkv;
  const T* qkv_bias;
  Weight proj;
  const T *proj_bias, *mlp_norm, *mlp_norm_bias;
  Weight up;
  const T* up_bias;
  Weight down;
  const T* down_bias;
  const T *query_norm, *query_norm_bias, *key_norm, *key_norm_bias, *condition;
  const T *scale, *shift, *gate, *gated_scale, *gated_shift;
  Weight gated_up, gated_down;
  const T* gated_gate;
};

// z and x are (samples, tokens, values). The network has `networks` rows per sample: first those with labels, of all
// samples, then the unconditional ones. `context` is added to the embeddings of a row and a token that are so many numbers
// apart. A `*_bias` is as long as the padded columns of its weight. `keys_values` is the memory of `attend`, and lives as
// long as calls go on with the same x. To `log_det` (samples) the log-scales are added.
//
// A STARFlow has a prefix: the keys and values (layers, rows, 2, heads, prefix, head) of so many positions before the
// tokens, and the output of the last layer for the last of them, `prefix_hidden` (rows, channels), from which entry 0 is
// read. `rotation` (prefix + tokens, head) has the cosine and the sine for each pair of a query's and a key's channels,
// `final_norm` the weights of an RMS norm. `soft_clip`, if not 0, bounds the outputs softly, and a scale is then
// softplus(a + log(e - 1)). `by_density` is that rule of guidance.
template <typename T>
struct RecurrenceArgs {
  const T *z, *position, *context, *query_scale;
  Weight proj_in, proj_out;
  const T *out_bias, *weight_scale, *weight_shift, *prefix_keys_values, *prefix_hidden, *rotation, *final_norm;
  const LayerArgs<T>* layers;
  T *x, *keys_values;
  double* log_det;
  int32_t samples, networks, tokens, values, channels, hidden, heads, depth, scales, context_row, context_token, prefix,
      by_density, threads, teams, start, stop;
  double soft_clip;
};

}  // namespace jacobiflow
