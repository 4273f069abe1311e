"""The exceptions a user may see, each with the exit code its stage ends with.

A message says what is wrong, the value found, where, and the next step; it is read by someone who did not write this code.
"""

import errno


class ShotlessError(Exception):
    """Something failed that was not the user's doing alone; exit code 1."""

    exit_code = 1


class UsageError(ShotlessError):
    """A parameter, file or argument cannot be used as given; exit code 2, always before long work."""

    exit_code = 2


class MismatchError(UsageError):
    """An artifact does not belong to the teacher, tokenizer, template or contexts it is used with."""


class CorruptError(ShotlessError):
    """An artifact's bytes are not what its manifest says."""


class NotJsonError(CorruptError, ValueError):
    """A file that should be JSON is none."""


def choices(names: object) -> str:
    """Names as they stand in an error message: sorted, comma-separated, or a dash where there are none."""
    return ", ".join(sorted(map(str, names))) or "–"  # type: ignore[call-overload]


SYSTEM = {
    errno.EROFS: "the file system is read-only; write elsewhere, or mount it for writing",
    errno.EACCES: "permission denied; change the owner or mode, or write elsewhere",
    errno.EPERM: "the system does not permit it; change the owner, mode or attributes, or write elsewhere",
    errno.ENOSPC: "the disk is full; what was written before is whole and stays. Make room and run again",
    errno.EDQUOT: "the quota is used up; what was written before is whole and stays. Make room and run again",
    errno.EIO: "the disk reports an error; look at the system's log, and write elsewhere",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
    errno.EISDIR: "it is a folder, and a file belongs there; remove or rename it",
    errno.ENOTDIR: "a part of the path is a file, and a folder belongs there; remove or rename it",
    errno.ENOENT: "no such file or folder; was it removed while this ran? Run again",
    errno.ELOOP: "symbolic links lead round in a circle; remove one",
    errno.EEXIST: "something of that name is in the way; remove or rename it",
    errno.ENOTEMPTY: "the folder was written by another run at the same time; run again when that has ended",
    errno.ESTALE: "the file's server has lost it; mount it again and run again",
}


def of_system(error: OSError) -> str | None:
    """What the machine refused, with the file where it is known and the next step; None where it is no such refusal but a bug."""
    if error.errno not in SYSTEM:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{SYSTEM[error.errno]}."
