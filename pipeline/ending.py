"""How a command ends, whatever happens: with its work done, or with a message and an exit code.

Stages and the `shotless` command line share this. A ShotlessError is a message; so is what the machine refuses (a full disk, a folder
that may not be written), wherever in a library it came up. Anything else is a bug and shows its traceback.
"""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import ShotlessError, UsageError, of_system


@contextmanager
def ending_well() -> Iterator[None]:
    """Run a command in this block; an error prints its message and ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes, rather than end the work
            stream.reconfigure(errors="backslashreplace")
    try:
        _check_locale()
        yield
    except ShotlessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE or (said := of_system(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(ShotlessError.exit_code)


def _check_locale() -> None:
    """Raise UsageError where this Python cannot pass the working folder's name, or an argument, to libraries that want UTF-8."""
    if sys.getfilesystemencoding().lower() in {"utf-8", "utf8"}:
        return
    for text in (os.getcwd(), *sys.argv[1:]):  # noqa: PTH109  as bytes in surrogates, which Path.cwd gives too
        if not text.isascii():
            raise UsageError(
                f"{text!r} is not ASCII, and this Python reads names of files as {sys.getfilesystemencoding()}; set PYTHONUTF8=1, or a "
                "UTF-8 locale such as LC_ALL=C.UTF-8."
            )
