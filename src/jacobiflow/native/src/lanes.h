// What a vector is on each kind of processor, on which no other file depends; and ranges of units or work.
#pragma once

#if defined(__CUDACC_RTC__)  // has no standard headers
using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#endif
#if defined(JACOBIFLOW_CUDA)  // uses no vectors of the processor
#elif defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jacobiflow {

template <typename T>
constexpr T smaller(T a, T b) { return b < a ? b : a; }

struct Range {
  int first, last;
};

// Returns the part of [0, total) for a thread, in multiples of `unit`.
inline Range partition(int total, int rank, int num_threads, int unit = 1) {
  const int64_t units = (total + unit - 1) / unit;
  const int first = (int)(units * rank / num_threads) * unit, last = (int)(units * (rank + 1) / num_threads) * unit;
  return {first < total ? first : total, last < total ? last : total};
}

int32_t integer_of(float);
int64_t integer_of(double);
uint32_t bit_of(float);
uint64_t bit_of(double);

#if defined(JACOBIFLOW_CUDA)

constexpr int sum_registers = 32;  // of a thread, for the sums of a product of tiles

// On a GPU a warp is a vector. Each of its 32 threads has one lane, and `load` and `store` take its own number of the 32 in
// memory: code for vectors is code for a thread, and neighbouring threads read neighbouring memory.
template <typename T>
struct Lanes {
  static constexpr int lanes = 32;
  using Vector = T;
  using Integer = decltype(integer_of(T()));
  using Bit = decltype(bit_of(T()));
  using Integers = Integer;
  using Bits = Bit;
  using Mask = bool;
  static constexpr bool has_all_kinds = false;  // without lu_linear and polynomials, the kernel is half as large

  // The warps of a block share the units of a tile.
  static int rank() { return threadIdx.x / lanes; }
  static int members() { return blockDim.x / lanes; }
  static void sync() { __syncthreads(); }

  static int lane() { return threadIdx.x % lanes; }
  static T load(const T* from) { return from[lane()]; }
  static void store(T* to, T v) { to[lane()] = v; }
  static Bits bits(T v) { return __builtin_bit_cast(Bits, v); }
  static T from_bits(Bits bits) { return __builtin_bit_cast(T, bits); }
  static T convert(Integers n) { return (T)n; }
  static T opaque(T v) { return v; }
  static T reciprocal(T v) { return T(1) / v; }
  static T sqrt(T v) { return ::sqrt(v); }
  static bool any(bool mask) { return mask; }

  template <typename Function>
  static T map(T v, const Function& function) {
    return function(v);
  }

  template <typename Use>
  static void each_row(int rows, const Use& use) {
    for (int row = lane(); row < rows; row += lanes) use(row);
  }
};

#else

// The number of floats in a vector; registers for the sums of a product of tiles; and the sizes of a block of a dense layer,
// whose sums fill the registers: `tile_rows` rows by `panel_vectors` vectors of outputs.
#if defined(__AVX512F__)
constexpr int float_lanes = 16, sum_registers = 24, panel_vectors = 4;  // of 32 registers
#elif defined(__AVX__)
constexpr int float_lanes = 8, sum_registers = 12, panel_vectors = 2;  // of 16
#elif defined(__aarch64__)
constexpr int float_lanes = 4, sum_registers = 24, panel_vectors = 4;
#else
constexpr int float_lanes = 4, sum_registers = 12, panel_vectors = 4;
#endif
constexpr int tile_rows = 6;

// Vectors of GCC and Clang.
template <typename T>
struct Lanes {
  static constexpr int lanes = float_lanes * 4 / sizeof(T);
  typedef T Vector __attribute__((vector_size(4 * float_lanes)));
  using Integer = decltype(integer_of(T()));
  using Bit = decltype(bit_of(T()));
  typedef Integer Integers __attribute__((vector_size(4 * float_lanes)));
  typedef Bit Bits __attribute__((vector_size(4 * float_lanes)));  // may overflow
  using Mask = Integers;
  static constexpr bool has_all_kinds = true;

  // A tile has one thread.
  static constexpr int rank() { return 0; }
  static constexpr int members() { return 1; }
  static void sync() {}

  static Vector load(const T* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
  }

  static void store(T* to, Vector v) { memcpy(to, &v, sizeof v); }

  static Bits bits(Vector v) { return (Bits)v; }
  static Vector from_bits(Bits bits) { return (Vector)bits; }
  static Vector convert(Integers n) { return __builtin_convertvector(n, Vector); }

  // Hides the origin of a value from GCC, which otherwise takes more than one instruction for a maximum or minimum.
  static Vector opaque(Vector v) {
#if defined(__x86_64__) && !defined(__clang__)
    asm("" : "+v"(v));
#endif
    return v;
  }

  // Returns 1 / v; with AVX-512, by an estimate and one step of Newton's method in place of a division.
  static Vector reciprocal(Vector v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)v), error = T(1) - v * estimate;
      return estimate * (error > T(-1) ? error : T(1) - Vector{}) + estimate;  // the error of 0 and infinity is NaN or infinite
    }
#endif
    return T(1) / v;
  }

  static Vector sqrt(Vector v) {
#if defined(__AVX512F__)  // GCC may take the loop in two halves, through memory
    if constexpr (sizeof(T) == 4) return (Vector)_mm512_sqrt_ps((__m512)v);
    return (Vector)_mm512_sqrt_pd((__m512d)v);
#endif
    return map(v, [](T value) { return std::sqrt(value); });
  }

  static T sum(Vector v) {
    T total = 0;
    for (int i = 0; i < lanes; i++) total += v[i];
    return total;
  }

  static bool any(Mask mask) {
    bool is_any = false;
    for (int i = 0; i < lanes; i++) is_any |= mask[i] != 0;
    return is_any;
  }

  // Applies a function of a number to all lanes.
  template <typename Function>
  static Vector map(Vector v, const Function& function) {
    Vector result;
    for (int i = 0; i < lanes; i++) result[i] = function(v[i]);
    return result;
  }

  // Calls use(row) for all rows of a tile.
  template <typename Use>
  static void each_row(int rows, const Use& use) {
    for (int row = 0; row < rows; row++) use(row);
  }
};

using Vector = Lanes<float>::Vector;
using Bits = Lanes<float>::Bits;
typedef uint16_t Halves __attribute__((vector_size(2 * float_lanes)));

// Convert between float and the bits of Float16. The first is exact, and the second too if Float16 has the number.
inline Vector from_half(Halves v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__) && defined(__AVX__)
  return (Vector)_mm256_cvtph_ps((__m128i)v);
#elif defined(__aarch64__)
  return (Vector)vcvt_f32_f16((float16x4_t)v);
#else  // moves the exponent; subnormal numbers and infinity are special
  const Bits bits = __builtin_convertvector(v, Bits), size = (bits & 0x7fff) << 13;
  const Bits normal = size + (112u << 23), infinite = size + (224u << 23);
  const Vector subnormal = (Vector)(size + (113u << 23)) - 0x1p-14f;
  const Bits magnitude = size < (1u << 23) ? (Bits)subnormal : size < (31u << 23) ? normal : infinite;
  return (Vector)(magnitude | (bits & 0x8000) << 16);
#endif
}

inline Halves to_half(Vector v) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && defined(__AVX__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Halves)vcvt_f16_f32((float32x4_t)v);
#else
  const Bits sign = (Bits)v >> 16 & 0x8000, magnitude = (Bits)v & 0x7fffffff, normal = (magnitude - (112u << 23)) >> 13;
  const Bits infinite = (magnitude - (224u << 23)) >> 13;
  const Bits subnormal = (Bits)((Vector)magnitude * 0x1p24f + 0x1p23f) & 0x7ff;  // counts the smallest Float16
  const Bits half = magnitude < (113u << 23) ? subnormal : magnitude < (255u << 23) ? normal : infinite;
  return __builtin_convertvector(sign | half, Halves);
#endif
}

#endif

}  // namespace jacobiflow
