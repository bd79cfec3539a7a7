"""Intel's matmuls, told to give the same bits in any company and on any number of threads (docs/design.md §3).

On an Intel processor MKL cuts long sums as the numbers of rows and of threads suggest: at 1,536 inputs a row's bits
depend on the rows beside it. In its strict mode (oneMKL's "conditional numerical reproducibility") they do not, for a
tenth of a matmul's speed at most. Other makers' processors do not have that mode.
"""

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_FIRST_LINES = 256  # characters; one of the first lines names the maker


def keep_bits() -> None:
    """For the whole process: MKL looks at the variable at its first matmul. What the operator has set stays."""
    if is_intel():
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def mode() -> str:
    """What MKL was told; empty: nothing."""
    return os.environ.get("MKL_CBWR", "")


def is_intel() -> bool:
    if not _CPUINFO.exists():
        return "GenuineIntel" in platform.processor()
    with _CPUINFO.open() as file:
        return "GenuineIntel" in file.read(_FIRST_LINES)
