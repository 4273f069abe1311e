"""Files that should be params and are none, bombs among them: refused at once, with what is wrong."""

import time

import pytest
from faults_world import LARGER, met
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults_presets import FILES

from pipeline.params import load_params

AREA = "params.yaml as a file"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12))
BOMBS = {
    "a bomb of aliases": BOMB.encode(),
    "a bomb under a known key": ("task:\n" + "".join("  " + line + "\n" for line in BOMB.splitlines())).encode(),
    "a bomb as a value": (BOMB + "runtime: {threads: *m}\n").encode(),
}


@pytest.mark.parametrize("name", [*FILES, *BOMBS])
def test_a_file_that_is_no_params_file_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "params.yaml"
    file.write_bytes((FILES | BOMBS)[name])
    start = time.process_time()
    met(AREA, lambda: load_params(file), "params.yaml")
    assert time.process_time() - start < 5
    assert not (tmp_path / "ran").exists()


@settings(max_examples=60 * LARGER, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300) | st.text(alphabet="a:[]{}&*!|>-#%@`\"'\n\t ,?<~1", max_size=80).map(str.encode))
def test_any_bytes_as_a_file_are_named(tmp_path, data):
    file = tmp_path / "params.yaml"
    file.write_bytes(data)
    met(AREA, lambda: load_params(file), "params.yaml")
