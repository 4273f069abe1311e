"""jinja2 as the page and the model cards use it: undefined names are errors, and what comes from data or params is escaped."""

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def make_environment(*, autoescape: bool) -> Environment:
    """jinja2 with this project's templates; an undefined name is an error. `code` sets names in backticks as code."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=autoescape,  # noqa: S701 - the page escapes; a card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment


def _code(text: str) -> Markup:
    """Escaped text whose `names` are code elements and whose numbers keep their sign of percent and their ranges in one line."""
    whole = re.sub(r"(?<=\d)–(?=[\d−])", "\u2060–\u2060", text.replace(" %", "\u00a0%"))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(whole))))  # noqa: S704 - escaped above
