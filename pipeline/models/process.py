"""What this process may use and has used, without torch: an exported student answers without it."""

import resource
import sys
from pathlib import Path

import joblib
import psutil


def cores() -> int:
    """Cores that this process may use: those of the machine, of its affinity, and of a container's quota."""
    return min(allowed := joblib.cpu_count(), psutil.cpu_count(logical=False) or allowed)


def peak_rss_bytes(process: int | None = None) -> int:
    """The largest resident set so far, in bytes: of this process, or of the `process` with that id (outside of Linux, its present one).

    On Linux it is the kernel's account of this process's memory: `ru_maxrss` survives `exec`, so a child begins with its parent's peak.
    """
    status = Path(f"/proc/{process or 'self'}/status")
    for line in status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if process is not None:
        return psutil.Process(process).memory_info().rss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
