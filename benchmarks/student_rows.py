"""`python -m benchmarks.student_rows ROW MODEL LESSON STEPS BATCH`: one measurement of benchmarks.student, printed as a line of JSON.

The clock runs over the training alone, not over loading. Memory is the peak of the resident set above what the process held once the
model's weights were in memory.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "frozen": {"freeze_embeddings": True},
    "lora": {"tuning": "lora"},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
}
LEARNING_RATE = 1e-5


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


def load(folder: str) -> PreTrainedModel:
    """The model with all its weights in memory, not only mapped."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    return model


def own(name: str, model: PreTrainedModel, lesson: dict[str, Any], steps: int, batch_size: int) -> tuple[int, float]:
    """Tokens and seconds of this project's training."""
    from pipeline.params import TuningParams
    from pipeline.student.batches import Example, Term
    from pipeline.student.training import train

    made = [
        Example(f"{number:064x}", tuple(row["ids"]), tuple(0.9 if n == row["label"] else 0.1 for n in range(len(lesson["completions"]))))
        for number, row in enumerate(lesson["rows"])
    ]
    params = TuningParams(steps=steps, batch_size=batch_size, learning_rate=LEARNING_RATE, **TUNINGS[name])
    trained = train(model, lesson["completions"], [Term("kl", 1.0, batch_size, tuple(made))], params, title=name)
    return trained.tokens, trained.seconds


def count_tokens(model: PreTrainedModel) -> list[int]:
    """A list that grows by each batch's query tokens: what is read and is no padding, without the answers."""
    counted: list[int] = []

    def hook(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        counted.append(int(((kwargs["labels"] == -100) & kwargs["attention_mask"].bool()).sum()))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return counted


def settings(steps: int, batch_size: int, folder: str) -> dict[str, Any]:
    """What the trainers are told: float32 on the CPU, nothing saved or logged; the rest as they come."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }


def trainer_padded(model: PreTrainedModel, folder: str, lesson: dict[str, Any], steps: int, batch_size: int) -> tuple[int, float]:
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
        return timed(trainer.train, model)


def sft_trainer(model: PreTrainedModel, folder: str, lesson: dict[str, Any], steps: int, batch_size: int) -> tuple[int, float]:
    """TRL's SFTTrainer on prompts and completions; without gradient checkpointing, which it turns on by itself and which costs time."""
    from datasets import Dataset  # type: ignore[import-not-found]
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

    data = Dataset.from_list([{"prompt": row["text"], "completion": row["answer"]} for row in lesson["rows"]])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(**settings(steps, batch_size, scratch), gradient_checkpointing=False)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        return timed(trainer.train, model)


def timed(run: Callable[[], Any], model: PreTrainedModel) -> tuple[int, float]:
    """Tokens and seconds of a trainer."""
    counted = count_tokens(model)
    started = time.monotonic()
    run()
    return sum(counted), time.monotonic() - started


def main(name: str, folder: str, lesson_file: str, steps: int, batch_size: int) -> None:
    """Measure one row."""
    lesson = json.loads(Path(lesson_file).read_text("utf-8"))
    model = load(folder)
    with peak_rss() as peak:
        if name in TUNINGS:
            tokens, seconds = own(name, model, lesson, steps, batch_size)
        else:
            tokens, seconds = {"trainer_padded": trainer_padded, "sft_trainer": sft_trainer}[name](model, folder, lesson, steps, batch_size)
    print(json.dumps({"tokens_per_s": tokens / seconds, "peak_rss_above_model_bytes": peak["bytes"], "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
