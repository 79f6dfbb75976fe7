// What the CPU's operators share: tensors as pointers, checks, wide vectors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

// Wider vectors where the processor has them, chosen at load. The numbers stay the same: every loop so marked
// is elementwise or keeps its sums in a fixed number of lanes, and -ffp-contract=off forbids fused
// multiply-add.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define X86
#include <immintrin.h>
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::Tensor;

constexpr int LANES = 16;  // independent sums or compares, to be vectorised

// Each is a call into libtorch: never in an inner loop.
template <class T> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline Tensor like(const Tensor& t, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(t, shape);
}

template <class F> auto by_dtype(const Tensor& t, F&& f) {
  if (t.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "tg: float32 or float64 only on the CPU");
  return f(double());
}

// kernels.py has checked shapes in words already; this keeps a direct call of torch.ops.tg within bounds.
inline void check(const char* op, const Tensor& x, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == dtype, op, ": operands differ in dtype or device");
  const bool same = std::equal(shape.begin(), shape.end(), x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(same, op, ": shapes do not match");
}
