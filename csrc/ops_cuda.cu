// CUDA kernels of the operators whose schemas are in ops.cpp: float32, k <= 2048, every sum in a fixed order.
// An index outside [0, F) is never followed: it makes NaN where it would have been used (checking it up front
// would cost a synchronisation). tests/emulate.py runs this file on the CPU.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "keys.h"

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::Tensor;

// of the block, as much as its launch asks for
extern __shared__ uint64_t block_memory[];

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int64_t MAX_BLOCKS = 0x7fffffff;  // of one launch
constexpr int STATS = 5;                    // columns of a distortion, kernels.STATS
// Pre-activations held at once: 32 MB, in the level-2 cache, or those of 128 tokens where that is more.
constexpr int64_t TILE = 8388608, TILE_TOKENS = 128;
constexpr int64_t MAX_K = 2048, CANDIDATES = 8000;  // of a token: 94 KB of shared memory at most

template <class T = float>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = float>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor check(const char* op, const Tensor& x, const Tensor& like, std::initializer_list<int64_t> shape,
             ScalarType dtype = ScalarType::Float) {
  const bool there = x.is_cuda() && x.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(there && x.scalar_type() == dtype, op, ": float32 on one GPU only");
  const bool same = std::equal(shape.begin(), shape.end(), x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(same, op, ": shapes do not match");
  return torch::stable::contiguous(x);
}

// V numbers of a row, one load or store.
template <int V>
struct alignas(V * sizeof(float)) Columns {
  float at[V];
};

template <int V>
__device__ Columns<V> load(const float* from) {
  return *reinterpret_cast<const Columns<V>*>(from);
}

template <int V>
__device__ void store(float* to, Columns<V> row) {
  *reinterpret_cast<Columns<V>*>(to) = row;
}

// Can rows of `width` numbers of these be read four at a time?
bool in_fours(int64_t width, std::initializer_list<Tensor> matrices) {
  bool can = width % 4 == 0;
  for (const Tensor& t : matrices) can &= uintptr_t(in(t)) % (4 * sizeof(float)) == 0;
  return can;
}

struct Device {  // the one that the caller's tensor lives on, and the stream that the caller uses there
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &raw));
    stream = static_cast<cudaStream_t>(raw);
  }

  template <class... P, class... A>
  void run(void (*kernel)(P...), int64_t blocks, size_t shared_bytes, A... arguments) const {
    STD_TORCH_CHECK(blocks <= MAX_BLOCKS, "tg: ", blocks, " tokens or latents at once, ", MAX_BLOCKS,
                    " at most: split the batch");
    cudaLaunchConfig_t how{};
    how.gridDim = dim3(unsigned(blocks)), how.blockDim = dim3(THREADS);
    how.dynamicSmemBytes = shared_bytes, how.stream = stream;
    if (blocks > 0) STD_CUDA_CHECK(cudaLaunchKernelEx(&how, kernel, P(arguments)...));
  }
};

// ---------------------------------------------------------------------------------------------------- encode
// The pre-activation of a token and a latent is h . W_enc[f] + b_enc[f], summed in float64 by one warp in one
// fixed order and rounded to float32 once: `canonical`. topk_encode returns the k largest of these, to the
// bit, and forms few of them. A screen in bfloat16 (cuBLAS on tensor cores) says what each is to within a
// proven bound. A latent whose upper bound lies below k other latents' lower bounds is out; those left, about
// 2 k of a trained encoder, are computed. So the result depends neither on the library's order of summation
// nor on its settings.
//
// The bound. h = hq + rh and w = wq + rw, with hq and wq in bfloat16; h . w - hq . wq = hq . rw + rh . w, at
// most |hq| |rw| + |rh| (|wq| + |rw|). The screen's sum of d products in float32 is off by at most (d + 8)
// 2^-21 |hq| |wq|: eight times the unit roundoff a term, for tensor cores align the terms of a group and cut
// what sticks out (Fasi, Higham, Mikaitis, Pranesh 2021). What the canonical sum's rounding adds, (d + 2)
// 2^-52 |h| |w|, is less than one term more and a factor of 1 + 2^-29 (d < 2^20). Products below 2^-126 may
// be lost, d times 2^-125 in all.

__device__ float up(double v) {  // to float32, not to the nearest
  const float f = float(v);
  return f < v ? nextafterf(f, INFINITY) : f;
}

__device__ double sum_of_warp(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// To the nearest, ties to even; what bfloat16 only has without full precision becomes 0, so that no hardware
// can lose it.
__device__ uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  bits += 0x7fff + (bits >> 16 & 1);
  return bits & 0x7f800000 ? bits >> 16 : 0;
}

__device__ float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A warp per row of x, a latent's or a token's. The product of a token's and a latent's bounds, x x + y y,
// bounds what screening the two is wrong by: (|hq|, |rh|) times (|rw| + (d + 9) 2^-21 |wq|, |wq| + |rw|),
// rounded up.
__global__ void quantise(const float* x, int64_t rows, int64_t d, bool latents, uint16_t* quantised,
                         float2* bounds) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  double kept = 0, rest = 0;
  for (int64_t i = row * d + threadIdx.x % 32; i < (row + 1) * d; i += 32) {
    const uint16_t half = to_bfloat16(x[i]);
    quantised[i] = half;
    const double v = x[i], q = from_bfloat16(half);
    kept += q * q, rest += (v - q) * (v - q);
  }
  const double more = 1 + 0x1p-30;  // than what these sums are rounded by
  kept = sqrt(sum_of_warp(kept)) * more, rest = sqrt(sum_of_warp(rest)) * more;
  if (threadIdx.x % 32) return;
  bounds[row] =
      latents ? float2{up(rest + (d + 9) * 0x1p-21 * kept), up(kept + rest)} : float2{up(kept), up(rest)};
}

// By a warp: lane l sums the fours l, l + 32, ... in order, however they can be read.
__device__ double canonical(const float* h, const float* w, float bias, int64_t d, bool aligned) {
  double sum = 0;
  for (int64_t i = threadIdx.x % 32 * 4; i < d; i += 128)
    if (aligned) {
      const auto a = load<4>(h + i), b = load<4>(w + i);
      for (int v = 0; v < 4; ++v) sum += double(a.at[v]) * b.at[v];
    } else {
      for (int64_t j = i; j < min(i + 4, d); ++j) sum += double(h[j]) * w[j];
    }
  return sum_of_warp(sum) + bias;
}

// A key is order << 32 | ~index: the larger key ranks first, no two are equal, and 0 stands for no key at
// all.
__device__ uint64_t key_of(uint32_t order, int64_t f) {
  return uint64_t(order) << 32 | uint32_t(~uint32_t(f));
}
__device__ int64_t latent_of(uint64_t key) { return uint32_t(~uint32_t(key)); }

struct Limits {  // of a canonical pre-activation, as to_order gives them
  uint32_t lower, upper;
};

// How far a screened pre-activation may be from the canonical one, both without bias.
__device__ double error(float2 token, float2 latent, int64_t d) {
  const double lost = token.x > 0 ? d * 0x1p-125 : 0;
  return (double(token.x) * latent.x + double(token.y) * latent.y) * (1 + 0x1p-29) + lost;
}

__device__ Limits limits(float screened, float bias, float2 token, float2 latent, int64_t d) {
  double e = error(token, latent, d);
  // An infinity or NaN came in, or overflowed on the way: it may be anything.
  if (!isfinite(screened) || !isfinite(e)) return {0, ~0u};
  const double s = double(screened) + bias;
  // The rounding of s, of s + e, and of the canonical sum + bias. None where the token is 0.
  if (e > 0 && isfinite(s)) e += (e + fabs(s)) * 0x1p-50;
  return {to_order(-up(-(s - e))), to_order(up(s + e))};
}

// The k-th largest of n keys, found byte by byte from the top: a histogram of the byte over the keys that
// agree with what is known says in which bin it lies.
__device__ uint64_t kth_largest(const uint64_t* keys, int n, int k) {
  static __shared__ int bins[256], bin, above, size;
  uint64_t known = 0, mask = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += THREADS) bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS)
      if ((keys[i] & mask) == known) atomicAdd(&bins[keys[i] >> shift & 255], 1);
    __syncthreads();
    if (threadIdx.x < 32) {  // eight bins a lane, the largest in lane 0
      const int first = 255 - 8 * int(threadIdx.x);
      int own = 0;
      for (int i = 0; i < 8; ++i) own += bins[first - i];
      int sum = own;  // of this lane's and all larger bins
      for (int step = 1; step < 32; step *= 2) {
        const int more = __shfl_up_sync(~0u, sum, step);
        if (threadIdx.x >= step) sum += more;
      }
      if (sum >= k && sum - own < k) {
        int b = first, larger = sum - own;
        while (larger + bins[b] < k) larger += bins[b--];
        bin = b, above = larger, size = bins[b];
      }
    }
    __syncthreads();
    known |= uint64_t(bin) << shift, mask |= uint64_t(255) << shift, k -= above;
    if (size == 1) break;
  }
  static __shared__ uint64_t found;
  for (int i = threadIdx.x; i < n; i += THREADS)
    if ((keys[i] & mask) == known) found = keys[i];
  __syncthreads();
  return found;
}

__device__ void sort_descending(uint64_t* keys, int size) {  // bitonic, size a power of two
  for (int run = 2; run <= size; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int t = threadIdx.x; t < size / 2; t += THREADS) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a < b) == !(i & run)) keys[i] = b, keys[j] = a;
      }
    }
  __syncthreads();
}

// The latents of one token that may be among its k largest, in shared memory: the key of each one's lower
// limit, and its upper limit. Atomics only hand out places: which candidates there are depends on nobody's
// order.
struct Candidates {
  uint64_t* lower = block_memory;
  uint32_t* upper;
  int *count, k, capacity;
  uint64_t threshold = 0;  // the k-th largest key of a lower limit so far: below it nobody is

  __device__ Candidates(int k, int capacity) : k(k), capacity(capacity) {
    static __shared__ int held;
    count = &held, upper = reinterpret_cast<uint32_t*>(lower + capacity);
  }

  __device__ void add(Limits at, int64_t f) {
    if (key_of(at.upper, f) < threshold) return;
    const int place = atomicAdd(count, 1);
    lower[place] = key_of(at.lower, f), upper[place] = at.upper;
  }

  __device__ void clear() {
    __syncthreads();
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
  }

  // Everyone has added; is there room for `more`? All threads see the same number.
  __device__ bool full(int more) const {
    __syncthreads();
    const bool is = *count > capacity - more;
    __syncthreads();
    return is;
  }

  // Raises the threshold and drops who is below it; a chunk of candidates is read before any is written.
  __device__ void shrink() {
    __syncthreads();
    const int n = *count;
    if (n > k) threshold = kth_largest(lower, n, k);
    clear();
    for (int first = 0; first < n; first += THREADS) {
      const int i = first + threadIdx.x;
      const bool there = i < n;
      const uint64_t key = there ? lower[i] : 0;
      const Limits at{uint32_t(key >> 32), there ? upper[i] : 0};
      __syncthreads();
      if (there) add(at, latent_of(key));
      __syncthreads();
    }
  }
};

// A block per token: one read of its row of the tile, V latents at a time, then the candidates' canonical
// pre-activations. Where too many are left, rows of near-ties, say, or a NaN in h, all latents are gone
// through again, now with canonical ones to raise the threshold.
template <int V>
__global__ void select(const float* tile, const float* h, const float* W, const float* bias,
                       const float2* tokens, const float2* latents, const float2* largest, int64_t d,
                       int64_t F, int k, int capacity, bool aligned, float* values, int64_t* indices) {
  Candidates best(k, capacity);
  uint64_t* keys = best.lower;
  const int64_t n = blockIdx.x;
  const float2 token = tokens[n];
  const float* row = tile + n * F;
  // Most latents fail a comparison with the largest error that any latent can have.
  const double margin = error(token, *largest, d);
  float cut = -INFINITY;
  bool many = false;  // too many candidates: the bounds do not separate
  best.clear();
  for (int64_t f0 = 0; f0 < F && !many; f0 += V * THREADS) {
    const int64_t f = f0 + threadIdx.x * V;
    if (f < F) {
      const auto x = load<V>(row + f), b = load<V>(bias + f);
      for (int v = 0; v < V; ++v)
        if (!(x.at[v] + b.at[v] < cut)) best.add(limits(x.at[v], b.at[v], token, latents[f + v], d), f + v);
    }
    if (!best.full(V * THREADS)) continue;
    best.shrink();
    many = best.full(V * THREADS);
    const uint32_t order = best.threshold >> 32;
    if (order > to_order(-INFINITY)) {
      const double least = from_order<float>(order);
      cut = -up(margin + (margin + fabs(least)) * 0x1p-40 - least);
    }
  }
  if (many) {
    best.clear();
    for (int64_t f0 = 0; f0 < F; f0 += WARPS) {
      const int64_t f = f0 + threadIdx.x / 32;
      if (f < F && key_of(limits(row[f], bias[f], token, latents[f], d).upper, f) >= best.threshold) {
        const uint32_t order = to_order(float(canonical(h + n * d, W + f * d, bias[f], d, aligned)));
        if (threadIdx.x % 32 == 0) best.add({order, order}, f);
      }
      if (best.full(WARPS)) best.shrink();
    }
  } else {
    best.shrink();
    for (int i = threadIdx.x / 32; i < *best.count; i += WARPS) {
      const bool first = threadIdx.x % 32 == 0;  // who writes is who has read
      const int64_t f = latent_of(__shfl_sync(~0u, first ? keys[i] : 0, 0));
      const uint32_t order = to_order(float(canonical(h + n * d, W + f * d, bias[f], d, aligned)));
      if (first) keys[i] = key_of(order, f), best.upper[i] = order;
    }
  }
  best.shrink();  // to k: limits are exact now
  int size = 1;
  while (size < k) size *= 2;
  // ~index comes on top: descending keys are ascending indices.
  for (int i = threadIdx.x; i < size; i += THREADS) keys[i] = i < k ? keys[i] << 32 | keys[i] >> 32 : 0;
  sort_descending(keys, size);
  for (int i = threadIdx.x; i < k; i += THREADS) {
    values[n * k + i] = relu(from_order<float>(uint32_t(keys[i])));
    indices[n * k + i] = latent_of(keys[i] >> 32);
  }
}

// result [n,F] = a [n,d] bT [d,F], from bfloat16 into float32: so no reduction is in less.
void gemm(const Tensor& a, const Tensor& bT, const Tensor& result) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(a), from(bT), from(ScalarType::Float), from(result)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> topk_encode(const Tensor& h_, const Tensor& W_, const Tensor& b_, int64_t k) {
  const char* op = "topk_encode";
  STD_TORCH_CHECK(h_.dim() == 2 && W_.dim() == 2, op, ": h and W_enc must have two dimensions");
  const int64_t N = h_.size(0), d = h_.size(1), F = W_.size(0);
  Tensor h = check(op, h_, h_, {N, d}), W = check(op, W_, h_, {F, d}), b = check(op, b_, h_, {F});
  const bool fits = k >= 1 && k <= std::min(F, MAX_K) && F < (int64_t(1) << 32) - 1;
  STD_TORCH_CHECK(fits, op, ": k=", k, " is not in 1..min(F, ", MAX_K, ")");
  STD_TORCH_CHECK(d < (int64_t(1) << 20), op, ": d=", d, " is more than the bound is proven for");
  Tensor values = new_empty(h, {N, k}), indices = new_empty(h, {N, k}, ScalarType::Long);
  if (N == 0) return {values, indices};
  const Device on(h);
  const auto half = ScalarType::BFloat16;
  Tensor hq = new_empty(h, {N, d}, half), of_tokens = new_empty(h, {N, 2});
  Tensor Wq = new_empty(h, {F, d}, half), of_latents = new_empty(h, {F, 2});
  on.run(quantise, (N + WARPS - 1) / WARPS, 0, in(h), N, d, false, out<uint16_t>(hq), out<float2>(of_tokens));
  on.run(quantise, (F + WARPS - 1) / WARPS, 0, in(W), F, d, true, out<uint16_t>(Wq), out<float2>(of_latents));
  Tensor largest = torch::stable::amax(of_latents, 0, false);
  const int64_t rows = std::min(N, std::max(TILE / F, TILE_TOKENS));
  Tensor tile = new_empty(h, {rows, F});
  const int capacity = std::min(4 * k + 6 * THREADS, CANDIDATES);
  const size_t shared = capacity * (sizeof(uint64_t) + sizeof(uint32_t));
  auto kernel = in_fours(F, {b}) ? select<4> : select<1>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  auto view = [&](const Tensor& t, int64_t first, int64_t rows, int64_t cols) {
    void* at = static_cast<char*>(t.mutable_data_ptr()) + first * cols * t.element_size();
    return torch::stable::from_blob(at, {rows, cols}, {cols, 1}, t.device(), t.scalar_type());
  };
  const Tensor WT = torch::stable::transpose(Wq, 0, 1);
  for (int64_t n = 0; n < N; n += rows) {
    const int64_t here = std::min(rows, N - n);
    gemm(view(hq, n, here, d), WT, view(tile, 0, here, F));
    on.run(kernel, here, shared, in(tile), in(h) + n * d, in(W), in(b), in<float2>(of_tokens) + n,
           in<float2>(of_latents), in<float2>(largest), d, F, k, capacity, in_fours(d, {h, W}),
           out(values) + n * k, out<int64_t>(indices) + n * k);
  }
  return {values, indices};
}

// ---------------------------------------------------------------------------------------------------- decode

// acc += value * W[f], in V columns from i on.
template <int V>
__device__ void add_row(float value, int64_t f, const float* W, int64_t F, int64_t d, int64_t i, float* acc) {
  const bool inside = uint64_t(f) < uint64_t(F);
  Columns<V> row{};
  if (inside) row = load<V>(W + f * d + i);
  for (int v = 0; v < V; ++v) acc[v] += inside ? value * row.at[v] : nanf("");
}

// V columns of one token's h_hat from i on, in the order of the CPU kernel: fours, then what is left, then
// the bias.
template <int V>
__device__ Columns<V> decode_at(const float* values, const int64_t* f, int64_t k, const float* W,
                                const float* b, int64_t F, int64_t d, int64_t i) {
  float acc[V] = {};
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    float pair[2][V] = {};
    for (int p = 0; p < 4; ++p) add_row<V>(values[j + p], f[j + p], W, F, d, i, pair[p / 2]);
    for (int v = 0; v < V; ++v) acc[v] += pair[0][v] + pair[1][v];
  }
  for (; j < k; ++j) add_row<V>(values[j], f[j], W, F, d, i, acc);
  const auto bias = load<V>(b + i);
  Columns<V> h_hat;
  for (int v = 0; v < V; ++v) h_hat.at[v] = acc[v] + bias.at[v];
  return h_hat;
}

template <int V>
__global__ void decode(const float* values, const int64_t* indices, int64_t k, const float* W, const float* b,
                       int64_t F, int64_t d, float* h_hat) {
  const int64_t n = blockIdx.x;
  for (int64_t i = threadIdx.x * V; i < d; i += THREADS * V)
    store(h_hat + n * d + i, decode_at<V>(values + n * k, indices + n * k, k, W, b, F, d, i));
}

// Sums over the block, in a fixed tree; thread s < STATS has column s of the result.
__device__ double sum_of_block(const double* sums) {
  static __shared__ double warp[STATS][WARPS];
  for (int s = 0; s < STATS; ++s) {
    const double sum = sum_of_warp(sums[s]);
    if (threadIdx.x % 32 == 0) warp[s][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < STATS)
    for (int w = 0; w < WARPS; ++w) sum += warp[threadIdx.x][w];
  return sum;
}

// The same as decode, with the sums taken from h_hat while it is in registers; float64 per token.
template <int V>
__global__ void distort(const float* values, const int64_t* indices, int64_t k, const float* W,
                        const float* b, int64_t F, int64_t d, const float* h, const float* g, float* stats,
                        float* h_hat) {
  const int64_t n = blockIdx.x;
  double sums[STATS] = {};
  for (int64_t i = threadIdx.x * V; i < d; i += THREADS * V) {
    const auto rounded = decode_at<V>(values + n * k, indices + n * k, k, W, b, F, d, i);
    if (h_hat) store(h_hat + n * d + i, rounded);
    const auto clean = load<V>(h + n * d + i), gradient = load<V>(g + n * d + i);
    for (int v = 0; v < V; ++v) {
      const double y = rounded.at[v], x = clean.at[v], delta = y - x;
      const double terms[STATS] = {gradient.at[v] * delta, delta * delta, y * y, x * y, x * x};
      for (int s = 0; s < STATS; ++s) sums[s] += terms[s];
    }
  }
  const double sum = sum_of_block(sums);
  if (threadIdx.x < STATS) stats[n * STATS + threadIdx.x] = sum;
}

Tensor sparse_decode(const Tensor& values_, const Tensor& indices_, const Tensor& W_, const Tensor& b_) {
  const char* op = "sparse_decode";
  STD_TORCH_CHECK(values_.dim() == 2 && W_.dim() == 2, op, ": values and W_dec must have two dimensions");
  const int64_t N = values_.size(0), k = values_.size(1), F = W_.size(0), d = W_.size(1);
  Tensor values = check(op, values_, values_, {N, k});
  Tensor indices = check(op, indices_, values_, {N, k}, ScalarType::Long);
  Tensor W = check(op, W_, values_, {F, d}), b = check(op, b_, values_, {d});
  Tensor h_hat = new_empty(values, {N, d});
  if (N == 0) return h_hat;
  const Device on(values);
  on.run(in_fours(d, {W, b}) ? decode<4> : decode<1>, N, 0, in(values), in<int64_t>(indices), k, in(W), in(b),
         F, d, out(h_hat));
  return h_hat;
}

std::tuple<Tensor, Tensor> gradient_weighted_distortion(const Tensor& values_, const Tensor& indices_,
                                                        const Tensor& W_, const Tensor& b_, const Tensor& h_,
                                                        const Tensor& g_, bool want_h_hat) {
  const char* op = "gradient_weighted_distortion";
  STD_TORCH_CHECK(values_.dim() == 2 && W_.dim() == 2, op, ": values and W_dec must have two dimensions");
  const int64_t N = values_.size(0), k = values_.size(1), F = W_.size(0), d = W_.size(1);
  Tensor values = check(op, values_, values_, {N, k});
  Tensor indices = check(op, indices_, values_, {N, k}, ScalarType::Long);
  Tensor W = check(op, W_, values_, {F, d}), b = check(op, b_, values_, {d});
  Tensor h = check(op, h_, values_, {N, d}), g = check(op, g_, values_, {N, d});
  Tensor stats = new_empty(h, {N, STATS}), h_hat = new_empty(h, {want_h_hat ? N : 0, d});
  if (N == 0) return {stats, h_hat};
  const Device on(values);
  on.run(in_fours(d, {W, b, h, g}) ? distort<4> : distort<1>, N, 0, in(values), in<int64_t>(indices), k,
         in(W), in(b), F, d, in(h), in(g), out(stats), want_h_hat ? out(h_hat) : nullptr);
  return {stats, h_hat};
}

// -------------------------------------------------------------------------------------------------- backward
__global__ void gather(const float* x, const float* W, const int64_t* indices, int64_t k, int64_t F,
                       int64_t d, float* dots) {
  const int64_t n = blockIdx.x;  // a warp per entry of the token
  for (int64_t j = threadIdx.x / 32; j < k; j += WARPS) {
    const int64_t f = indices[n * k + j];
    const bool outside = uint64_t(f) >= uint64_t(F);
    float sum = 0;
    for (int64_t i = threadIdx.x % 32; i < d && !outside; i += 32) sum += x[n * d + i] * W[f * d + i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) dots[n * k + j] = outside ? nanf("") : sum;
  }
}

Tensor gather_dot(const Tensor& x_, const Tensor& W_, const Tensor& indices_) {
  const char* op = "gather_dot";
  const bool matrices = x_.dim() == 2 && W_.dim() == 2 && indices_.dim() == 2;
  STD_TORCH_CHECK(matrices, op, ": all operands must have two dimensions");
  const int64_t N = x_.size(0), d = x_.size(1), F = W_.size(0), k = indices_.size(1);
  Tensor x = check(op, x_, x_, {N, d}), W = check(op, W_, x_, {F, d});
  Tensor indices = check(op, indices_, x_, {N, k}, ScalarType::Long), dots = new_empty(x, {N, k});
  if (N == 0) return dots;
  const Device on(x);
  on.run(gather, N, 0, in(x), in(W), in<int64_t>(indices), k, F, d, out(dots));
  return dots;
}

std::tuple<Tensor, Tensor> stable_sort(const Tensor& x) {  // of one dimension; torch 2.15 has a sort
  using torch::stable::detail::from, torch::stable::detail::to;
  const std::optional<bool> stable = true;
  std::array<StableIValue, 4> stack{from(x), from(stable), from(int64_t(0)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// scatter_rows sorts the entries of the code by latent (stable: in token order) and gives each latent's
// segment of the sorted list to a block. A segment longer than PIECE, of a latent that fires on every token,
// say, is cut from its start into pieces for other blocks, and their float64 sums are added in order: a
// latent's numbers depend on its own entries alone. Within a piece sums of 32 go into float64, as on the CPU.
constexpr int64_t PIECE = 256;

// The entries' latents in 32 bits, half of what the sort would move; F stands for every index outside.
__global__ void narrow(const int64_t* indices, int64_t entries, int64_t F, int* latents) {
  const int64_t e = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (e < entries) latents[e] = uint64_t(indices[e]) < uint64_t(F) ? indices[e] : F;
}

// Of each sorted entry its token (the one division) and coefficient; starts[f] [F+1] is where f's segment
// begins.
__global__ void open_segments(const int* sorted, const int64_t* place, int64_t entries, int64_t k, int64_t F,
                              const float* coef, int* tokens, float* weights, int64_t* starts) {
  const int64_t e = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (e > entries) return;
  for (int64_t f = e > 0 ? sorted[e - 1] + 1 : 0; f <= (e < entries ? sorted[e] : F); ++f) starts[f] = e;
  if (e == entries) return;
  tokens[e] = place[e] / k;
  weights[e] = coef[place[e]];
}

// Adds to total what the entries from first to last give columns i to i + V of their latent's row; column d
// is the sum of the coefficients.
template <int V>
__device__ void add_entries(const int* tokens, const float* weights, int64_t first, int64_t last,
                            const float* x, int64_t d, int64_t i, double* total) {
  for (int64_t e0 = first; e0 < last; e0 += 32) {
    float part[V] = {};
    for (int64_t e = e0; e < min(e0 + 32, last); ++e) {
      const float weight = weights[e];
      if (i < d) {
        const auto row = load<V>(x + tokens[e] * d + i);
        for (int v = 0; v < V; ++v) part[v] += weight * row.at[v];
      } else {
        part[0] += weight;
      }
    }
    for (int v = 0; v < V; ++v) total[v] += part[v];
  }
}

// Every piece but a segment's first. Of the steps (first - PIECE, first] that end where a later piece begins
// each holds one multiple of PIECE: the block of that number sums the piece.
template <int V>
__global__ void sum_later_pieces(const int* sorted, const int64_t* starts, const int* tokens,
                                 const float* weights, const float* x, int64_t d, int64_t F,
                                 double* partial) {
  const int64_t at = blockIdx.x * PIECE, f = sorted[at];
  if (f == F) return;
  const int64_t start = starts[f], end = starts[f + 1];
  const int64_t first = start + (at - start + PIECE - 1) / PIECE * PIECE;
  if (first == start || first >= end) return;
  for (int64_t i = threadIdx.x * V; i <= d; i += THREADS * V) {
    double total[V] = {};
    add_entries<V>(tokens, weights, first, min(first + PIECE, end), x, d, i, total);
    for (int v = 0; v < V; ++v) partial[blockIdx.x * (d + V) + i + v] = total[v];
  }
}

// The first piece of each latent's segment, and the others' sums on top. Where any index lay outside, nobody
// knows which row is short of an entry: all are NaN.
template <int V>
__global__ void sum_segments(const int64_t* starts, int64_t entries, int64_t F, const int* tokens,
                             const float* weights, const float* x, int64_t d, const double* partial,
                             float* rows, float* sums) {
  const int64_t f = blockIdx.x, start = starts[f], end = starts[f + 1];
  const bool outside = starts[F] < entries;
  for (int64_t i = threadIdx.x * V; i <= d; i += THREADS * V) {
    double total[V] = {};
    add_entries<V>(tokens, weights, start, min(start + PIECE, end), x, d, i, total);
    for (int64_t first = start + PIECE; first < end; first += PIECE)
      for (int v = 0; v < V; ++v) total[v] += partial[first / PIECE * (d + V) + i + v];
    Columns<V> row;
    for (int v = 0; v < V; ++v) row.at[v] = outside ? nanf("") : float(total[v]);
    if (i < d) store(rows + f * d + i, row);
    else sums[f] = row.at[0];
  }
}

std::tuple<Tensor, Tensor> scatter_rows(const Tensor& coef_, const Tensor& indices_, const Tensor& x_,
                                        int64_t F) {
  const char* op = "scatter_rows";
  STD_TORCH_CHECK(x_.dim() == 2 && coef_.dim() == 2 && F >= 0, op, ": coef and x must have two dimensions");
  const int64_t N = x_.size(0), d = x_.size(1), k = coef_.size(1), entries = N * k;
  Tensor x = check(op, x_, x_, {N, d}), coef = check(op, coef_, x_, {N, k});
  Tensor indices = check(op, indices_, x_, {N, k}, ScalarType::Long);
  STD_TORCH_CHECK(std::max(N, F) < MAX_BLOCKS, op, ": ", MAX_BLOCKS, " tokens or latents are too many");
  if (entries == 0 || F == 0) return {torch::stable::new_zeros(x, {F, d}), torch::stable::new_zeros(x, {F})};
  const Device on(x);
  const int64_t per_entry = entries / THREADS + 1, pieces = (entries + PIECE - 1) / PIECE;
  Tensor latents = new_empty(x, {entries}, ScalarType::Int);
  on.run(narrow, per_entry, 0, in<int64_t>(indices), entries, F, out<int>(latents));
  const auto by_latent = stable_sort(latents);
  const Tensor &sorted = std::get<0>(by_latent), &place = std::get<1>(by_latent);
  Tensor tokens = new_empty(x, {entries}, ScalarType::Int), weights = new_empty(x, {entries});
  Tensor starts = new_empty(x, {F + 1}, ScalarType::Long), rows = new_empty(x, {F, d}),
         sums = new_empty(x, {F});
  on.run(open_segments, per_entry, 0, in<int>(sorted), in<int64_t>(place), entries, k, F, in(coef),
         out<int>(tokens), out(weights), out<int64_t>(starts));
  auto sum = [&](auto V) {
    Tensor partial = new_empty(x, {pieces, d + V}, ScalarType::Double);
    on.run(sum_later_pieces<V>, pieces, 0, in<int>(sorted), in<int64_t>(starts), in<int>(tokens), in(weights),
           in(x), d, F, out<double>(partial));
    on.run(sum_segments<V>, F, 0, in<int64_t>(starts), entries, F, in<int>(tokens), in(weights), in(x), d,
           in<double>(partial), out(rows), out(sums));
  };
  if (in_fours(d, {x})) sum(std::integral_constant<int, 4>());
  else sum(std::integral_constant<int, 1>());
  return {rows, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tg, CUDA, m) {
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("gradient_weighted_distortion", TORCH_BOX(&gradient_weighted_distortion));
  m.impl("gather_dot", TORCH_BOX(&gather_dot));
  m.impl("scatter_rows", TORCH_BOX(&scatter_rows));
}
