// Step 2 of topk_encode: cheap products of a tile of tokens and latents, and which latents survive them.
// Part of encode.cpp, which has the overview; the bounds come from bounds.h.
//
// There are two screens: products of 8-bit integers (int8 in, int32 out), and products in the tensors' own
// dtype. Either is one GEMM of the library that torch uses.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <chrono>

#include "bounds.h"
#include "cpu.h"

namespace {

// The 8-bit screen is for d from 32 (torch._int_mm is wrong at d = 1) to where d * 127 * 127 fits an int32.
constexpr int64_t MIN_INT8_D = 32, MAX_INT8_D = 1 << 17;

// ----------------------------------------------------------------------------------------------- one product
template <class T> constexpr ScalarType DTYPE = ScalarType::Float;
template <> constexpr ScalarType DTYPE<double> = ScalarType::Double;
template <> constexpr ScalarType DTYPE<int8_t> = ScalarType::Char;
template <> constexpr ScalarType DTYPE<int32_t> = ScalarType::Int;

// result [rows,cols] = a [rows,d] b [cols,d]^T, through torch's dispatcher: inside parallel_for this is the
// library's GEMM on one thread. Tensors made of raw pointers keep autograd out: the threads of parallel_for
// do not inherit the caller's grad mode.
template <class T, class Sum>
void gemm(const T* a, int64_t rows, const T* b, int64_t cols, int64_t d, Sum* result) {
  using torch::stable::detail::from;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  auto view = [&](const void* p, ScalarType dtype, int64_t m, int64_t n, int64_t step_m, int64_t step_n) {
    return from(torch::stable::from_blob(const_cast<void*>(p), {m, n}, {step_m, step_n}, cpu, dtype));
  };
  std::array<StableIValue, 3> stack{view(a, DTYPE<T>, rows, d, d, 1), view(b, DTYPE<T>, d, cols, 1, d),
                                    view(result, DTYPE<Sum>, rows, cols, cols, 1)};
  const char* op = std::is_same_v<T, int8_t> ? "aten::_int_mm" : "aten::mm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference, so that it is released
}

// --------------------------------------------------------------------------------- is the 8-bit one worth it
// Seconds of an 8-bit GEMM divided by those of a float32 one, or infinity where the 8-bit one is not exact:
// on a processor without 8-bit products a library may add pairs of them in 16 bits, which saturate. Of
// several turns the shortest counts, because other work on the machine only ever adds time.
inline double measure_int8_gemm_cost() {
  constexpr int64_t rows = 64, d = 256, more_rows = 256, more_cols = 1024;
  auto q = uninitialised<int8_t>(more_cols * d);
  auto x = uninitialised<float>(more_cols * d);
  auto sums = uninitialised<int32_t>(more_rows * more_cols);
  auto pre = uninitialised<float>(more_rows * more_cols);
  for (int64_t i = 0; i < more_cols * d; ++i) {
    const int64_t row = i / d, hashed = (i * 2654435761u >> 16) % 255 - 127;
    const int64_t entries[] = {127, -127, i % 2 ? 127 : -127, hashed};
    q[i] = int8_t(entries[row % 4]), x[i] = q[i];
  }
  gemm(q.get(), rows, q.get(), rows, d, sums.get());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < rows; ++c) {
      int32_t sum = 0;
      for (int64_t i = 0; i < d; ++i) sum += q[r * d + i] * q[c * d + i];
      if (sums[r * rows + c] != sum) return INF<double>;
    }
  const auto ratio = [&](int64_t n, int64_t m) {
    double seconds[2] = {INF<double>, INF<double>};
    for (int turn = 0; turn < 4; ++turn)
      for (int integers : {0, 1}) {
        const auto start = std::chrono::steady_clock::now();
        if (integers)
          gemm(q.get(), n, q.get(), m, d, sums.get());
        else
          gemm(x.get(), n, x.get(), m, d, pre.get());
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        seconds[integers] = std::min(seconds[integers], took.count());
      }
    return seconds[1] / seconds[0];
  };
  // A library without a kernel for 8 bits multiplies one by one: 20 times slower at the small shape, 50 times
  // and more at the large one, which would take a second or longer. The large one is not run then.
  const double small = ratio(rows, rows);
  return small < 8 ? ratio(more_rows, more_cols) : small;
}

// --------------------------------------------------------------------------------------- who survives a tile
// Appends those of `count` latents, f0 and the ones after it, whose upper bound reaches the floor. They go to
// the ends of to_lower, to_upper and to_f; returns how many. A NaN survives, with an upper bound of infinity.
template <class T>
int64_t append_survivors(const T* lower, const T* upper, int64_t count, uint32_t f0, T floor, T* to_lower,
                         T* to_upper, uint32_t* to_f) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    to_lower[n] = lower[i], to_upper[n] = upper[i] == upper[i] ? upper[i] : INF<T>, to_f[n] = f0 + i;
    n += !(upper[i] < floor);  // 1 for a NaN too
  }
  return n;
}

#ifdef X86
// The same for float32, 16 latents at a time. A store may write up to LANES - 1 entries beyond the last
// survivor.
__attribute__((target("avx512f"))) inline int64_t append_survivors_avx512(
    const float* lower, const float* upper, int64_t count, uint32_t f0, float floor, float* to_lower,
    float* to_upper, uint32_t* to_f) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 least = _mm512_set1_ps(floor), inf = _mm512_set1_ps(INF<float>);
  int64_t n = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
    const __m512 x = _mm512_maskz_loadu_ps(there, upper + i);
    const __mmask16 hits = _mm512_mask_cmp_ps_mask(there, x, least, _CMP_NLT_UQ);
    if (!hits) continue;
    const __m512 bound = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), inf);
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(f0 + i)));
    _mm512_storeu_ps(to_upper + n, _mm512_maskz_compress_ps(hits, bound));
    _mm512_storeu_ps(to_lower + n, _mm512_maskz_compress_ps(hits, _mm512_maskz_loadu_ps(there, lower + i)));
    _mm512_storeu_si512(to_f + n, _mm512_maskz_compress_epi32(hits, index));
    n += __builtin_popcount(hits);
  }
  return n;
}

inline int64_t append_survivors(const float* lower, const float* upper, int64_t count, uint32_t f0,
                                float floor, float* to_lower, float* to_upper, uint32_t* to_f) {
  static const bool wide = __builtin_cpu_supports("avx512f");
  if (wide) return append_survivors_avx512(lower, upper, count, f0, floor, to_lower, to_upper, to_f);
  return append_survivors<float>(lower, upper, count, f0, floor, to_lower, to_upper, to_f);
}
#endif

}  // namespace
