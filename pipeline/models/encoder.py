"""Encoders: models whose classification head answers, with nothing in the prompt but the input.

The head's labels are its whole vocabulary: the n-th of the sorted labels is token n of its logits. So scores, losses, targets and caches
are those of a decoder whose verbalisers have one token each. The input is the task's fields without the template's words: two fields are a
pair, further ones are joined to the second by a line break.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.errors import UsageError
from pipeline.schema import NO_CONTEXT, Context, Example, Prompt
from pipeline.task import Task, TaskTokens

OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "data2vec-text")
"""Families that number positions from the padding token's id on."""


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a config is an encoder's: a family with a masked language model, saved as neither a decoder nor an encoder-decoder."""
    as_decoder = config.is_encoder_decoder or config.is_decoder
    named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not as_decoder and not named


def load_classifier(folder: Path, labels: Sequence[str] = (), seed: int = 0) -> PreTrainedModel:
    """An encoder with its family's classification head, float32, in evaluation mode.

    With `labels` a new head is made for them, random by `seed`, unless the folder has one for the same labels. Without, the folder's own
    head is taken. Raises UsageError if it has none, or if weights below the head are missing.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if labels:
        named = dict(enumerate(labels))
        config.id2label, config.label2id = named, {label: number for number, label in named.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=bool(labels),
            output_loading_info=True,
        )
    model, found = loaded
    lacking = sorted(found["missing_keys"])
    if below := [name for name in lacking if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]:
        raise UsageError(f"{folder}: {len(below)} weights are missing, first {below[0]}.")
    if lacking and not labels:
        raise UsageError(f"{folder}: an encoder without a classification head ({lacking[0]} is missing). Tune it first: `tuned` in params.yaml.")
    return model.eval()


def position_limit(config: PreTrainedConfig) -> int | None:
    """The longest input in tokens, with the tokens around it; None if the config does not say."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit - config.pad_token_id - 1 if limit is not None and config.model_type in OFFSET_POSITIONS else limit


class EncoderTokens(TaskTokens):
    """A task in an encoder's ids: the fields with the tokens that the tokenizer puts around them.

    A control token in somebody's text is tokenised as the characters it is. Raises UsageError if answers are free text.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        if task.params.completion is not None:
            raise UsageError("task.completion: answers are free text, which an encoder cannot give. Use a decoder.")
        self.task = task
        self.tokenizer = tokenizer
        self.completions = [[number] for number in range(len(task.labels))]

    def prompts(self, context: Context, examples: Sequence[Example]) -> list[Prompt]:
        """One prompt for each example. Raises UsageError for a context: an encoder has none."""
        if context.context_id != NO_CONTEXT.context_id:
            raise UsageError(f"context {context.name!r}: an encoder has nothing in its prompt but the input; use `demonstrations: 0`.")
        if not examples:
            return []
        first, *others = self.task.fields
        pairs = ["\n".join(example.fields[name] for name in others) for example in examples] if others else None
        found = self.tokenizer([example.fields[first] for example in examples], pairs, split_special_tokens=True, truncation=False)
        return [Prompt(tuple(ids)) for ids in found.input_ids]

    def fault_of(self, example: Example, context: Context = NO_CONTEXT) -> None:
        """No input can be taken for control tokens."""


def classifier_logits(model: PreTrainedModel, inputs: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the labels [N, L] for inputs of token ids, with a gradient if one is enabled; padded to the longest."""
    longest, count = max(map(len, inputs)), len(inputs)
    config: Any = model.config
    ids = torch.full((count, longest), config.pad_token_id or 0)
    mask = torch.zeros((count, longest), dtype=torch.long)
    for row, own in enumerate(inputs):
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = 1
    given: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if (getattr(config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        ends = ids == inputs[0][-1]  # the separator ends each of a pair, and every input
        given["token_type_ids"] = ((ends.cumsum(1) - ends.long()).clamp(max=1)) * mask
    return model(**{name: value.to(model.device) for name, value in given.items()}).logits.float()
