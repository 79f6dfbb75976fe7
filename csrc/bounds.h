// Step 1 of topk_encode: how far the product of two rounded rows can be from the pre-activation h . w + b.
// Part of encode.cpp, which has the overview and an example.
//
// Rounding. A row x of h or of W_enc is written as x = unit (q + e): unit = max |x_i| / 127, q the nearest
// integers, in [-127, 127], and e what rounding took away. Then
//
//   h . w  =  unit_h unit_w (q_h . q_w)  +  (unit_h q_h) . (unit_w e_w)  +  (unit_h e_h) . w.
//
// The first term is the product of the integers, which is computed exactly. By Cauchy-Schwarz the other two
// are at most  |unit_h q_h| |unit_w e_w| + |unit_h e_h| |w|.  So four numbers per row (`Row` below) give a
// bound for every pair of rows.
//
// Floating point. A sum of d products, in any order, is wrong by at most gamma_d |h| |w|, gamma_d being about
// d eps (Higham 2002, (3.5)). This covers a float GEMM and the exact pre-activation, which is a float sum
// too. The arithmetic of the bounds themselves rounds away less than 16 eps (|h| |w| + |b|).
//
// Why no true top-k latent is lost. Every pre-activation lies between its lower and its upper bound. If k
// latents have lower bounds of at least `floor`, then a latent whose upper bound is below `floor` has k
// latents above it and is not among the top k. Only such latents are dropped.
//
// Scales. One dimension that is large in h or in W_enc would take the 8 bits from all the others. Therefore
// the rows h s and w / s are rounded instead, with a scale s_i per dimension that divides the size fairly
// (Xiao et al. 2023, arXiv:2211.10438, eq. 4). Their product is the same, and s_i is a power of two, so
// nothing is rounded by it.
#pragma once
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cpu.h"

namespace {

template <class T> constexpr T INF = std::numeric_limits<T>::infinity();
template <class T> constexpr T EPS = std::numeric_limits<T>::epsilon();
// No bound is given for norms and biases above this, or units below its inverse: a product might over- or
// underflow.
template <class T> const T LARGE = std::sqrt(std::numeric_limits<T>::max()) / 16;

template <class T> std::unique_ptr<T[]> uninitialised(int64_t n) { return std::unique_ptr<T[]>(new T[n]); }

// -------------------------------------------------------------------------------------------- rows in 8 bits
// What the bounds need to know of a row x = unit (q + e). The norms are rounded up.
template <class T> struct Row {
  T unit;
  T rounded_norm;  // |unit q|
  T error_norm;    // |unit e|
  T norm;          // |x|
};

template <class T> inline __attribute__((always_inline)) T sum_lanes(T (&lane)[LANES]) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// max |x_i scale_i|
template <class T> WIDE T max_magnitude(const T* x, int64_t d, const T* scale) {
  T most[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES)
    for (int l = 0; l < LANES; ++l) {
      const T u = x[i + l] * scale[i + l], size = u < 0 ? -u : u;
      most[l] = most[l] < size ? size : most[l];
    }
  for (; i < d; ++i) most[0] = std::max(most[0], std::abs(x[i] * scale[i]));
  return *std::max_element(most, most + LANES);
}

// Rounds the row x scale to the integers q [d] and returns the sizes of it. A row that cannot be bounded (it
// is not finite, or so large that a product might overflow, or so small that digits are lost) has infinite
// norms.
template <class T> WIDE Row<T> round_to_8_bits(const T* x, int64_t d, const T* scale, int8_t* q) {
  constexpr T shift = T(1.5) / EPS<T>;  // adding it rounds to an integer
  const T largest = max_magnitude(x, d, scale), per_unit = largest > 0 ? T(127) / largest : T(1);
  T rounded_sq[LANES] = {}, error_sq[LANES] = {}, norm_sq[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    T rounded[LANES];
    for (int l = 0; l < LANES; ++l) {
      const T u = x[i + l] * scale[i + l] * per_unit, r = (u + shift) - shift, e = u - r;
      rounded[l] = r, rounded_sq[l] += r * r, error_sq[l] += e * e, norm_sq[l] += u * u;
    }
    for (int l = 0; l < LANES; ++l) q[i + l] = int8_t(int32_t(rounded[l]));
  }
  for (; i < d; ++i) {
    const T u = x[i] * scale[i] * per_unit, r = (u + shift) - shift, e = u - r;
    q[i] = int8_t(int32_t(r)), rounded_sq[0] += r * r, error_sq[0] += e * e, norm_sq[0] += u * u;
  }
  const T unit = largest / T(127), up = unit * T(1.0001);  // more than the three sums can have lost
  const Row<T> row{unit, up * std::sqrt(sum_lanes(rounded_sq)), up * std::sqrt(sum_lanes(error_sq)),
                   up * std::sqrt(sum_lanes(norm_sq))};
  if (row.norm < LARGE<T> && (unit > 1 / LARGE<T> || largest == 0)) return row;
  std::fill(q, q + d, 0);
  return {0, INF<T>, INF<T>, INF<T>};
}

// ---------------------------------------------------------------------------------------------------- scales
// The size of every dimension, summed over some 64 rows of x [n,d], each divided by its largest number.
template <class T> std::vector<double> dimension_sizes(const T* x, int64_t n, int64_t d) {
  const std::vector<T> ones(d, 1);
  std::vector<double> size(d);
  for (int64_t r = 0; r < n; r += (n + 63) / 64) {
    const T largest = max_magnitude(x + r * d, d, ones.data());
    if (!(largest > 1 / LARGE<T> && largest < LARGE<T>)) continue;
    for (int64_t i = 0; i < d; ++i) size[i] += std::abs(x[r * d + i]) / largest;
  }
  return size;
}

// {s, 1 / s}, each [d]: s = sqrt(size in W / size in h), rounded to a power of two.
template <class T>
std::array<std::vector<T>, 2> balancing_scales(const T* h, int64_t N, const T* W, int64_t F, int64_t d) {
  const std::vector<double> in_h = dimension_sizes(h, N, d), in_W = dimension_sizes(W, F, d);
  std::array<std::vector<T>, 2> scale{std::vector<T>(d, 1), std::vector<T>(d, 1)};
  for (int64_t i = 0; i < d; ++i) {
    const double exponent = std::round(0.5 * std::log2(in_W[i] / in_h[i]));
    if (!(std::abs(exponent) <= 16)) continue;  // too far apart, or NaN: both sizes are 0
    scale[0][i] = std::ldexp(T(1), int(exponent)), scale[1][i] = std::ldexp(T(1), -int(exponent));
  }
  return scale;
}

// ---------------------------------------------------------------------------------------------------- bounds
// The rows of W_enc in 8 bits, and their sizes as one array each.
template <class T> struct Latents {
  std::array<std::vector<T>, 2> scale;  // of h and of W, [d]
  std::unique_ptr<int8_t[]> q;          // [F,d]
  std::vector<T> unit, error_norm, norm;
  std::vector<T> slack;  // for what the bias and the smallest numbers lose in rounding

  Latents(const T* h, int64_t N, const T* W, const T* b, int64_t F, int64_t d, bool keep_q)
      : scale(balancing_scales(h, N, W, F, d)),
        q(uninitialised<int8_t>(keep_q ? F * d : 0)),
        unit(F),
        error_norm(F),
        norm(F),
        slack(F) {
    torch::stable::parallel_for(0, F, 64, [&](int64_t begin, int64_t end) {
      auto scratch = uninitialised<int8_t>(d);
      for (int64_t f = begin; f < end; ++f) {
        int8_t* q_row = keep_q ? q.get() + f * d : scratch.get();
        const Row<T> row = round_to_8_bits(W + f * d, d, scale[1].data(), q_row);
        const T bias = std::abs(b[f]);
        unit[f] = row.unit, error_norm[f] = row.error_norm, norm[f] = row.norm;
        slack[f] = bias < LARGE<T> ? 16 * EPS<T> * bias + T(1e8) * std::numeric_limits<T>::min() : INF<T>;
      }
    });
  }
};

// The products of one token with the latents f0 to f0 + cols -> lower and upper bounds of their
// pre-activations. A latent that cannot be bounded gets -inf as its lower bound.
template <class Sum, class T>
WIDE void bound_pre_activations(const Sum* __restrict product, int64_t cols, int64_t f0,
                                const Latents<T>& latents, const T* bias, const Row<T>& h,
                                T* __restrict lower, T* __restrict upper) {
  const T unit_h = h.unit, rounded_h = h.rounded_norm, error_h = h.error_norm;
  const T *unit = latents.unit.data() + f0, *error_w = latents.error_norm.data() + f0;
  const T *norm = latents.norm.data() + f0, *slack = latents.slack.data() + f0, *b = bias + f0;
  for (int64_t c = 0; c < cols; ++c) {
    T value = T(product[c]), error = error_h * norm[c] + slack[c];
    if (std::is_same_v<Sum, int32_t>) value *= unit_h * unit[c], error += rounded_h * error_w[c];
    value += b[c];
    upper[c] = value + error;
    lower[c] = error < INF<T> ? value - error : -INF<T>;
  }
}

}  // namespace
