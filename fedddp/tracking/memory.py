"""The memory that this process uses, on the CPU and on its GPU."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def resident_bytes() -> int:
    """Return the bytes of this process that are in the machine's memory; on macOS the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def gpu_bytes() -> int | None:
    """Return the most bytes that torch has held on this process's GPU; None where it uses none."""
    torch = sys.modules.get("torch")  # imported where there is something to measure
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())
