"""A student's answers by ONNX Runtime, from a folder that `shotless export --format onnx` wrote, without torch and transformers.

The graph takes `input_ids` [N, T], `attention_mask` [N, T] (1 for tokens, then 0 for padding) and, if it has them, `token_type_ids` [N, T],
all int64, and gives `label_logprobs` [N, L] float32 nats, over the sorted labels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipeline.errors import CorruptError, need
from pipeline.files import MANIFEST, read_manifest
from pipeline.models.trained import Trained
from pipeline.schema import Prompt
from pipeline.serving.predictor import ONNX_FILE, LabelScores
from pipeline.task import ChatTokens, EncoderTokens, Task, TaskTokens

TOKENIZER_FILE = "tokenizer.json"
TOKENS_A_PASS, STRETCH = 256, 1.25
"""Of a pass: tokens with padding, and the longest row by its shortest. Larger passes are no faster and take memory, and padding costs what
text costs. MiniLM in int8, ms of CPU on a busy core: 5.4 for a text of 27 tokens, 3.9 each in passes of 8, 5.1 in passes of 32; texts of 9
to 112 tokens, 16 at once: 5.0 each, and 9.5 in passes of 1024 tokens whatever their lengths."""


class PlainTokenizer:
    """What `TaskTokens` asks of a tokenizer, with transformers' names, by the tokenizers library alone."""

    def __init__(self, file: Path, bos_token_id: int | None) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other kind  # noqa: BLE001
            raise CorruptError(f"{file}: not a tokenizer ({error}). Export the student again.") from None
        self.name_or_path = str(file.parent)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token_id = bos_token_id
        self.added_tokens_decoder = self._tokenizer.get_added_tokens_decoder()

    def __call__(
        self,
        texts: str | list[str],
        pairs: list[str] | None = None,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        truncation: bool = False,
        return_offsets_mapping: bool = False,
        verbose: bool = False,
    ) -> Any:
        """Token ids of a text, or of each text or pair of a list, as `input_ids`; where each begins and ends as `offset_mapping`."""
        assert not truncation
        assert not verbose
        self._tokenizer.encode_special_tokens = split_special_tokens
        given: Any = [texts] if isinstance(texts, str) else texts if pairs is None else list(zip(texts, pairs, strict=True))
        encode = self._tokenizer.encode_batch if return_offsets_mapping else self._tokenizer.encode_batch_fast  # which finds no offsets
        found = encode(given, add_special_tokens=add_special_tokens)
        ids = [one.ids for one in found]
        return SimpleNamespace(input_ids=ids[0] if isinstance(texts, str) else ids, offset_mapping=[one.offsets for one in found])

    def decode(self, token: int) -> str:
        """The text of a token."""
        return self._tokenizer.decode([token], skip_special_tokens=False)


def exported_tokens(task: Task, folder: Path) -> TaskTokens:
    """A task in the ids of an exported folder's tokenizer. Raises CorruptError if its manifest does not say what kind of model it is."""
    about = read_manifest(folder).get("onnx")
    if not isinstance(about, dict) or not {"encoder", "bos_token_id", "context_limit"} <= about.keys():
        raise CorruptError(f"{folder / MANIFEST}: says nothing of {ONNX_FILE}. Export the student again.")
    tokenizer, limit = PlainTokenizer(folder / TOKENIZER_FILE, about["bos_token_id"]), about["context_limit"]
    if task.format == "chat":
        return ChatTokens(task, tokenizer, limit, read_manifest(folder)["frame"])
    return (EncoderTokens if about["encoder"] else TaskTokens)(task, tokenizer, limit)


class OnnxEngine:
    """The graph of an exported folder, on the CPU."""

    def __init__(self, student: Trained, threads: int | None) -> None:
        need("onnx", "onnxruntime")
        import onnxruntime

        from pipeline.models.process import cores

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        self._session = onnxruntime.InferenceSession(student.folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])
        self._inputs = {given.name for given in self._session.get_inputs()}
        self.name, self.reason = "onnxruntime", f"an exported student, by onnxruntime {onnxruntime.__version__}"

    def score(self, prompts: Sequence[Prompt]) -> LabelScores:
        """Scores of the prompts, in order; states are [N, 0]."""
        found: dict[int, Any] = {}
        for batch in _batches([len(prompt.ids) for prompt in prompts]):
            found |= zip(batch, self._logprobs([prompts[number].ids for number in batch]), strict=True)
        return np.stack([found[number] for number in range(len(prompts))]), np.zeros((len(prompts), 0), dtype=np.float32)

    def _logprobs(self, rows: Sequence[Sequence[int]]) -> Any:
        lengths = np.array([[len(row)] for row in rows])
        mask = np.arange(lengths.max()) < lengths  # [N, T]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate([np.array(row) for row in rows])
        given = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if "token_type_ids" in self._inputs:
            ends = (ids == rows[0][-1]).astype(np.int64)  # the separator ends every input, and the first of a pair
            given["token_type_ids"] = np.minimum(ends.cumsum(1) - ends, 1) * mask
        return self._session.run(None, given)[0]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers of each pass: rows of like length, as many as fit with their padding, and at least one."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and ((len(batch) + 1) * lengths[row] > TOKENS_A_PASS or lengths[row] > STRETCH * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
