"""Memory of this process: its peak, and giving back what is free."""

import ctypes
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes.

    On Linux from the kernel's account of the process's own memory: `ru_maxrss` lives on through `exec`, so that a child begins with the
    peak of the process that started it.
    """
    if STATUS.is_file():
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library is one that holds on to it and can be asked (glibc).

    Passes of ever other lengths leave holes among the large results that come and go; by itself glibc gives back the end of its heap alone.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
