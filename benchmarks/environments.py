"""Virtual environments of the projects that are compared with, under `.work/environments/`; made once."""

import subprocess
import sys
from pathlib import Path

from pipeline.files import Folders

LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of the source release, which is compiled for minutes."""


def llama_cpp_python() -> Path | None:
    """The Python of an environment with llama.cpp and its server."""
    return python_of("llama_cpp", ["llama-cpp-python[server]", "numpy"], f"{LLAMA_CPP} --hash=sha256:{LLAMA_CPP_SHA256}")


def python_of(name: str, packages: list[str], hashed: str | None = None) -> Path | None:
    """The Python of an environment with `packages`, or None, and the reason printed, where they cannot be installed.

    `hashed`, a package with its hash, is installed first and alone: pip wants the hashes of all packages or of none.
    """
    folder = (Folders.here().work / "environments" / name).absolute()
    python = folder / "bin" / "python"
    done = folder / "installed"
    wanted = "\n".join([*packages, *filter(None, [hashed])])
    if done.is_file() and done.read_text("utf-8") == wanted:
        return python
    print(f"making an environment for {name}: {' '.join(packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # the project's own versions where both use a package: the comparison is then of what is done with torch, not of its releases
    steps = [["--constraint", str(Path("constraints.txt").absolute()), *packages]]
    if hashed is not None:
        (folder / "hashed.txt").write_text(hashed, "utf-8")
        steps.insert(0, ["--no-deps", "--requirement", str(folder / "hashed.txt")])
    for step in steps:
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
        result = subprocess.run(install, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            print(f"{name} is left out; pip ended with {result.returncode}: {result.stderr.strip().splitlines()[-1:]}", flush=True)
            return None
    done.write_text(wanted, "utf-8")
    return python
