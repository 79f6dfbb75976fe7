// Schemas and CPU kernels of namespace `tg`. Autograd and fake tensors are registered in kernels.py, CUDA in
// ops_cuda.cu. Everything goes through the LibTorch stable ABI, so one build serves every torch from 2.10 on.
//
// Results depend neither on the host nor on the number of threads: each output number is summed by one thread
// in a fixed order, and no flag lets the compiler reorder floating point.
#include <pybind11/pybind11.h>

#include <array>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "encode.h"

namespace {

constexpr int STATS = 5;  // columns of a distortion, kernels.STATS

void check_code(const char* op, const Tensor& indices, int64_t F) {
  const int64_t* f = in<int64_t>(indices);
  bool bad = false;
  for (int64_t i = 0; i < indices.numel(); ++i) bad |= uint64_t(f[i]) >= uint64_t(F);
  STD_TORCH_CHECK(!bad, op, ": an index lies outside [0, ", F, ")");
}

// ---------------------------------------------------------------------------------------------------- decode
// acc += sum_j values[j] W[indices[j]]. Four rows of W per pass over acc: a quarter of its loads and stores.
// Rows lie anywhere in W, so the processor is told of the next four while it adds these, at a token's end the
// next token's (`more` entries follow).
template <class T>
WIDE void add_rows(const T* values, const int64_t* indices, int64_t k, int64_t more, const T* W, int64_t d,
                   T* __restrict acc) {
  typedef T Vector __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  constexpr int64_t width = sizeof(Vector) / sizeof(T);
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    const T v0 = values[j], v1 = values[j + 1], v2 = values[j + 2], v3 = values[j + 3];
    const T *w0 = W + indices[j] * d, *w1 = W + indices[j + 1] * d;
    const T *w2 = W + indices[j + 2] * d, *w3 = W + indices[j + 3] * d;
    const T* next[4];
    for (int l = 0; l < 4; ++l) next[l] = W + indices[std::min(j + 4 + l, k + more - 1)] * d;
    int64_t i = 0;
    for (; i + width <= d; i += width) {
      for (int l = 0; l < 4; ++l) __builtin_prefetch(next[l] + i);
      *(Vector*)(acc + i) += (v0 * *(const Vector*)(w0 + i) + v1 * *(const Vector*)(w1 + i)) +
                           (v2 * *(const Vector*)(w2 + i) + v3 * *(const Vector*)(w3 + i));
    }
    for (; i < d; ++i) acc[i] += (v0 * w0[i] + v1 * w1[i]) + (v2 * w2[i] + v3 * w3[i]);
  }
  for (; j < k; ++j) {
    const T v = values[j], *w = W + indices[j] * d;
    for (int64_t i = 0; i < d; ++i) acc[i] += v * w[i];
  }
}

template <class T> WIDE T dot(const T* a, const T* b, int64_t d) {
  T lane[2 * LANES] = {}, sum = 0;
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES)
    for (int l = 0; l < 2 * LANES; ++l) lane[l] += a[i + l] * b[i + l];
  for (; i < d; ++i) sum += a[i] * b[i];
  for (int l = 0; l < 2 * LANES; ++l) sum += lane[l];
  return sum;
}

struct Code {  // the operands that decode and distortion share, checked and contiguous
  Tensor values, indices, W, b;
  int64_t N, k, F, d;
  Code(const char* op, const Tensor& v, const Tensor& i, const Tensor& W_, const Tensor& b_)
      : values(contiguous(v)), indices(contiguous(i)), W(contiguous(W_)), b(contiguous(b_)) {
    STD_TORCH_CHECK(v.dim() == 2 && W_.dim() == 2, op, ": values and W_dec must have two dimensions");
    N = v.size(0), k = v.size(1), F = W.size(0), d = W.size(1);
    check(op, v, v.scalar_type(), {N, k});
    check(op, i, ScalarType::Long, {N, k});
    check(op, W_, v.scalar_type(), {F, d});
    check(op, b_, v.scalar_type(), {d});
    check_code(op, indices, F);
  }
  // acc [d] is scratch: it stays in cache while rows pass through
  template <class T> void row(int64_t n, T* acc, T* h_hat) const {
    const T* bias = in<T>(b);
    std::fill(acc, acc + d, T(0));
    add_rows(in<T>(values) + n * k, in<int64_t>(indices) + n * k, k, (N - n - 1) * k, in<T>(W), d, acc);
    for (int64_t i = 0; i < d; ++i) h_hat[i] = acc[i] + bias[i];  // last: b may be far larger than the sum
  }
};

Tensor sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& W_dec, const Tensor& b_dec) {
  const Code code("sparse_decode", values, indices, W_dec, b_dec);
  Tensor h_hat = like(code.values, {code.N, code.d});
  by_dtype(h_hat, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, code.N, 16, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(code.d);
      for (int64_t n = begin; n < end; ++n) code.row(n, scratch.data(), out<T>(h_hat) + n * code.d);
    });
  });
  return h_hat;
}

// One pass: h_hat of a token is built in cache, and its sums are taken from there with h and g, in float64
// over four lanes.
std::tuple<Tensor, Tensor> gradient_weighted_distortion(const Tensor& values, const Tensor& indices,
                                                        const Tensor& W_dec, const Tensor& b_dec,
                                                        const Tensor& h_, const Tensor& g_, bool want_h_hat) {
  const char* op = "gradient_weighted_distortion";
  const Code code(op, values, indices, W_dec, b_dec);
  const int64_t N = code.N, d = code.d;
  check(op, h_, values.scalar_type(), {N, d});
  check(op, g_, values.scalar_type(), {N, d});
  Tensor h = contiguous(h_), g = contiguous(g_);
  Tensor stats = like(h, {N, STATS}), h_hat = like(h, {want_h_hat ? N : 0, d});
  by_dtype(h, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(d);
      for (int64_t n = begin; n < end; ++n) {
        T* y = want_h_hat ? out<T>(h_hat) + n * d : scratch.data();
        code.row(n, scratch.data(), y);
        const T *x = in<T>(h) + n * d, *grad = in<T>(g) + n * d;
        double sums[STATS][4] = {};
        for (int64_t i0 = 0; i0 < d; i0 += 4)
          for (int64_t i = i0; i < std::min(i0 + 4, d); ++i) {
            const double xi = x[i], yi = y[i], delta = yi - xi;
            const double terms[STATS] = {grad[i] * delta, delta * delta, yi * yi, xi * yi, xi * xi};
            for (int s = 0; s < STATS; ++s) sums[s][i - i0] += terms[s];
          }
        T* to = out<T>(stats) + n * STATS;
        for (int s = 0; s < STATS; ++s) to[s] = T((sums[s][0] + sums[s][1]) + (sums[s][2] + sums[s][3]));
      }
    });
  });
  return {stats, h_hat};
}

// -------------------------------------------------------------------------------------------------- backward
// out[n,j] = x[n] . W[indices[n,j]]
Tensor gather_dot(const Tensor& x_, const Tensor& W_, const Tensor& indices_) {
  const char* op = "gather_dot";
  const bool matrices = x_.dim() == 2 && W_.dim() == 2 && indices_.dim() == 2;
  STD_TORCH_CHECK(matrices, op, ": all operands must have two dimensions");
  const int64_t N = x_.size(0), d = x_.size(1), F = W_.size(0), k = indices_.size(1);
  check(op, x_, x_.scalar_type(), {N, d});
  check(op, W_, x_.scalar_type(), {F, d});
  check(op, indices_, ScalarType::Long, {N, k});
  Tensor x = contiguous(x_), W = contiguous(W_), indices = contiguous(indices_);
  check_code(op, indices, F);
  Tensor dots = like(x, {N, k});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      const T *from = in<T>(x), *rows = in<T>(W);
      const int64_t* f = in<int64_t>(indices);
      T* to = out<T>(dots);
      for (int64_t at = begin * k; at < end * k; ++at) to[at] = dot(from + at / k * d, rows + f[at] * d, d);
    });
  });
  return dots;
}

// rows[f] = sum of coef[n,j] x[n] over the entries with indices[n,j] = f, sums[f] = sum of their coef. A
// counting sort lists each latent's entries in token order; then a thread owns whole rows. Sums of 32 entries
// go into a float64 total, so that a latent that fires on every token loses no more digits than in a blocked
// matmul.
std::tuple<Tensor, Tensor> scatter_rows(const Tensor& coef_, const Tensor& indices_, const Tensor& x_,
                                        int64_t F) {
  const char* op = "scatter_rows";
  STD_TORCH_CHECK(x_.dim() == 2 && coef_.dim() == 2 && F >= 0, op, ": coef and x must have two dimensions");
  const int64_t N = x_.size(0), d = x_.size(1), k = coef_.size(1);
  check(op, x_, x_.scalar_type(), {N, d});
  check(op, coef_, x_.scalar_type(), {N, k});
  check(op, indices_, ScalarType::Long, {N, k});
  Tensor x = contiguous(x_), coef = contiguous(coef_), indices = contiguous(indices_);
  check_code(op, indices, F);
  Tensor rows = like(x, {F, d}), sums = like(x, {F});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* f = in<int64_t>(indices);
    std::vector<int64_t> start(F + 2), token(N * k);
    std::vector<T> sorted(N * k);
    const T *c = in<T>(coef), *from = in<T>(x);
    for (int64_t at = 0; at < N * k; ++at) ++start[f[at] + 2];
    for (int64_t i = 2; i < F + 2; ++i) start[i] += start[i - 1];
    // After this the entries from start[f] to start[f + 1] belong to f.
    for (int64_t at = 0; at < N * k; ++at) {
      const int64_t to = start[f[at] + 1]++;
      token[to] = at / k, sorted[to] = c[at];
    }
    torch::stable::parallel_for(0, F, 64, [&](int64_t begin, int64_t end) {
      std::vector<T> part(d);
      std::vector<double> total(d);
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        std::fill(total.begin(), total.end(), 0);
        for (int64_t e0 = start[row]; e0 < start[row + 1]; e0 += 32) {
          const int64_t e1 = std::min(e0 + 32, start[row + 1]);
          std::fill(part.begin(), part.end(), T(0));
          add_rows(sorted.data() + e0, token.data() + e0, e1 - e0, N * k - e1, from, d, part.data());
          for (int64_t i = 0; i < d; ++i) total[i] += part[i];
          sum += std::accumulate(sorted.data() + e0, sorted.data() + e1, 0.0);
        }
        std::copy(total.begin(), total.end(), out<T>(rows) + row * d);
        out<T>(sums)[row] = T(sum);
      }
    });
  });
  return {rows, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY(tg, m) {
  m.def("topk_encode(Tensor h, Tensor W_enc, Tensor b_enc, int k) -> (Tensor, Tensor)");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor");
  m.def("gradient_weighted_distortion(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec, "
        "Tensor h, Tensor g, bool want_h_hat) -> (Tensor, Tensor)");
  m.def("gather_dot(Tensor x, Tensor W, Tensor indices) -> Tensor");
  m.def("scatter_rows(Tensor coef, Tensor indices, Tensor x, int F) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tg, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("gradient_weighted_distortion", TORCH_BOX(&gradient_weighted_distortion));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}

// Importing the module runs the registrations above; what it holds says which build this is.
PYBIND11_MODULE(_kernels, m) {
  m.attr("devices") = BUILD_DEVICES;
  m.attr("source") = BUILD_SOURCE;
  m.def("screen_first", &screen_first);
  m.def("integers_price", &integers_price);
  m.def("tokens_that_went_on", [] {
    const auto [integers, own] = tokens_that_went_on();
    return pybind11::make_tuple(integers, own);
  });
  m.attr("WORTH") = WORTH;
}
