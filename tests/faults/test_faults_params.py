"""Bad values in params: every one is refused with its place, whatever it is."""

import copy
from typing import Any

import pytest
from faults_world import LARGER, met
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.params import parse_params

AREA = "values in params.yaml"
NAUGHTY: list[Any] = [
    "",
    " ",
    "\0",
    "../..",
    "{",
    "}" * 9,
    "\ud800",
    -1,
    10**400,
    float("nan"),
    float("inf"),
    [],
    {},
    None,
    True,
    b"x",
    [[[]]],
]
"""Values that a key may meet by mistake or by malice."""
PLACES = {
    "task.template": "task",
    "task.verbalisers": "verbalisers",
    "task.separator": "task.separator",
    "models.smollm2": "models.smollm2",
    "models.smollm2.package": "package",
    "models.smollm2.sha256": "sha256",
    "models.smollm2.member": "member",
    "data.sources.movie.format": "format",
    "data.demonstrations.per_label": "per_label",
    "data.transfer.source": "transfer",
    "contexts.orders.count": "contexts",
    "teachers.few_shot.model": "teachers",
    "teachers.few_shot.cache": "teachers.few_shot",
    "targets.mix.temperature": "targets.mix",
    "students.cd.learning_rate": "learning_rate",
    "students.cd.steps": "steps",
    "evaluation.bootstrap": "bootstrap",
    "runtime.threads": "threads",
}
WRONG = [  # a value for a key, and what the message has to name
    ("task.template", "no field", "template"),
    ("task.template", "{text", "template"),
    ("task.template", "{text.__class__}", "not a plain field name"),
    ("task.template", "{text[0]}", "not a plain field name"),
    ("task.template", "{text:>1000000000}", "not a plain field name"),
    ("task.template", "{}", "not a plain field name"),
    ("task.verbalisers", {"one": " x"}, "two or more"),
    ("task.max_chars", 0, "task.max_chars"),
    ("task.max_chars", "2000", "task.max_chars"),
    ("models.smollm2.member", ["../../etc/passwd"], "leaves the folder"),
    ("models.smollm2.member", ["/etc/passwd"], "leaves the folder"),
    ("models.smollm2.member", ["a/../../b"], "leaves the folder"),
    ("models.smollm2.package", "x; rm -rf /", "package"),
    ("models.smollm2.package", "x --index-url=elsewhere", "package"),
    ("models.smollm2.version", "1 --pre", "version"),
    ("models.smollm2.sha256", "ABC", "sha256"),
    ("models.smollm2.source", "ftp", "choose one of"),
    ("models.smollm2", {"source": "hub", "repo": "a/b", "revision": "main", "licence": "x"}, "is not a commit"),
    ("data.sources.movie.format", "pickle", "format"),
    ("data.sources.movie.format", "xlsx", "format"),
    ("data.demonstrations.source", "nowhere", "nowhere"),
    ("data.transfer.source", "nowhere", "nowhere"),
    ("contexts.orders.tokenizer", "models/none", "none"),
    ("teachers.few_shot.model", "../secrets", "secrets"),
    ("teachers.few_shot.contexts", "nowhere", "nowhere"),
    ("targets.mix.teachers", {}, "targets.mix"),
    ("targets.mix.teachers", {"few_shot": -1.0}, "targets.mix"),
    ("targets.mix.temperature", 0, "temperature"),
    ("students.cd.learn_from", "targets/none", "none"),
    ("students.cd.learn_from", "../../etc", "learn_from"),
    ("students.cd.learning_rate", -1e-5, "learning_rate"),
    ("students.cd.steps", 1.5, "steps"),
    ("students.cd.decay", "cosin", "decay"),
    ("baselines.icl.contexts", "all", "contexts"),
    ("baselines.icl.prompts", "targets/none", "none"),
    ("runtime.threads", 0, "threads"),
    ("runtime.treads", 1, "unknown key"),
    ("__proto__", {}, "unknown key"),
    ("students.Cd", {}, "as DVC stages need"),
    ("students.a/../b", {}, "as DVC stages need"),
]


def put(raw: Any, path: str, value: Any) -> Any:
    *parents, last = path.split(".")
    entry = raw
    for key in parents:
        entry = entry.setdefault(key, {})
    entry[last] = value
    return raw


@pytest.mark.parametrize(("path", "value", "named"), WRONG)
def test_a_wrong_value_is_named(raw_params, path, value, named):
    met(AREA, lambda: parse_params(put(raw_params, path, value)), named)


@pytest.mark.parametrize("place", PLACES)
def test_a_naughty_value_anywhere_is_named_or_fits(raw_params, place):
    for value in NAUGHTY:
        met(AREA, lambda value=value: parse_params(put(copy.deepcopy(raw_params), place, value)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(sorted(PLACES)), value=VALUES)
def test_any_value_in_any_place_is_named_or_fits(raw_params, place, value):
    met(AREA, lambda: parse_params(put(copy.deepcopy(raw_params), place, value)))
