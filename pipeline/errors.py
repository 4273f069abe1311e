"""The exceptions a user may see, each with the exit code its stage ends with.

A message says what is wrong, the value found, where, and the next step; it is read by someone who did not write this code.
"""


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


def choices(names: object) -> str:
    """Names as they stand in an error message: sorted, comma-separated, or a dash where there are none."""
    return ", ".join(sorted(map(str, names))) or "–"  # type: ignore[call-overload]
