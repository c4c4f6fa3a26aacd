"""glibc's logf, sinf and cosf in NumPy, bit for bit on every machine.

llm.c draws its initial weights through these three functions, so a libm that rounds one value
differently makes another model. glibc, since 2.28, computes them in float64 and rounds once at the
end, and so does this module. The results were compared with glibc 2.36 for every float32 of the
ranges below (up to 1 for the logarithm): no bit differs from its build with fused multiply-add,
which NumPy lacks, nor from its build without.
Source of the formulas and constants: ARM-software/optimized-routines, math/logf.c, math/sincosf.h.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]

LN2: Final = float.fromhex("0x1.62e42fefa39efp-1")
PI_HALF: Final = float.fromhex("0x1.921fb54442d18p+0")
TWO_OVER_PI: Final = float.fromhex("0x1.45f306dc9c883p-1")
# log(1 + r) = r + r^2 (L0 + L1 r + L2 r^2)
L0: Final = float.fromhex("-0x1.ffffef20a4123p-2")
L1: Final = float.fromhex("0x1.5575b0be00b6ap-2")
L2: Final = float.fromhex("-0x1.00ea348b88334p-2")
# sin(x) = x + S0 x^3 + x^5 (S1 + S2 x^2)
S0: Final = float.fromhex("-0x1.555545995a603p-3")
S1: Final = float.fromhex("0x1.1107605230bc4p-7")
S2: Final = float.fromhex("-0x1.994eb3774cf24p-13")
# cos(x) = 1 + C0 x^2 + C1 x^4 + x^6 (C2 + C3 x^2)
C0: Final = float.fromhex("-0x1.ffffffd0c621cp-2")
C1: Final = float.fromhex("0x1.55553e1068f19p-5")
C2: Final = float.fromhex("-0x1.6c087e89a359dp-10")
C3: Final = float.fromhex("0x1.99343027bf8c3p-16")


def _table(text: str) -> npt.NDArray[np.float64]:
    """The float64 values (n,) of hexadecimal numbers separated by white space."""
    return np.array([float.fromhex(number) for number in text.split()])


# The octave of float32 that begins at bits 0x3f330000 (0.7) is divided into 16 intervals. The
# tables hold 1 / c and log(c) for the center c of each interval.
OCTAVE_START: Final = 0x3F330000
INVERSE_CENTER: Final = _table("""
    0x1.661ec79f8f3bep+0 0x1.571ed4aaf883dp+0 0x1.49539f0f010bp+0 0x1.3c995b0b80385p+0
    0x1.30d190c8864a5p+0 0x1.25e227b0b8eap+0 0x1.1bb4a4a1a343fp+0 0x1.12358f08ae5bap+0
    0x1.0953f419900a7p+0 0x1p+0 0x1.e608cfd9a47acp-1 0x1.ca4b31f026aap-1
    0x1.b2036576afce6p-1 0x1.9c2d163a1aa2dp-1 0x1.886e6037841edp-1 0x1.767dcf5534862p-1
""")
LOG_CENTER: Final = _table("""
    -0x1.57bf7808caadep-2 -0x1.2bef0a7c06ddbp-2 -0x1.01eae7f513a67p-2 -0x1.b31d8a68224e9p-3
    -0x1.6574f0ac07758p-3 -0x1.1aa2bc79c81p-3 -0x1.a4e76ce8c0e5ep-4 -0x1.1973c5a611cccp-4
    -0x1.252f438e10c1ep-5 0x0p+0 0x1.aa5aa5df25984p-5 0x1.c5e53aa362eb4p-4
    0x1.526e57720db08p-3 0x1.bc2860d22477p-3 0x1.1058bc8a07ee1p-2 0x1.4043057b6ee09p-2
""")
# The same for the intervals of octaves k, one after the other: 2^-k / c and log(c) + k log(2).
LOWEST_OCTAVE: Final = -126
OCTAVES: Final = np.arange(LOWEST_OCTAVE, 129)[:, None]
INVERSES: Final = np.ldexp(INVERSE_CENTER, -OCTAVES).reshape(-1)
LOGS: Final = (LOG_CENTER + OCTAVES * LN2).reshape(-1)


def logf(x: FloatArray) -> FloatArray:
    """The natural logarithm of x float32, positive and not subnormal."""
    # The upper 4 bits of the mantissa are the interval, and the bits above them the octave.
    interval = (x.view(np.int32) - (OCTAVE_START + (LOWEST_OCTAVE << 23))) >> 19
    r = x * INVERSES[interval] - 1.0
    r2 = r * r
    y: npt.NDArray[np.float64] = (L2 * r2 + (L1 * r + L0)) * r2 + (LOGS[interval] + r)
    return y.astype(np.float32)


def sinf_cosf(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The sine and the cosine of x float32 in [0, 2 pi]."""
    wide = x.astype(np.float64)
    quarters = np.rint(wide * TWO_OVER_PI)
    r = wide - quarters * PI_HALF
    r2 = r * r
    r3 = r * r2
    r4 = r2 * r2
    sine = ((r + r3 * S0) + (r3 * r2) * (S1 + r2 * S2)).astype(np.float32)
    cosine = (((1.0 + r2 * C0) + r4 * C1) + (r4 * r2) * (C2 + r2 * C3)).astype(np.float32)
    quarter = quarters.astype(np.int32)
    odd = (quarter & 1).astype(np.bool_)
    return (
        _negate(np.where(odd, cosine, sine), quarter & 2),
        _negate(np.where(odd, sine, cosine), (quarter + 1) & 2),
    )


def _negate(x: FloatArray, two: npt.NDArray[np.int32]) -> FloatArray:
    """x where `two` is 0, and -x where it is 2."""
    return (x.view(np.int32) ^ (two << 30)).view(np.float32)
