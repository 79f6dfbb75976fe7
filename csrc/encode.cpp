// topk_encode on the CPU: the exact top k for less than a float32 GEMM.
//
// The result. The pre-activation of a token h and a latent with row w and bias b is h . w + b, summed in the
// tensors' own dtype in one fixed order. The k largest are returned; of equal ones, those with lower indices.
// It does not depend on the library's GEMM, the instruction set or the number of threads.
//
// The method.
//   1. bounds.h: rows are rounded to 8 bits, and a bound says how far a product of such rows can be from the
//      pre-activation.
//   2. screen.h: a cheap GEMM of the rounded rows, tile by tile, gives every latent a lower and an upper
//      bound. At least k latents reach the k-th largest lower bound, the floor. Latents whose upper bound is
//      below the floor are not among the top k and are dropped.
//   3. This file: the few latents that remain, the candidates, are computed exactly, and the k best of them
//      are selected.
// A token that keeps too many candidates falls back to the next screen: first 8-bit integers, then the
// tensors' own dtype, then no screen, which computes every latent exactly.
//
// An example: d = 2, F = 4, k = 1, no bias. (The 8-bit screen really asks for d of 32; scales and the
// rounding of floats, which are far smaller here than what 8 bits take away, are left out.)
//
//   row                  unit  q           |unit q|  |unit e|  norm
//   h  = (1.27,  0.504)  0.01  (127,  50)  1.365     0.004     1.366   (0.504 is 50.4 units: e = (0, 0.4))
//   w0 = (1.27,  0.300)  0.01  (127,  30)  1.305     0         1.305
//   w1 = (1.27,  0.304)  0.01  (127,  30)  1.305     0.004     1.306
//   w2 = (1.27, -0.200)  0.01  (127, -20)  1.286     0         1.286
//   w3 = w1
//
//   latent  q_h . q_w  product  |unit q_h| |unit e_w| + |unit e_h| |w|  lower   upper   exact
//   w0      17629      1.7629   1.365 * 0     + .004 * 1.305 = .0052    1.7577  1.7681  1.7641
//   w1, w3  17629      1.7629   1.365 * .004  + .004 * 1.306 = .0107    1.7522  1.7736  1.7661
//   w2      15129      1.5129   1.365 * 0     + .004 * 1.286 = .0051    1.5078  1.5180  1.5121
//
// The floor is the largest lower bound, 1.7577 (k = 1). The upper bound of w2 is below it: w2 is dropped. The
// screen cannot separate w0, w1 and w3, so these three are computed exactly. w1 and w3 are the largest and
// are equal. The lower index wins: the result is value 1.7661, index 1.
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "bounds.h"
#include "cpu.h"
#include "encode.h"
#include "keys.h"
#include "screen.h"

namespace {

constexpr int64_t TILE_TOKENS = 256, TILE_LATENTS = 1024;  // 1 MB of pre-activations a thread
// The 8-bit screen gives up on a token with more than 4 k + min(F / 4, this) candidates: to compute a quarter
// of the latents costs about as much as the next screen. The constant limits the memory.
constexpr int64_t MAX_EXTRA_CANDIDATES = 4096;

template <class T> struct Problem {
  const T *h, *W, *b;
  int64_t d, F, k;
  T* values;
  int64_t* indices;
  const Latents<T>& latents;
};

// ---------------------------------------------------------------------------------------------- exact values
// The pre-activations of one latent for two tokens. Independent sums in a fixed number of lanes, no fused
// multiply-add: the same bits everywhere.
template <class T>
WIDE void pre_activations(const T* h0, const T* h1, const T* w, T bias, int64_t d, T* x0, T* x1) {
  typedef T Lanes __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
  constexpr int64_t width = 64 / sizeof(T);
  Lanes a0 = {}, a1 = {}, b0 = {}, b1 = {};
  T rest[2] = {};
  int64_t i = 0;
  for (; i + 2 * width <= d; i += 2 * width) {
    const Lanes w0 = *(const Lanes*)(w + i), w1 = *(const Lanes*)(w + i + width);
    __builtin_prefetch(w + d + i);  // the next latent's
    a0 += *(const Lanes*)(h0 + i) * w0, a1 += *(const Lanes*)(h0 + i + width) * w1;
    b0 += *(const Lanes*)(h1 + i) * w0, b1 += *(const Lanes*)(h1 + i + width) * w1;
  }
  for (; i < d; ++i) rest[0] += h0[i] * w[i], rest[1] += h1[i] * w[i];
  a0 += a1, b0 += b1;
  T a[width], b[width];
  memcpy(a, &a0, sizeof a), memcpy(b, &b0, sizeof b);
  for (int64_t half = width / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) a[l] += a[l + half], b[l] += b[l + half];
  *x0 = (a[0] + rest[0]) + bias, *x1 = (b[0] + rest[1]) + bias;
}

// --------------------------------------------------------------------------------------------- the k largest
template <class T> WIDE void to_orders(const T* x, int64_t n, typename Bits<T>::U* order) {
  for (int64_t i = 0; i < n; ++i) order[i] = to_order(x[i]);
}

// The k-th largest of x [n], n >= k, by bisection: one bit and one pass of vector compares at a time. Only
// its `bits` highest bits are found, so with fewer than all it is rounded down.
template <class U> WIDE U kth_largest(const U* x, int64_t n, int64_t k, int bits) {
  U low = 0;
  for (int bit = 8 * sizeof(U) - 1; bits > 0; --bit, --bits) {
    const U next = low + (U(1) << bit);
    U count = 0;
    for (int64_t i = 0; i < n; ++i) count += x[i] >= next;
    if (int64_t(count) >= k) low = next;
  }
  return low;
}

// The best k of x [n], n >= k, whose indices f [n] ascend: all above the k-th largest, and of those equal to
// it the first ones. order [n] is scratch.
template <class T>
void select_top_k(const T* x, const uint32_t* f, int64_t n, int64_t k, typename Bits<T>::U* order, T* values,
                  int64_t* indices) {
  to_orders(x, n, order);
  const auto last = kth_largest(order, n, k, 8 * sizeof(*order));
  int64_t equal = k;
  for (int64_t i = 0; i < n; ++i) equal -= order[i] > last;
  for (int64_t i = 0, j = 0; i < n; ++i)
    if (order[i] > last || (order[i] == last && equal-- > 0)) values[j] = relu(x[i]), indices[j++] = f[i];
}

template <class T> WIDE void max_into(T* __restrict most, const T* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) most[i] = x[i] > most[i] ? x[i] : most[i];
}

// ------------------------------------------------------------------------------------------------ candidates
// The latents that may still be among the top k of one token, by ascending index.
template <class T> struct Candidates {
  using U = typename Bits<T>::U;
  T *lower, *upper;
  uint32_t* f;
  int64_t n = 0;
  T floor = -INF<T>;     // at least k latents have a pre-activation that reaches it
  bool give_up = false;  // there are too many of them, or their bounds are not to be relied on

  // `bound` are lower bounds of different latents.
  void raise_floor(const T* bound, int64_t count, int64_t k, int bits, U* scratch) {
    to_orders(bound, count, scratch);
    floor = std::max(floor, from_order<T>(kth_largest(scratch, count, k, bits)));  // a NaN does not count
  }

  void drop_below_floor(int64_t k, U* scratch) {
    if (n > k) raise_floor(lower, n, k, 8 * sizeof(U), scratch);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      lower[kept] = lower[i], upper[kept] = upper[i], f[kept] = f[i];
      kept += upper[i] >= floor;
    }
    n = kept;
  }
};

// Encodes up to max_tokens at a time by one screen, whose products are of type Sum: int32_t for the 8-bit
// screen, T for the one in the tensors' own dtype. Every thread has its own, with the memory it needs.
template <class T, class Sum> class Screen {
  using Entry = std::conditional_t<std::is_same_v<Sum, int32_t>, int8_t, T>;
  static constexpr bool IS_INT8 = std::is_same_v<Entry, int8_t>;
  static constexpr int64_t CHUNK = 64;  // latents appended at once
  const Problem<T>& problem;
  const int64_t width = std::min(problem.F, TILE_LATENTS);
  // A cheap floor: latent f belongs to group f % groups, and every group keeps its largest lower bound. These
  // are lower bounds of different latents, so at least k latents reach the k-th largest of them.
  const int64_t groups =
      std::min(problem.F, std::max<int64_t>(256, (2 * problem.k + LANES - 1) / LANES * LANES));
  const int64_t capacity;                        // candidates that a token can have
  std::unique_ptr<Entry[]> x;                    // [max_tokens,d], the tokens' rows
  std::unique_ptr<Sum[]> tile;                   // [max_tokens,width], their products with a tile's latents
  std::unique_ptr<T[]> kept_lower, kept_upper;   // [max_tokens,capacity], bounds of the candidates
  std::unique_ptr<T[]> tile_lower, tile_upper;   // [width], bounds of one token's row of the tile
  std::unique_ptr<T[]> group_max;                // [max_tokens,groups]
  std::unique_ptr<uint32_t[]> kept_f;            // [max_tokens,capacity], latents of the candidates
  std::unique_ptr<typename Bits<T>::U[]> scratch;
  std::vector<Row<T>> rows;
  std::vector<Candidates<T>> candidates;  // of each token, in kept_lower, kept_upper and kept_f
  struct Place {
    uint32_t token, slot;
  };
  std::vector<uint32_t> start;  // where the entries of a latent begin in `places`
  std::vector<Place> places;    // for which token, and as which of its candidates, a latent is to be computed

 public:
  Screen(const Problem<T>& problem_, int64_t max_tokens, int64_t max_candidates)
      : problem(problem_),
        capacity(std::min(max_candidates, problem_.F) + 2 * CHUNK + LANES),
        x(uninitialised<Entry>(max_tokens * problem_.d)),
        tile(uninitialised<Sum>(max_tokens * width)),
        kept_lower(uninitialised<T>(max_tokens * capacity)),
        kept_upper(uninitialised<T>(max_tokens * capacity)),
        tile_lower(uninitialised<T>(width)),
        tile_upper(uninitialised<T>(width)),
        group_max(uninitialised<T>(max_tokens * groups)),
        kept_f(uninitialised<uint32_t>(max_tokens * capacity)),
        scratch(uninitialised<typename Bits<T>::U>(std::max(capacity, groups))) {}

  // Writes the results of these tokens; returns those that it gave up on, for the next screen.
  std::vector<int64_t> encode(const std::vector<int64_t>& tokens) {
    const int64_t N = tokens.size(), d = problem.d;
    rows.resize(N), candidates.resize(N);
    for (int64_t r = 0; r < N; ++r) load_row(r, problem.h + tokens[r] * d);
    for (int64_t f0 = 0; f0 < problem.F; f0 += width) {
      const int64_t cols = std::min(width, problem.F - f0);
      if constexpr (IS_INT8)
        gemm(x.get(), N, problem.latents.q.get() + f0 * d, cols, d, tile.get());
      else
        gemm(x.get(), N, problem.W + f0 * d, cols, d, tile.get());
      for (int64_t r = 0; r < N; ++r) scan_tile(r, f0, cols);
    }
    for (Candidates<T>& best : candidates) {
      best.drop_below_floor(problem.k, scratch.get());
      if (best.give_up) best.n = 0;
    }
    rescore(tokens);
    std::vector<int64_t> left;
    for (int64_t r = 0; r < N; ++r) {
      const Candidates<T>& best = candidates[r];
      if (best.give_up)
        left.push_back(tokens[r]);
      else
        select_top_k(best.upper, best.f, best.n, problem.k, scratch.get(),
                     problem.values + tokens[r] * problem.k, problem.indices + tokens[r] * problem.k);
    }
    return left;
  }

 private:
  // Prepares token r: its row as the screen multiplies it, the sizes of the row, no candidates.
  void load_row(int64_t r, const T* h) {
    const int64_t d = problem.d;
    const T* scale = problem.latents.scale[0].data();
    if constexpr (IS_INT8) {
      rows[r] = round_to_8_bits(h, d, scale, x.get() + r * d);
      rows[r].error_norm += (d + 16) * EPS<T> * rows[r].norm;  // gamma_d < d EPS, for the exact value
    } else {
      std::copy(h, h + d, x.get() + r * d);
      const T norm = round_to_8_bits(h, d, scale, uninitialised<int8_t>(d).get()).norm;
      rows[r] = {1, 0, (2 * d + 16) * EPS<T> * norm, norm};  // for the product and for the exact value
    }
    candidates[r] = {kept_lower.get() + r * capacity, kept_upper.get() + r * capacity,
                     kept_f.get() + r * capacity};
    std::fill_n(group_max.get() + r * groups, groups, -INF<T>);
  }

  // Bounds the products of token r with the tile's latents and adds the survivors to its candidates.
  void scan_tile(int64_t r, int64_t f0, int64_t cols) {
    Candidates<T>& best = candidates[r];
    bound_pre_activations(tile.get() + r * cols, cols, f0, problem.latents, problem.b, rows[r],
                          tile_lower.get(), tile_upper.get());
    for (int64_t c = 0, n; c < cols; c += n) {
      const int64_t g = (f0 + c) % groups;
      n = std::min(groups - g, cols - c);
      max_into(group_max.get() + r * groups + g, tile_lower.get() + c, n);
    }
    // After tiles 1, 2, 4, 8 ... only: the floor rises ever more slowly. Its 16 highest bits are enough.
    const int64_t tiles = f0 / width + 1;
    if ((tiles & (tiles - 1)) == 0)
      best.raise_floor(group_max.get() + r * groups, groups, problem.k, 16, scratch.get());
    for (int64_t c = 0; c < cols && !best.give_up; c += CHUNK) {
      if (best.n > capacity - 2 * CHUNK) {
        // if an eighth or less becomes free, this would happen again and again; where all F fit it does not
        best.drop_below_floor(problem.k, scratch.get());
        best.give_up = best.n > std::min(capacity / 8 * 7, capacity - 2 * CHUNK) &&
                       capacity < problem.F + 2 * CHUNK;
      }
      best.n += append_survivors(tile_lower.get() + c, tile_upper.get() + c, std::min(CHUNK, cols - c),
                                 uint32_t(f0 + c), best.floor, best.lower + best.n, best.upper + best.n,
                                 best.f + best.n);
    }
  }

  // Puts the exact value in the place of the upper bound. A value outside its bounds means that the GEMM is
  // not what the proof assumes; then nothing of this token is used.
  void record_exact(const Place& place, T value) {
    Candidates<T>& best = candidates[place.token];
    best.give_up |= value < best.lower[place.slot] || value > best.upper[place.slot];
    best.upper[place.slot] = value;
  }

  // Computes every candidate of every token, latent after latent, so that W_enc is read once for all tokens.
  // `places` lists the candidates by latent (a counting sort).
  void rescore(const std::vector<int64_t>& tokens) {
    start.assign(problem.F + 2, 0);
    for (const Candidates<T>& best : candidates)
      for (int64_t i = 0; i < best.n; ++i) ++start[best.f[i] + 2];
    std::partial_sum(start.begin(), start.end(), start.begin());
    places.resize(start.back());
    for (uint32_t r = 0; r < candidates.size(); ++r)
      for (uint32_t i = 0; i < candidates[r].n; ++i) places[start[candidates[r].f[i] + 1]++] = {r, i};
    const int64_t d = problem.d;
    T x[2];
    for (int64_t f = 0; f < problem.F; ++f)
      for (uint32_t p = start[f]; p < start[f + 1]; p += 2) {
        const Place &one = places[p], &two = places[std::min(p + 1, start[f + 1] - 1)];
        pre_activations(problem.h + tokens[one.token] * d, problem.h + tokens[two.token] * d,
                        problem.W + f * d, problem.b[f], d, x, x + 1);
        record_exact(one, x[0]);
        if (p + 1 < start[f + 1]) record_exact(two, x[1]);
      }
  }
};

template <class T> void encode_without_screen(const Problem<T>& problem, const std::vector<int64_t>& tokens) {
  const int64_t d = problem.d, F = problem.F, k = problem.k;
  auto x = uninitialised<T>(F);
  auto f = uninitialised<uint32_t>(F);
  auto scratch = uninitialised<typename Bits<T>::U>(F);
  std::iota(f.get(), f.get() + F, 0);
  for (int64_t n : tokens) {
    const T* h = problem.h + n * d;
    for (int64_t i = 0; i < F; ++i) pre_activations(h, h, problem.W + i * d, problem.b[i], d, &x[i], &x[i]);
    select_top_k(x.get(), f.get(), F, k, scratch.get(), problem.values + n * k, problem.indices + n * k);
  }
}

// ------------------------------------------------------------------------------------------ screen by screen
enum FirstScreen { INT8, OWN_DTYPE, NONE, MEASURED };  // MEASURED: the cheaper of the first two
FirstScreen asked_for = MEASURED;
std::atomic<int64_t> given_up[2];  // tokens that the 8-bit screen and the other one left to the next

FirstScreen first_screen(bool int8_possible) {
  int8_possible &= int8_gemm_cost() < INF<double>;
  const FirstScreen first =
      asked_for != MEASURED ? asked_for : int8_gemm_cost() < MAX_INT8_GEMM_COST ? INT8 : OWN_DTYPE;
  return first == INT8 && !int8_possible ? OWN_DTYPE : first;
}

template <class T>
void encode(const Tensor& h, const Tensor& W, const Tensor& b, int64_t k, const Tensor& values,
            const Tensor& indices) {
  const int64_t N = h.size(0), d = h.size(1), F = W.size(0);
  const FirstScreen first = first_screen(std::is_same_v<T, float> && d >= MIN_INT8_D && d <= MAX_INT8_D);
  const Latents<T> latents(in<T>(h), N, in<T>(W), in<T>(b), F, d, first == INT8);
  const Problem<T> problem{in<T>(h), in<T>(W), in<T>(b), d, F, k, out<T>(values), out<int64_t>(indices),
                           latents};
  torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    const int64_t max_tokens = std::min(TILE_TOKENS, end - begin);
    std::vector<int64_t> tokens(end - begin);  // still to be encoded
    std::iota(tokens.begin(), tokens.end(), begin);
    const auto encode_by = [&](auto& screen) {
      std::vector<int64_t> left;
      const int64_t count = tokens.size();
      for (int64_t n0 = 0; n0 < count; n0 += max_tokens) {
        const auto from = tokens.begin() + n0, to = tokens.begin() + std::min(n0 + max_tokens, count);
        const std::vector<int64_t> more = screen.encode({from, to});
        left.insert(left.end(), more.begin(), more.end());
      }
      tokens = left;
    };
    if (first == INT8) {
      Screen<T, int32_t> screen(problem, max_tokens, 4 * k + std::min<int64_t>(F / 4, MAX_EXTRA_CANDIDATES));
      encode_by(screen);
      given_up[0] += tokens.size();
    }
    if (first != NONE && !tokens.empty()) {
      Screen<T, T> screen(problem, std::min<int64_t>(max_tokens, tokens.size()), 4 * k + 256);
      encode_by(screen);
      given_up[1] += tokens.size();
    }
    encode_without_screen(problem, tokens);
  });
}

std::tuple<Tensor, Tensor> topk_encode(const Tensor& h_, const Tensor& W_, const Tensor& b_, int64_t k) {
  const char* op = "topk_encode";
  STD_TORCH_CHECK(h_.dim() == 2 && W_.dim() == 2, op, ": h and W_enc must have two dimensions");
  const int64_t N = h_.size(0), d = h_.size(1), F = W_.size(0);
  check(op, h_, h_.scalar_type(), {N, d});
  check(op, W_, h_.scalar_type(), {F, d});
  check(op, b_, h_.scalar_type(), {F});
  const bool fits = k >= 1 && k <= F && F < std::numeric_limits<uint32_t>::max();
  STD_TORCH_CHECK(fits, op, ": k=", k, " is not in 1..F=", F);
  Tensor h = contiguous(h_), W = contiguous(W_), b = contiguous(b_);
  Tensor values = like(h, {N, k}), indices = torch::stable::new_empty(h, {N, k}, ScalarType::Long);
  if (N) by_dtype(h, [&](auto zero) { encode<decltype(zero)>(h, W, b, k, values, indices); });
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tg, CPU, m) { m.impl("topk_encode", TORCH_BOX(&topk_encode)); }

// ------------------------------------------------------------------- for the module's attributes, in ops.cpp
double int8_gemm_cost() {
  static const double cost = [] {
    double measured = 0;
    // The second of two tasks does nothing: inside parallel_for the products take one thread, as in encode.
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) {
      if (begin == 0) measured = measure_int8_gemm_cost();
    });
    return measured;
  }();
  return cost;
}

void screen_first(const std::string& name) {
  const std::array<const char*, 4> names{"integers", "own", "none", "measured"};  // as in FirstScreen
  const auto at = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(at != names.end(), "screen_first: integers, own, none or measured, not ", name);
  asked_for = FirstScreen(at - names.begin());
}

std::tuple<int64_t, int64_t> fallback_tokens() { return {given_up[0].exchange(0), given_up[1].exchange(0)}; }
