// What csrc/ops_cuda.cu finds in place of CUDA's header when tests/emulate.py compiles it for the CPU: the
// names it uses, no more. The threads of a block are fibers (emulator.cpp), a CPU tensor stands for a tensor
// on the GPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>

typedef void* cudaStream_t;
typedef int cudaError_t;
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x = 1) : x(x) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulated {
extern dim3 thread, block;  // which one is running

void barrier(int line);
uint64_t exchange(uint64_t given, unsigned from, unsigned mask, int line);
int add(int* at, int by);
void reach(const void* start, size_t bytes, size_t unit, bool writable);  // kernels may touch it from here on
int stream(int32_t device, void** stream);  // an operator begins: nothing is in reach yet
int clear(void* start, int value, size_t bytes, void* stream);
int allow_shared(void (*kernel)(), int bytes);
int launch(const cudaLaunchConfig_t& how, void (*kernel)(), void (*call)(const void*), const void* with,
           size_t size);
void check(int failed);  // throws what went wrong

inline const void* const_data_ptr(const torch::stable::Tensor& t) {
  reach(t.const_data_ptr(), t.numel() * t.element_size(), t.element_size(), false);
  return t.const_data_ptr();
}
inline void* mutable_data_ptr(const torch::stable::Tensor& t) {
  reach(t.mutable_data_ptr(), t.numel() * t.element_size(), t.element_size(), true);
  return t.mutable_data_ptr();
}
struct Guard {
  explicit Guard(int) {}
};
template <class T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, from, mask, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulated

template <class... P>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(P...), P... parameters) {
  using Call = std::tuple<void (*)(P...), std::tuple<P...>>;
  const Call with{kernel, {parameters...}};
  auto call = [](const void* p) { std::apply(std::get<0>(*(const Call*)p), std::get<1>(*(const Call*)p)); };
  return emulated::launch(*how, (void (*)())kernel, call, &with, sizeof with);
}
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class... P>
int cudaFuncSetAttribute(void (*kernel)(P...), int, int bytes) {
  return emulated::allow_shared((void (*)())kernel, bytes);
}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// one section holds all of it, each variable on a line of its own: what lies between is never written
#define __shared__ __attribute__((section("block_shared"), aligned(64)))
#define threadIdx emulated::thread
#define blockIdx emulated::block
#define __syncthreads() emulated::barrier(__LINE__)
#define __shfl_xor_sync(mask, value, by) emulated::shuffle(mask, value, LANE ^ (by), __LINE__)
#define __shfl_up_sync(mask, value, by) \
  emulated::shuffle(mask, value, LANE < (by) ? LANE : LANE - (by), __LINE__)
#define __shfl_sync(mask, value, lane) emulated::shuffle(mask, value, lane, __LINE__)
#define LANE (emulated::thread.x % 32)
#define atomicAdd emulated::add
#define cudaMemsetAsync emulated::clear
#define aoti_torch_get_current_cuda_stream emulated::stream
#define is_cuda is_cpu
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) emulated::check(call)
using std::isfinite, std::max, std::min;
