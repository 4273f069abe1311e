"""A target set is the same wherever it lies."""

from student_world import TASK, make_world

from pipeline.models.loading import load_tokenizer
from pipeline.places import place, sha256_of, write_bytes
from pipeline.students.lessons import target_set, targets_fingerprint
from pipeline.task import TaskTokens


def test_a_target_set_at_a_url_is_that_of_a_folder(tmp_path, model_folder):
    world = make_world(tmp_path, model_folder("llama"))
    here, there = world.places.artifacts / "targets" / "mix", place("memory://bucket/targets/mix")
    for file in here.iterdir():
        write_bytes(file.read_bytes(), there / file.name)
    tokens, transfer = TaskTokens(TASK, load_tokenizer(world.base)), world.places.artifacts / "data" / "transfer.parquet"
    assert target_set(there, transfer, tokens) == target_set(here, transfer, tokens)
    assert targets_fingerprint(there) == targets_fingerprint(here)
    assert sha256_of(there / "targets.parquet") == sha256_of(here / "targets.parquet")
