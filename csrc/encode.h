// What Python may ask of topk_encode's screens, through the attributes of the module (ops.cpp).
#pragma once
#include <cstdint>
#include <string>
#include <tuple>

// The 8-bit screen comes first where its GEMM costs less than this share of a float32 one.
constexpr double MAX_INT8_GEMM_COST = 0.7;

// What it costs on this machine, measured once; infinite where 8-bit products are not exact.
double int8_gemm_cost();
// For tests: "integers" (where they are exact), "own", "none" or, as by default, "measured".
void screen_first(const std::string& name);
// Tokens that the 8-bit screen, and the one in the tensors' own dtype, left to the next since the last call.
std::tuple<int64_t, int64_t> fallback_tokens();
