// Schemas and CPU kernels of namespace `tg`. Autograd and fake tensors are registered in kernels.py, CUDA in
// ops_cuda.cu. Everything goes through the LibTorch stable ABI, so one build serves every torch from 2.10 on.
//
// Results depend neither on the host nor on the number of threads: each output number is summed by one thread
// in a fixed order, and no flag lets the compiler reorder floating point.
#include <pybind11/pybind11.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "encode.h"

namespace {

constexpr int64_t AHEAD = 8;   // entries of a code between a row's prefetch and its use
constexpr int64_t BLOCK = 64;  // latents whose partial sums are one number
constexpr int STATS = 5;       // columns of a distortion, kernels.STATS

void check_code(const char* op, const Tensor& indices, int64_t F) {
  const int64_t* f = in<int64_t>(indices);
  bool bad = false;
  for (int64_t i = 0; i < indices.numel(); ++i) bad |= uint64_t(f[i]) >= uint64_t(F);
  STD_TORCH_CHECK(!bad, op, ": an index lies outside [0, ", F, ")");
}

// ---------------------------------------------------------------------------------------------------- decode
// acc [d] += sum of values[j] W[indices[j]] over R entries, in the order of j, but four of them by pairs. Rows
// lie anywhere in W, so the processor is told of four that come later while it adds these.
template <int R, class T>
WIDE void add_rows(const T* values, const int64_t* indices, const int64_t* later, const T* W, int64_t d,
                   T* __restrict acc) {
  typedef T Vector __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  constexpr int64_t width = sizeof(Vector) / sizeof(T);
  const T *w[R], *next[4];
  for (int r = 0; r < R; ++r) w[r] = W + indices[r] * d;
  for (int l = 0; l < 4; ++l) next[l] = W + later[l] * d;
  int64_t i = 0;
  for (; i + width <= d; i += width) {
    for (int l = 0; l < 4; ++l) __builtin_prefetch(next[l] + i);
    Vector term[R], sum = *(const Vector*)(acc + i);
    for (int r = 0; r < R; ++r) term[r] = values[r] * *(const Vector*)(w[r] + i);
    if constexpr (R == 4)
      sum += (term[0] + term[1]) + (term[2] + term[3]);
    else
      for (int r = 0; r < R; ++r) sum += term[r];
    *(Vector*)(acc + i) = sum;
  }
  for (; i < d; ++i) {
    T term[R];
    for (int r = 0; r < R; ++r) term[r] = values[r] * w[r][i];
    if constexpr (R == 4)
      acc[i] += (term[0] + term[1]) + (term[2] + term[3]);
    else
      for (int r = 0; r < R; ++r) acc[i] += term[r];
  }
}

// acc [d] = sum_j values[j] W[indices[j]] over k entries; `more` follow them in memory and are wanted next.
// Four rows per pass over acc: a quarter of its loads and stores.
template <class T>
void sum_rows(const T* values, const int64_t* indices, int64_t k, int64_t more, const T* W, int64_t d, T* acc) {
  std::fill(acc, acc + d, T(0));
  for (int64_t j = 0; j < k; j += 4) {
    int64_t later[4];
    for (int l = 0; l < 4; ++l) later[l] = indices[std::min(j + AHEAD + l, k + more - 1)];
    switch (k - j) {
      case 1: add_rows<1>(values + j, indices + j, later, W, d, acc); break;
      case 2: add_rows<2>(values + j, indices + j, later, W, d, acc); break;
      case 3: add_rows<3>(values + j, indices + j, later, W, d, acc); break;
      default: add_rows<4>(values + j, indices + j, later, W, d, acc);
    }
  }
}

// out[j] = a . W[indices[j]] for R rows: one at a time waits for its additions, four keep the processor busy.
// The order of summation is the same for every R: 2 LANES sums, these by halves, then what is left over.
template <int R, class T>
WIDE void dots(const T* a, const T* W, const int64_t* indices, int64_t d, T* out) {
  typedef T Vector __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef T Half __attribute__((vector_size(LANES / 2 * sizeof(T)), may_alias));
  typedef T Quarter __attribute__((vector_size(LANES / 4 * sizeof(T)), may_alias));
  Vector low[R] = {}, high[R] = {};
  const T* w[R];
  for (int r = 0; r < R; ++r) w[r] = W + indices[r] * d;
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES)
    for (int r = 0; r < R; ++r) {
      low[r] += *(const Vector*)(a + i) * *(const Vector*)(w[r] + i);
      high[r] += *(const Vector*)(a + i + LANES) * *(const Vector*)(w[r] + i + LANES);
    }
  for (int r = 0; r < R; ++r) {
    const Vector all = low[r] + high[r];
    const Half half = ((const Half*)&all)[0] + ((const Half*)&all)[1];
    const Quarter sum = ((const Quarter*)&half)[0] + ((const Quarter*)&half)[1];
    out[r] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    for (int64_t l = i; l < d; ++l) out[r] += a[l] * w[r][l];
  }
}

template <class T> void dots_of(const T* a, const T* W, const int64_t* indices, int64_t k, int64_t d, T* out) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) dots<4>(a, W, indices + j, d, out + j);
  for (; j < k; ++j) dots<1>(a, W, indices + j, d, out + j);
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
  template <class T> void row(int64_t n, T* h_hat) const {
    const T* bias = in<T>(b);
    sum_rows(in<T>(values) + n * k, in<int64_t>(indices) + n * k, k, (N - n - 1) * k, in<T>(W), d, h_hat);
    for (int64_t i = 0; i < d; ++i) h_hat[i] += bias[i];  // last: b may be far larger than the sum
  }
};

Tensor sparse_decode(const Tensor& values, const Tensor& indices, const Tensor& W_dec, const Tensor& b_dec) {
  const Code code("sparse_decode", values, indices, W_dec, b_dec);
  Tensor h_hat = like(code.values, {code.N, code.d});
  by_dtype(h_hat, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, code.N, 16, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) code.row(n, out<T>(h_hat) + n * code.d);
    });
  });
  return h_hat;
}

// The sums of one token, in float64 over four lanes.
template <class T> WIDE void statistics(const T* h, const T* g, const T* h_hat, int64_t d, T* to) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef double Wide __attribute__((vector_size(4 * sizeof(double))));
  Wide sums[STATS] = {};
  for (int64_t i = 0; i < d; i += 4) {
    Wide x = {}, y = {}, grad = {};
    if (i + 4 <= d) {
      x = __builtin_convertvector(*(const Four*)(h + i), Wide);
      y = __builtin_convertvector(*(const Four*)(h_hat + i), Wide);
      grad = __builtin_convertvector(*(const Four*)(g + i), Wide);
    } else
      for (int64_t l = 0; l < d - i; ++l) x[l] = h[i + l], y[l] = h_hat[i + l], grad[l] = g[i + l];
    const Wide delta = y - x;
    sums[0] += grad * delta;
    sums[1] += delta * delta;
    sums[2] += y * y;
    sums[3] += x * y;
    sums[4] += x * x;
  }
  for (int s = 0; s < STATS; ++s) to[s] = T((sums[s][0] + sums[s][1]) + (sums[s][2] + sums[s][3]));
}

// One pass: h_hat of a token is built in cache, and its sums are taken from there with h and g.
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
        code.row(n, y);
        statistics(in<T>(h) + n * d, in<T>(g) + n * d, y, d, out<T>(stats) + n * STATS);
      }
    });
  });
  return {stats, h_hat};
}

// -------------------------------------------------------------------------------------------------- backward
// delta = h_hat - h [N,d], delta . W_dec[indices] [N,k] and |delta|^2 [N]: what the gradients of |delta|^2 need.
// A token's rows of W_dec are read for h_hat and again for the products, then from the level-2 cache.
std::tuple<Tensor, Tensor, Tensor> reconstruction_error(const Tensor& values, const Tensor& indices,
                                                        const Tensor& W_dec, const Tensor& b_dec,
                                                        const Tensor& h_) {
  const char* op = "reconstruction_error";
  const Code code(op, values, indices, W_dec, b_dec);
  const int64_t N = code.N, d = code.d, k = code.k;
  check(op, h_, values.scalar_type(), {N, d});
  Tensor h = contiguous(h_), delta = like(h, {N, d}), products = like(h, {N, k}), squares = like(h, {N});
  by_dtype(h, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      const int64_t *f = in<int64_t>(code.indices), self = 0;
      const T *x = in<T>(h), *W = in<T>(code.W);
      T *to = out<T>(delta), *prod = out<T>(products), *sq = out<T>(squares);
      for (int64_t n = begin; n < end; ++n) {
        T* row = to + n * d;
        code.row(n, row);
        for (int64_t i = 0; i < d; ++i) row[i] -= x[n * d + i];
        dots_of(row, W, f + n * k, k, d, prod + n * k);
        dots<1>(row, row, &self, d, sq + n);
      }
    });
  });
  return {delta, products, squares};
}

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
  Tensor products = like(x, {N, k});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
      const T *from = in<T>(x), *rows = in<T>(W);
      const int64_t* f = in<int64_t>(indices);
      T* to = out<T>(products);
      for (int64_t n = begin; n < end; ++n) dots_of(from + n * d, rows, f + n * k, k, d, to + n * k);
    });
  });
  return products;
}

// The entries of a code by latent: those of f are start[f] to start[f + 1], in token order (a counting sort).
template <class T> struct ByLatent {
  std::vector<int64_t> start, token;
  std::vector<T> coef;
  const T* x;  // [N,d]
  int64_t d;

  ByLatent(const char* op, const Tensor& coef_, const Tensor& indices_, const Tensor& x_, int64_t F)
      : start(F + 2), x(in<T>(x_)), d(x_.size(1)) {
    const int64_t N = coef_.size(0), k = coef_.size(1);
    check_code(op, indices_, F);
    const int64_t* f = in<int64_t>(indices_);
    const T* c = in<T>(coef_);
    token.resize(N * k), coef.resize(N * k);
    for (int64_t at = 0; at < N * k; ++at) ++start[f[at] + 2];
    for (int64_t i = 2; i < F + 2; ++i) start[i] += start[i - 1];
    for (int64_t n = 0, at = 0; n < N; ++n)
      for (int64_t j = 0; j < k; ++j, ++at) {
        const int64_t to = start[f[at] + 1]++;
        token[to] = n, coef[to] = c[at];
      }
  }

  // g [d] = sum of coef x[token] over the entries of f -> sum of coef. Sums of 32 entries go into a float64
  // total, so that a latent that fires on every token loses no more digits than in a blocked matmul; total [d]
  // is scratch.
  double sum(int64_t f, T* g, double* total) const {
    double sum = 0;
    const int64_t first = start[f], last = start[f + 1];
    for (int64_t e0 = first; e0 == first || e0 < last; e0 += 32) {
      const int64_t e1 = std::min(e0 + 32, last);
      sum_rows(coef.data() + e0, token.data() + e0, e1 - e0, int64_t(token.size()) - e1, x, d, g);
      sum += std::accumulate(coef.data() + e0, coef.data() + e1, 0.0);
      if (last - first <= 32) return sum;
      if (e0 == first) std::fill(total, total + d, 0);
      for (int64_t i = 0; i < d; ++i) total[i] += g[i];
    }
    std::copy(total, total + d, g);
    return sum;
  }
};

void check_entries(const char* op, const Tensor& coef, const Tensor& indices, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && coef.dim() == 2, op, ": coef and x must have two dimensions");
  check(op, x, x.scalar_type(), {x.size(0), x.size(1)});
  check(op, coef, x.scalar_type(), {x.size(0), coef.size(1)});
  check(op, indices, ScalarType::Long, {x.size(0), coef.size(1)});
}

// rows[f] = sum of coef[n,j] x[n] over the entries with indices[n,j] = f, sums[f] = sum of their coef. A thread
// owns whole rows.
std::tuple<Tensor, Tensor> scatter_rows(const Tensor& coef_, const Tensor& indices_, const Tensor& x_,
                                        int64_t F) {
  const char* op = "scatter_rows";
  STD_TORCH_CHECK(F >= 0, op, ": F=", F, " is negative");
  check_entries(op, coef_, indices_, x_);
  Tensor x = contiguous(x_), coef = contiguous(coef_), indices = contiguous(indices_);
  const int64_t d = x.size(1);
  Tensor rows = like(x, {F, d}), sums = like(x, {F});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ByLatent<T> entries(op, coef, indices, x, F);
    torch::stable::parallel_for(0, F, 64, [&](int64_t begin, int64_t end) {
      std::vector<double> total(d);
      for (int64_t f = begin; f < end; ++f)
        out<T>(sums)[f] = T(entries.sum(f, out<T>(rows) + f * d, total.data()));
    });
  });
  return {rows, sums};
}

// -------------------------------------------------------------------------------------------------- optimiser
struct Rates {  // of one step of Adam (Kingma & Ba 2015) after t of them
  double step, root, beta1, beta2, eps;  // rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};

template <class T>
WIDE void adam(T* __restrict w, T* __restrict m, T* __restrict v, const T* __restrict g, int64_t d, Rates of) {
  const T step = of.step, root = of.root, one = 1 - of.beta1, beta2 = of.beta2, two = 1 - of.beta2, eps = of.eps;
  for (int64_t i = 0; i < d; ++i) {
    m[i] += one * (g[i] - m[i]);
    v[i] = beta2 * v[i] + two * (g[i] * g[i]);
    w[i] -= step * (m[i] / (std::sqrt(v[i]) * root + eps));
  }
}

template <class T> WIDE void add_scaled(T* __restrict y, const T* __restrict x, T a, int64_t d) {
  for (int64_t i = 0; i < d; ++i) y[i] += a * x[i];
}

template <class T> WIDE void multiply(T* y, T a, int64_t d) {
  for (int64_t i = 0; i < d; ++i) y[i] *= a;
}

// A step of Adam on W [F,d], whose gradient is scatter_rows(coef, indices, x), and `more` [D,d] at its `rows`
// [D] -> the column sums [F] of the code (the gradient of a bias), and sums . W [d] for W before the step (minus
// the gradient of what was subtracted from every x). The gradient lives in cache, a row at a time: m, v and W
// pass through memory once. unit: rows of W have norm 1 before and after, and what of the gradient is along
// them is taken out.
std::tuple<Tensor, Tensor> adam_rows_(const Tensor& W, const Tensor& m, const Tensor& v, const Tensor& coef_,
                                      const Tensor& indices_, const Tensor& x_, const Tensor& rows_,
                                      const Tensor& more_, double step, double root, double beta1,
                                      double beta2, double eps, bool unit) {
  const char* op = "adam_rows_";
  check_entries(op, coef_, indices_, x_);
  STD_TORCH_CHECK(W.dim() == 2 && rows_.dim() == 1, op, ": W must have two dimensions, rows one");
  const int64_t F = W.size(0), d = x_.size(1), D = rows_.size(0), blocks = (F + BLOCK - 1) / BLOCK;
  for (const Tensor* t : {&W, &m, &v}) {
    check(op, *t, x_.scalar_type(), {F, d});
    STD_TORCH_CHECK(t->is_contiguous(), op, ": what is updated must be contiguous");
  }
  check(op, rows_, ScalarType::Long, {D});
  check(op, more_, x_.scalar_type(), {D, d});
  Tensor x = contiguous(x_), coef = contiguous(coef_), indices = contiguous(indices_);
  Tensor rows = contiguous(rows_), more = contiguous(more_);
  check_code(op, rows, F);
  std::vector<int64_t> at(F, -1);  // in more
  for (int64_t i = 0; i < D; ++i) at[in<int64_t>(rows)[i]] = i;
  const Rates rates{step, root, beta1, beta2, eps};
  Tensor sums = like(x, {F}), back = like(x, {d});
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ByLatent<T> entries(op, coef, indices, x, F);
    std::vector<T> partial(blocks * d);  // sums . W of a block
    T *weights = out<T>(W), *first = out<T>(m), *second = out<T>(v), *column = out<T>(sums);
    const T* extra = in<T>(more);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> g(d);
      std::vector<double> total(d);
      const int64_t self = 0;
      for (int64_t f = begin * BLOCK; f < std::min(end * BLOCK, F); ++f) {
        T *w = weights + f * d, along, square;
        column[f] = T(entries.sum(f, g.data(), total.data()));
        if (column[f] != 0) add_scaled(partial.data() + f / BLOCK * d, w, column[f], d);
        if (at[f] >= 0) add_scaled(g.data(), extra + at[f] * d, T(1), d);
        if (unit) {
          dots<1>(g.data(), w, &self, d, &along);
          add_scaled(g.data(), w, -along, d);
        }
        adam(w, first + f * d, second + f * d, g.data(), d, rates);
        if (unit) {
          dots<1>(w, w, &self, d, &square);
          multiply(w, 1 / std::sqrt(square), d);
        }
      }
    });
    std::vector<double> total(d);
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t i = 0; i < d; ++i) total[i] += partial[b * d + i];
    std::copy(total.begin(), total.end(), out<T>(back));
  });
  return {sums, back};
}

}  // namespace

STABLE_TORCH_LIBRARY(tg, m) {
  m.def("topk_encode(Tensor h, Tensor W_enc, Tensor b_enc, int k) -> (Tensor, Tensor)");
  m.def("sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec) -> Tensor");
  m.def("gradient_weighted_distortion(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec, "
        "Tensor h, Tensor g, bool want_h_hat) -> (Tensor, Tensor)");
  m.def("gather_dot(Tensor x, Tensor W, Tensor indices) -> Tensor");
  m.def("scatter_rows(Tensor coef, Tensor indices, Tensor x, int F) -> (Tensor, Tensor)");
  m.def("reconstruction_error(Tensor values, Tensor indices, Tensor W_dec, Tensor b_dec, Tensor h) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("adam_rows_(Tensor(a!) W, Tensor(b!) m, Tensor(c!) v, Tensor coef, Tensor indices, Tensor x, "
        "Tensor rows, Tensor more, float step, float root, float beta1, float beta2, float eps, bool unit) "
        "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(tg, CPU, m) {
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("gradient_weighted_distortion", TORCH_BOX(&gradient_weighted_distortion));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
  m.impl("reconstruction_error", TORCH_BOX(&reconstruction_error));
  m.impl("adam_rows_", TORCH_BOX(&adam_rows_));
}

// Importing the module runs the registrations above; what it holds says which build this is.
PYBIND11_MODULE(_kernels, m) {
  m.attr("devices") = BUILD_DEVICES;
  m.attr("source") = BUILD_SOURCE;
  m.def("screen_first", &screen_first);
  m.def("int8_gemm_cost", &int8_gemm_cost);
  m.def("fallback_tokens", [] {
    const auto [integers, own] = fallback_tokens();
    return pybind11::make_tuple(integers, own);
  });
  m.attr("MAX_INT8_GEMM_COST") = MAX_INT8_GEMM_COST;
}
