"""`shotless init`: params for a user's own files that a run takes. What does not fit is chosen smaller or refused."""

import io
import json
import re
import shutil
import sys
from collections import Counter

import polars as pl
import pytest
from conftest import PROJECT
from serving_world import shotless

from pipeline.data.examples import write_source
from pipeline.data.prepare import prepare
from pipeline.files import Folders
from pipeline.params import TaskParams, load_params, read_yaml, resolve, write_yaml
from pipeline.schema import Context, Example, read_examples
from pipeline.setup import format_choice
from pipeline.setup.estimate import stage_count, token_work
from pipeline.setup.new_task import Answers, guess_label, guess_text, new_task, read_columns
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

OPTIONS = ["--labelled", "mine/labelled.csv", "--unlabelled", "mine/pile.jsonl", "--test", "mine/test.parquet"]
MAPPED = [*OPTIONS, "--field", "text=body", "--label-column", "urgency", "--verbaliser", "0=bad", "--verbaliser", "1=good"]
FILES = ["--labelled", "mine/l.jsonl", "--unlabelled", "mine/u.jsonl", "--test", "mine/t.jsonl", "--output", "new.yaml"]
WORDS = ["amber", "brook", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "lagoon", "meadow", "nectar"]


def sentence(number, words=12):
    """A text of its own: no two are near copies."""
    return " ".join(WORDS[(number * 7 + n * (number + 3)) % len(WORDS)] + str(number * n) for n in range(words))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folder(tmp_path):
    """A project's folder with a user's files: texts in `body`, labels 0 and 1 in `urgency`."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(PROJECT / name, tmp_path)
    rows = [{"body": sentence(n), "urgency": n % 2} for n in range(60)]
    pl.DataFrame(rows[:40]).write_csv(mine / "labelled.csv")
    pl.DataFrame(rows[40:]).write_parquet(mine / "test.parquet")
    write_rows(mine / "pile.jsonl", [{"body": sentence(100 + n)} for n in range(30)])
    return tmp_path


def three(folder, label=lambda n: ["no", "yes"][n % 2], text=sentence, long=sentence):
    """The files of FILES; `long` makes every 16th text of the pile."""
    write_rows(folder / "mine" / "l.jsonl", [{"text": text(n), "label": label(n)} for n in range(40)])
    write_rows(folder / "mine" / "t.jsonl", [{"text": text(100 + n), "label": label(n)} for n in range(40)])
    write_rows(folder / "mine" / "u.jsonl", [{"text": (sentence if n % 16 else long)(200 + n)} for n in range(100)])


def small_students(folder):
    """Students of the models in these tests, which have 4 layers."""
    raw = read_yaml(folder / "params.yaml")
    for student in raw["students"].values():
        student |= {"layers": "0-1, 3"} if "layers" in student else {}
    write_yaml(raw, folder / "params.yaml")


def prepares(folder, model, monkeypatch, params="new.yaml"):
    """Whether the stages source and prepare take what was written, with a small model in place of the downloaded one."""
    raw = read_yaml(folder / params)
    raw["models"] = {name: {"path": str(model)} for name in raw["models"]}
    raw["downloads"] = {}
    write_yaml(raw, folder / "params.yaml")
    monkeypatch.chdir(folder)
    resolve()
    checked = load_params()
    for name in checked.models:
        shutil.copytree(model, folder / "artifacts" / "models" / name, dirs_exist_ok=True)
    for name in checked.data.sources:
        write_source(name, checked, Folders.here())
    prepare(checked, Folders.here())
    return checked


def test_what_is_written_is_taken_and_names_the_users_files(folder, model_folder, monkeypatch):
    done = shotless(folder, "init", *MAPPED, "--force", "--template", r"Ticket: {text}\nUrgent:", "--per-label", "4")
    params = load_params(folder / "params.yaml")
    assert params.task.template == "Ticket: {text}\nUrgent:"
    assert params.task.verbalisers == {"0": " bad", "1": " good"}
    assert params.data.sources["unlabelled"].label is None
    assert params.data.sources["labelled"].fields == {"text": "body"}
    assert params.contexts["orders"].demonstrations == 8
    assert "labelled.csv: 40 rows, 40 texts, 0 bad" in done.stdout
    assert "artifacts/models/smollm2 does not exist yet" in done.stdout
    assert (folder / "params.yaml.old").read_text("utf-8") == (PROJECT / "params.yaml").read_text("utf-8")
    old = load_params(PROJECT / "params.yaml")
    for block in ("models", "teachers", "targets", "students", "baselines", "tuned", "evaluation"):
        assert getattr(params, block) == getattr(old, block), block
    assert set(params.downloads) == {"smollm2", "minilm"}, "the old task's data are not downloaded"
    written = (folder / "params.yaml").read_text("utf-8")
    assert "docs/params.md" in written
    assert "&id" not in written, "people read it: no anchors"
    prepares(folder, model_folder("llama", max_position_embeddings=2048), monkeypatch, "params.yaml")


def test_fewer_of_a_label_are_drawn_if_its_texts_are_those_of_the_test(folder):
    three(folder, label=lambda n: "rare" if n % 5 == 0 else "usual")
    tested = [{"text": sentence(n), "label": "rare"} for n in range(0, 25, 5)]  # 5 of the 8 rare labelled texts
    write_rows(folder / "mine" / "t.jsonl", tested + [{"text": sentence(100 + n), "label": "usual"} for n in range(20)])
    done = shotless(folder, "init", *FILES)
    drawn = load_params(folder / "new.yaml").data.demonstrations
    assert (drawn.per_label, drawn.most_per_label) == (3, 32)
    assert "5 labelled rows are not used: copies of each other or of the test's texts, and bad rows" in done.stdout
    asked = shotless(folder, "init", *FILES, "--force", "--per-label", "8", check=False)
    assert "8 examples of label 'rare' wanted, 3 found" in asked.stderr


def test_students_of_a_round_are_left_out_of_a_task_without_a_pool(folder):
    raw = read_yaml(folder / "params.yaml")
    raw["data"]["pool"], raw["rounds"] = {"source": "movie"} | {"limit": 30}, {"second": {"student": "cd"}}
    raw["students"]["small"] = raw["students"]["encoder"] | {"learn_from": "rounds/second"}
    write_yaml(raw, folder / "params.yaml")
    done = shotless(folder, "init", *MAPPED, "--output", "new.yaml")
    assert "students.small: left out, since it learns from a round of more texts, and here is no pool of them" in done.stdout
    params = load_params(folder / "new.yaml")
    assert (set(params.students), params.rounds, params.data.pool) == ({"cd", "encoder"}, {}, None)


def test_servers_and_a_limit_of_milliseconds_stay(folder):
    raw = read_yaml(folder / "params.yaml")
    raw["servers"], raw["select"] = {"big": {"url": "http://127.0.0.1:8000/v1", "model": "m"}}, {"within_ms": 20.0}
    raw["teachers"]["few_shot"]["model"] = "servers/big"
    write_yaml(raw, folder / "params.yaml")
    shotless(folder, "init", *MAPPED, "--force")
    params = load_params(folder / "params.yaml")
    assert (set(params.servers), params.select.within_ms) == ({"big"}, 20.0)


@pytest.mark.slow
def test_it_says_what_a_run_will_cost_if_the_model_is_there(folder, model_folder):
    shutil.copytree(model_folder("llama", max_position_embeddings=2048), folder / "artifacts" / "models" / "smollm2")
    done = shotless(folder, "init", *MAPPED, "--output", "other.yaml", check=False)
    assert "layers: '0-19, 26-29' must name layers between 0 and 3" in done.stderr, "the students do not suit this model"
    assert not (folder / "other.yaml").exists()
    small_students(folder)
    done = shotless(folder, "init", *MAPPED, "--output", "other.yaml")
    assert "smollm2 on 20 rows" in done.stdout
    assert "A full run takes about" in done.stdout
    assert "GB of memory" in done.stdout


@pytest.mark.parametrize(("right", "chosen"), [((9, 12), "chat turns"), ((12, 12), "plain text"), ((12, 9), "plain text")])
def test_it_takes_the_format_in_which_the_model_answers_more_right(folder, model_folder, monkeypatch, right, chosen):
    """Ties go to plain text. The counts are set here; another test counts them."""
    shutil.copytree(model_folder("llama", max_position_embeddings=2048), own := folder / "artifacts" / "models" / "smollm2")
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|end|>' }}{% endfor %}"
    (own / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}assistant: {% endif %}", encoding="utf-8")
    small_students(folder)
    monkeypatch.chdir(folder)
    asked = []

    def counted(model, task, context, examples, threads):
        asked.append((model, context, examples))
        return {"plain": (0, right[0]), "chat": (30, right[1])}

    monkeypatch.setattr(format_choice, "right_answers", counted)
    three(folder)
    files = [folder / "mine" / name for name in ("l.jsonl", "u.jsonl", "t.jsonl")]
    raw, notes = new_task(read_yaml(folder / "params.yaml"), Answers(*files, "Text: {text}\nLabel:", {}, {}, "label"))
    (model, context, examples), name = asked[0], "orders"
    assert (len(asked), str(model)) == (1, "artifacts/models/smollm2")
    shown = {fields["text"] for fields, _ in context.demonstrations}
    assert 8 <= len(examples) <= 32
    assert shown.isdisjoint(example.fields["text"] for example in examples)
    assert [example.label for example in examples[:4]] == ["no", "yes"] * 2
    assert raw["contexts"][name].get("format", "plain") == ("chat" if chosen == "chat turns" else "plain")
    assert (
        f"contexts.orders: {chosen}; of {len(examples)} labelled examples behind {len(shown)} others smollm2 answers "
        f"{right[0]} right in plain text, "
        f"{right[1]} in chat turns" in notes
    )
    assert ("user: Text: " in "\n".join(notes)) == (chosen == "chat turns")


@pytest.mark.slow
def test_right_answers_are_counted_in_both_formats(folder, model_folder):
    model = folder / "model"
    shutil.copytree(model_folder("llama"), model)
    template = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|end|>' }}{% endfor %}assistant: "
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    task = TaskParams(template="Text: {text}\nLabel:", verbalisers={"no": " no", "yes": " yes"})
    examples = [Example({"text": sentence(n)}, ["no", "yes"][n % 2]) for n in range(9)]
    context = Context("few", "", (({"text": "x"}, "no"),))
    found = format_choice.right_answers(model, task, context, examples, 1)
    for form in ("plain", "chat"):
        scores = Scorer(model, Task(task, form), work=None, threads=1).label_scores([context], examples, "t")[0]
        odds = scores[:, 1] - scores[:, 0]  # of "yes"
        gold = [example.label == "yes" for example in examples]
        assert found[form] == (sum((odds > 0) == gold), sum((odds > odds.mean()) == gold))


def test_nothing_is_replaced_unless_told(folder):
    before = (folder / "params.yaml").read_text("utf-8")
    done = shotless(folder, "init", *MAPPED, check=False)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (folder / "params.yaml").read_text("utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (OPTIONS, "no column 'label'; the columns are: body, urgency. Name the right one with --label-column."),
        ([*OPTIONS, *MAPPED[8:]], "no column 'text'; the columns are: body, urgency. Name the right one with --field text=COLUMN."),
        (MAPPED[:-2], "label '1' is not a word: say what a model should answer for each of them, for example: --verbaliser 1=yes"),
        ([*MAPPED[:-1], "1=bad"], "verbalisers: '0' and '1' are both ' bad', so no answer tells them apart; change one"),
        ([*MAPPED, "--verbaliser", "2=maybe"], "--verbaliser 2=…: no such label"),
        ([*MAPPED, "--template", "no field"], "template names no field"),
        ([*MAPPED, "--per-label", "30"], "--per-label"),
        ([*MAPPED[:-6], "--label-column", "body"], "column 'body' has 40 different values in 40 rows, and a task has 2"),
        (
            ["--labelled", "mine/pile.jsonl", *OPTIONS[2:]],
            "no column 'label'; the columns are: body. Name the right one with --label-column.",
        ),
        (MAPPED[2:], "--labelled: missing"),
        (["--labelled", "mine/nope.csv", *MAPPED[2:]], "nope.csv: no such file"),
        (["--labelled", "mine/pile.txt", *MAPPED[2:]], "mine/pile.txt: a file's name ends with one of .csv, .json"),
        (["--labelled", "mine/labelled.csv", "--unlabelled", "mine/labelled.csv", *MAPPED[4:]], "of its 40 rows: 40 in demonstrations"),
        (["--labelled", "mine/labelled.csv", "--unlabelled", "mine/labelled.csv", *MAPPED[4:], "--per-label", "8"], None),
        ([*MAPPED[:4], "--test", "mine/labelled.csv", *MAPPED[6:]], "data.demonstrations"),
    ],
)
def test_what_cannot_work_is_named_and_writes_nothing(folder, arguments, said):
    (folder / "mine" / "pile.txt").write_text("a\n", "utf-8")
    done = shotless(folder, "init", *arguments, "--output", "new.yaml", check=False)
    if said is None:
        assert done.returncode == 0
        return
    assert done.returncode == 2
    assert said in done.stderr
    assert not (folder / "new.yaml").exists()


def test_bad_rows_beyond_the_limit_stop_it(folder):
    with (folder / "mine" / "pile.jsonl").open("a", encoding="utf-8") as file:
        file.write("not json\n" * 20)
    done = shotless(folder, "init", *MAPPED, "--output", "new.yaml", check=False)
    assert done.returncode == 2
    assert "20 of 50 rows of pile.jsonl cannot be used" in done.stderr
    assert not (folder / "new.yaml").exists()


def test_asking_again_keeps_the_first_params_and_bad_rows_are_shown(folder):
    with (folder / "mine" / "labelled.csv").open("a", encoding="utf-8") as file:
        file.write("".join(f"{sentence(300 + n)},1\n" for n in range(21)) + ",1\n")
    for _ in range(2):
        done = shotless(folder, "init", *MAPPED, "--force")
        assert "labelled.csv: 62 rows, 61 texts, 1 bad\n  line 2: text 'amber0 " in done.stdout
        assert "\n  line 63: left out, body: empty\n" in done.stdout
        assert (folder / "params.yaml.old").read_text("utf-8") == (PROJECT / "params.yaml").read_text("utf-8")


@pytest.mark.slow
def test_a_few_texts_too_long_for_the_model_are_counted_and_cut(folder, model_folder, monkeypatch):
    model = model_folder("llama", max_position_embeddings=1024)
    shutil.copytree(model, folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, long=lambda n: sentence(n, words=600))
    done = shotless(folder, "init", *FILES)
    assert "u.jsonl: 7 texts do not fit behind a context, and are cut there (task.long_texts)" in done.stdout
    prepares(folder, model, monkeypatch)
    counts = json.loads((folder / "metrics" / "prepare.json").read_text("utf-8"))
    assert counts["sources"]["unlabelled"]["quarantined"] == {}
    assert counts["cut"]["smollm2"] == {"transfer": 7}


LONG = {  # words of a text (5 to 6 tokens each here), what the model takes, most demonstrations
    "900 to 1,200 characters": (lambda n: 130 + n, 2048, 0),
    "one of each label": (lambda n: 60, 2048, 2),
    "a few long ones": (lambda n: 20 if n % 8 else 160, 2048, 6),
    "more than half of the model": (lambda n: 100 + n % 5, 1024, 0),
    "longer than the model": (lambda n: 100, 256, 0),
    "of every length": (lambda n: 1 + 3 * n % 120, 1024, 4),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.slow
def test_it_never_stops_because_texts_are_long_and_a_run_takes_what_it_writes(folder, model_folder, monkeypatch, name):
    words, limit, most = LONG[name]
    model = model_folder("llama", max_position_embeddings=limit)
    shutil.copytree(model, folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, text=lambda n: sentence(n, words(n % 40)))
    said = shotless(folder, "init", *FILES).stdout
    demonstrations = prepares(folder, model, monkeypatch).contexts["orders"].demonstrations
    assert demonstrations <= most
    assert f"contexts: at most {demonstrations} demonstrations" in said
    assert ("as many as fit beside an input" in said) == (demonstrations < 16)


@pytest.mark.parametrize(("limit", "demonstrations"), [(1024, 2), (2048, 4), (16384, 16)])
@pytest.mark.slow
def test_as_many_demonstrations_as_fit_the_model(folder, model_folder, monkeypatch, limit, demonstrations):
    model = model_folder("llama", max_position_embeddings=limit)
    shutil.copytree(model, folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, text=lambda n: sentence(n, words=25))
    shotless(folder, "init", *FILES)
    params = prepares(folder, model, monkeypatch)
    assert 2 <= params.contexts["orders"].demonstrations <= demonstrations
    assert params.contexts["none"].demonstrations == 0


def test_an_encoder_that_is_not_there_yet_takes_no_room_from_demonstrations(folder, model_folder):
    """Of a model that is not there 8,192 tokens are assumed, half of them for a context; 16 of these texts need more."""
    shutil.copytree(model_folder("llama", max_position_embeddings=32768), folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, text=lambda n: sentence(n, words=60))
    assert "contexts: at most 16 demonstrations;" in shotless(folder, "init", *FILES, "--dry-run").stdout


@pytest.mark.slow
def test_long_demonstrations_are_left_to_shorter_ones(folder, model_folder, monkeypatch):
    model = model_folder("llama", max_position_embeddings=2048)
    shutil.copytree(model, folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, text=lambda n: sentence(n, words=4 if n % 3 else 40))
    done = shotless(folder, "init", *FILES, "--per-label", "4")
    params = prepares(folder, model, monkeypatch)
    assert params.data.demonstrations.max_words == 4
    assert "data.demonstrations.max_words: 4, so that demonstrations fit" in done.stdout
    assert params.contexts["orders"].demonstrations == 8


INTENTS = [f"{word}_topic_{n}" for n in range(6) for word in WORDS][:77]


def intents(folder):
    """The files of FILES, with 77 labels."""
    for name, start in (("l", 0), ("t", 400)):
        rows = [{"text": sentence(start + n, 6), "label": INTENTS[n % 77].title()} for n in range(77 * 2)]
        write_rows(folder / "mine" / f"{name}.jsonl", rows)
    write_rows(folder / "mine" / "u.jsonl", [{"text": sentence(1000 + n)} for n in range(60)])


def test_decoders_are_left_out_of_a_task_with_many_labels(folder, encoder_folder, monkeypatch):
    intents(folder)
    said = shotless(folder, "init", *FILES).stdout
    assert "teachers.few_shot, teachers.zero_shot, teachers.tuned, students.cd: left out, since decoders read 77 labels" in said
    assert "tuned.contrast.steps: 0, since" in said
    params = prepares(folder, encoder_folder(), monkeypatch)
    made = {
        block: list(getattr(params, block)) for block in ("models", "tuned", "teachers", "contexts", "targets", "students", "baselines")
    }
    assert made == {
        "models": ["minilm"],
        "tuned": ["contrast"],
        "teachers": ["contrast"],
        "contexts": ["none"],
        "targets": ["mix", "contrast"],
        "students": ["encoder"],
        "baselines": ["setfit", "teacher"],
    }
    assert (list(params.targets["mix"].teachers), params.tuned["contrast"].steps) == (["contrast"], 0)
    assert params.students["encoder"].steps == 400


def test_decoders_stay_if_there_is_no_encoder_to_do_their_work(folder):
    intents(folder)
    raw = read_yaml(folder / "params.yaml")
    del raw["students"]["encoder"]
    write_yaml(raw, folder / "params.yaml")
    assert "left out" not in shotless(folder, "init", *FILES).stdout
    assert set(load_params(folder / "new.yaml").teachers) == set(raw["teachers"])


@pytest.mark.slow
def test_77_labels_are_shown_by_several_contexts_between_them(folder, model_folder, monkeypatch):
    intents(folder)
    said = shotless(folder, "init", *FILES, "--all-teachers").stdout
    assert "and 65 more" in said
    assert "contexts: at most 16 demonstrations, which show the 77 labels between them" in said
    params = prepares(folder, model_folder("llama", max_position_embeddings=4096), monkeypatch)
    assert params.task.verbalisers == {label.title(): f" {label.replace('_', ' ')}" for label in INTENTS}
    assert (params.contexts["orders"].demonstrations, params.contexts["orders"].count) == (16, 5)
    assert shotless(folder, "check").stdout.startswith("params.yaml is in order")


def test_two_demonstrations_have_two_orders(folder):
    three(folder)
    raw = read_yaml(folder / "params.yaml")
    raw["contexts"]["orders"]["count"] = 8
    write_yaml(raw, folder / "params.yaml")
    shotless(folder, "init", *FILES, "--per-label", "1")
    context = load_params(folder / "new.yaml").contexts["orders"]
    assert (context.demonstrations, context.count) == (2, 2)


SPELLINGS = {
    "booleans": (lambda n: n % 2 == 0, ["false", "true"], []),
    "booleans with words": (lambda n: n % 2 == 0, ["false", "true"], ["--verbaliser", "True=yes", "--verbaliser", "false=no"]),
    "floats": (lambda n: float(n % 2), ["0", "1"], ["--verbaliser", "1.0=yes", "--verbaliser", "0=no"]),
    "integers": (lambda n: n % 2, ["0", "1"], ["--verbaliser", "1=yes", "--verbaliser", "0=no"]),
    "texts of floats": (lambda n: ["0.0", "1.0"][n % 2], ["0", "1"], ["--verbaliser", "1=yes", "--verbaliser", "0=no"]),
    "with a gap": (lambda n: None if n == 3 else ["no", "yes"][n % 2], ["no", "yes"], []),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_labels_have_one_spelling_in_every_format(folder, name, form):
    label, labels, options = SPELLINGS[name]
    three(folder, label=label)
    files = list(FILES)
    for at in (1, 5):
        path = folder / files[at]
        frame = pl.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
        files[at] = files[at].replace("jsonl", form)
        if form != "jsonl":
            (frame.write_csv if form == "csv" else frame.write_parquet)(folder / files[at])
    shotless(folder, "init", *files, *options)
    params = load_params(folder / "new.yaml")
    assert list(params.task.labels) == labels


def test_labels_of_two_files_that_spell_them_differently_are_the_same(folder):
    three(folder)
    (folder / "mine" / "l.csv").write_text("text,label\n" + "".join(f"{sentence(n)},{n % 2}.0\n" for n in range(40)), "utf-8")
    write_rows(folder / "mine" / "t.jsonl", [{"text": sentence(100 + n), "label": n % 2} for n in range(40)])
    words = ["--verbaliser", "1=yes", "--verbaliser", "0=no"]
    done = shotless(folder, "init", "--labelled", "mine/l.csv", *FILES[2:], *words)
    assert "t.jsonl: 40 rows, 40 texts, 0 bad" in done.stdout


@pytest.mark.parametrize("label", [["billing", "refund"], {"a": 1}])
def test_several_labels_in_a_row_are_refused_with_the_line(folder, label):
    three(folder, label=lambda n: label if n == 2 else ["no", "yes"][n % 2])
    done = shotless(folder, "init", *FILES, check=False)
    assert done.returncode == 2
    assert "l.jsonl, line 3: label: several labels in a row are not supported" in done.stderr
    assert not (folder / "new.yaml").exists()


def test_a_label_with_few_rows_is_shown_less_but_costs_the_others_nothing(folder, model_folder, monkeypatch):
    three(folder, label=lambda n: "yes" if n % 14 == 0 else "no")
    done = shotless(folder, "init", *FILES)
    assert "5 labelled rows are not used: those above 32 of a label, since judging them takes time (--per-label takes more)" in done.stdout
    params = prepares(folder, model_folder("llama", max_position_embeddings=2048), monkeypatch)
    drawn = params.data.demonstrations
    assert (drawn.per_label, drawn.most_per_label, params.contexts["orders"].demonstrations) == (3, 32, 6)
    rows = read_examples(folder / "artifacts" / "data" / "demonstrations.parquet", ("text",))
    assert Counter(example.label for example in rows) == {"yes": 3, "no": 32}


def test_all_labelled_rows_are_used_up_to_what_judging_them_costs(folder):
    three(folder)
    assert "labelled rows are not used" not in shotless(folder, "init", *FILES).stdout
    assert load_params(folder / "new.yaml").data.demonstrations.per_label == 20
    write_rows(folder / "mine" / "l.jsonl", [{"text": sentence(1000 + n), "label": ["no", "yes"][n % 2]} for n in range(70)])
    done = shotless(folder, "init", *FILES, "--force")
    assert "6 labelled rows are not used: those above 32 of a label, since judging them takes time" in done.stdout
    params = load_params(folder / "new.yaml")
    assert params.data.demonstrations.per_label == 32
    assert params.tuned["tuned"].steps == 12, "3 times 64 texts, in batches of 16"
    assert "tuned.tuned.steps: 12, so that it sees each labelled text 3 times" in done.stdout
    assert "not used" not in shotless(folder, "init", *FILES, "--force", "--per-label", "5").stdout, "this was asked for"


@pytest.mark.parametrize(
    ("labels", "suggested"),
    [
        ((0, 1), "0=no --verbaliser 1=yes"),
        ((-1, 0, 1), "-1=negative --verbaliser 0=neutral"),
        ((1, 2, 3, 4, 5), "5=great"),
        ((3, 7), "7=7"),
    ],
)
def test_numbers_get_a_suggestion_that_is_taken(folder, labels, suggested):
    three(folder, label=lambda n: labels[n % len(labels)])
    done = shotless(folder, "init", *FILES, "--per-label", "2", check=False)
    assert done.returncode == 2
    assert f"for example: --verbaliser {labels[0]}=" in done.stderr
    assert suggested in done.stderr
    shotless(folder, "init", *FILES, "--per-label", "2", *done.stderr.partition("for example: ")[2].split())
    assert list(load_params(folder / "new.yaml").task.labels) == sorted(map(str, labels))


@pytest.mark.slow
def test_digits_as_answers_get_the_form_in_which_the_model_tells_them_apart(folder, model_folder, monkeypatch):
    model = model_folder("llama", max_position_embeddings=2048)
    shutil.copytree(model, folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder, label=lambda n: 1 + n % 5)
    words = [part for n in range(1, 6) for part in ("--verbaliser", f"{n}={n}")]
    shotless(folder, "init", *FILES, "--per-label", "2", *words)
    task = prepares(folder, model, monkeypatch).task
    assert (task.template, task.verbalisers["5"]) == ("Text: {text}\nLabel: ", "5")


@pytest.mark.parametrize(
    ("template", "verbaliser"),
    [("Q: {text}\\nA: ", " no"), ("Q: {text}\\nA:", " no"), ("{text}\\n", "no"), ('{text} = "', "no"), ("{text} ->", " no")],
)
def test_the_space_before_an_answer_is_where_models_expect_it(folder, template, verbaliser):
    three(folder)
    shotless(folder, "init", *FILES, "--template", template)
    task = load_params(folder / "new.yaml").task
    assert (task.template, task.verbalisers["no"]) == (template.replace("\\n", "\n").rstrip(" "), verbaliser)


@pytest.mark.slow
def test_a_dry_run_says_the_same_and_writes_nothing(folder, model_folder):
    shutil.copytree(model_folder("llama", max_position_embeddings=2048), folder / "artifacts" / "models" / "smollm2")
    small_students(folder)
    three(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml*")}
    dry = shotless(folder, "init", *FILES[:-2], "--dry-run").stdout
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml*")} == before
    wet = shotless(folder, "init", *FILES).stdout
    notes, end = dry.split("smollm2 on 20 rows"), dry.splitlines()[-1]
    assert wet.startswith(notes[0])
    assert "labels: no (20 rows, ' no'), yes (20 rows, ' yes')" in notes[0]
    assert "A full run takes about" in notes[1]
    assert end == "Nothing was written. Next: the same command without --dry-run"
    assert wet.splitlines()[-1] == "new.yaml is written. Next: mv new.yaml params.yaml && shotless run"
    assert re.search(r"A teacher's prompt, [2-9] demonstrations, \d+ tokens for smollm2:\n  \| Text: \w+\d+ ", notes[0])
    assert notes[0].endswith("\n  | Label:\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_shows_the_file_and_asks_with_guesses(folder, monkeypatch):
    answers = ["mine/labelled.csv", "mine/pile.jsonl", "mine/test.parquet", "", "", "", "", "good", "y"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    said = shotless(folder, "init").stdout
    for question in (
        "File with labelled texts: ", "Prompt ({text} is the input, \\n a new line) [Text: {text}\\nLabel:]: ", "Column of {text} [body]: ",
        "Column of the labels [urgency]: ", "Label '0', 20 rows: the model answers [no]: ", "Label '1', 20 rows: the model answers [yes]: ",
        "Write params.yaml (the old one is kept as params.yaml.old) [Y/n]: ",
    ):  # fmt: skip
        assert question in said
    assert "amber0 " in said.partition("Prompt (")[0], "the first rows are shown"
    assert said.splitlines()[-1].endswith("params.yaml is written. Next: shotless run")
    params = load_params(folder / "params.yaml")
    assert params.task.verbalisers == {"0": " no", "1": " good"}
    assert params.data.sources["labelled"].fields == {"text": "body"}


@pytest.mark.parametrize("lines", [[], ["n"], ["y"]])
def test_on_a_terminal_options_are_not_asked_for_and_no_means_no(folder, monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines) + "\n" * bool(lines)))
    before = (folder / "params.yaml").read_text("utf-8")
    done = shotless(folder, "init", *MAPPED, "--template", "{text}:", check=False)
    assert (done.returncode, (folder / "params.yaml").read_text("utf-8") == before) == ((0, False) if lines == ["y"] else (1, True))


GUESSED = {  # rows of the labelled file → the columns of text and label
    "by name": ([{"label": n % 2, "text": "a", "body": sentence(n)} for n in range(40)], ["text", "label"]),
    "mail": (
        [{"from": f"p{n}@x.org", "subject": f"re {n}", "body": sentence(n), "team": "ab"[n % 2]} for n in range(40)],
        ["body", "team"],
    ),
    "survey": ([{"Nr": n, "Antwort": sentence(n), "Note": 1 + n % 5, "Ort": f"o{n % 7}"} for n in range(40)], ["Antwort", "Note"]),
    "labels that differ": ([{"comment": sentence(n), "stars": 1 + n % 5, "id": n} for n in range(40)], ["comment", "stars"]),
}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", GUESSED)
def test_columns_are_guessed(tmp_path, name, form):
    rows, expected = GUESSED[name]
    path = tmp_path / f"file.{form}"
    frame = pl.DataFrame(rows)
    {"jsonl": frame.write_ndjson, "csv": frame.write_csv, "parquet": frame.write_parquet}[form](path)
    columns = read_columns(Answers(path, path, path, "{text}", {}, {}, "label"))
    assert [guess_text(columns), guess_label(columns, [guess_text(columns)])] == expected


def test_a_delimiter_and_an_encoding_that_are_said_are_written(folder):
    for name, first in (("l", 0), ("t", 200)):
        rows = [f"{sentence(first + n)} caf\xe9;{['no', 'yes'][n % 2]}\n" for n in range(40)]
        (folder / "mine" / f"{name}.csv").write_text("text;label\n" + "".join(rows), "cp1252")
    files = ["--labelled", "mine/l.csv", "--unlabelled", "mine/pile.jsonl", "--test", "mine/t.csv", "--output", "new.yaml"]
    write_rows(folder / "mine" / "pile.jsonl", [{"text": sentence(100 + n)} for n in range(30)])
    shotless(folder, "init", *files, "--delimiter", ";", "--encoding", "cp1252")
    source = load_params(folder / "new.yaml").data.sources["labelled"]
    assert (source.delimiter, source.encoding) == (";", "cp1252")


def test_work_is_counted_as_the_stages_do_it(tmp_path):
    params = load_params(PROJECT / "params.yaml")
    for model, size in (("smollm2", 400), ("minilm", 100)):
        folder = tmp_path / "models" / model
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
    sizes = {"query": 30.0, "answer": 3.0, "layers": 30, "labelled": 16, "transfer": 800, "evaluated": 600, "artifacts": tmp_path}
    work, shots = token_work(params, **sizes), params.contexts["orders"].count
    tuned, contrast = (3 * 30 * params.tuned[name].steps * params.tuned[name].batch_size for name in ("tuned", "contrast"))
    cd, encoder = (3 * 30 * params.students[name].steps * params.students[name].batch_size for name in ("cd", "encoder"))
    few_shot, plain = shots * (16 * 33 + 600 * 30), 600 * 30
    judged, probed = 16 * 30, 4 * 32 * 30  # 16 labelled examples once, and 32 probes in each of four folds
    assert work == pytest.approx(
        {
            "tune@tuned": 4 * tuned + probed,
            "tune@contrast": contrast + probed / 4,
            "teacher@few_shot": shots * (16 * 33 + 800 * 30) + shots * (4 * 16 * 33 + judged + probed),
            "teacher@zero_shot": 800 * 30 + judged,
            "teacher@tuned": 800 * 30 + judged,
            "teacher@contrast": (800 * 30 + judged) / 4,
        }
        | {"student@cd": cd * 24 / 30, "student@encoder": encoder / 4}
        | {"evaluate@cd": plain * 24 / 30, "evaluate@encoder": plain / 4}
        | {"baseline@zero_shot": plain, "baseline@few_shot": few_shot, "baseline@few_shot_calibrated": 0}
        | {"baseline@fine_tuned": plain, "baseline@setfit": plain / 4, "baseline@teacher": 0}
    )
    assert sum(token_work(params, **sizes | {"layers": None}).values()) > sum(work.values()), "students count as whole models"
    assert token_work(params, **sizes | {"artifacts": tmp_path / "none"})["evaluate@encoder"] == plain, "a model that is not there"
    seeds = params.students["cd"].model_copy(update={"seeds": (0, 1, 2)})
    more = token_work(params.model_copy(update={"students": params.students | {"cd": seeds}}), **sizes)
    assert more["student@cd"] == pytest.approx(3 * work["student@cd"])


def test_stages_are_those_that_dvc_makes(folder):
    from dvc.repo import Repo

    with Repo.init(str(folder), no_scm=True) as repo:
        assert stage_count(load_params(folder / "params.yaml"), folder / "dvc.yaml") == len(repo.index.stages)
