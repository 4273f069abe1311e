"""`python -m benchmarks.student_rows ROW MODEL LESSON STEPS BATCH`: one measurement of benchmarks.student, printed as a line of JSON.

Every row takes each example of the lesson once, in an order of its own. The clock runs from the end of the last warm-up step to the end of
the last step, so that neither loading nor what is done once a training counts: a lesson has a dozen steps, a training hundreds. What is
done once is in `seconds_in_all`. Head-only training does its work before its first step, so there all is counted. Memory is the peak of the
resident set above what the process held once the model's weights were in memory.

`trainer_padded` and `sft_trainer` run as their users run them, which on some processors is a slower library for matrix products than the
one that this project chooses (`pipeline/models/machine.py`); `trainer_same_products` and `sft_same_products` are given that choice too.
"""

import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"freeze_embeddings": True},
    "lora": {"tuning": "lora"},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
    "encoder": {},
}
IMPORTS = {"own": ("pipeline.students.loop", "peft"), "trainer_padded": (), "sft_trainer": ("datasets", "trl")}
"""What a row's code loads by itself, loaded before memory is looked at: it is no memory of the training."""
SAME_PRODUCTS = {"trainer_same_products": "trainer_padded", "sft_same_products": "sft_trainer"}
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LEARNING_RATE = 1e-5
WARM_UP_STEPS = 2
"""Before the clock starts: page faults of gradients and moments, and the matrix library's first look at each shape."""


@contextmanager
def peak_rss() -> Iterator[dict[str, int]]:
    """The growth of the resident set inside the block, at its peak, looked at every 2 ms; bytes."""
    process, found, over = psutil.Process(), {"bytes": 0}, threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.002):
            found["bytes"] = max(found["bytes"], process.memory_info().rss - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def load(folder: str, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The model with all its weights in memory, not only mapped."""
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    return model


def steps_ended() -> list[float]:
    """A list that grows by the time at the end of each step of any optimizer."""
    ends: list[float] = []

    def ended(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.monotonic())

    register_optimizer_step_post_hook(ended)
    return ends


def own(name: str, model: PreTrainedModel, lesson: dict[str, Any], steps: int, batch_size: int) -> list[int]:
    """Run the project's training; tokens of each step."""
    from pipeline.params import TuningParams
    from pipeline.students.data import Batches, LabelTerm, TargetRow
    from pipeline.students.loop import train

    made = [
        TargetRow(f"{number:064x}", tuple(row["ids"]), tuple(0.9 if n == row["label"] else 0.1 for n in range(len(lesson["completions"]))))
        for number, row in enumerate(lesson["rows"])
    ]
    params = TuningParams(steps=steps, batch_size=batch_size, learning_rate=LEARNING_RATE, **TUNINGS[name])
    term = LabelTerm("kl", 1.0, batch_size, made)
    trained = train(model, lesson["completions"], [term], params, title=name)
    batches = Batches(made, batch_size, params.seed)
    tokens = [sum(len(row.ids) for row in batches.at(step)) for step in range(steps)]
    assert sum(tokens) == trained.tokens
    return tokens


def count_tokens(model: PreTrainedModel) -> list[int]:
    """A list that grows by each step's query tokens: what is read and is no padding, without the answers."""
    counted: list[int] = []

    def hook(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        counted.append(int(((kwargs["labels"] == -100) & kwargs["attention_mask"].bool()).sum()))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return counted


def settings(steps: int, batch_size: int, folder: str) -> dict[str, Any]:
    """What the trainers are told: float32, nothing saved or logged; the rest as they come."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "dataloader_pin_memory": False,
    }


def trainer_padded(model: PreTrainedModel, folder: str, lesson: dict[str, Any], steps: int, batch_size: int) -> list[int]:
    """The Trainer of transformers with its own loss on the answer's token, batches padded to their longest row."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = []
    for row in lesson["rows"]:
        answer = lesson["completions"][row["label"]]
        ids = [*row["ids"], *answer]
        data.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(row["ids"]) + answer})
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(**settings(steps, batch_size, scratch))
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer))  # type: ignore[arg-type]
        counted = count_tokens(model)
        trainer.train()
    return counted


def sft_trainer(model: PreTrainedModel, folder: str, lesson: dict[str, Any], steps: int, batch_size: int) -> list[int]:
    """TRL's SFTTrainer on prompts and completions; without gradient checkpointing, which it turns on by itself and which costs time."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    data = Dataset.from_list([{"prompt": row["text"], "completion": row["answer"]} for row in lesson["rows"]])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(**settings(steps, batch_size, scratch), gradient_checkpointing=False)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        counted = count_tokens(model)
        trainer.train()
    return counted


def measure(name: str, folder: str, lesson: dict[str, Any], steps: int, batch_size: int) -> dict[str, Any]:
    """One row, as it stands in the JSON."""
    same_products = name in TUNINGS or name in SAME_PRODUCTS
    torch.set_num_threads(THREADS)
    if same_products:
        from pipeline.models.machine import use_machine

        use_machine(THREADS)
    for module in IMPORTS["own" if name in TUNINGS else SAME_PRODUCTS.get(name, name)]:
        importlib.import_module(module)
    model, ends = load(folder, AutoModelForSequenceClassification if name == "encoder" else AutoModelForCausalLM), steps_ended()
    with peak_rss() as peak:
        started = time.monotonic()
        if name in TUNINGS:
            tokens = own(name, model, lesson, steps, batch_size)
        else:
            run = trainer_padded if SAME_PRODUCTS.get(name, name) == "trainer_padded" else sft_trainer
            tokens = run(model, folder, lesson, steps, batch_size)
        in_all = time.monotonic() - started
    if len(ends) != steps or len(tokens) != steps:
        raise SystemExit(f"{name}: {len(ends)} updates and {len(tokens)} batches in {steps} steps")
    counted, seconds = sum(tokens), in_all
    if name != "head":
        counted, seconds = sum(tokens[WARM_UP_STEPS:]), ends[-1] - ends[WARM_UP_STEPS - 1]
    return {
        "tokens_per_s": counted / seconds,
        "peak_rss_above_model_bytes": peak["bytes"],
        "peak_device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "tokens": sum(tokens),
        "seconds_in_all": in_all,
        "products": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


def main(name: str, folder: str, lesson_file: str, steps: int, batch_size: int) -> None:
    """Measure one row and print it."""
    print(json.dumps(measure(name, folder, json.loads(Path(lesson_file).read_text("utf-8")), steps, batch_size)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
