// SPDX-License-Identifier: Apache-2.0
//
// Which table of passes this processor runs, decided once from CPUID and the state that the system saves.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "backend.h"
#include "passes.h"

#if defined(CODMD_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace codmd {
namespace {

#if defined(CODMD_X86)
void cpuid(unsigned leaf, unsigned out[4]) {
#if defined(_MSC_VER)
  __cpuidex(reinterpret_cast<int*>(out), int(leaf), 0);
#else
  __cpuid_count(leaf, 0, out[0], out[1], out[2], out[3]);
#endif
}

unsigned long long enabled_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

bool has(unsigned word, int bit) { return (word >> bit) & 1u; }

// 0: baseline; 1: AVX2, FMA, F16C; 2: also AVX-512 F, DQ, BW, VL.
int processor_level() {
  unsigned basic[4], one[4], seven[4];
  cpuid(0, basic);
  if (basic[0] < 7) return 0;
  cpuid(1, one);
  cpuid(7, seven);
  const bool osxsave = has(one[2], 27), fma = has(one[2], 12), f16c = has(one[2], 29);
  if (!osxsave || !fma || !f16c || !has(seven[1], 5)) return 0;
  const unsigned long long state = enabled_state();
  if ((state & 0x6) != 0x6) return 0;
  const bool wide = has(seven[1], 16) && has(seven[1], 17) && has(seven[1], 30) && has(seven[1], 31);
  return wide && (state & 0xe6) == 0xe6 ? 2 : 1;
}
#endif

const Passes* table(const char* name) {
  if (std::strcmp(name, "baseline") == 0) return &passes_baseline;
#if defined(CODMD_X86)
  static const int level = processor_level();
  if (level >= 1 && std::strcmp(name, "avx2") == 0) return &passes_avx2;
  if (level >= 2 && std::strcmp(name, "avx512") == 0) return &passes_avx512;
#endif
  return nullptr;
}

const Passes* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Passes* found = table(name)) return found;
  return &passes_baseline;
}

std::atomic<const Passes*>& selected() {
  static std::atomic<const Passes*> passes{best()};
  return passes;
}

}  // namespace

const Passes& passes() { return *selected().load(std::memory_order_relaxed); }

const char* active_isa() { return passes().name; }

bool select_isa(const char* name) {
  const Passes* found = table(name);
  if (found) selected().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

}  // namespace codmd
