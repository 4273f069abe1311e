"""Whole files: what is not YAML, not a mapping, or a bomb is refused at once with the file's name; as params.yaml and as a preset."""

import time
from pathlib import Path

import pytest
from conftest import PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.params import load_params, read_yaml, write_yaml
from pipeline.params.presets import make_workspace

LINES = ["a: &a [x,x,x,x,x,x,x,x,x]"] + [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]" for n in range(12)]
FILES = {  # name → bytes, what is said of them
    "empty": (b"", "expected a mapping"),
    "only a comment": (b"# nothing\n", "expected a mapping"),
    "a list": (b"- task\n", "expected a mapping"),
    "a number": (b"7", "expected a mapping"),
    "a date": (b"2020-01-01", "expected a mapping"),
    "an open bracket": (b"task: [", "not valid YAML"),
    "a tab as indent": (b"task:\n\ttemplate: x\n", "not valid YAML"),
    "a key twice": (b"task: {}\ntask: {}\n", "not valid YAML"),
    "two documents": (b"task: {}\n---\ntask: {}\n", "not valid YAML"),
    "latin-1": ("task: café".encode("latin-1"), "not UTF-8 at byte 9"),
    "utf-16": ("task: {}".encode("utf-16"), "not UTF-8 at byte 0"),
    "NUL": (b"task: \0", "not valid YAML"),
    "control characters": (b"task: \x07", "not valid YAML"),
    "binary": (bytes(range(256)) * 16, "not UTF-8 at byte 128"),
    "an unknown alias": (b"task: *nowhere\n", "not valid YAML"),
    "python object": (b"task: !!python/object/apply:os.system ['echo ran > ran']\n", "not valid YAML"),
    "python name": (b"task: !!python/name:os.system\n", "not valid YAML"),
    "an unknown tag": (b"task: !Include /etc/passwd\n", "not valid YAML"),
    "a deep list": (b"task: " + b"[" * 50_000, "nested too deep"),
    "a deep mapping": (b"task: " + b"{a: " * 50_000, "nested too deep"),
    "a directive": (b"%YAML 9.9\n---\ntask: {}\n", "not valid YAML"),
    "a merge of nothing": (b"task:\n  <<: 3\n", "not valid YAML"),
    "an alias of itself": (b"task: &a [*a]\n", ""),
    "a mapping of itself": (b"task: &a {template: *a}\n", ""),
    "keys that are not texts": (b"1: {}\nnull: {}\n? [a, b]\n: c\n", ""),
    "an integer of 5,000 digits": (b"runtime: {threads: " + b"9" * 5000 + b"}\n", ""),
    "a million characters": (b"task: {template: '" + b"x" * 1_000_000 + b"'}\n", ""),
    "a bomb of aliases": ("\n".join(LINES).encode(), ""),
    "a bomb under a known key": ("\n  ".join(["task:", *LINES]).encode(), ""),
    "a bomb as a value": ("\n".join([*LINES, "runtime: {threads: *m}"]).encode(), ""),
}


def refused(action, named: str, said: str) -> str:
    start = time.process_time()
    with pytest.raises(UsageError) as error:
        action()
    assert time.process_time() - start < 8, "refused at once"
    message = str(error.value)
    assert named in message
    assert said in message
    assert len(message) < 20_000, "a message is for reading"
    return message


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_a_params_file_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, said = FILES[name]
    (tmp_path / "params.yaml").write_bytes(content)
    refused(lambda: load_params(Path("params.yaml")), "params.yaml", said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_a_preset_is_refused_and_makes_no_workspace(project, monkeypatch, name):
    monkeypatch.chdir(project)
    (project / "presets" / "bad.yaml").write_bytes(FILES[name][0])
    refused(lambda: make_workspace("bad", project), "bad.yaml", FILES[name][1])
    assert not (project / "ran").exists()
    assert not (project / "runs").exists()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300) | st.text(alphabet="a:[]{}&*!|>-#%@`\"'\n\t ,?<~1", max_size=80).map(str.encode))
def test_no_bytes_are_params_and_the_message_names_the_file(tmp_path, data):
    (tmp_path / "params.yaml").write_bytes(data)
    refused(lambda: load_params(tmp_path / "params.yaml"), "params.yaml", "")


TEXTS = st.sampled_from(["true", "1", "no", "null", "", "a: b", "# x", "- y", "?", "é 🎬", "x" * 300, "one two " * 40]) | st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(TEXTS, TEXTS | st.integers() | st.booleans() | st.none() | st.lists(TEXTS, max_size=3), max_size=4))
@pytest.mark.slow
def test_what_is_written_is_read_again(tmp_path, value):
    write_yaml({"task": value}, tmp_path / "params.yaml")
    assert read_yaml(tmp_path / "params.yaml") == {"task": value}


def test_an_absent_file_is_named(tmp_path):
    refused(lambda: load_params(tmp_path / "params.yaml"), "params.yaml", "no such file. Run from the project's folder.")


def test_exponents_without_a_dot_are_numbers_as_for_dvc(tmp_path):
    text = (PROJECT / "params.yaml").read_text(encoding="utf-8")
    assert "learning_rate: 2e-5" in text
    (tmp_path / "params.yaml").write_text(text.replace("learning_rate: 2e-5", "learning_rate: 3e-5"), encoding="utf-8")
    assert load_params(tmp_path / "params.yaml").tuned["tuned"].learning_rate == 3e-5
