// What Python may ask of the encoder's screens, and ask for.
#pragma once
#include <cstdint>
#include <string>
#include <tuple>

constexpr double WORTH = 0.7;  // an 8-bit GEMM that costs more of a float32 one does not pay

double integers_price();                             // what it costs here; infinite where it is not exact
void screen_first(const std::string& name);          // integers (if exact), own, none or measured: for tests
std::tuple<int64_t, int64_t> tokens_that_went_on();  // from the 8-bit and the own screen, since last asked
