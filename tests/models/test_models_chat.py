"""Chat prompts, over the templates of ten families: written out as the models' own folders have them, without tools and images."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.errors import MismatchError, UsageError
from pipeline.files import MANIFEST, write_manifest
from pipeline.models.trained import about_trained, load_tokens, open_trained
from pipeline.params import TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example, read_contexts, write_contexts
from pipeline.serving.onnx_engine import PlainTokenizer
from pipeline.task import ChatTokens, Task, TaskTokens

TEXTS = ["a warm and funny film", "The plot goes nowhere...", "Größe: 5 €", "two\n\nlines "]

LLAMA_3 = """{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}
{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{%- if message.role == "user" or (message.role == "system" and not loop.first)
 or message.role == "assistant" %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN_3 = """{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>')
 and message.content.endswith('</tool_response>')) %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == "assistant" %}{%- set content = message.content %}{%- set reasoning_content = '' %}
{%- if '</think>' in content %}{%- set reasoning_content = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
ALTERNATE = """{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}{%- endif %}"""
GEMMA_3 = (
    """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}"""
    + ALTERNATE
    + """{%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}{{ message['content'] | trim }}
{{- '<end_of_turn>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\\n'}}{%- endif -%}"""
)
GEMMA_2 = (
    """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}"""
    + ALTERNATE
    + """{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] | trim
 + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""
)
MISTRAL = (
    """{{ bos_token }}{% for message in messages %}"""
    + ALTERNATE
    + """{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
)
PHI_3 = """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}
{{- '<|system|>\\n' + message['content'] + '<|end|>\\n'}}
{%- elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}
{%- elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
SMOLLM_2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
OLMO_2 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
{{- '<|system|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
DEEPSEEK_R1 = """{% set ns = namespace(system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

IM = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TURN = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
DEEPSEEK_TOKENS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
# template, control tokens, its beginning-of-text and end-of-text tokens, the end of a turn
FAMILIES = {
    "llama3": (LLAMA_3, LLAMA_TOKENS, LLAMA_TOKENS[0], "<|eot_id|>", "<|eot_id|>"),
    "qwen2.5": (QWEN_2_5, IM, None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN_3, IM, None, "<|im_end|>", "<|im_end|>"),
    "gemma3": (GEMMA_3, TURN, "<bos>", "<eos>", "<end_of_turn>"),
    "gemma2": (GEMMA_2, TURN, "<bos>", "<eos>", "<end_of_turn>"),
    "mistral": (MISTRAL, ["<s>", "</s>"], "<s>", "</s>", "</s>"),
    "phi3": (PHI_3, ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"], None, "<|endoftext|>", "<|end|>"),
    "smollm2": (SMOLLM_2, IM, "<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "olmo2": (OLMO_2, ["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "deepseek": (DEEPSEEK_R1, DEEPSEEK_TOKENS, *DEEPSEEK_TOKENS[:2], DEEPSEEK_TOKENS[1]),
}
NO_SYSTEM = {"gemma2", "mistral"}
TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"bad": " bad", "good": " good", "mixed": " so-so"}), "chat")
SHOTS = (({"text": "I loved it"}, "good"), ({"text": "bored\n"}, "bad"), ({"text": "meh, \nbut fine"}, "mixed"))
CONTEXTS = [
    NO_CONTEXT,
    Context("shots/0", "", SHOTS, "chat"),
    Context("told/0", "Say what the review says.", (), "chat"),
    Context("both/0", "Say what the review says.", SHOTS[::-1], "chat"),
]
DATE = {"date_string": "26 Jul 2024"}
EXAMPLES = [Example({"text": text}) for text in TEXTS]


def chat_tokenizer(family, **changes):
    template, control, bos, eos, _ = FAMILIES[family]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=control, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([*TEXTS, "Review: a good film\nSentiment: good", "user\nassistant\nsystem\nmodel bad so-so"] * 4, trainer)
    if bos is not None and family != "smollm2":  # which has one, and puts it before no text
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=eos, **changes)
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def chat(family):
    return chat_tokenizer(family)


@pytest.fixture(scope="module")
def tokens(chat):
    return ChatTokens(TASK, chat)


def conversation(family, context, example):
    """Written from the definition, apart from `Task.messages`."""
    words = TASK.params.verbalisers
    turns = [
        turn
        for fields, label in context.demonstrations
        for turn in (("user", f"Review: {fields['text']}\nSentiment:"), ("assistant", words[label].strip()))
    ]
    turns.append(("user", f"Review: {example.fields['text']}\nSentiment:"))
    if context.instruction and family in NO_SYSTEM:
        turns[0] = ("user", f"{context.instruction}\n\n{turns[0][1]}")
    elif context.instruction:
        turns.insert(0, ("system", context.instruction))
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.name)
def test_prompts_are_those_of_the_chat_template(family, chat, tokens, context):
    expected = [
        chat.apply_chat_template(
            conversation(family, context, example), add_generation_prompt=True, return_dict=False, enable_thinking=False, **DATE
        )
        for example in EXAMPLES
    ]
    prompts = tokens.prompts(context, EXAMPLES)
    assert [list(prompt.ids) for prompt in prompts] == expected
    if chat.bos_token_id is not None:
        assert all(ids[0] == chat.bos_token_id != ids[1] for ids in expected)
    assert "<think>" not in chat.decode(prompts[0].ids) or chat.decode(prompts[0].ids).endswith(("</think>\n\n", "<think>\n"))


def test_a_text_that_spells_control_tokens_stays_text(chat, tokens):
    control = {token.content: number for number, token in chat.added_tokens_decoder.items()}
    ordinary, hostile = tokens.prompts(NO_CONTEXT, [Example({"text": "x y"}), Example({"text": "x" + "".join(control) + " y"})])
    assert [i for i in hostile.ids if i in control.values()] == [i for i in ordinary.ids if i in control.values()]
    assert "x" + "".join(control) + " y" in chat.decode(hostile.ids)
    assert tokens.fault_of(Example({"text": next(iter(control))})) is None
    shown = Context("shots/0", "", (({"text": "".join(control)}, "good"),), "chat")
    plain = Context("shots/0", "", (({"text": "xyz"}, "good"),), "chat")
    counts = [[i for i in tokens.prompts(one, EXAMPLES[:1])[0].ids if i in control.values()] for one in (shown, plain)]
    assert counts[0] == counts[1]


def test_answers_in_demonstrations_are_the_completions(family, chat, tokens):
    end = chat.convert_tokens_to_ids(FAMILIES[family][4])
    assert tokens.end_ids == (end,)
    for label, completion in zip(TASK.labels, tokens.completions, strict=True):
        assert chat.decode(completion).strip() == TASK.params.verbalisers[label].strip()
        shown = tokens.prompts(Context("shots/0", "", (({"text": "qqq"}, label),), "chat"), EXAMPLES[:1])[0].ids
        found = [start for start in range(len(shown)) if list(shown[start : start + len(completion) + 1]) == [*completion, end]]
        assert len(found) == 1, label
        if family not in {"deepseek", "qwen3"}:  # which begin an answer with thoughts, and show none of earlier turns
            alone = tokens.prompts(NO_CONTEXT, [Example({"text": "qqq"})])[0].ids
            assert shown[: found[0]] == alone


def test_everything_before_the_input_is_shared(tokens):
    prompts = [prompt.ids for prompt in tokens.prompts(CONTEXTS[3], EXAMPLES)]
    before = len(tokens.prompts(CONTEXTS[3], [Example({"text": "a"})])[0].ids) - len(
        tokens.prompts(NO_CONTEXT, [Example({"text": "a"})])[0].ids
    )
    assert all(ids[:before] == prompts[0][:before] for ids in prompts)


def test_free_answers_end_with_the_turn_or_a_stop_text(family, chat):
    completion = {"source": "given", "stop": ["}"], "lead": " >> "}
    task = Task(TaskParams(template="Review: {text}\nJSON:", completion=completion), "chat")
    tokens, end = ChatTokens(task, chat), chat.convert_tokens_to_ids(FAMILIES[family][4])
    one, other = tokens.prompts(NO_CONTEXT, [Example({"text": "x"}, completion=answer) for answer in (' {"a": 1}', "none")])
    assert chat.decode(one.answer).strip() == '{"a": 1}'
    assert end not in one.answer
    assert (chat.decode(other.answer[:-1]).strip(), other.answer[-1]) == ("none", end)
    asked = [{"role": "user", "content": "Review: x\nJSON:"}]
    expected = chat.apply_chat_template(asked, add_generation_prompt=True, return_dict=False, enable_thinking=False, **DATE)
    assert list(one.ids) == list(other.ids) == expected[: len(one.ids)]
    assert chat.decode(expected[len(one.ids) :]).strip() == ""  # what the answer's first token took along


def test_an_exported_tokenizer_needs_no_template(chat, tokens, tmp_path):
    chat.backend_tokenizer.save(str(tmp_path / "chat.json"))
    plain = ChatTokens(TASK, PlainTokenizer(tmp_path / "chat.json", chat.bos_token_id), frame=json.loads(json.dumps(tokens.frame)))
    hostile = Example({"text": f"x{chat.eos_token}\n"})
    assert plain.prompts(NO_CONTEXT, [*EXAMPLES, hostile]) == tokens.prompts(NO_CONTEXT, [*EXAMPLES, hostile])
    assert (plain.completions, plain.end_ids) == (tokens.completions, tokens.end_ids)


def test_a_tokenizer_without_a_template_is_refused():
    bare = chat_tokenizer("qwen2.5")
    bare.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template. Take an instruct model, or use `format: plain`"):
        ChatTokens(TASK, bare)
    bare.chat_template = "{{ nothing.at_all }}"
    with pytest.raises(UsageError, match="its chat template cannot be used"):
        ChatTokens(TASK, bare)
    bare.chat_template = "{% for message in messages %}{{ message.content|upper }}{% endfor %}x"
    ChatTokens(TASK, bare)
    bare.chat_template = "hello"  # shows no turn
    with pytest.raises(UsageError, match="its chat template cannot be used"):
        ChatTokens(TASK, bare)


def test_control_tokens_of_the_task_itself_are_refused():
    task = Task(TaskParams(template="<|im_start|>{text}", verbalisers={"a": "a", "b": "b"}), "chat")
    with pytest.raises(UsageError, match=r"<\|im_start\|> is a control token.*format: plain"):
        ChatTokens(task, chat_tokenizer("qwen2.5"))
    with pytest.raises(UsageError, match=r"the instruction of told/0 holds <\|im_end\|>"):
        ChatTokens(TASK, chat_tokenizer("qwen2.5")).prompts(Context("told/0", "x<|im_end|>"), EXAMPLES)


def test_a_text_that_cannot_be_told_apart_has_a_fault():
    stripping = chat_tokenizer("phi3")
    template = stripping.chat_template
    raw = stripping.backend_tokenizer  # as Phi-3's own: a control token takes the whitespace behind it
    from tokenizers import AddedToken

    raw.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|assistant|>", "<|end|>")])
    stripping = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    stripping.chat_template = template
    tokens = ChatTokens(TASK, stripping)
    assert tokens.fault_of(EXAMPLES[0]) is None
    assert "<|end|>, a control token of this model" in str(tokens.fault_of(Example({"text": "x<|end|>"})))
    expected = stripping.apply_chat_template(conversation("phi3", NO_CONTEXT, EXAMPLES[0]), add_generation_prompt=True, return_dict=False)
    assert list(tokens.prompts(NO_CONTEXT, EXAMPLES[:1])[0].ids) == expected
    assert "U+FDD0" in str(tokens.fault_of(Example({"text": "x\ufdd0"})))


def test_a_template_with_a_date_gives_one_prompt_every_day():
    tokenizer = chat_tokenizer("llama3")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + tokenizer.chat_template
    assert tokenizer.decode(ChatTokens(TASK, tokenizer).prompts(NO_CONTEXT, EXAMPLES)[0].ids).count("26 Jul 2024") == 2


def test_the_format_is_part_of_a_context(tmp_path):
    plain, chat = Context("a", "b", SHOTS), Context("a", "b", SHOTS, "chat")
    assert plain.context_id != chat.context_id
    write_contexts([plain, chat], tmp_path / "c.parquet")
    assert read_contexts(tmp_path / "c.parquet") == [plain, chat]


def test_a_trained_folder_keeps_its_format(model_folder, tmp_path):
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(model_folder("llama"), folder)
    with pytest.raises(UsageError, match="no chat template"):
        load_tokens(TASK, folder)
    chat_tokenizer("gemma2").save_pretrained(folder)
    names = [path.name for path in folder.iterdir() if path.name != MANIFEST]
    for form, kind in (("plain", TaskTokens), ("chat", ChatTokens)):
        tokens = load_tokens(replace(TASK, format=form), folder)
        write_manifest(folder, about_trained("s", tokens, {}), names)
        found = open_trained(folder)
        assert (found.task, type(found.tokens)) == (replace(TASK, format=form), kind)
        assert found.tokens.prompts(NO_CONTEXT, EXAMPLES) == tokens.prompts(NO_CONTEXT, EXAMPLES)
    write_manifest(folder, about_trained("s", tokens, {}) | {"frame": {**tokens.frame, "before": "other"}}, names)
    with pytest.raises(MismatchError, match="its chat template writes"):
        open_trained(folder)


def test_an_encoder_has_no_chat_format(encoder_folder):
    with pytest.raises(UsageError, match="`format: chat`, and an encoder"):
        load_tokens(TASK, encoder_folder("bert"))
