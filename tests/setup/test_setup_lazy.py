"""The command line starts fast: what needs torch is imported by the commands that need it."""

import subprocess
import sys

from conftest import PROJECT


def test_the_command_line_is_there_before_torch_is():
    code = "import sys, pipeline.cli; sys.exit(','.join({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
