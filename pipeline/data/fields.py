"""What counts as a usable input: one rule for the texts that students learn from and for those that they answer later.

Whoever reads inputs from outside (`prepare`, `predict`, `serve`, `monitor`) asks here, so that a student never meets a text in another form
than the one it was trained on.
"""

import re
from typing import Any

MISSING = object()
"""Stands for a value whose key a JSON object does not have."""
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
"""Characters that no text holds, except by mistake; tabs, line ends and form feeds are white space."""
SURROGATE = re.compile("[\ud800-\udfff]")


class BadValueError(Exception):
    """A value that cannot be used: field, reason, value."""

    def __init__(self, field_name: str, reason: str, value: object) -> None:
        super().__init__(field_name, reason, value)
        self.field_name, self.reason, self.value = field_name, reason, value


def field_text(column: str, value: Any, max_chars: int | None) -> str:
    """A field's value as the models see it: stripped of outer white space, otherwise as it stands.

    Raises BadValueError where it is missing, no text, empty, longer than `max_chars`, or holds a character that no text holds.
    """
    if value is MISSING or value is None:
        raise BadValueError(column, "missing", "")
    if not isinstance(value, str):
        raise BadValueError(column, "not a text", value)
    text = value.strip()
    if not text:
        raise BadValueError(column, "empty", value)
    if max_chars is not None and len(text) > max_chars:
        raise BadValueError(column, "too long", f"{len(text):,} characters: {text}")
    if not text.isprintable() and (found := CONTROL.search(text) or SURROGATE.search(text)):
        reason = "lone surrogate" if SURROGATE.match(found[0]) else "control character"
        raise BadValueError(column, reason, f"U+{ord(found[0]):04X} in {text!r}")
    return text
