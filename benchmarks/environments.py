"""Virtual environments of the projects that are compared with, under `.work/environments/`; made once."""

import subprocess
import sys
from pathlib import Path

from pipeline.files import Folders


def python_of(name: str, packages: list[str], *, constrained: bool = True) -> Path | None:
    """The Python of an environment with `packages`, or None, and the reason printed, where they cannot be installed."""
    folder = (Folders.here().work / "environments" / name).absolute()
    python = folder / "bin" / "python"
    done = folder / "installed"
    wanted = "\n".join(packages)
    if done.is_file() and done.read_text("utf-8") == wanted:
        return python
    print(f"making an environment for {name}: {' '.join(packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # the project's own versions where both use a package: the comparison is then of what is done with torch, not of its releases
    pinned = ["--constraint", str(Path("constraints.txt").absolute())] if constrained else []
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pinned, *packages]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"{name} is left out; pip ended with {result.returncode}: {result.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    done.write_text(wanted, "utf-8")
    return python
