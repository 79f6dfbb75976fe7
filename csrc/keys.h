// The order in which pre-activations are ranked, the same on every device: larger value first, then lower
// index, NaN above all.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define BOTH __host__ __device__ __forceinline__
#else
#define BOTH inline
#endif

template <class T> struct Bits;
template <> struct Bits<float> { using U = uint32_t; };
template <> struct Bits<double> { using U = uint64_t; };

// Floats of either sign become unsigned integers in the same order: a positive float compares like its bits,
// a negative one the other way round. The zeros are one value, hence + 0 (which the compiler keeps, as this
// is not built with fast-math).
template <class T> BOTH typename Bits<T>::U to_order(T value) {
  using U = typename Bits<T>::U;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  if (value != value) return ~U(0);
  value += T(0);
  U bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

template <class T> BOTH T from_order(typename Bits<T>::U order) {
  using U = typename Bits<T>::U;
  constexpr U sign = U(1) << (8 * sizeof(U) - 1);
  const U bits = order & sign ? order ^ sign : ~order;
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Keeps a NaN visible, as torch.relu does.
template <class T> BOTH T relu(T value) { return value <= T(0) ? T(0) : value; }
