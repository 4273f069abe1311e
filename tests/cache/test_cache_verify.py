"""`shotless verify`: every kind of damage is found and named, and repaired from the store to the bytes there were, without the model."""

import json
import shutil

import pyarrow as pa
import pytest
from score_rows import ENGINE, IDENTITY, about, bytes_of, flip, stored

from pipeline.cache.folder import write_cache
from pipeline.cache.store import Store
from pipeline.commands.project import verify
from pipeline.errors import CorruptError, MismatchError, ShotlessError, UsageError
from pipeline.params import load_params
from pipeline.schema import SCORES, STORED, Context, Example, read_contexts, read_examples, write_contexts, write_examples
from pipeline.task import Task, TaskTokens

TEACHER = "few_shot"
CONTEXTS = [
    Context("orders/0", demonstrations=(({"text": "a warm film"}, "positive"),)),
    Context("orders/1", demonstrations=(({"text": "bored"}, "negative"),)),
]


class Project:
    """The shipped params with a teacher's cache of 2 contexts × (1 input without content + 11 examples), in shards of 8 rows."""

    def __init__(self, folder, tokenizer, raw_params):
        self.folder, self.raw = folder, raw_params
        self.raw["teachers"][TEACHER]["cache"] = {"top_k": 4}
        self.cache = folder / "artifacts" / "teachers" / TEACHER
        self.write_params()
        self.model = folder / "artifacts" / self.raw["teachers"][TEACHER]["model"]
        self.tokenizer = tokenizer
        tokenizer.save_pretrained(self.model)
        (self.model / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
        write_contexts(CONTEXTS, folder / "artifacts" / "data" / "contexts" / f"{self.raw['teachers'][TEACHER]['contexts']}.parquet")
        self.write_transfer(11)
        self.store = Store(folder / "work", IDENTITY)
        self.capture()

    def write_params(self):
        (self.folder / "params.yaml").write_text(json.dumps(self.raw), "utf-8")

    def write_transfer(self, count):
        examples = [Example({"text": f"text number {n} " + "good " * (n % 7)}, source="s", line=n) for n in range(1, count + 1)]
        write_examples(examples, ["text"], self.folder / "artifacts" / "data" / "transfer.parquet")

    def capture(self):
        """What the teacher's stage does, with made-up scores."""
        params = load_params(self.folder / "params.yaml")
        task = Task(params.task)
        data = self.folder / "artifacts" / "data"
        contexts = read_contexts(data / "contexts" / f"{params.teachers[TEACHER].contexts}.parquet")
        free = [Example(dict.fromkeys(task.fields, text)) for text in task.params.content_free]
        examples, tokens = [*free, *read_examples(data / "transfer.parquet", task.fields)], TaskTokens(task, self.tokenizer)
        ids = [(context.context_id, example.example_id) for context in contexts for example in examples]
        prompts = [prompt.prompt_sha for context in contexts for prompt in tokens.prompts(context, examples)]
        with self.store.lock():
            for start in range(0, len(prompts), 5):
                own = prompts[start : start + 5]
                self.store.write(stored(own, own), 1.0, ENGINE)
        found = self.store.read(prompts)
        columns = {"context_id": [one for one, _ in ids], "example_id": [other for _, other in ids]}
        table = pa.table({**columns, **{name: found[name] for name in STORED.names}}, schema=SCORES)
        listed = [{"context_id": context.context_id, "name": context.name, "tokens": 1} for context in contexts]
        model = self.raw["teachers"][TEACHER]["model"]
        write_cache(self.cache, [table], about(model=model, contexts=listed, content_free=[e.example_id for e in free]))


@pytest.fixture
def project(tmp_path, tokenizer, raw_params, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / "work"))
    monkeypatch.setattr("pipeline.cache.folder.MOST_ROWS", 8)
    monkeypatch.setattr("pipeline.models.folders.load_model", None)
    return Project(tmp_path, tokenizer, raw_params)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def swap(folder):
    one, other = folder / "part-00000.parquet", folder / "part-00001.parquet"
    kept = one.read_bytes()
    shutil.copy(other, one)
    other.write_bytes(kept)


SHARD_DAMAGE = {
    "bit flipped": (lambda folder: flip(folder / "part-00001.parquet"), "part-00001.parquet: sha256 "),
    "truncated": (lambda folder: truncate(folder / "part-00001.parquet"), " bytes instead of "),
    "empty": (lambda folder: (folder / "part-00002.parquet").write_bytes(b""), ", 0 bytes instead of "),
    "missing": (lambda folder: (folder / "part-00000.parquet").unlink(), "part-00000.parquet: missing"),
    "swapped": (swap, "part-00000.parquet: sha256 "),
}


def test_a_cache_in_order_passes_and_nothing_is_changed(project, capsys):
    before, parts = bytes_of(project.cache), bytes_of(project.store.folder)
    verify([TEACHER])
    assert (
        f"few_shot: 24 rows, {sum(len(b) for n, b in before.items() if n != 'manifest.json'):,} bytes, all intact"
        in capsys.readouterr().out
    )
    assert (bytes_of(project.cache), bytes_of(project.store.folder)) == (before, parts)


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damage_is_found_and_repaired_to_the_same_bytes_without_the_model(project, capsys, damage):
    before = bytes_of(project.cache)
    harm, message = SHARD_DAMAGE[damage]
    harm(project.cache)
    with pytest.raises(CorruptError, match=r"damaged: few_shot\. `shotless verify --repair`"):
        verify([TEACHER])
    assert message in capsys.readouterr().out
    verify([TEACHER], repair=True)
    assert "written again, with the bytes that the manifest says: part-0000" in capsys.readouterr().out
    assert bytes_of(project.cache) == before


def test_without_the_rows_in_the_store_the_next_step_is_named(project):
    shutil.rmtree(project.folder / "work")
    flip(project.cache / "part-00001.parquet")
    with pytest.raises(
        ShotlessError, match=r"8 of 8 rows are not here.*`dvc checkout`, or `dvc repro --force --single-item teacher@few_shot`"
    ):
        verify([TEACHER], repair=True)


def test_rows_that_were_scored_otherwise_since_are_not_put_under_the_old_hash(project):
    flip(project.cache / "part-00001.parquet")
    damaged = bytes_of(project.cache)
    shutil.rmtree(project.folder / "work")
    prompts = [key for name in ("part-00000.parquet", "part-00002.parquet") for key in prompts_of(project, name)]
    other = Store(project.folder / "work", IDENTITY)
    with other.lock():
        together = [*prompts, *lost_prompts(project)]  # one batch
        other.write(stored(together, together), 1.0, ENGINE)
    with pytest.raises(ShotlessError, match="the store's rows are not those that its manifest has the hash of"):
        verify([TEACHER], repair=True)
    assert bytes_of(project.cache) == damaged


def prompts_of(project, name):
    import pyarrow.parquet as pq

    return pq.read_table(project.cache / name, columns=["prompt_sha"])["prompt_sha"].to_pylist()


def lost_prompts(project):
    """The prompts of the second shard, from the data."""
    tokens = TaskTokens(Task(load_params().task), project.tokenizer)
    examples = [Example({"text": "N/A"}), *read_examples(project.folder / "artifacts" / "data" / "transfer.parquet", ["text"])]
    return [prompt.prompt_sha for context in CONTEXTS for prompt in tokens.prompts(context, examples)][8:16]


def test_data_that_changed_since_are_not_those_of_the_shard(project):
    flip(project.cache / "part-00001.parquet")
    project.write_transfer(12)
    with pytest.raises(MismatchError, match="24 rows, and this run's data ask for 26"):
        verify([TEACHER], repair=True)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_damaged_or_missing_manifest_is_found_and_the_next_step_is_named(project, capsys, text):
    manifest = project.cache / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    for repair in (False, True):
        with pytest.raises(CorruptError, match="damaged: few_shot"):
            verify([TEACHER], repair=repair)
        assert "manifest.json: " in capsys.readouterr().out


def test_files_that_the_manifest_does_not_list_are_named(project, capsys):
    (project.cache / "part-00009.parquet").write_bytes(b"x")
    with pytest.raises(CorruptError):
        verify([TEACHER])
    assert "part-00009.parquet: its manifest does not list it" in capsys.readouterr().out


def test_a_damaged_part_of_the_store_is_found_and_set_aside(project, capsys):
    part = sorted(project.store.folder.glob("part-*.parquet"))[2]
    flip(part, 0.1)
    with pytest.raises(CorruptError, match="damaged: the store"):
        verify([TEACHER])
    assert part.name in capsys.readouterr().out
    verify([TEACHER], repair=True)
    assert not part.exists()
    assert Store(project.folder / "work", IDENTITY).faults() == {}


@pytest.mark.parametrize(
    ("block", "change", "named"),
    [
        ("task", {"template": "{text} It was"}, "task.template: 'Review: {text}"),
        ("teachers", {TEACHER: {"model": "models/smollm2", "contexts": "orders", "cache": {"top_k": 5}}}, "cache.top_k: 4, this run has 5"),
    ],
)
def test_a_cache_of_other_params_is_refused_with_what_differs(project, capsys, block, change, named):
    project.raw[block] |= change
    project.write_params()
    with pytest.raises(MismatchError, match=r"not of this run's params: few_shot\. `dvc repro`"):
        verify([TEACHER])
    assert named in capsys.readouterr().out


def test_bytes_are_checked_if_neither_model_nor_data_are_here(project, capsys):
    shutil.rmtree(project.model)
    shutil.rmtree(project.folder / "artifacts" / "data")
    verify([TEACHER])
    assert "24 rows" in capsys.readouterr().out


def test_a_cache_at_a_url_is_checked(project, capsys):
    verify([f"file://{project.cache}"])
    flip(project.cache / "part-00000.parquet")
    with pytest.raises(CorruptError, match=f"damaged: file://{project.cache}"):
        verify([f"file://{project.cache}"])
    assert "part-00000.parquet: sha256" in capsys.readouterr().out


def test_a_teacher_that_params_do_not_have_is_named_with_the_choices(project):
    with pytest.raises(UsageError, match="few_shot"):
        verify(["nope"])
