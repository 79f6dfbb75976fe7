// CUDA kernels of the operators whose schemas are in ops.cpp: float32, k <= 2048, every sum in a fixed order.
// An index outside [0, F) is never followed: it makes NaN where it would have been used (checking it up front
// would cost a synchronisation). These are right and bounded in memory; they are not tuned for speed.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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
constexpr int64_t MAX_BLOCKS = 0x7fffffff;                  // of one launch
constexpr int STATS = 5;                                    // columns of a distortion, kernels.STATS
constexpr int64_t TILE_TOKENS = 4096, TILE_LATENTS = 4096;  // 64 MB of pre-activations at most
constexpr int64_t MAX_K = 2048;                             // 4096 keys of 8 bytes in shared memory

template <class T = float> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T = float> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

Tensor check(const char* op, const Tensor& x, const Tensor& like, std::initializer_list<int64_t> shape,
             ScalarType dtype = ScalarType::Float) {
  const bool there = x.is_cuda() && x.get_device_index() == like.get_device_index();
  STD_TORCH_CHECK(there && x.scalar_type() == dtype, op, ": float32 on one GPU only");
  const bool same = std::equal(shape.begin(), shape.end(), x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(same, op, ": shapes do not match");
  return torch::stable::contiguous(x);
}

struct Device {  // the one that the caller's tensor lives on, and the stream that the caller uses there
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit Device(const Tensor& t) : guard(t.get_device_index()) {
    void* raw = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &raw));
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
// A key is order << 32 | ~index: the larger key ranks first, no two are equal, and 0 stands for no key at
// all.
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

// One block merges one token's tile row into its best k so far (sorted, in global memory between tiles).
// Candidates above the k-th key gather behind the best k in shared memory until they might not fit, then all
// are sorted. Atomics only hand out places; the sort makes the result independent of who got which.
__global__ void merge_tile(const float* tile, const float* bias, int64_t cols, int64_t first, int k, int size,
                           uint64_t* best, bool last, float* values, int64_t* indices) {
  static __shared__ int count;
  uint64_t* keys = block_memory;
  const int64_t n = blockIdx.x;
  const float* x = tile + n * cols;
  for (int i = threadIdx.x; i < size; i += THREADS) keys[i] = i < k ? best[n * k + i] : 0;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  uint64_t threshold = keys[k - 1];
  for (int64_t c0 = 0; c0 < cols; c0 += THREADS) {
    const int64_t c = c0 + threadIdx.x;
    if (c < cols) {
      const uint64_t key = uint64_t(to_order(x[c] + bias[c])) << 32 | uint32_t(~uint32_t(first + c));
      if (key > threshold) keys[k + atomicAdd(&count, 1)] = key;
    }
    __syncthreads();
    const bool full = count > size - k - THREADS || (c0 + THREADS >= cols && count > 0);
    __syncthreads();  // everyone has read count before it changes
    if (full) {
      sort_descending(keys, size);
      threshold = keys[k - 1];
      __syncthreads();
      for (int i = k + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
    }
  }
  if (!last) {
    for (int i = threadIdx.x; i < k; i += THREADS) best[n * k + i] = keys[i];
    return;
  }
  // ~index comes on top: descending keys are ascending indices.
  for (int i = threadIdx.x; i < k; i += THREADS) keys[i] = keys[i] << 32 | keys[i] >> 32;
  sort_descending(keys, size);
  for (int i = threadIdx.x; i < k; i += THREADS) {
    values[n * k + i] = relu(from_order<float>(uint32_t(keys[i])));
    indices[n * k + i] = uint32_t(~uint32_t(keys[i] >> 32));
  }
}

void gemm(const Tensor& a, const Tensor& bT, const Tensor& result) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(bT), from(result)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// cuBLAS through the dispatcher into one bounded tile (so the caller's TF32 setting holds), then a merge per
// token.
std::tuple<Tensor, Tensor> topk_encode(const Tensor& h_, const Tensor& W_, const Tensor& b_, int64_t k) {
  const char* op = "topk_encode";
  STD_TORCH_CHECK(h_.dim() == 2 && W_.dim() == 2, op, ": h and W_enc must have two dimensions");
  const int64_t N = h_.size(0), d = h_.size(1), F = W_.size(0);
  Tensor h = check(op, h_, h_, {N, d}), W = check(op, W_, h_, {F, d}), b = check(op, b_, h_, {F});
  const bool fits = k >= 1 && k <= std::min(F, MAX_K) && F < (int64_t(1) << 32);
  STD_TORCH_CHECK(fits, op, ": k=", k, " is not in 1..min(F, ", MAX_K, ")");
  Tensor values = new_empty(h, {N, k}), indices = new_empty(h, {N, k}, ScalarType::Long);
  if (N == 0) return {values, indices};
  const Device on(h);
  const int64_t tokens = std::min(N, TILE_TOKENS), width = std::min(F, TILE_LATENTS);
  int size = 1;
  while (size < k + 2 * THREADS) size *= 2;
  Tensor tile = new_empty(h, {tokens, width}), best = new_empty(h, {tokens, k}, ScalarType::Long);
  auto* keys = out<uint64_t>(best);
  auto view = [&](const float* p, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
    return torch::stable::from_blob(const_cast<float*>(p), {rows, cols}, {row_stride, col_stride}, h.device(),
                                    ScalarType::Float);
  };
  for (int64_t n0 = 0; n0 < N; n0 += tokens) {
    const int64_t rows = std::min(tokens, N - n0);
    STD_CUDA_CHECK(cudaMemsetAsync(keys, 0, rows * k * sizeof(uint64_t), on.stream));
    for (int64_t f0 = 0; f0 < F; f0 += width) {
      const int64_t cols = std::min(width, F - f0);
      gemm(view(in(h) + n0 * d, rows, d, d, 1), view(in(W) + f0 * d, d, cols, 1, d),
           view(out(tile), rows, cols, cols, 1));
      on.run(merge_tile, rows, size * sizeof(uint64_t), 
          out(tile), in(b) + f0, cols, f0, k, size, keys, f0 + cols == F, out(values) + n0 * k,
          out<int64_t>(indices) + n0 * k);
    }
  }
  return {values, indices};
}

// ---------------------------------------------------------------------------------------------------- decode
__device__ float entry(float value, int64_t f, const float* W, int64_t F, int64_t d, int64_t i) {
  return uint64_t(f) < uint64_t(F) ? value * W[f * d + i] : nanf("");
}

// Column i of one token's h_hat, in the order of the CPU kernel: fours, then what is left, then the bias.
__device__ float decode_at(const float* v, const int64_t* f, int64_t k, const float* W, const float* b,
                           int64_t F, int64_t d, int64_t i) {
  float acc = 0;
  int64_t j = 0;
  for (; j + 4 <= k; j += 4)
    acc += (entry(v[j], f[j], W, F, d, i) + entry(v[j + 1], f[j + 1], W, F, d, i)) +
           (entry(v[j + 2], f[j + 2], W, F, d, i) + entry(v[j + 3], f[j + 3], W, F, d, i));
  for (; j < k; ++j) acc += entry(v[j], f[j], W, F, d, i);
  return acc + b[i];
}

__global__ void decode(const float* values, const int64_t* indices, int64_t k, const float* W, const float* b,
                       int64_t F, int64_t d, float* h_hat) {
  const int64_t n = blockIdx.x;
  for (int64_t i = threadIdx.x; i < d; i += THREADS)
    h_hat[n * d + i] = decode_at(values + n * k, indices + n * k, k, W, b, F, d, i);
}

// The same, with the sums taken from h_hat while it is in a register; float64 per token, reduced in a
// fixed tree.
__global__ void distort(const float* values, const int64_t* indices, int64_t k, const float* W,
                        const float* b, int64_t F, int64_t d, const float* h, const float* g, float* stats,
                        float* h_hat) {
  const int64_t n = blockIdx.x;
  double sums[STATS] = {};
  for (int64_t i = threadIdx.x; i < d; i += THREADS) {
    const float rounded = decode_at(values + n * k, indices + n * k, k, W, b, F, d, i);
    if (h_hat) h_hat[n * d + i] = rounded;
    const double y = rounded, x = h[n * d + i], delta = y - x;
    const double terms[STATS] = {g[n * d + i] * delta, delta * delta, y * y, x * y, x * x};
    for (int s = 0; s < STATS; ++s) sums[s] += terms[s];
  }
  static __shared__ double warp[STATS][WARPS];
  for (int s = 0; s < STATS; ++s) {
    for (int step = 16; step > 0; step /= 2) sums[s] += __shfl_xor_sync(~0u, sums[s], step);
    if (threadIdx.x % 32 == 0) warp[s][threadIdx.x / 32] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x < STATS) {
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += warp[threadIdx.x][w];
    stats[n * STATS + threadIdx.x] = sum;
  }
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
  on.run(decode, N, 0, in(values), in<int64_t>(indices), k, in(W), in(b), F, d, out(h_hat));
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
  on.run(distort, N, 0, in(values), in<int64_t>(indices), k, in(W), in(b), F, d, in(h), in(g),
                                        out(stats), want_h_hat ? out(h_hat) : nullptr);
  return {stats, h_hat};
}

// -------------------------------------------------------------------------------------------------- backward
__global__ void gather(const float* x, const float* W, const int64_t* indices, int64_t k, int64_t F,
                       int64_t d, float* dots) {
  const int64_t n = blockIdx.x;  // a warp per entry of the token
  for (int64_t j = threadIdx.x / 32; j < k; j += WARPS) {
    const int64_t f = indices[n * k + j];
    float sum = 0;
    for (int64_t i = threadIdx.x % 32; i < d; i += 32) sum += entry(x[n * d + i], f, W, F, d, i);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) dots[n * k + j] = sum;
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

std::tuple<Tensor, Tensor> sort(const Tensor& x) {  // of one dimension; stable
  using torch::stable::detail::from, torch::stable::detail::to;
  const std::optional<bool> stable = true;
  std::array<StableIValue, 4> stack{from(x), from(stable), from(int64_t(0)), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

// scatter_rows sorts the entries of the code by latent (stable: in token order) and gives each latent's segment
// of the sorted list to a block. A segment longer than PIECE, of a latent that fires on every token, say, is cut
// from its start into pieces for other blocks, and their float64 sums are added in order: a latent's numbers
// depend on its own entries alone. Within a piece sums of 32 go into float64, as on the CPU.
constexpr int64_t PIECE = 256;

// The entries' latents in 32 bits, half of what the sort would move; F stands for every index outside.
__global__ void narrow(const int64_t* indices, int64_t entries, int64_t F, int* latents) {
  const int64_t e = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (e < entries) latents[e] = uint64_t(indices[e]) < uint64_t(F) ? indices[e] : F;
}

// Of each sorted entry its token (the one division) and coefficient; starts[f] [F+1] is where f's segment begins.
__global__ void open_segments(const int* sorted, const int64_t* place, int64_t entries, int64_t k, int64_t F,
                              const float* coef, int* tokens, float* weights, int64_t* starts) {
  const int64_t e = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (e > entries) return;
  for (int64_t f = e > 0 ? sorted[e - 1] + 1 : 0; f <= (e < entries ? sorted[e] : F); ++f) starts[f] = e;
  if (e == entries) return;
  tokens[e] = place[e] / k;
  weights[e] = coef[place[e]];
}

template <int V> struct alignas(V * sizeof(float)) Columns { float at[V]; };

// Adds to total what the entries from first to last give columns i to i + V of their latent's row; column d is
// the sum of the coefficients.
template <int V>
__device__ void add_entries(const int* tokens, const float* weights, int64_t first, int64_t last, const float* x,
                            int64_t d, int64_t i, double* total) {
  for (int64_t e0 = first; e0 < last; e0 += 32) {
    float part[V] = {};
    for (int64_t e = e0; e < min(e0 + 32, last); ++e) {
      const float weight = weights[e];
      if (i < d) {
        const auto row = *reinterpret_cast<const Columns<V>*>(x + tokens[e] * d + i);
        for (int v = 0; v < V; ++v) part[v] += weight * row.at[v];
      } else {
        part[0] += weight;
      }
    }
    for (int v = 0; v < V; ++v) total[v] += part[v];
  }
}

// Every piece but a segment's first. Of the steps (first - PIECE, first] that end where a later piece begins each
// holds one multiple of PIECE: the block of that number sums the piece.
template <int V>
__global__ void sum_later_pieces(const int* sorted, const int64_t* starts, const int* tokens, const float* weights,
                                 const float* x, int64_t d, int64_t F, double* partial) {
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

// The first piece of each latent's segment, and the others' sums on top. Where any index lay outside, nobody knows
// which row is short of an entry: all are NaN.
template <int V>
__global__ void sum_segments(const int64_t* starts, int64_t entries, int64_t F, const int* tokens,
                             const float* weights, const float* x, int64_t d, const double* partial, float* rows,
                             float* sums) {
  const int64_t f = blockIdx.x, start = starts[f], end = starts[f + 1];
  const bool outside = starts[F] < entries;
  for (int64_t i = threadIdx.x * V; i <= d; i += THREADS * V) {
    double total[V] = {};
    add_entries<V>(tokens, weights, start, min(start + PIECE, end), x, d, i, total);
    for (int64_t first = start + PIECE; first < end; first += PIECE)
      for (int v = 0; v < V; ++v) total[v] += partial[first / PIECE * (d + V) + i + v];
    Columns<V> row;
    for (int v = 0; v < V; ++v) row.at[v] = outside ? nanf("") : float(total[v]);
    if (i < d) *reinterpret_cast<Columns<V>*>(rows + f * d + i) = row;
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
  const auto by_latent = sort(latents);
  const Tensor &sorted = std::get<0>(by_latent), &place = std::get<1>(by_latent);
  Tensor tokens = new_empty(x, {entries}, ScalarType::Int), weights = new_empty(x, {entries});
  Tensor starts = new_empty(x, {F + 1}, ScalarType::Long), rows = new_empty(x, {F, d}), sums = new_empty(x, {F});
  on.run(open_segments, per_entry, 0, in<int>(sorted), in<int64_t>(place), entries, k, F, in(coef),
         out<int>(tokens), out(weights), out<int64_t>(starts));
  auto sum = [&](auto V) {
    Tensor partial = new_empty(x, {pieces, d + V}, ScalarType::Double);
    on.run(sum_later_pieces<V>, pieces, 0, in<int>(sorted), in<int64_t>(starts), in<int>(tokens), in(weights), in(x),
           d, F, out<double>(partial));
    on.run(sum_segments<V>, F, 0, in<int64_t>(starts), entries, F, in<int>(tokens), in(weights), in(x), d,
           in<double>(partial), out(rows), out(sums));
  };
  const bool aligned = d % 4 == 0 && uintptr_t(in(x)) % 16 == 0;
  if (aligned) sum(std::integral_constant<int, 4>());
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
