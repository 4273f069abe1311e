"""`python -m benchmarks.student`: training a student, side by side with what else there is → benchmarks/results/student.json and a table.

Every row is measured in a process that does nothing else, on the same examples, model, batch size, steps and threads, in turns over several
rounds, so that a slow minute of the machine hits all alike; the medians are reported. `limit_*` is what the matrix products alone must
take: 6 operations for each learnt weight and token, 4 for each frozen one, at the rate at which this machine multiplies matrices of the
model's shapes, in the library for products that the training itself uses. Only the layers' matrices count: the embeddings are looked up,
and the head sees one position of each row. The last layer's queries and MLP see that position alone too, so the limit is a little generous.

`encoder` is a small encoder, trained on the same texts, and what an answer of it costs: one text, one thread, in a process that only
answers. `encoder_onnx_int8` is the same of its export.

`--only` measures some of the rows and leaves the others in the JSON as they are, so that a run can be made in parts; rows of another model,
batch size or number of steps are not mixed in.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import about
from benchmarks.training_limit import limits
from pipeline.errors import UsageError
from pipeline.files import sha256_text, write_json
from pipeline.models.trained import load_tokens
from pipeline.params import load_params
from pipeline.schema import NO_CONTEXT, read_examples
from pipeline.task import Task

RESULTS = Path("benchmarks/results/student.json")
OWN = ("full", "frozen", "lora", "bitfit", "head")
OTHERS = ("trainer_padded", "trainer_same_products", "sft_trainer", "sft_same_products")
NEEDS_TRL = ("sft_trainer", "sft_same_products")
LIMITS = "limits"
ENCODERS = ("encoder", "encoder_onnx_int8")
ANSWERED = 100
"""Texts that answers are timed on."""
TRL = "trl==1.16.0"


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")] = Path("artifacts/models/smollm2"),
    transfer: Annotated[Path, typer.Option(help="The texts, as `prepare` writes them.")] = Path("artifacts/data/transfer.parquet"),
    encoder: Annotated[Path, typer.Option(help="The folder of an encoder's student.")] = Path("artifacts/students/encoder"),
    steps: int = 12,
    batch_size: int = 16,
    rounds: int = 2,
    only: Annotated[str, typer.Option(help="Some of the rows, separated by commas.")] = "",
    work: Annotated[Path, typer.Option(help="Where TRL's virtual environment goes.")] = Path(".work/bench"),
    results: Path = RESULTS,
) -> None:
    """Measure, print, write."""
    choices = (*OWN, *OTHERS, *ENCODERS, LIMITS)
    wanted = only.split(",") if only else list(choices)
    if unknown := set(wanted) - set(choices):
        raise typer.BadParameter(f"no rows {sorted(unknown)}; there are {', '.join(choices)}")
    interpreters = dict.fromkeys(wanted, sys.executable)
    notes: list[str] = []
    if set(wanted) & set(NEEDS_TRL):
        try:
            interpreters |= dict.fromkeys(NEEDS_TRL, trl_interpreter(work))
        except subprocess.CalledProcessError as error:
            notes.append(f"TRL's rows left out: installing {TRL} failed: {(error.stderr or '').strip()[-300:]}")
            wanted = [name for name in wanted if name not in NEEDS_TRL]
    if set(wanted) & set(ENCODERS) and not (encoder / "manifest.json").is_file():
        notes.append(f"encoder's rows left out: no {encoder}. `shotless run student@encoder` makes it.")
        wanted = [name for name in wanted if name not in ENCODERS]
    with tempfile.TemporaryDirectory() as scratch:
        lesson = write_lesson(model, transfer, steps * batch_size, Path(scratch) / "lesson.json")
        subjects, answering = dict.fromkeys(wanted, (model, lesson)), {name: encoder for name in ENCODERS if name in wanted}
        if answering:
            of_encoder = write_lesson(encoder, transfer, steps * batch_size, Path(scratch) / "of_encoder.json")
            subjects |= dict.fromkeys(answering, (encoder, of_encoder))
        if "encoder_onnx_int8" in answering:
            answering["encoder_onnx_int8"] = Path(scratch) / "onnx"
            if fault := export(encoder, answering["encoder_onnx_int8"]):
                notes.append(f"encoder_onnx_int8 left out: {fault}")
                wanted.remove("encoder_onnx_int8")
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted if name != LIMITS}
        for turn in range(rounds):
            for name in measured:
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                trains = name != "encoder_onnx_int8"
                row = measure(interpreters[name], name, *subjects[name], steps, batch_size) if trains else {}
                measured[name].append(row | (answer(answering[name], subjects[name][1]) if name in answering else {}))
        tokens_a_step = round(batch_size * statistics.fmean(len(row["ids"]) for row in json.loads(lesson.read_text())["rows"]))
    rows = [{"name": name, **_median(found)} for name, found in measured.items()]
    machine = about()
    compared = {"model": model.name, "steps": steps, "batch_size": batch_size, "mean_tokens_a_step": tokens_a_step}
    found = compared | {"rounds": rounds, **machine, "notes": notes}
    if LIMITS in wanted:
        limit = limits(model, tokens_a_step)
        rows += [{"name": name, "tokens_per_s": value, "peak_rss_above_model_bytes": None} for name, value in limit.tokens_per_s.items()]
        found |= {"matrix_operations_per_s": limit.operations_per_s, "layer_matrix_parameters": limit.parameters}
    results.parent.mkdir(parents=True, exist_ok=True)
    whole = merged(rows, found, results, tuple(compared))
    write_json(whole, results)
    print(table(whole["rows"], notes))


def merged(rows: list[dict[str, Any]], about: dict[str, Any], results: Path, compared: tuple[str, ...]) -> dict[str, Any]:
    """The new rows among those that the file has, each name once, where what `compared` names is the same; else the new ones alone."""
    before = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    if not before or any(before.get(key) != about[key] for key in compared):
        return {"rows": rows, **about}
    by_name = {row["name"]: row for row in [*before["rows"], *rows]}
    return before | about | {"rows": list(by_name.values())}


def write_lesson(model: Path, transfer: Path, count: int, file: Path) -> Path:
    """The rows that all learn, as JSON: fields, text, token ids, and a label that follows from the text's hash.

    No teacher is needed for speed. They are `count` rows, so that every row is learnt once and all read the same, whatever order they take
    them in.
    """
    if not (model / "config.json").is_file() or not transfer.is_file():
        raise UsageError(f"{model} and {transfer} are needed; `make run` makes them.")
    task = Task(load_params().task)
    tokens = load_tokens(task, model)
    examples = read_examples(transfer, task.fields)[:count]
    texts = [task.query(example.fields) for example in examples]
    if len(texts) < count:
        raise UsageError(
            f"{transfer} has {len(texts)} texts, and steps × batch size are {count}; ask for fewer with --steps or --batch-size."
        )
    ids = [prompt.ids for prompt in tokens.prompts(NO_CONTEXT, examples)]
    labels = [int(sha256_text(text), 16) % len(tokens.completions) for text in texts]
    verbalisers = task.verbalisers
    rows = [
        {"fields": example.fields, "text": text, "ids": row, "label": label, "answer": verbalisers[label]}
        for example, text, row, label in zip(examples, texts, ids, labels, strict=True)
    ]
    file.write_text(json.dumps({"rows": rows, "completions": tokens.completions}), "utf-8")
    return file


def measure(interpreter: str, name: str, model: Path, lesson: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """One row, in a process of its own."""
    return _figures(name, [interpreter, "-m", "benchmarks.student_rows", name, str(model), str(lesson), str(steps), str(batch_size)])


def export(student: Path, folder: Path) -> str | None:
    """Write a student's folder as int8 ONNX; what went wrong, if something did."""
    command = [sys.executable, "-c", "from pipeline.cli import app; app()", "export", "--student", f"{student.resolve()}"]
    done = subprocess.run([*command, "-o", str(folder), "--format", "onnx", "--int8"], capture_output=True, text=True, check=False)
    return (done.stderr or done.stdout).strip()[-300:] if done.returncode else None


def answer(student: Path, lesson: Path) -> dict[str, Any]:
    """What an answer of a student's folder costs, in a process that only answers the first texts of a lesson."""
    rows = json.loads(lesson.read_text("utf-8"))["rows"][:ANSWERED]
    found = _figures(str(student), [sys.executable, "-m", "benchmarks.answering", str(student), str(lesson), str(len(rows))])
    return found | {"mean_text_tokens": statistics.fmean(len(row["ids"]) for row in rows)}


def _figures(name: str, command: list[str]) -> dict[str, Any]:
    """What a process prints last, as JSON."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def trl_interpreter(work: Path) -> str:
    """Python of a virtual environment with TRL, which sees this one's packages, so that torch and transformers are the same."""
    folder, python = work / "trl", work / "trl" / "bin" / "python"
    if not (folder / TRL).is_file():
        _quietly(sys.executable, "-m", "venv", str(folder))
        ours = next(path for path in map(Path, sys.path) if path.name == "site-packages")
        theirs = next(folder.glob("lib/python*/site-packages"))
        (theirs / "shotless.pth").write_text(f"{ours}\n", "utf-8")
        # what both need must be ours: pip is told to keep to the constraints of the project
        constraints = ["--constraint", "constraints.txt"] if Path("constraints.txt").is_file() else []
        _quietly(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints, TRL)
        (folder / TRL).touch()
    return str(python.absolute())


def _quietly(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; None for a training's figures if there was none."""
    middle = dict[str, Any](tokens_per_s=None, peak_rss_above_model_bytes=None)
    of_answers = ("latency_ms", "peak_rss_mb", "disk_mb", "mean_text_tokens")
    middle |= {key: statistics.median(entry[key] for entry in found) for key in (*middle, *of_answers) if key in found[0]}
    return middle | {"all_tokens_per_s": [entry["tokens_per_s"] for entry in found if "tokens_per_s" in entry]}


def table(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The rows for a terminal, with the ratios that the project aims at."""
    by_name = {row["name"]: row for row in rows}
    columns = {  # key: title, unit, digits, factor
        "tokens_per_s": ("tokens/s", "", 1, 1.0),
        "peak_rss_above_model_bytes": ("peak above model", " MB", 0, 1e-6),
        "latency_ms": ("one text", " ms", 2, 1.0),
        "peak_rss_mb": ("peak memory", " MB", 0, 1.0),
        "disk_mb": ("on disk", " MB", 0, 1.0),
    }
    lines = [f"{'':22}" + "".join(f"{title:>18}" for title, *_ in columns.values())]
    for row in rows:
        cells = ("–" if row.get(key) is None else f"{row[key] * by:,.{digits}f}{unit}" for key, (_, unit, digits, by) in columns.items())
        lines.append(f"{row['name']:22}" + "".join(f"{cell:>18}" for cell in cells))
    full = by_name.get("full")
    if full:
        aims = [
            (
                "trainer_padded",
                "full is {:.2f}× the padded Trainer (aim: at least 1.5×)",
                lambda r: full["tokens_per_s"] / r["tokens_per_s"],
            ),
            (
                "trainer_same_products",
                "full is {:.2f}× the padded Trainer with the same products",
                lambda r: full["tokens_per_s"] / r["tokens_per_s"],
            ),
        ]
        aims.append(
            ("limit_full", "full takes {:.2f}× the limit's time (aim: at most 1.25×)", lambda r: r["tokens_per_s"] / full["tokens_per_s"])
        )
        for name in ("lora", "bitfit"):
            share = f"{name} takes {{:.0%}} of full's peak above the model (aim: at most 40 %)"
            aims.append((name, share, lambda r: r["peak_rss_above_model_bytes"] / full["peak_rss_above_model_bytes"]))
            aims.append((name, f"{name} is {{:.2f}}× full's speed (aim: at least 1×)", lambda r: r["tokens_per_s"] / full["tokens_per_s"]))
        lines += [text.format(ratio(by_name[name])) for name, text, ratio in aims if name in by_name]
    if int8 := by_name.get("encoder_onnx_int8"):
        lines.append(
            f"encoder_onnx_int8 takes {int8['latency_ms']:.2f} ms for a text of {int8['mean_text_tokens']:.0f} tokens, with one thread "
            f"(aim: at most 3.5 ms for 27), and {int8['peak_rss_mb']:.0f} MB (aim: at most 110)"
        )
    return "\n".join([*lines, *notes])


if __name__ == "__main__":
    typer.run(main)
