"""A student as a folder for other programs: a checked copy for transformers, or an ONNX graph that needs nothing but its tokenizer.

The graph is the student with the head's rows of the labels' tokens alone: ids and mask in, log-probabilities of the labels out
(`onnx_engine` has the names). With `int8` its matrices are 8-bit integers, and so are the activations that they are multiplied with. A
decoder has activations of a hundred times the others' size, so there every block of `BLOCK` numbers has a scale. An encoder has not: a
scale for each token and each of a matrix's columns is as good there, and twice as fast. What else is in the batch moves a decoder's answer
by rounding alone, and an encoder's a little more. Embeddings are 8-bit integers with a scale for each token.

What was exported is asked the same texts as the student, each in a process of its own, with one thread and one text at a time.
"""

import logging
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from heapq import nsmallest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import CorruptError, ShotlessError, ThresholdError, UsageError
from pipeline.files import MANIFEST, check_manifest, sha256_json, write_manifest, write_text
from pipeline.models.folders import context_limit, is_encoder, load_model
from pipeline.models.forward import has_token_types
from pipeline.models.held_back import HELD_BACK_FILE
from pipeline.models.trained import Trained
from pipeline.serving.files import read_items
from pipeline.serving.measure import answered
from pipeline.serving.onnx_engine import TOKENIZER_FILE, need
from pipeline.serving.predictor import ONNX_FILE
from pipeline.task import TaskTokens

TEXTS = 200
TRANSFER = Path("artifacts/data/transfer.parquet")
PROBES = (
    "N/A", "It was what it was.", "The best one in years.", "Nothing here works.", "Please call me back before Friday.",
    "Some of it is good, some of it is not, and by the end nobody in the room could say which.", "1,024 of 2,048", "Größe: 5 € 你好 🙂",
)  # fmt: skip
"""Texts for a check outside of a project."""
BLOCK = 64
"""Weights that share a scale."""


class Int8Embedding(nn.Module):
    """An embedding's rows as 8-bit integers with a scale each."""

    def __init__(self, embedding: nn.Module, rows: int) -> None:
        super().__init__()
        values = embedding(torch.arange(rows)).detach()  # [V, H]; some families scale what they look up
        scales = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.scales = nn.Buffer(scales)  # [V, 1]
        self.rows = nn.Buffer((values / scales).round().to(torch.int8))

    def forward(self, ids: Tensor) -> Tensor:
        """[N, T] → [N, T, H]."""
        return self.rows[ids].float() * self.scales[ids]


class TokenwiseLinear(nn.Module):
    """A linear layer whose inputs are brought to [-1, 1] token by token, so that ONNX Runtime's one scale for all of them suits each."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, states: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        scales = states.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        products = nn.functional.linear(states / scales, self.weight) * scales
        return products if self.bias is None else products + self.bias


def prepare_int8(model: PreTrainedModel, encoder: bool) -> None:
    """Replace the modules of a model by those whose graph loses little as 8-bit integers."""
    embedding: Any = model.get_input_embeddings()
    model.set_input_embeddings(Int8Embedding(embedding, embedding.weight.shape[0]))
    for module in list(model.modules()) if encoder else ():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, TokenwiseLinear(child))


class LabelGraph(nn.Module):
    """Ids and mask → the labels' log-probabilities; see `onnx_engine`."""

    def __init__(self, model: Any, tokens: TaskTokens, encoder: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.encoder, self.pad = encoder, int(model.config.pad_token_id or 0)
        if not encoder:
            head, rows = model.get_output_embeddings(), [ids[0] for ids in tokens.completions]
            own = nn.Linear(head.in_features, len(rows), bias=head.bias is not None)
            own.weight = nn.Parameter(head.weight[rows].clone())
            if head.bias is not None:
                own.bias = nn.Parameter(head.bias[rows].clone())
            model.set_output_embeddings(own)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """[N, T] each → [N, L]."""
        ids = torch.where(attention_mask == 1, input_ids, self.pad)  # some families read positions off the padding
        if self.encoder:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids=ids, attention_mask=attention_mask, **types).logits.log_softmax(-1)
        logits = self.model(input_ids=ids, use_cache=False).logits  # [N, T, L]; what is padded comes later, so nothing attends to it
        last = attention_mask.sum(-1) - 1
        return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0].log_softmax(-1)


def copy_student(student: Trained, folder: Path) -> str:
    """Copy a student's files and card into `folder`; returns a sentence. Raises CorruptError naming a weight that is not finite."""
    source, dtypes = student.folder, Counter[str]()
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise CorruptError(f"{file}: {name} has numbers that are not finite; train the student again.")
            dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
    for name in (*student.manifest["files"], MANIFEST, "README.md"):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)  # not the mode: weights are saved for their owner alone
    check_manifest(folder)
    return f"{dtypes.total()} tensors ({', '.join(sorted(dtypes))}), all weights are finite"


def check_exportable(student: Trained) -> None:
    """Raise UsageError if a student cannot become a graph whose output are the labels' log-probabilities."""
    if student.task.params.completion is not None:
        raise UsageError(f"{student.folder}: its answers are free text, and a graph gives labels. Use --format transformers.")
    if long := [label for label, ids in zip(student.task.labels, student.tokens.completions, strict=True) if len(ids) > 1]:
        text = student.task.params.verbalisers[long[0]]
        raise UsageError(
            f"{student.folder}: the verbaliser {text!r} of {long[0]!r} has several tokens, or needs an end, which one pass of a graph "
            "cannot score. Train a student with task.verbalisers of one token each, or an encoder; or use --format transformers."
        )
    if not hasattr(student.tokens.tokenizer, "backend_tokenizer"):
        raise UsageError(f"{student.folder}: its tokenizer is Python code, and has no {TOKENIZER_FILE}. Use --format transformers.")
    need("onnx", "onnx", "onnxruntime", "onnxscript")


def write_onnx(student: Trained, folder: Path, int8: bool) -> dict[str, Any]:
    """Write the graph, the tokenizer and a manifest into `folder`; returns what the manifest says.

    Raises UsageError if torch cannot export this architecture.
    """
    with _quiet():
        return _write_onnx(student, folder, int8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and the quantiser say about their own insides."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _write_onnx(student: Trained, folder: Path, int8: bool) -> dict[str, Any]:
    model = load_model(student.folder)
    encoder = is_encoder(model.config)
    graph = LabelGraph(model, student.tokens, encoder).eval()
    if int8:
        prepare_int8(model, encoder)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if encoder and has_token_types(model) else [])]
    shape = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            tuple(torch.ones(2, 9, dtype=torch.long) for _ in names),
            dynamic_shapes=tuple(shape for _ in names),
            input_names=names,
            output_names=["label_logprobs"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # as it is with dynamo
    program.save(folder / ONNX_FILE, external_data=True)
    if int8:
        quantise(folder / ONNX_FILE, encoder)
    tokenizer = student.tokens.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # sentence encoders' own files pad each text to 128 tokens
    backend.no_truncation()
    backend.save(str(folder / TOKENIZER_FILE), pretty=False)
    if HELD_BACK_FILE in student.manifest["files"]:
        shutil.copyfile(student.folder / HELD_BACK_FILE, folder / HELD_BACK_FILE)
    kind = {"encoder": encoder, "inputs": names, "int8": int8}
    own = {**kind, "bos_token_id": tokenizer.bos_token_id, "context_limit": context_limit(student.folder)}
    about = {**student.manifest, "onnx": own}
    write_manifest(folder, about)
    return about


def quantise(file: Path, encoder: bool) -> None:
    """Make the matrices of a graph 8-bit integers, in place, with a scale for each column of an encoder's and each block of a decoder's."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = ONNXModel(onnx.load(file))
    graph.replace_gemm_with_matmul()
    for old in file.parent.glob(f"{file.name}*"):
        old.unlink()
    if encoder:
        only = {"op_types_to_quantize": ["MatMul"], "extra_options": {"MatMulConstBOnly": True}, "use_external_data_format": True}
        quantize_dynamic(graph.model, file, per_channel=True, weight_type=QuantType.QInt8, **only)
    else:
        quantizer: Any = MatMulNBitsQuantizer(graph.model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(file), use_external_data_format=True)


def check_texts(fields: Sequence[str], file: Path | None) -> tuple[list[Mapping[str, Any]], str]:
    """The inputs that an export is checked on, and where they are from: of `file`, else of the project's transfer set, else fixed ones.

    Of a file those whose hashes are the smallest. Raises UsageError if it cannot be read or has no row.
    """
    file = file or (TRANSFER if TRANSFER.is_file() else None)
    if file is None:
        return [dict.fromkeys(fields, text) for text in PROBES], f"{len(PROBES)} fixed texts, since there is no transfer set here"
    rows = read_items(str(file), dict(zip(fields, fields, strict=True)), {})
    texts = nsmallest(TEXTS, (item.fields for item in rows if item.error is None), key=sha256_json)
    if not texts:
        raise UsageError(f"{file}: no row that can be read. Name another file with --check.")
    return texts, str(file)


def compare(student: Path, exported: Path, texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answers of an exported folder beside those of its student: labels changed, largest difference of a probability, and costs.

    Raises UsageError if none of the texts can be answered, ShotlessError if the two do not read a text as the same tokens.
    """
    sides = {}
    for name, folder in (("student", student), ("exported", exported)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # whose memory is its own
            sides[name] = process.submit(answered, folder, texts).result()
    pairs = [pair for pair in zip(*(side.pop("answers") for side in sides.values()), strict=True) if pair[0][0] is not None]
    if not pairs:
        raise UsageError("--check: the student can answer none of these texts. Name a file of texts as it will see them.")
    if any(before[1] != after[1] for before, after in pairs):
        raise ShotlessError(f"{student}: tokenizers alone reads a text as other tokens than transformers. Use --format transformers.")
    before, after = (np.array([pair[side][0] for pair in pairs]) for side in (0, 1))  # [texts, L]
    return {
        "texts": len(pairs),
        "labels_changed": int((before.argmax(-1) != after.argmax(-1)).sum()),
        "largest_difference": float(np.abs(before - after).max()),
        **sides,
    }


def export_onnx(student: Trained, folder: Path, int8: bool, most_changed: float, check: Path | None) -> str:
    """Fill `folder` with a student as an ONNX graph, its manifest and card; returns how it compares with the student.

    Raises UsageError for what cannot be exported, before work; ThresholdError if more than a share `most_changed` of the labels change.
    """
    check_exportable(student)
    texts, origin = check_texts(student.task.fields, check)
    about = write_onnx(student, folder, int8)
    found = {**compare(student.folder, folder, texts), "from": origin}
    if found["labels_changed"] > most_changed * found["texts"]:
        way = "Export without --int8, or allow it with --most-changed." if int8 else "Use --format transformers."
        raise ThresholdError(
            f"{student.folder}: {found['labels_changed']} of {found['texts']} labels change ({origin}), more than --most-changed "
            f"{most_changed:g} allows; a probability by up to {found['largest_difference']:.3f}. Nothing was written. {way}"
        )
    write_manifest(folder, {**about, "check": found})
    write_text(card(student, about["onnx"], found), folder / "README.md")
    return figures(found)


def figures(found: Mapping[str, Any]) -> str:
    """A check's result in Markdown."""
    rows = (("milliseconds a text (median)", "milliseconds"), ("MB on disk", "disk_mb"), ("MB of memory (peak)", "peak_mb"))
    table = "".join(f"| {what} | {found['student'][key]:,} | {found['exported'][key]:,} |\n" for what, key in rows)
    return (
        f"{found['labels_changed']} of {found['texts']} labels changed; a probability by up to {found['largest_difference']:.2g} "
        f"({found['from']}).\n\n| one thread, one text at a time | student | exported |\n|---|---:|---:|\n{table}"
    )


def card(student: Trained, about: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The student's card with this folder's own part in place of how it is loaded; that part alone if the student has no card."""
    inputs, labels = (", ".join(f"`{name}`" for name in names) for names in (about["inputs"], student.task.labels))
    part = f"""## Loading it

`shotless predict --student FOLDER`, `shotless serve` and `pipeline.serving.Predictor` take this folder, with `onnxruntime` and `tokenizers`
and without torch. `{ONNX_FILE}`: {inputs} (int64, padded on the right) → `label_logprobs` of {labels}, in nats; probabilities \
are softmax(`label_logprobs` / {student.temperature:g}). \
{"Its matrices are 8-bit integers." if about["int8"] else "Its weights are float32."}

{figures(found)}
"""
    own = student.folder / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else f"# {student.name}\n\n## Loading it\n"
    text = text.replace("\nlibrary_name: transformers\n", "\nlibrary_name: onnx\n")
    return re.sub(r"(?ms)^## Loading it$.*?(?=^## |\Z)", lambda _: part, text)
