"""Token ids on demand: those of all inputs tokenised at once, in little memory whatever the number of inputs."""

import tracemalloc
from collections.abc import Sequence

import pytest

from pipeline.teachers import asked as module
from pipeline.teachers.asked import Asked, Query
from pipeline.files import example_id
from pipeline.params import TaskParams
from pipeline.task import Task, TaskTokens

TEMPLATE = "Review: {text}\nSentiment:"
LABELS = Task(TaskParams(template=TEMPLATE, verbalisers={"negative": " bad", "positive": " good"}))
GIVEN = Task(TaskParams.model_validate({"template": TEMPLATE, "completion": {"source": "given", "max_tokens": 40}}))


class Made(Sequence):
    """Inputs that are made when they are asked for; `largest` is the longest slice that anyone took."""

    def __init__(self, count):
        self.count, self.largest = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        rows = range(self.count)[place]
        self.largest = max(self.largest, len(rows))
        texts = [f"text {number} " + "good " * (number % 7) for number in rows]
        return [Query(example_id({"text": text}), {"text": text}, f"answer {len(text)}") for text in texts]


@pytest.fixture
def small_runs(monkeypatch):
    monkeypatch.setattr(module, "RUN", 4)
    monkeypatch.setattr(module, "RUNS_KEPT", 2)


@pytest.mark.parametrize("task", [LABELS, GIVEN], ids=["labels", "given answers"])
def test_ids_are_those_of_all_inputs_tokenised_at_once(tokenizer, small_runs, task):
    queries, tokens = Made(23)[:], TaskTokens(task, tokenizer)
    asked = Asked(tokens, {}, queries)
    places = [22, 0, 7, 3, 21, 1, 8, 7]
    ids, answers = asked.rows([queries[place].example_id for place in places])
    every = tokens.query_ids([task.query(query.fields) for query in queries])
    assert ids == [every[place] for place in places]
    assert asked.lengths.tolist() == list(map(len, every))
    assert asked.lengths_of([queries[place].example_id for place in places]) == list(map(len, ids))
    given = tokens.answer_ids([query.answer for query in queries]) if task is GIVEN else None
    assert answers == (given and [given[place] for place in places])


def test_the_shortest_and_the_longest_are_among_those_spread_by_length(tokenizer, small_runs):
    queries = Made(23)[:]
    asked = Asked(TaskTokens(LABELS, tokenizer), {}, queries)
    first, middle, last = asked.lengths_of(asked.spread(3))
    rising = sorted(asked.lengths.tolist())
    assert (first, middle, last) == (rising[0], rising[11], rising[-1])
    assert asked.spread(3) == Asked(TaskTokens(LABELS, tokenizer), {}, queries[::-1]).spread(3), "whatever their order"
    assert asked.lengths[asked.longest()] == rising[-1]


def test_an_input_asked_twice_is_refused(tokenizer):
    queries = Made(3)[:]
    with pytest.raises(ValueError, match="twice"):
        Asked(TaskTokens(LABELS, tokenizer), {}, [*queries, queries[1]])


def test_memory_holds_a_few_runs_and_some_bytes_of_each_input(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "RUN", 64)
    monkeypatch.setattr(module, "RUNS_KEPT", 2)
    tokens, peaks = TaskTokens(LABELS, tokenizer), []
    for count in (1_000, 1_000, 5_000):  # the first one's are the tokenizer's own
        queries = Made(count)
        tracemalloc.start()
        Asked(tokens, {}, queries)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert queries.largest == 64
    assert (peaks[2] - peaks[1]) / 4_000 < 120, "bytes an input; lists of ids would take 1.5 kB"
