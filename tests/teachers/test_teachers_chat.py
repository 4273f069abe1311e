"""A teacher that is asked in chat turns: its cache has what the model says of the conversations that its template writes."""

import pytest
import torch
from teachers.conftest import TEXTS, example

from pipeline.cache.folder import read_cache
from pipeline.models.folders import load_model, load_tokenizer
from pipeline.params import CompletionParams, TaskParams
from pipeline.schema import NO_CONTEXT, Context
from pipeline.task import ChatTokens, Task
from pipeline.teachers.capture import content_free
from pipeline.teachers.generation import Generator

TEMPLATE = """{% for message in messages %}{{ message.role + ': ' + message.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
SHOTS = (({"text": "bored"}, "negative"), ({"text": "I loved it"}, "positive"))
CONTEXTS = [Context("shots/0", "", (), "chat"), Context("shots/1", "Answer.", SHOTS, "chat")]


def in_chat(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


@torch.no_grad()
@pytest.mark.slow
def test_a_cache_has_the_whole_labels_behind_each_conversation(world):
    in_chat(world.model)
    world.write_contexts(CONTEXTS)
    cache = world.capture()
    model, tokenizer = load_model(world.model), load_tokenizer(world.model)
    words = world.task["verbalisers"]

    def turns(context, text):
        own = [{"role": "system", "content": "Answer."}] if context.instruction else []
        for fields, label in context.demonstrations:
            own.append({"role": "user", "content": f"Review: {fields['text']}\nSentiment:"})
            own.append({"role": "assistant", "content": words[label].strip()})
        return [*own, {"role": "user", "content": f"Review: {text}\nSentiment:"}]

    rows = iter(cache.rows.to_pylist())
    free = [one.fields["text"] for one in content_free(Task(world.params().task))]
    for context in CONTEXTS:
        for text in [*free, *TEXTS]:
            row = next(rows)
            assert row["context_id"] == context.context_id
            asked = tokenizer.apply_chat_template(turns(context, text), add_generation_prompt=True, return_dict=False)
            for label, found in zip(sorted(words), row["label_logprobs"], strict=True):
                answer = tokenizer(words[label].strip(), add_special_tokens=False).input_ids
                logprobs = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
                assert found == pytest.approx(float(logprobs[range(len(answer)), answer].sum()), abs=1e-4)
    assert cache.manifest["format"] == "chat"


@pytest.mark.slow
def test_asking_in_turns_leaves_plain_answers_in_the_store(world):
    plain = world.capture()
    in_chat(world.model)
    world.write_contexts(CONTEXTS)
    world.capture()
    world.write_contexts([Context("shots/2")])
    scored = len(world.scored())
    again = world.capture()
    assert len(world.scored()) == scored, "nothing is scored again"
    assert again.rows["label_logprobs"].to_pylist() == plain.rows["label_logprobs"].to_pylist()[: len(again.rows)]
    assert read_cache(world.output).manifest["format"] == "plain"


def test_a_label_that_begins_another_ends_with_the_turn(world):
    in_chat(world.model)
    words = {"one": " good", "two": " good film"}
    tokens = ChatTokens(Task(TaskParams(template="{text}", verbalisers=words), "chat"), load_tokenizer(world.model))
    assert [ids[-1] for ids in tokens.completions] == [*tokens.end_ids * 2]
    assert [tokens.tokenizer.decode(ids) for ids in tokens.completions] == ["good<|end|>", "good film<|end|>"]


def test_a_written_answer_ends_with_the_turn(tiny_model, tokenizer):
    frame = {"before": "user: ", "after": "<|end|>assistant: ", "lead": "", "end": "<|end|>"}
    task = Task(TaskParams(template="{text}", verbalisers={"a": "a", "b": "b"}), "chat")
    prompts = ChatTokens(task, tokenizer, frame=frame).prompts(NO_CONTEXT, [example("x")])
    model, completion = tiny_model("llama"), CompletionParams(max_tokens=12, stop=("\x00",))
    free = Generator(model, tokenizer, completion).answers(prompts)[0]
    ended = Generator(model, tokenizer, completion, (free[3],)).answers(prompts)[0]
    assert ended == free[: free.index(free[3]) + 1]
