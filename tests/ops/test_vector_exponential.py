"""The vector exponential of the C++ kernels (csrc/cpu/vector/vec.h), compiled alone for each capability of this CPU:
its error in units in the last place over its whole range, and its ends."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from in2nect import native

ROOT = Path(__file__).parents[2]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
COMPILER = shlex.split(os.environ.get("CXX", "")) or [found for found in map(shutil.which, ("c++", "g++")) if found][:1]

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#define IN2NECT_CAPABILITY tested
#include "csrc/cpu/vector/vec.h"
using namespace in2nect::cpu::tested;

// Units in the last place of the exact value between what was found and that.
template <typename A>
long double ulps(A found, long double exact) {
  const int exponent = std::ilogb(exact);
  const long double unit = std::ldexp(1.0L, exponent - std::numeric_limits<A>::digits + 1);
  return std::fabs(static_cast<long double>(found) - exact) / unit;
}

template <typename A>
A exp2_of(A x) {
  A numbers[kLanes<A>];
  store(numbers, Exp2<A>::of(broadcast(x)));
  return numbers[kLanes<A> - 1];
}

int main() {
  long double worst_float = 0, worst_double = 0;
  // every 64th float32 from -126 to 1, both signs of their bits
  for (int sign = 0; sign < 2; ++sign) {
    for (uint32_t bits = 0; bits <= 0x42FC0000u; bits += 64) {
      const uint32_t whole = bits | static_cast<uint32_t>(sign) << 31;
      float x;
      std::memcpy(&x, &whole, 4);
      if (x <= 1 && x >= -126) {
        const long double error = ulps(exp2_of(x), exp2l(x));
        worst_float = error > worst_float ? error : worst_float;
      }
    }
  }
  for (double x = -1022; x <= 1; x += 0.000731) {
    const long double error = ulps(exp2_of(x), exp2l(x));
    worst_double = error > worst_double ? error : worst_double;
  }
  const float infinity = std::numeric_limits<float>::infinity();
  std::printf("%.3Lf %.3Lf %g %g %d %g\n", worst_float, worst_double, exp2_of(-infinity), exp2_of(-1e30f),
              std::isnan(exp2_of(std::nanf(""))), exp2_of(-static_cast<double>(infinity)));
}
"""


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("capability", FLAGS)
def test_error(capability: str, tmp_path: Path) -> None:
    if capability not in native.available_cpu_capabilities():
        pytest.skip(f"this CPU has no {capability}, or the C++ operators are not built")
    source, program = tmp_path / "exponential.cpp", tmp_path / "exponential"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-fno-math-errno", f"-I{ROOT}", *FLAGS[capability]]
    subprocess.run([*COMPILER, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    worst_float, worst_double, *ends = map(float, done.stdout.split())
    assert 0.5 <= worst_float <= 2  # the kernels' stated bound; an exact result is within 0.5
    assert 0.5 <= worst_double <= 2
    assert ends == [0, 0, 1, 0]  # of -infinity, of what underflows, NaN stays NaN, of -infinity in float64
