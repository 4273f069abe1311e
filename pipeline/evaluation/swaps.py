"""Swaps that should not change an answer: first names, words of gender, contractions written out, a frame around the text.

Each swap is a fixed list and a rule, in this module, so that anyone can see what was swapped. A text with nothing to swap is left out of
its count. The lists are English and short on purpose: a wrong swap (a surname that is also a first name, `her` read as `his` for `him`)
would count against the student. No swap adds, removes or moves a negation.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Given names that are seldom surnames, words, places or brands; each is replaced by the next of its row. Two rows of men, two of women.
NAMES = (
    "David Jamal Michael Carlos Kevin Ahmed Peter Darnell Steven Wei Robert Rashid Brian",
    "Mary Lakisha Julia Maria Sarah Fatima Nicole Aisha Jennifer Mei Emily Keisha Susan",
    "John Tyrone Paul Luis Richard Omar Thomas Hiroshi Daniel Jose Andrew Ali Adam",
    "Anna Shanice Laura Carmen Helen Leila Linda Ebony Rachel Yuki Jessica Rosa Kate",
)
GENDER = (
    "he/she himself/herself man/woman men/women boy/girl boys/girls guy/gal male/female father/mother dad/mom son/daughter sons/daughters "
    "brother/sister brothers/sisters husband/wife uncle/aunt king/queen actor/actress actors/actresses hero/heroine gentleman/lady "
    "gentlemen/ladies"
)
# Only endings with one reading: "it's" and "he's" may stand for "has", and "n't" is a negation.
CONTRACTIONS = {"m": "am", "re": "are", "ve": "have", "ll": "will"}
FRAMES = ("Here is the text: {}", "To begin with: {}", "{} That is the whole text.")  # around the first field; they say nothing of it

_NEXT_NAME = {name: row[(at + 1) % len(row)] for row in map(str.split, NAMES) for at, name in enumerate(row)}
_OTHER_GENDER = {one: other for pair in GENDER.split() for one, other in (pair.split("/"), pair.split("/")[::-1])}
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_CONTRACTION = re.compile(rf"\b(i|you|we|they|he|she|it)['’]({'|'.join(CONTRACTIONS)})\b", re.IGNORECASE)
_NEXT_WORD = re.compile(r"[ \t]+[^\W_]")
# After "her" these open a new part of the sentence, so that it is an object ("saw her in the park"), not a possessive.
_AFTER_OBJECT = re.compile(
    "a about again alone an and as at away back because but by down for from if in into is of off on or out over than that the through to "
    "too up was when where while with".replace(" ", "|")
)


@dataclass(frozen=True)
class Swap:
    """A named change of a text."""

    name: str
    what: str
    apply: Callable[[str], str]  # the changed text; the text itself if there is nothing to swap
    every_field: bool = True  # all fields of an input are changed together, so that a name stays one person; else the first alone


def swap_fields(swap: Swap, fields: Mapping[str, str]) -> dict[str, str] | None:
    """An input after a swap; None if there is nothing to swap."""
    names = list(fields) if swap.every_field else list(fields)[:1]
    changed = {**fields, **{name: swap.apply(fields[name]) for name in names}}
    return None if changed == dict(fields) else changed


def other_names(text: str) -> str:
    """First names replaced by the next of their row. A possessive keeps its ending; names in capitals or small letters stay."""
    return _each_word(text, lambda word, _: _NEXT_NAME.get(word, word))


def other_gender(text: str) -> str:
    """Words of gender replaced by their counterparts, in the same case: "He saw her brother" → "She saw his sister"."""

    def change(word: str, rest: str) -> str:
        other = _counterpart(word.lower(), rest)
        if len(word) > 1 and word.isupper():
            return other.upper()
        return other[0].upper() + other[1:] if word[0].isupper() else other

    return _each_word(text, change)


def written_out(text: str) -> str:
    """Contractions without a negation written out: "they're" → "they are"."""

    def replace(found: re.Match[str]) -> str:
        full = f"{found[1]} {CONTRACTIONS[found[2].lower()]}".lower()
        return full.capitalize() if found[1][0].isupper() else full

    return _CONTRACTION.sub(replace, text)


SWAPS = (
    Swap("first_names", "first names replaced by others of the same gender", other_names),
    Swap("gender_words", "words of gender replaced by their counterparts", other_gender),
    Swap("contractions", "contractions without a negation written out", written_out),
    *(Swap(f"frame_{at}", frame.format("…"), frame.format, every_field=False) for at, frame in enumerate(FRAMES, 1)),
)


def _counterpart(word: str, rest: str) -> str:
    """A word's counterpart in small letters, or the word; `rest` is what follows it."""
    follows = _WORD.match(rest.lstrip()) if _NEXT_WORD.match(rest) else None
    if word == "her":
        return "his" if follows is not None and not _AFTER_OBJECT.fullmatch(follows.group().lower()) else "him"
    if word == "his":
        return "her" if follows is not None else "hers"
    return {"him": "her", "hers": "his"}.get(word) or _OTHER_GENDER.get(word, word)


def _each_word(text: str, change: Callable[[str, str], str]) -> str:
    """A text with `change(word, what follows it)` for each word. An ending from an apostrophe on stays."""

    def replace(found: re.Match[str]) -> str:
        word = re.split("['’]", found.group())[0]
        return change(word, text[found.end() :]) + found.group()[len(word) :]

    return _WORD.sub(replace, text)
