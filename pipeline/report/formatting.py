"""Numbers and lists as people read them."""

from typing import Any

DASH = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as a percentage without its sign: 0.8633 → 86.3."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """A difference of fractions in percentage points with a true minus sign: -0.021 → −2.1."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in {"+0.0", "−0.0"} else text


def span(interval: list[float]) -> str:
    """An interval of fractions as percentages: 82.0–90.1."""
    return f"{percent(interval[0])}–{percent(interval[1])}"


def quantity(value: Any, unit: str = "", digits: int = 0) -> str:
    """A count or measurement with thousands separators, a dash where it is missing."""
    if value is None:
        return DASH
    return f"{value:,.{digits}f}{unit}" if isinstance(value, float) else f"{value:,}{unit}"


def scaled(value: float | None, unit: str = "") -> str:
    """A large number in thousands, millions, …: 113142528 → 113.1 M; with unit B: 452.6 MB."""
    if value is None:
        return DASH
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:,.1f} {prefix}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def compact(value: float) -> str:
    """A setting as people write it: 5e-05 → 5e-5."""
    return f"{value:g}".replace("e-0", "e-")


def listed(names: list[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}" if quoted else DASH


def plural(count: int, noun: str) -> str:
    """`1 set`, `3 sets`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
