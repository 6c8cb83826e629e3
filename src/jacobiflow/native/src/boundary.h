// The structures and enumerations that Python and C++ share. boundary.py reads them from this file, so a field has a line of
// its own. C++ trusts what it gets: tensors.py has checked all shapes, dtypes and addresses.
#pragma once

#include "lanes.h"

namespace jacobiflow {

enum class OperationKind : int32_t { linear, activation, sum, add_context, gate_context, guidance };

enum class Activation : int32_t { identity, relu, leaky_relu, elu, selu, tanh, sigmoid, silu, gelu, gelu_tanh, softplus };

// Computes one value of a masked network from earlier ones. Value 0 is the network's input.
struct Operation {
  OperationKind kind;
  int32_t source;          // index of the value that it reads
  int32_t other;           // index of the second value that `sum` and `guidance` read
  int32_t units;           // number of units of the new value
  int32_t weight;          // index in the transform's tensors, or -1
  int32_t bias;            // index in the transform's tensors, or -1
  Activation activation;   // of the result, or of the layer that reads the context
  int32_t is_kept;         // 1 if later steps read the value
  double negative_slope;   // of leaky_relu
  double alpha;            // of elu
  double beta;             // of softplus
  double threshold;        // of softplus, which is linear above
  const uint8_t* mask;     // shape of the weight, 0 or 1; null without a mask
  const int32_t* rows;     // (units): row of each unit in the weight
  const int32_t* ready;    // (steps): number of units that can be computed at each step
};

enum class TransformKind : int32_t {
  permutation, affine, normal, soft_clip, lu_linear, masked_affine, rational_quadratic, rational_linear, bernstein,
  sum_of_squares
};

// Makes a scale of a parameter p: the exponential of p, p / (1 + clip |p|) or clamped p; the root of p + min_scale; or a function
// of p, plus `min_scale`.
enum class ScaleActivation : int32_t { exp, soft_clipped_exp, clamped_exp, square_root, softplus, sigmoid };

enum class SplineBoundary : int32_t { fixed, free, circular };

// Transforms x to y. `affine` and `normal` have a scale and a shift as tensors. `normal` leaves x as it is, and adds its
// log-density to the log-determinant: the base of a flow ends its chain. `soft_clip` is y = x / (1 + |x / high|). `lu_linear` is
// y = L U x + shift, with ones on the diagonal of L; its tensors are the entries below the diagonal of L, those above the
// diagonal of U, the diagonal of U before its softplus, and the shift. For the kinds after them, a network gives the parameters
// of each feature from the features of earlier steps. A coupling has two steps: features that stay as they are, which the
// network reads, and the others. Without a network, tensors (features, size) are the parameters: two of an affine transform, or
// widths, heights and derivatives.
struct Transform {
  TransformKind kind;
  int32_t features;           // D
  int32_t steps;              // number of groups of features that are solved together
  int32_t parameters;         // number of parameters of each feature
  int32_t identity;           // number of features that stay as they are, the first in `order`
  int32_t inputs;             // number of features that the network reads, the first in `order`: all, or `identity`
  int32_t num_operations;     // 0 without a network
  int32_t context;            // number of context columns in the network's input
  int32_t context_start;      // the first of these columns
  int32_t first_tensor;       // index in ChainArgs.tensors of the transform's first tensor
  int32_t scale_stride;       // of the scale of `affine` and `normal`: 0 for one number, 1 for one per feature
  int32_t shift_stride;       // the same of the shift
  ScaleActivation scale_activation;
  int32_t scale_index;        // 0 if the scale is the first of the two parameters of masked_affine, 1 if it is the second
  int32_t parametrizes_inverse;      // 1 if the parameters of masked_affine are those of the inverse, x = scale y + shift
  int32_t bins;               // number of bins of a spline, or of coefficients of a polynomial
  SplineBoundary boundary;    // derivatives at the ends of a spline: a constant, parameters, or one parameter for both
  int32_t is_soft_clipped;    // 1 if the parameters of a spline are soft-clipped
  int32_t has_tails;          // 1 if a spline is the identity outside of [low, high]
  int32_t is_circular;        // 1 if a spline takes x modulo high - low
  int32_t is_inverted;        // 1 if the chain has the inverse of the transform
  double clip;                // soft-clips p to p / (1 + clip |p|); for widths and heights twice as strongly
  double min_scale;           // added to a scale by softplus or sigmoid, and to the diagonal of U
  double max_scale;           // of softplus; 0 without a bound
  double logit_shift;         // added to the logit of a scale by sigmoid
  double min_log_scale;       // of clamped_exp
  double max_log_scale;       // of clamped_exp
  double low;                 // start of a spline
  double high;                // end of a spline, or bound of a polynomial or soft_clip
  double min_width;           // of a bin, as a fraction of high - low
  double min_height;          // of a bin, as a fraction of high - low
  double min_slope;           // added to the derivative at a knot, or to a sum of squares
  double end_slope;           // derivative at the ends if the boundary is `fixed`
  double logit_scale;         // multiplies the logits of widths and heights
  double edge_margin;         // added to the edges of bins in the search of a bin; width of the ends of bernstein
  const Operation* operations;
  const int32_t* order;       // (features): features, sorted by step
  const int32_t* starts;      // (steps + 1): where each step starts in `order`
  const int32_t* input_rows;  // Operation.rows of value 0
  const int32_t* input_ready; // Operation.ready of value 0
};

// A call of a chain of transforms. `packed` and `activations` are for gradients, and have the sizes that
// jacobiflow_masked_sizes gives.
struct ChainArgs {
  const Transform* transforms;
  const void* const* tensors;  // weights, biases, scales and shifts of all transforms
  const void* input;           // (rows, features)
  const void* context;         // (rows, context_features), or null
  void* out;                   // (rows, features)
  void* log_det;               // (rows), or (rows, features) if is_by_feature; null if it is not needed
  uint8_t* failed;             // (rows): 1 for a row that is not finite
  void* packed;                // packed weights, or null
  void* activations;           // values of all rows; null if the backward pass computes them again
  int64_t rows;
  int64_t in_stride;           // between rows of the input
  int64_t context_stride;      // between rows of the context; 0 if all rows share one
  int32_t count;               // number of transforms
  int32_t features;
  int32_t context_features;
  int32_t is_inverse;
  int32_t is_by_feature;
  int32_t num_threads;
};

// Gradients of a loss in the inputs of a call, from those in its results. A null gradient of a result is 0, and a null
// gradient of an input is not needed.
struct GradientArgs {
  const ChainArgs* chain;      // of the call, without results
  const void* grad_out;        // (rows, features)
  const void* grad_log_det;    // shape of log_det
  void* const* grad_tensors;   // in the order of ChainArgs.tensors
  void* grad_input;            // (rows, features)
  void* grad_context;          // (rows, context_features)
};

enum class WeightFormat : int32_t { float32, float64, bfloat16, float16 };

// A weight (outputs, inputs): in panels of columns as jacobiflow_store makes them, or row after row.
struct Weight {
  const void* values;
  WeightFormat format;
  int32_t is_packed;  // 1 if in panels
};

// A copy of a weight that jacobiflow_store makes. In panels it has whole vectors of outputs, else of outputs and inputs.
struct WeightCopy {
  Weight copy;
  const void* source;  // row after row
  int32_t outputs;
  int32_t inputs;
};

// A transformer layer: h <- h + proj(attention(norm(h))), then h <- h + down(gelu(up(mlp_norm(h)))). Pointers after
// `down_bias` may be null. With `scale` the layer is Prose's, see models/prose.py: its input is scale * norm(h) + shift, its
// output times `gate` is added to h, and so is that of a second, gated perceptron. Tables of tokens have padded rows.
template <typename T>
struct LayerArgs {
  const T* norm;             // (width)
  const T* norm_bias;        // (width)
  Weight qkv;                // (3 width, width)
  const T* qkv_bias;         // (3 width)
  Weight proj;               // (width, width)
  const T* proj_bias;        // (width)
  const T* mlp_norm;         // (width)
  const T* mlp_norm_bias;    // (width)
  Weight up;                 // (hidden, width)
  const T* up_bias;          // (hidden)
  Weight down;               // (width, hidden)
  const T* down_bias;        // (width)
  const T* query_norm;       // (width), of all heads together
  const T* query_norm_bias;  // (width)
  const T* key_norm;         // (width), of all heads together
  const T* key_norm_bias;    // (width)
  const T* condition;        // (tokens, width), added to h first
  const T* scale;            // (tokens, width)
  const T* shift;            // (tokens, width)
  const T* gate;             // (tokens, width)
  const T* gated_scale;      // (tokens, width), of the gated perceptron
  const T* gated_shift;      // (tokens, width)
  Weight gated_up;           // (2 hidden, width)
  Weight gated_down;         // (width, hidden)
  const T* gated_gate;       // (tokens, width)
};

// The inverse of a block with a causal transformer. The network has rows = rows_per_sample * samples rows: first the
// conditional row of each sample, then, for guidance, the unconditional ones. Biases are padded to whole vectors.
template <typename T>
struct TransformerArgs {
  const T* z;                   // (samples, tokens, token_dim)
  const T* position;            // (tokens, width), added to the projection of each token
  const T* context;             // (rows, tokens, width) by its strides, added to the embeddings; null without a context
  const T* query_scale;         // (rows), or null: multiplies the attention's logits
  Weight proj_in;               // (width, token_dim)
  Weight proj_out;              // (token_dim or 2 token_dim, width)
  const T* out_bias;            // (outputs of proj_out)
  const T* guidance_scale;      // (tokens): guidance weights of the log-scales
  const T* guidance_shift;      // (tokens): guidance weights of the shifts
  const T* prefix_keys_values;  // (depth, rows, 2, heads, prefix_length, width / heads)
  const T* prefix_hidden;       // (rows, width): last layer's output at the prefix's end, which gives entry 0
  const T* rotation;            // (prefix_length + tokens, width / heads): cosine and sine of each pair, or null
  const T* final_norm;          // (width): weights of an RMS norm of the last layer's output, or null
  const LayerArgs<T>* layers;   // (depth)
  T* x;                         // (samples, tokens, token_dim)
  T* keys_values;               // memory of KeyValueCache, which lives until all tokens are solved
  double* log_det;              // (samples), to which the log-scales are added
  int32_t samples;
  int32_t rows_per_sample;      // 1, or 2 with guidance
  int32_t tokens;
  int32_t token_dim;            // numbers of a token
  int32_t width;
  int32_t hidden;               // units of a layer's perceptron
  int32_t heads;
  int32_t depth;                // number of layers
  int32_t has_scale;            // 0 if log-scales are 0
  int32_t context_row_stride;   // in numbers; 0 if all rows share one context
  int32_t context_token_stride; // in numbers; 0 if all tokens share one context
  int32_t prefix_length;        // positions before the tokens
  int32_t is_by_density;        // 1 for guidance by densities
  int32_t num_threads;
  int32_t num_teams;            // each has samples of its own
  int32_t start;                // first token to solve
  int32_t stop;                 // token after the last one to solve
  double soft_clip;             // if not 0, outputs o become soft_clip tanh(o / soft_clip), and scales a softplus
};

}  // namespace jacobiflow
