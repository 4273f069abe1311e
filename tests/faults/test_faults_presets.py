"""Presets that are none, in every way that a YAML file can be none: refused at once, with what is wrong, and no workspace is made."""

import time

import pytest
from faults_world import met, project_copy

from pipeline.params.presets import make_workspace

AREA = "presets"
FILES = {  # whole files
    "empty": b"",
    "a list": b"- task\n",
    "a number": b"7",
    "an open bracket": b"task: [",
    "a tab as indent": b"task:\n\ttemplate: x\n",
    "a key twice": b"task: {}\ntask: {}\n",
    "latin-1": "task: café".encode("latin-1"),
    "utf-16": "task: {}".encode("utf-16"),
    "NUL": b"task: \0",
    "control characters": b"task: \x07",
    "binary": bytes(range(256)) * 16,
    "an unknown alias": b"task: *nowhere\n",
    "an alias of itself": b"task: &a [*a]\n",
    "a mapping of itself": b"task: &a {template: *a}\n",
    "python object": b"task: !!python/object/apply:os.system ['echo ran > ran']\n",
    "python name": b"task: !!python/name:os.system\n",
    "an unknown tag": b"task: !Include /etc/passwd\n",
    "a deep list": b"task: " + b"[" * 50_000,
    "a deep mapping": b"task: " + b"{a: " * 50_000,
    "two documents": b"task: {}\n---\ntask: {}\n",
    "a date": b"2020-01-01",
    "keys that are no texts": b"1: {}\nnull: {}\n? [a, b]\n: c\n",
    "a merge of nothing": b"task:\n  <<: 3\n",
    "an integer of 5,000 digits": b"runtime: {threads: " + b"9" * 5000 + b"}\n",
    "a million characters": b"task: {template: '" + b"x" * 1_000_000 + b"'}\n",
    "only a comment": b"# nothing\n",
    "a directive": b"%YAML 9.9\n---\ntask: {}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_preset_that_is_none_is_refused_at_once(tmp_path, monkeypatch, name):
    project = project_copy(tmp_path)
    monkeypatch.chdir(project)
    (project / "presets" / "bad.yaml").write_bytes(FILES[name])
    start = time.process_time()
    met(AREA, lambda: make_workspace("bad", project), "bad.yaml")
    assert time.process_time() - start < 8
    assert not (project / "ran").exists()
    assert not (project / "runs").exists()


def test_a_preset_outside_the_folder_is_not_there(tmp_path):
    project = project_copy(tmp_path)
    for name in ("../params", "/etc/passwd", "", "..", "json.yaml", "a\0b"):
        met(AREA, lambda name=name: make_workspace(name, project), "choose one of")
