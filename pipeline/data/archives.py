"""One file out of an archive, or out of an archive inside an archive.

Members are copied as streams to a name that the caller chose, and nothing is ever extracted by the names that stand in the archive, so no
path can leave its folder. Links and devices are refused, and so is a member that unpacks to far more than its archive: a data file of
text shrinks 3 to 20 times, a bomb hundreds of times. The trade-off: every read opens the archive anew, which costs nothing at the sizes
of a release.
"""

import difflib
import errno
import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UsageError, choices

MAX_EXPANSION = 200
"""Bytes of a member for each byte of its archive."""
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile,
    NotImplementedError,  # a compression that zipfile does not have
    ValueError, OverflowError, struct.error,  # names and numbers in headers that are none
)  # fmt: skip
_BROKEN_STREAM = (None, errno.EINVAL)
"""Numbers of an OSError that says a compressed stream is broken, or that a header points nowhere; others are the machine's."""


def extract(archive: Path, members: Sequence[str], target: Path) -> None:
    """Write to `target` the file that `members` leads to.

    The first member is looked up in `archive`, each further one in the archive that the one before it names.
    Raises UsageError for a member that is not there, is no plain file or is unreasonably large, and for a file that is no archive.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as scratch:
        for depth, member in enumerate(members):
            inner = target if depth == len(members) - 1 else Path(scratch) / str(depth)
            try:
                _copy_member(archive, member, inner)
            except _BROKEN as error:
                raise _broken(archive, member, error) from None
            except OSError as error:
                if error.errno not in _BROKEN_STREAM:
                    raise
                raise _broken(archive, member, error) from None
            archive = inner


def _copy_member(archive: Path, member: str, target: Path) -> None:
    if zipfile.is_zipfile(archive):
        _from_zip(archive, member, target)
    elif tarfile.is_tarfile(archive):
        _from_tar(archive, member, target)
    else:
        raise UsageError(f"{archive.name}: neither a zip nor a tar archive, so there is no {member!r} in it; shorten `member`.")


def _from_zip(archive: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        try:
            info = file.getinfo(member)
        except KeyError:
            raise _missing(archive, member, file.namelist()) from None
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 0x1:
            raise UsageError(f"{archive.name}: {member!r} is a folder, a link or encrypted; `member` must name a plain file.")
        _check_size(archive, member, info.file_size)
        with file.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _from_tar(archive: Path, member: str, target: Path) -> None:
    with tarfile.open(archive) as file:
        try:
            info = file.getmember(member)
        except KeyError:
            raise _missing(archive, member, file.getnames()) from None
        source = file.extractfile(info) if info.isreg() else None
        if source is None:
            raise UsageError(f"{archive.name}: {member!r} is a folder, a link or a device; `member` must name a plain file.")
        _check_size(archive, member, info.size)
        with source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _check_size(archive: Path, member: str, size: int) -> None:
    packed = archive.stat().st_size
    if size > MAX_EXPANSION * packed:
        raise UsageError(
            f"{archive.name}: {member!r} unpacks to {size:,} bytes, more than {MAX_EXPANSION} times the archive's {packed:,}; "
            "this is refused as unsafe. Unpack it by hand and give it as a local file if it is what you expect."
        )


def _broken(archive: Path, member: str, error: Exception) -> UsageError:
    return UsageError(
        f"{archive.name}: cannot be read as an archive ({error or type(error).__name__}); {member!r} was looked for in it. Fetch it again."
    )


def _missing(archive: Path, member: str, names: list[str]) -> UsageError:
    near = difflib.get_close_matches(member, names, n=5, cutoff=0.3) or names[:5]
    return UsageError(f"{archive.name}: no {member!r} in it ({len(names):,} members); the nearest are: {choices(near)}.")
