// The recurrence of a MAF block, token by token: x_t = exp(s(x_<t)) z_t + u(x_<t), by a masked dense network whose units
// are in the order of their degrees, so that each is computed once.
#include <atomic>
#include <exception>

#include "simd.h"
#include "team.h"

namespace jacobiflow {

constexpr int run = 32;  // tokens after which what earlier ones add to later units comes by one matrix product

// All arrays are (features, samples), where `samples` is a multiple of `panel`. `weights` are (outputs, inputs), masked;
// `offsets` have the network under the labels first, then the unconditional one where `networks` is 2.
// `units_below[d]` is how many units of a layer have a degree below d.
struct Maf {
  const float *z, *weight_scale, *weight_shift;
  const float *const *weights, *const *offsets;
  const int32_t* units_below;
  float* x;
  int32_t samples, networks, tokens, units, layers, threads;
};

// The state of `panel` samples: tokens, and units or outputs of each layer, whose sums are complete up to their degree.
class Panel {
 public:
  explicit Panel(const Maf& maf)
      : f(maf), tokens((size_t)f.tokens * panel),
        sums(f.networks * (f.layers + 1), std::vector<float>((size_t)panel * larger(f.units, 2 * f.tokens))) {}

  void solve(int first) {
    sample = first;
    for (int v = 0; v < panel; v += lanes) store(tokens.data() + v, load(f.z + first + v));
    next_entry<true>(0);
    for (int begin = 0; begin + 1 < f.tokens; begin += run) {
      const int end = begin + run < f.tokens - 1 ? begin + run : f.tokens - 1;
      for (int n = 0; n < f.networks; n++) start_sums(n, begin, end);
      for (int t = begin; t < end; t++) {
        for (int n = 0; n < f.networks; n++) feed(n, begin, t);
        next_entry<false>(t + 1);
      }
    }
    for (int t = 0; t < f.tokens; t++)
      std::memcpy(f.x + (int64_t)t * f.samples + first, tokens.data() + (size_t)t * panel, sizeof(float) * panel);
  }

 private:
  const Maf& f;
  std::vector<float> tokens;
  std::vector<std::vector<float>> sums;
  int sample = 0;

  static int larger(int a, int b) { return a > b ? a : b; }

  float* of(int network, int layer) { return sums[network * (f.layers + 1) + layer].data(); }

  int inputs_of(int layer) const { return layer ? f.units : f.tokens; }

  // Rows [first, last) of a layer: start(row, column) plus what inputs [from, to) add.
  template <typename Start, typename Use>
  void rows(int network, int layer, int first, int last, int from, int to, const Start& start, const Use& use) {
    const float* in = layer ? of(network, layer - 1) : tokens.data();
    const float* weight = f.weights[layer] + (int64_t)first * inputs_of(layer) + from;
    float* out = of(network, layer);
    dense_rows<panel_vectors>(weight, inputs_of(layer), in + (size_t)from * panel, panel, to - from, last - first, 0,
                              [&](int r, int column, Vector value) {
                                const int row = first + r;
                                store(out + (size_t)row * panel + column, use(start(row, column) + value));
                              });
  }

  // What the tokens before `begin` add to the units of tokens [begin, end), and to the entries that these give.
  void start_sums(int network, int begin, int end) {
    const int known = f.units_below[begin];
    for (int layer = 0; layer <= f.layers; layer++) {
      const bool last = layer == f.layers;
      const float* offset = f.offsets[network * (f.layers + 1) + layer] + sample;
      rows(network, layer, last ? 2 * begin + 2 : known, last ? 2 * end + 2 : f.units_below[end], 0,
           layer ? known : begin,
           [&](int row, int column) { return load(offset + (int64_t)row * f.samples + column); },
           [](Vector value) { return value; });
    }
  }

  // Token t, and with it the units of its degree and the outputs for entry t + 1.
  void feed(int network, int begin, int t) {
    const int known = f.units_below[begin], first = f.units_below[t], last = f.units_below[t + 1];
    for (int layer = 0; layer <= f.layers; layer++) {
      float* out = of(network, layer);
      const auto start = [&](int row, int column) { return load(out + (size_t)row * panel + column); };
      const int from = layer ? known : begin, to = layer ? last : t + 1;
      if (layer < f.layers)
        rows(network, layer, first, last, from, to, start,
             [](Vector value) { return value < 0.0f ? Vector{} : value; });
      else
        rows(network, layer, 2 * t + 2, 2 * t + 4, from, to, start, [](Vector value) { return value; });
    }
  }

  // x_t from the outputs for entry t, which for the first entry are the offsets alone.
  template <bool first>
  void next_entry(int t) {
    for (int v = 0; v < panel; v += lanes) {
      Vector out[2][2];
      for (int n = 0; n < f.networks; n++)
        for (int part = 0; part < 2; part++)
          out[n][part] = first ? load(f.offsets[n * (f.layers + 1) + f.layers] + (int64_t)part * f.samples + sample + v)
                               : load(of(n, f.layers) + (size_t)(2 * t + part) * panel + v);
      if (f.networks == 2) {
        out[0][0] += f.weight_scale[t] * (out[0][0] - out[1][0]);
        out[0][1] += f.weight_shift[t] * (out[0][1] - out[1][1]);
      }
      const Vector z = load(f.z + (int64_t)t * f.samples + sample + v);
      store(tokens.data() + (size_t)t * panel + v, exponential(out[0][0]) * z + out[0][1]);
    }
  }
};

}  // namespace jacobiflow

using namespace jacobiflow;

extern "C" {

int32_t jacobiflow_panel() { return panel; }

int32_t jacobiflow_maf_size() { return sizeof(Maf); }

// All entries of x. Returns 0, or 1 where memory or threads are wanting: then x is unchanged.
int32_t jacobiflow_maf(const Maf* maf) {
  try {
    std::vector<Panel> panels(maf->threads, Panel(*maf));
    std::atomic<int> next{0};
    in_threads(maf->threads, [&](int rank) {
      for (int first; (first = next.fetch_add(panel)) < maf->samples;) panels[rank].solve(first);
    });
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
