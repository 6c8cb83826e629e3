// The library's exact loop for a browser, which solves one image by one block.
#include <chrono>
#include <cstdlib>
#include <thread>

// WebAssembly has no exceptions and, here, no threads. These names let the library compile; without memory the page stops.
extern "C" void* __cxa_allocate_exception(size_t) { std::abort(); }
extern "C" void __cxa_throw(void*, void*, void (*)(void*)) { std::abort(); }
namespace std {
struct thread {
  template <typename Run>
  explicit thread(const Run&) {}
  void join() {}
};
namespace this_thread {
inline void yield() {}
inline void sleep_for(chrono::microseconds) {}
}  // namespace this_thread
}  // namespace std

#include "transformer.h"

using namespace jacobiflow;

// Sizes of a block, as model.json has them.
struct Sizes {
  int32_t tokens, token_dim, width, hidden, heads, depth, classes;
};

// A solve of one block. It holds the weights in panels, and what the structures point to.
struct Loop {
  const float* next;  // parameter of the block, in the order of its file
  std::vector<std::vector<float>> copies;
  std::vector<LayerArgs<float>> layers;
  TransformerArgs<float> args{};
  double log_det = 0;

  Loop(const Sizes& s, const float* parameters, const float* guidance, const float* query_scale, int label, const float* z,
       float* x)
      : next(parameters), layers(s.depth) {
    float* position = copy(s.tokens * s.width);
    const float* classes = read(s.classes * s.width);
    args.proj_in = read_matrix(s.width, s.token_dim);
    const float* bias = read(s.width);
    for (int i = 0; i < s.tokens * s.width; i++) position[i] += bias[i % s.width];
    for (LayerArgs<float>& layer : layers) {
      layer.norm = copy(s.width);
      layer.norm_bias = copy(s.width);
      layer.qkv = read_matrix(3 * s.width, s.width);
      layer.qkv_bias = copy(3 * s.width);
      layer.proj = read_matrix(s.width, s.width);
      layer.proj_bias = copy(s.width);
      layer.mlp_norm = copy(s.width);
      layer.mlp_norm_bias = copy(s.width);
      layer.up = read_matrix(s.hidden, s.width);
      layer.up_bias = copy(s.hidden);
      layer.down = read_matrix(s.width, s.hidden);
      layer.down_bias = copy(s.width);
    }
    args.proj_out = read_matrix(2 * s.token_dim, s.width);
    args.out_bias = copy(2 * s.token_dim);
    args.z = z;
    args.x = x;
    args.position = position;
    args.context = embed(classes, s.classes, s.width, label);
    args.query_scale = query_scale;
    args.guidance_scale = guidance;
    args.guidance_shift = guidance + s.tokens;
    args.layers = layers.data();
    args.log_det = &log_det;
    args.samples = args.num_threads = args.num_teams = args.has_scale = 1;
    args.rows_per_sample = 2;
    args.tokens = s.tokens;
    args.token_dim = s.token_dim;
    args.width = args.context_row_stride = s.width;
    args.hidden = s.hidden;
    args.heads = s.heads;
    args.depth = s.depth;
    const int head_size = s.width / s.heads, padded_tokens = padded<float>(s.tokens);
    args.keys_values = allocate(s.depth * 2 * s.heads * (head_size * padded_tokens + padded<float>(head_size) * s.tokens));
  }

  float* allocate(int count) { return copies.emplace_back(count).data(); }

  const float* read(int count) {
    next += count;
    return next - count;
  }

  float* copy(int count) {
    return (float*)std::memcpy(allocate(padded<float>(count)), read(count), sizeof(float) * count);
  }

  Weight read_matrix(int outputs, int inputs) {
    const float* weight = read(outputs * inputs);
    float* panels = allocate(padded<float>(outputs) * inputs);
    for (int first = 0; first < outputs; first += panel_columns<float>)
      store_panel<float>(weight, outputs, inputs, first, true, panels);
    return {panels, WeightFormat::float32, 1};
  }

  // Returns the embedding of a class, and the mean of all for the unconditional row.
  const float* embed(const float* classes, int count, int width, int label) {
    float* rows = allocate(2 * width);
    for (int k = 0; k < width; k++) {
      rows[k] = classes[label * width + k];
      for (int c = 0; c < count; c++) rows[width + k] += classes[c * width + k] / count;
    }
    return rows;
  }
};

#pragma GCC visibility push(default)
extern "C" {

void* allocate(int32_t bytes) { return std::malloc(bytes); }

Loop* begin(const Sizes* sizes, const float* parameters, const float* guidance, const float* query_scale, int32_t label,
            const float* z, float* x) {
  return new Loop(*sizes, parameters, guidance, query_scale, label, z, x);
}

// Solves the tokens before `stop` that no call has solved yet.
void solve(Loop* loop, int32_t stop) {
  loop->args.start = loop->args.stop;
  loop->args.stop = stop;
  solve_transformer(loop->args);
}

void end(Loop* loop) { delete loop; }
}
#pragma GCC visibility pop
