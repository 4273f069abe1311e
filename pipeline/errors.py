"""The errors a user may see, each with its exit code, and how a command ends with one.

A message says what is wrong, the value found, the place and the next step, for someone who did not write this code. Exit codes: 0 done,
1 failed, 2 usage or params, 3 a threshold was crossed.
"""

import errno
import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class ShotlessError(Exception):
    """Something failed; exit code 1."""

    exit_code = 1


class UsageError(ShotlessError):
    """A parameter, file or argument cannot be used as given; exit code 2."""

    exit_code = 2


class MismatchError(UsageError):
    """An artifact does not belong to the teacher, tokenizer, template or contexts it is used with."""


class CorruptError(ShotlessError):
    """An artifact's bytes are not what its manifest says."""


class ThresholdError(ShotlessError):
    """What was made is worse than a threshold allows; exit code 3."""

    exit_code = 3


def choices(names: Iterable[object]) -> str:
    """Names for an error message: sorted and comma-separated, or a dash if there are none."""
    return ", ".join(sorted(map(str, names))) or "–"


def need(extra: str, *packages: str) -> None:
    """Raise UsageError if a package of an extra of pyproject.toml is not installed."""
    if absent := [name for name in packages if find_spec(name) is None]:
        raise UsageError(f"{', '.join(absent)}: not installed. Run `pip install -c constraints.txt 'shotless[{extra}]'`.")


NEXT_STEPS = {
    errno.EROFS: "The file system is read-only. Write elsewhere, or mount it for writing.",
    errno.EACCES: "Permission denied. Change the owner or mode, or write elsewhere.",
    errno.EPERM: "The system does not permit it. Change the owner or mode, or write elsewhere.",
    errno.ENOSPC: "The disk is full. What was written before is whole and stays: make room and run again.",
    errno.EDQUOT: "The quota is used up. What was written before is whole and stays: make room and run again.",
    errno.EIO: "The disk reports an error. Look at the system's log, and write elsewhere.",
    errno.ENAMETOOLONG: "The name is too long for this file system. Choose a shorter one.",
    errno.EMFILE: "Too many files are open. Raise `ulimit -n`.",
    errno.EISDIR: "It is a folder; a file is needed here. Remove or rename it.",
    errno.ENOTDIR: "A part of the path is a file; a folder is needed here. Remove or rename it.",
    errno.ENOENT: "No such file or folder. If it was removed while this ran, run again.",
}


@contextmanager
def ending_with_a_message() -> Iterator[None]:
    """Run a command in this block; what a user can mend ends the process with a message and an exit code, a bug with its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except ShotlessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in NEXT_STEPS:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"error: {where}{NEXT_STEPS[error.errno]}", file=sys.stderr)
        sys.exit(ShotlessError.exit_code)
