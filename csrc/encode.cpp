// topk_encode on the CPU: the exact top k for less than a float32 GEMM.
//
// What the result is. The pre-activation of a token and a latent is h . w + b, summed in the tensors' own
// precision in one fixed order. The k largest are the result, equal ones by the lower index. No library's
// GEMM, no instruction set and no number of threads has a say in it.
//
// How it is found. A screen is a GEMM of low precision, tile by tile, with a proof of how far each of its
// numbers can be from the pre-activation. At least k latents reach the k-th largest lower bound, so whatever
// stays below that with its upper bound is out. The few others are computed as said above. Screens come in
// the order of their price, and a token of which too many are left goes on to the next: 8-bit integers, the
// tensors' own precision, none.
//
// The proof. A row is x = unit (q + e), q its integers in [-127, 127]. Then
//   h . w = unit_h unit_w q_h . q_w + (unit_h q_h) . (unit_w e_w) + (unit_h e_h) . w,
// and by Cauchy-Schwarz the last two are at most kept_h lost_w + lost_h norm_w. A floating-point sum of d
// products, in any order, errs by gamma_d |h| |w| at most (Higham 2002, (3.5)), in a screen and in the
// result. What the arithmetic of the bounds rounds away is below 16 eps (|h| |w| + |b|). All of this holds
// for h s and w / s, too, whatever the scales s [d] of the dimensions are: powers of two, so that nothing is
// rounded, and such that a dimension that is large in h or in W does not cost the others their digits (Xiao
// et al. 2023, arXiv:2211.10438, eq. 4).
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "encode.h"
#include "keys.h"

namespace {

constexpr int64_t TILE_TOKENS = 256, TILE_LATENTS = 1024;  // 1 MB of pre-activations a thread
// A quarter of the latents cost about what the next screen does; beyond so many, memory.
constexpr int64_t MANY = 4096;
constexpr int64_t MIN_D = 32, MAX_D = 1 << 17;  // of integers: d * 127 * 127 fits an int32
template <class T> constexpr T INF = std::numeric_limits<T>::infinity();
template <class T> constexpr T EPS = std::numeric_limits<T>::epsilon();
template <class T> const T LARGE = std::sqrt(std::numeric_limits<T>::max()) / 16;  // of a norm, and of a bias

template <class T> std::unique_ptr<T[]> memory(int64_t n) { return std::unique_ptr<T[]>(new T[n]); }

// result = a b^T through the dispatcher: inside parallel_for this is the library's single-threaded GEMM.
// Wrapping raw pointers keeps autograd out: the threads of parallel_for do not inherit the caller's grad
// mode.
template <class T> constexpr ScalarType DTYPE = ScalarType::Float;
template <> constexpr ScalarType DTYPE<double> = ScalarType::Double;
template <> constexpr ScalarType DTYPE<int8_t> = ScalarType::Char;
template <> constexpr ScalarType DTYPE<int32_t> = ScalarType::Int;

template <class T, class A>
void gemm(const T* a, int64_t rows, const T* b, int64_t cols, int64_t d, A* result) {
  using torch::stable::detail::from;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  auto view = [&](const void* p, ScalarType dtype, int64_t m, int64_t n, int64_t step_m, int64_t step_n) {
    return from(torch::stable::from_blob(const_cast<void*>(p), {m, n}, {step_m, step_n}, cpu, dtype));
  };
  std::array<StableIValue, 3> stack{view(a, DTYPE<T>, rows, d, d, 1), view(b, DTYPE<T>, d, cols, 1, d),
                                    view(result, DTYPE<A>, rows, cols, cols, 1)};
  const char* op = std::is_same_v<T, int8_t> ? "aten::_int_mm" : "aten::mm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference, so that it is released
}

// ---------------------------------------------------------------------------------------------- rows, bounds
template <class T> struct Row {
  T unit, kept, lost, norm;  // |unit q|, |unit e| and |x|, rounded up
};

template <class T> inline __attribute__((always_inline)) T sum_of(T (&lane)[LANES]) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class T> WIDE T largest_of(const T* x, int64_t d, const T* scale) {
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

// x scale in 8 bits: q, and by how much that is wrong. A row that cannot be bounded (not finite, so large
// that a product might overflow, or so small that digits are lost) has infinite norms.
template <class T> WIDE Row<T> round_to_8_bits(const T* x, int64_t d, const T* scale, int8_t* q) {
  constexpr T shift = T(1.5) / EPS<T>;  // adding it rounds to an integer
  const T largest = largest_of(x, d, scale), per_unit = largest > 0 ? T(127) / largest : T(1);
  T kept[LANES] = {}, lost[LANES] = {}, norm[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    T rounded[LANES];
    for (int l = 0; l < LANES; ++l) {
      const T u = x[i + l] * scale[i + l] * per_unit, r = (u + shift) - shift, e = u - r;
      rounded[l] = r, kept[l] += r * r, lost[l] += e * e, norm[l] += u * u;
    }
    for (int l = 0; l < LANES; ++l) q[i + l] = int8_t(int32_t(rounded[l]));
  }
  for (; i < d; ++i) {
    const T u = x[i] * scale[i] * per_unit, r = (u + shift) - shift, e = u - r;
    q[i] = int8_t(int32_t(r)), kept[0] += r * r, lost[0] += e * e, norm[0] += u * u;
  }
  const T unit = largest / T(127), up = unit * T(1.0001);  // the sums are rounded, too
  const Row<T> row{unit, up * std::sqrt(sum_of(kept)), up * std::sqrt(sum_of(lost)),
                   up * std::sqrt(sum_of(norm))};
  if (row.norm < LARGE<T> && (unit > 1 / LARGE<T> || largest == 0)) return row;
  std::fill(q, q + d, 0);
  return {0, INF<T>, INF<T>, INF<T>};
}

// Mean size of every dimension in some 64 rows of x [n,d], each divided by its largest number.
template <class T> std::vector<double> sizes(const T* x, int64_t n, int64_t d) {
  const std::vector<T> ones(d, 1);
  std::vector<double> mean(d);
  for (int64_t r = 0; r < n; r += (n + 63) / 64) {
    const T largest = largest_of(x + r * d, d, ones.data());
    if (!(largest > 1 / LARGE<T> && largest < LARGE<T>)) continue;
    for (int64_t i = 0; i < d; ++i) mean[i] += std::abs(x[r * d + i]) / largest;
  }
  return mean;
}

// s and 1 / s [d]
template <class T>
std::array<std::vector<T>, 2> scales(const T* h, int64_t N, const T* W, int64_t F, int64_t d) {
  const std::vector<double> of_h = sizes(h, N, d), of_W = sizes(W, F, d);
  std::array<std::vector<T>, 2> scale{std::vector<T>(d, 1), std::vector<T>(d, 1)};
  for (int64_t i = 0; i < d; ++i) {
    const double exponent = std::round(0.5 * std::log2(of_W[i] / of_h[i]));
    if (!(std::abs(exponent) <= 16)) continue;  // nor is it where one of them has no size
    scale[0][i] = std::ldexp(T(1), int(exponent)), scale[1][i] = std::ldexp(T(1), -int(exponent));
  }
  return scale;
}

// What the bounds of all latents are made of.
template <class T> struct Latents {
  std::array<std::vector<T>, 2> scale;  // of h and of W, [d]
  std::unique_ptr<int8_t[]> q;          // [F,d]
  std::vector<T> unit, lost, norm, slack;

  Latents(const T* h, int64_t N, const T* W, const T* b, int64_t F, int64_t d, bool integers)
      : scale(scales(h, N, W, F, d)),
        q(memory<int8_t>(integers ? F * d : 0)),
        unit(F),
        lost(F),
        norm(F),
        slack(F) {
    torch::stable::parallel_for(0, F, 64, [&](int64_t begin, int64_t end) {
      auto scratch = memory<int8_t>(d);
      for (int64_t f = begin; f < end; ++f) {
        const Row<T> row =
            round_to_8_bits(W + f * d, d, scale[1].data(), integers ? q.get() + f * d : scratch.get());
        const T size = std::abs(b[f]);
        unit[f] = row.unit, lost[f] = row.lost, norm[f] = row.norm;
        slack[f] = size < LARGE<T> ? 16 * EPS<T> * size + T(1e8) * std::numeric_limits<T>::min() : INF<T>;
      }
    });
  }
};

// A tile row [cols] of latents from f0 on -> the bounds of its pre-activations; no lower bound is -inf.
template <class A, class T>
WIDE void bounds(const A* __restrict tile, int64_t cols, int64_t f0, const Latents<T>& of, const T* bias,
                 const Row<T>& h, T* __restrict lower, T* __restrict upper) {
  const T unit_h = h.unit, kept = h.kept, lost_h = h.lost;
  const T *unit = of.unit.data() + f0, *lost = of.lost.data() + f0, *norm = of.norm.data() + f0;
  const T *slack = of.slack.data() + f0, *b = bias + f0;
  for (int64_t c = 0; c < cols; ++c) {
    T value = T(tile[c]), error = lost_h * norm[c] + slack[c];
    if (std::is_same_v<A, int32_t>) value *= unit_h * unit[c], error += kept * lost[c];
    value += b[c];
    upper[c] = value + error;
    lower[c] = error < INF<T> ? value - error : -INF<T>;
  }
}

// ------------------------------------------------------------------------------------------------ candidates
// The k-th largest of x [n], n >= k, by bisection, a bit and a pass of vector compares at a time; of its
// `bits` highest bits only, rounded down.
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

template <class T> WIDE void to_orders(const T* x, int64_t n, typename Bits<T>::U* order) {
  for (int64_t i = 0; i < n; ++i) order[i] = to_order(x[i]);
}

template <class T> WIDE void keep_largest(T* __restrict most, const T* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) most[i] = x[i] > most[i] ? x[i] : most[i];
}

// Whatever of `count` latents from f on reaches the floor, to the end of lower, upper and at: how many do.
template <class T>
int64_t append(const T* low, const T* high, int64_t count, uint32_t f, T floor, T* lower, T* upper,
               uint32_t* at) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    lower[n] = low[i], upper[n] = high[i] == high[i] ? high[i] : INF<T>, at[n] = f + i;
    n += !(high[i] < floor);  // 1 for a NaN too
  }
  return n;
}

#ifdef X86
// The same; the last of its three stores may write up to LANES - 1 entries beyond the end.
__attribute__((target("avx512f"))) int64_t append_512(const float* low, const float* high, int64_t count,
                                                      uint32_t f, float floor, float* lower, float* upper,
                                                      uint32_t* at) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 least = _mm512_set1_ps(floor), inf = _mm512_set1_ps(INF<float>);
  int64_t n = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 there = count - i < 16 ? (1 << (count - i)) - 1 : 0xffff;
    const __m512 x = _mm512_maskz_loadu_ps(there, high + i);
    const __mmask16 hits = _mm512_mask_cmp_ps_mask(there, x, least, _CMP_NLT_UQ);
    if (!hits) continue;
    const __m512 bound = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), inf);
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(f + i)));
    _mm512_storeu_ps(upper + n, _mm512_maskz_compress_ps(hits, bound));
    _mm512_storeu_ps(lower + n, _mm512_maskz_compress_ps(hits, _mm512_maskz_loadu_ps(there, low + i)));
    _mm512_storeu_si512(at + n, _mm512_maskz_compress_epi32(hits, index));
    n += __builtin_popcount(hits);
  }
  return n;
}

int64_t append(const float* low, const float* high, int64_t count, uint32_t f, float floor, float* lower,
               float* upper, uint32_t* at) {
  static const bool wide = __builtin_cpu_supports("avx512f");
  if (wide) return append_512(low, high, count, f, floor, lower, upper, at);
  return append<float>(low, high, count, f, floor, lower, upper, at);
}
#endif

// What may still be among the best k of a token, in the order of their indices.
template <class T> struct Candidates {
  using U = typename Bits<T>::U;
  T *lower, *upper;
  uint32_t* f;
  int64_t n = 0;
  T floor = -INF<T>;  // k latents reach it
  bool many = false;  // more than there is room for, or none to be believed

  void raise(const T* bound, int64_t count, int64_t k, int bits, U* scratch) {
    to_orders(bound, count, scratch);
    floor = std::max(floor, from_order<T>(kth_largest(scratch, count, k, bits)));  // a NaN does not count
  }

  void shrink(int64_t k, U* scratch) {
    if (n > k) raise(lower, n, k, 8 * sizeof(U), scratch);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      lower[kept] = lower[i], upper[kept] = upper[i], f[kept] = f[i];
      kept += upper[i] >= floor;
    }
    n = kept;
  }
};

// The best k of x [n], n >= k, whose indices f [n] ascend. order [n] is scratch.
template <class T>
void select(const T* x, const uint32_t* f, int64_t n, int64_t k, typename Bits<T>::U* order, T* values,
            int64_t* indices) {
  to_orders(x, n, order);
  const auto last = kth_largest(order, n, k, 8 * sizeof(*order));
  int64_t equal = k;
  for (int64_t i = 0; i < n; ++i) equal -= order[i] > last;
  for (int64_t i = 0, j = 0; i < n; ++i)
    if (order[i] > last || (order[i] == last && equal-- > 0)) values[j] = relu(x[i]), indices[j++] = f[i];
}

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

template <class T> struct Problem {
  const T *h, *W, *b;
  int64_t d, F, k;
  T* values;
  int64_t* indices;
  const Latents<T>& latents;
};

// ---------------------------------------------------------------------------------------------------- screens
// A screen whose numbers are A, for up to `most` tokens at a time.
template <class T, class A> class Screen {
  using Q = std::conditional_t<std::is_same_v<A, int32_t>, int8_t, T>;
  static constexpr bool INTEGERS = std::is_same_v<Q, int8_t>;
  static constexpr int64_t CHUNK = 64;
  const Problem<T>& of;
  const int64_t width = std::min(of.F, TILE_LATENTS);
  // Of a tile, the largest lower bound of every `groups`-th latent: the k-th largest of them is reached by k.
  const int64_t groups = std::min(of.F, std::max<int64_t>(256, (2 * of.k + LANES - 1) / LANES * LANES));
  const int64_t room;
  std::unique_ptr<Q[]> x;
  std::unique_ptr<A[]> tile;
  std::unique_ptr<T[]> lower, upper, low, high, group;
  std::unique_ptr<uint32_t[]> at;
  std::unique_ptr<typename Bits<T>::U[]> scratch;
  std::vector<Row<T>> row;
  std::vector<Candidates<T>> candidates;
  std::vector<uint32_t> start;
  struct Place {
    uint32_t token, slot;
  };
  std::vector<Place> places;

  void read(int64_t r, const T* h) {
    if constexpr (INTEGERS) {
      row[r] = round_to_8_bits(h, of.d, of.latents.scale[0].data(), x.get() + r * of.d);
      row[r].lost += (of.d + 16) * EPS<T> * row[r].norm;  // gamma_d < d EPS
    } else {
      std::copy(h, h + of.d, x.get() + r * of.d);
      const T norm = round_to_8_bits(h, of.d, of.latents.scale[0].data(), memory<int8_t>(of.d).get()).norm;
      row[r] = {1, 0, (2 * of.d + 16) * EPS<T> * norm, norm};
    }
    candidates[r] = {lower.get() + r * room, upper.get() + r * room, at.get() + r * room};
    std::fill_n(group.get() + r * groups, groups, -INF<T>);
  }

  void look(int64_t r, int64_t f0, int64_t cols) {
    Candidates<T>& best = candidates[r];
    bounds(tile.get() + r * cols, cols, f0, of.latents, of.b, row[r], low.get(), high.get());
    for (int64_t c = 0, n; c < cols; c += n) {
      const int64_t g = (f0 + c) % groups;
      n = std::min(groups - g, cols - c);
      keep_largest(group.get() + r * groups + g, low.get() + c, n);
    }
    const int64_t tiles = f0 / width + 1;
    if ((tiles & (tiles - 1)) == 0) best.raise(group.get() + r * groups, groups, of.k, 16, scratch.get());
    for (int64_t c = 0; c < cols && !best.many; c += CHUNK) {
      if (best.n > room - 2 * CHUNK) {
        best.shrink(of.k, scratch.get());
        best.many = best.n > std::min(room / 8 * 7, room - 2 * CHUNK) && room < of.F + 2 * CHUNK;
      }
      best.n += append(low.get() + c, high.get() + c, std::min(CHUNK, cols - c), uint32_t(f0 + c), best.floor,
                       best.lower + best.n, best.upper + best.n, best.f + best.n);
    }
  }

  // A bound that does not hold means a GEMM that is not what the proof says: then nothing of it is believed.
  void found(const Place& at, T x) {
    Candidates<T>& best = candidates[at.token];
    best.many |= x < best.lower[at.slot] || x > best.upper[at.slot];
    best.upper[at.slot] = x;
  }

  // Every candidate's pre-activation, in its upper bound's place: latent after latent, so that W_enc is read
  // once for all tokens.
  void compute(const std::vector<int64_t>& tokens) {
    start.assign(of.F + 2, 0);
    for (const Candidates<T>& best : candidates)
      for (int64_t i = 0; i < best.n; ++i) ++start[best.f[i] + 2];
    std::partial_sum(start.begin(), start.end(), start.begin());
    places.resize(start.back());
    for (uint32_t r = 0; r < candidates.size(); ++r)
      for (uint32_t i = 0; i < candidates[r].n; ++i) places[start[candidates[r].f[i] + 1]++] = {r, i};
    T x[2];
    for (int64_t f = 0; f < of.F; ++f)
      for (uint32_t p = start[f]; p < start[f + 1]; p += 2) {
        const Place &one = places[p], &two = places[std::min(p + 1, start[f + 1] - 1)];
        pre_activations(of.h + tokens[one.token] * of.d, of.h + tokens[two.token] * of.d, of.W + f * of.d,
                        of.b[f], of.d, x, x + 1);
        found(one, x[0]);
        if (p + 1 < start[f + 1]) found(two, x[1]);
      }
  }

 public:
  Screen(const Problem<T>& of, int64_t most, int64_t room_)
      : of(of),
        room(std::min(room_, of.F) + 2 * CHUNK + LANES),
        x(memory<Q>(most * of.d)),
        tile(memory<A>(most * width)),
        lower(memory<T>(most * room)),
        upper(memory<T>(most * room)),
        low(memory<T>(width)),
        high(memory<T>(width)),
        group(memory<T>(most * groups)),
        at(memory<uint32_t>(most * room)),
        scratch(memory<typename Bits<T>::U>(std::max(room, groups))) {}

  // Writes the result of all of them but those that are returned: too much is left of these.
  std::vector<int64_t> operator()(const std::vector<int64_t>& tokens) {
    const int64_t rows = tokens.size();
    row.resize(rows), candidates.resize(rows);
    for (int64_t r = 0; r < rows; ++r) read(r, of.h + tokens[r] * of.d);
    for (int64_t f0 = 0; f0 < of.F; f0 += width) {
      const int64_t cols = std::min(width, of.F - f0);
      if constexpr (INTEGERS)
        gemm(x.get(), rows, of.latents.q.get() + f0 * of.d, cols, of.d, tile.get());
      else
        gemm(x.get(), rows, of.W + f0 * of.d, cols, of.d, tile.get());
      for (int64_t r = 0; r < rows; ++r) look(r, f0, cols);
    }
    for (Candidates<T>& best : candidates) {
      best.shrink(of.k, scratch.get());
      if (best.many) best.n = 0;
    }
    compute(tokens);
    std::vector<int64_t> left;
    for (int64_t r = 0; r < rows; ++r) {
      const Candidates<T>& best = candidates[r];
      if (best.many)
        left.push_back(tokens[r]);
      else
        select(best.upper, best.f, best.n, of.k, scratch.get(), of.values + tokens[r] * of.k,
               of.indices + tokens[r] * of.k);
    }
    return left;
  }
};

template <class T> void without_a_screen(const Problem<T>& of, const std::vector<int64_t>& tokens) {
  auto x = memory<T>(of.F);
  auto f = memory<uint32_t>(of.F);
  auto scratch = memory<typename Bits<T>::U>(of.F);
  std::iota(f.get(), f.get() + of.F, 0);
  for (int64_t n : tokens) {
    const T* h = of.h + n * of.d;
    for (int64_t i = 0; i < of.F; ++i) pre_activations(h, h, of.W + i * of.d, of.b[i], of.d, &x[i], &x[i]);
    select(x.get(), f.get(), of.F, of.k, scratch.get(), of.values + n * of.k, of.indices + n * of.k);
  }
}

// What an 8-bit GEMM costs here beside a float32 one; infinite where it is not exact: on a processor without
// 8-bit products a library may add pairs of them in 16 bits, which saturate. Of each the least of several
// turns counts, for other work on the machine only ever adds time.
double price_of_integers() {
  constexpr int64_t rows = 64, d = 256, more_rows = 256, more_cols = 1024;
  auto q = memory<int8_t>(more_cols * d);
  auto x = memory<float>(more_cols * d);
  auto sums = memory<int32_t>(more_rows * more_cols);
  auto pre = memory<float>(more_rows * more_cols);
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
  // A library without a kernel for them multiplies one by one: 20 times slower in the small turns, 50 and up in
  // the large ones, which would take a second or more. They are not run then.
  const double small = ratio(rows, rows);
  return small < 8 ? ratio(more_rows, more_cols) : small;
}

enum First { INTEGERS, OWN, NONE, MEASURED };
First asked_for = MEASURED;
std::atomic<int64_t> went_on[2];  // tokens that the first and the second screen left to the next

double measured_price() {
  static const double price = [] {
    double found = 0;
    // of two tasks one does nothing: within parallel_for the products take one thread, as they do in encode
    torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t) {
      if (begin == 0) found = price_of_integers();
    });
    return found;
  }();
  return price;
}

First first_screen(bool may_be_integers) {
  may_be_integers &= measured_price() < INF<double>;
  const First first = asked_for != MEASURED ? asked_for : measured_price() < WORTH ? INTEGERS : OWN;
  return first == INTEGERS && !may_be_integers ? OWN : first;
}

template <class T>
void encode(const Tensor& h, const Tensor& W, const Tensor& b, int64_t k, const Tensor& values,
            const Tensor& indices) {
  const int64_t N = h.size(0), d = h.size(1), F = W.size(0);
  const First first = first_screen(std::is_same_v<T, float> && d >= MIN_D && d <= MAX_D);
  const Latents<T> latents(in<T>(h), N, in<T>(W), in<T>(b), F, d, first == INTEGERS);
  const Problem<T> problem{in<T>(h), in<T>(W), in<T>(b), d, F, k, out<T>(values), out<int64_t>(indices),
                           latents};
  torch::stable::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(TILE_TOKENS, end - begin);
    const auto some = [&](std::vector<int64_t>& tokens, auto& screen) {
      std::vector<int64_t> left;
      const int64_t count = tokens.size();
      for (int64_t n0 = 0; n0 < count; n0 += most) {
        const auto from = tokens.begin() + n0, to = tokens.begin() + std::min(n0 + most, count);
        const std::vector<int64_t> more = screen({from, to});
        left.insert(left.end(), more.begin(), more.end());
      }
      tokens = left;
    };
    std::vector<int64_t> tokens(end - begin);
    std::iota(tokens.begin(), tokens.end(), begin);
    if (first == INTEGERS) {
      Screen<T, int32_t> screen(problem, most, 4 * k + std::min<int64_t>(F / 4, MANY));
      some(tokens, screen);
      went_on[0] += tokens.size();
    }
    if (first != NONE && !tokens.empty()) {
      Screen<T, T> screen(problem, std::min<int64_t>(most, tokens.size()), 4 * k + 256);
      some(tokens, screen);
      went_on[1] += tokens.size();
    }
    without_a_screen(problem, tokens);
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

// For the module's attributes, in ops.cpp.
double integers_price() { return measured_price(); }
void screen_first(const std::string& name) {
  const std::array<const char*, 4> names{"integers", "own", "none", "measured"};
  const auto at = std::find(names.begin(), names.end(), name);
  STD_TORCH_CHECK(at != names.end(), "screen_first: integers, own, none or measured, not ", name);
  asked_for = First(at - names.begin());
}

std::tuple<int64_t, int64_t> tokens_that_went_on() {
  return {went_on[0].exchange(0), went_on[1].exchange(0)};
}
