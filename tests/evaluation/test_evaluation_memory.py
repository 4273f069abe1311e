"""Peak memory is a process's own."""

import subprocess
import sys

import numpy as np
from conftest import PROJECT

from pipeline.models.memory import peak_rss_bytes


def test_the_peak_rises_with_what_is_held_and_stays():
    before = peak_rss_bytes()
    held = np.ones(before // 8 + 10_000_000)  # more than there ever was
    assert peak_rss_bytes() >= held.nbytes
    del held
    assert peak_rss_bytes() > before


def test_a_child_does_not_begin_with_its_parent_s_peak():
    held = np.ones(50_000_000)
    code = "from pipeline.models.memory import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert 1_000_000 < int(child.stdout) < held.nbytes / 2
