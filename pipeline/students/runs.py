"""Training a student or a tuned teacher, to its folder and its metrics.

Whatever is learnt from (`pipeline.students.jobs`), the way is one: one run at a time for a folder, from a checkpoint where one was left, the
weights written before what stands beside them says that they are whole.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedModel

from pipeline.files import make_folder, write_json, write_sealed_json
from pipeline.files import sha256_text
from pipeline.models.loading import context_limit, load_model, load_tokenizer, parameter_counts, save_model
from pipeline.models.machine import default_device, use_machine
from pipeline.models.provenance import FILE, identity_entries
from pipeline.models.truncation import cut_layers, parse_layers
from pipeline.params import StudentParams, TunedTeacherParams
from pipeline.students.checkpoint import SECONDS_BETWEEN, Checkpoint
from pipeline.students.jobs import Job, Places, student_job, tokens_of, tuned_job
from pipeline.students.lessons import check_lengths
from pipeline.students.loop import Trained
from pipeline.students.outputs import final_loss, held_back_summary, write_curve, write_runtime
from pipeline.students.processes import Processes
from pipeline.students.training import ALONE, train
from pipeline.task import Task


@dataclass(frozen=True)
class Ran:
    """What a training left to be written down."""

    job: Job
    values: dict[str, Any]
    trained: Trained
    threads: int
    checkpoint: Checkpoint


def train_student(
    name: str,
    params: StudentParams,
    task: Task,
    places: Places,
    threads: int | None = None,
    seconds_between: float = SECONDS_BETWEEN,
    processes: Processes = ALONE,
) -> None:
    """Write `artifacts/students/NAME`, `metrics/train/NAME.json`, `metrics/curves/NAME.csv`, `metrics/runtime/student-NAME.json`.

    One training for each of `params.runs`, all in that folder. `seconds_between` checkpoints. Of several `processes` each calls this, and
    the first one writes. Raises UsageError and MismatchError on bad input before training, ShotlessError where it diverges.
    """
    tokens = tokens_of(places.artifacts / params.base, task)
    jobs = {place: student_job(name, run, tokens, places) for place, run in params.runs.items()}
    output = places.artifacts / "students" / name
    with _one_run(output, places.work) if processes.first else nullcontext():
        ran = {
            job.params.seed: _run(job, output / place, places, threads, seconds_between, len(jobs) > 1, processes)
            for place, job in jobs.items()
        }
        if processes.first:
            _write_metrics(name, ran, places.metrics)


def tune_teacher(
    name: str, params: TunedTeacherParams, task: Task, places: Places, threads: int | None = None, seconds_between: float = SECONDS_BETWEEN
) -> None:
    """Fine-tune a teacher's model on the demonstrations' labels (PBFT), with no layer cut.

    Writes `artifacts/tuned/NAME`, `metrics/train/tuned-NAME.json`, `metrics/curves/tuned-NAME.csv`, `metrics/runtime/tuned-NAME.json`.
    """
    job = tuned_job(name, params, tokens_of(places.artifacts / params.base, task), places)
    output = places.artifacts / "tuned" / name
    with _one_run(output, places.work):
        ran = _run(job, output, places, threads, seconds_between)
        _write_metrics(f"tuned-{name}", {params.seed: ran}, places.metrics)


@contextmanager
def _one_run(output: Path, work: Path) -> Iterator[None]:
    """One run at a time trains for `output`: a second one waits, and then trains to the same bytes."""
    folder = work / "training"
    make_folder(folder)
    with FileLock(folder / f"{sha256_text(str(output.resolve()))[:16]}.lock"):
        yield


def _run(
    job: Job,
    output: Path,
    places: Places,
    threads: int | None,
    seconds_between: float,
    is_one_of_many: bool = False,
    processes: Processes = ALONE,
) -> Ran:
    """Train and write the folder. Of many trainings for one folder of DVC's, each keeps its end until all are done."""
    base = places.artifacts / job.base
    check_lengths(job.examples, job.rows, job.tokens, context_limit(base), base)
    used_threads = use_machine(processes.threads(threads))
    provenance = job.provenance(base)
    own = f"{job.kind}-{job.name}" + (f"-seed{job.params.seed}" if is_one_of_many else "")
    fingerprint = job.fingerprint(provenance, used_threads, processes.count)
    checkpoint = Checkpoint(places.work / "training", own, fingerprint, seconds_between, is_one_of_many)
    model = load_model(base, device=default_device())
    if job.layers is not None:
        cut_layers(model, parse_layers(job.layers, model.config.get_text_config().num_hidden_layers))
    adapter = (output / "adapter", job.base) if job.params.adapters == "kept" else None
    title = f"{job.kind} {job.name}" + (f", seed {job.params.seed}" if is_one_of_many else "")
    trained = train(
        model,
        job.tokens.completions,
        job.terms,
        job.params,
        title=title,
        cached=job.cached,
        checkpoint=checkpoint,
        held_back=job.held_back,
        adapter=adapter,
        processes=processes,
    )
    if processes.first:
        _write_model(model, base, output)
    counts = {
        "steps": len(trained.losses),
        "examples": trained.examples,
        "tokens": trained.tokens,
        "parameters": parameter_counts(model)[0],
        "trained_parameters": trained.trained_parameters,
        "layers": int(model.config.get_text_config().num_hidden_layers),
    }
    choice = held_back_summary(trained, len(job.held_back.examples) + len(job.held_back.cached)) if job.held_back else {}
    if processes.first:
        own = identity_entries(output, provenance)
        about = {**provenance, **own, "counts": counts, **choice, "trains": trained.trains, "forward": trained.forward}
        write_sealed_json(about, output / FILE)
    return Ran(job, counts | choice | {"final_loss": final_loss(trained.losses)}, trained, used_threads, checkpoint)


def _write_model(model: PreTrainedModel, base: Path, output: Path) -> None:
    make_folder(output)
    model.config._name_or_path = ""
    save_model(model, load_tokenizer(base), output)


def _write_metrics(name: str, ran: Mapping[int, Ran], metrics: Path) -> None:
    """Metrics of the first seed, with each seed's loss and choice of step where there are several; then no checkpoint is needed."""
    first = next(iter(ran.values()))
    values: dict[str, Any] = {**first.values, "base": first.job.base, "learn_from": first.job.learn_from}
    if len(ran) > 1:
        kept = ("steps", "final_loss", "best_step", "held_back_kl_nats")
        values["seeds"] = {str(seed): {key: run.values[key] for key in kept if key in run.values} for seed, run in ran.items()}
    write_json(values, metrics / "train" / f"{name}.json")
    write_curve({seed: run.trained for seed, run in ran.items()}, first.job.params, metrics / "curves" / f"{name}.csv")
    write_runtime([run.trained for run in ran.values()], first.threads, metrics / "runtime" / f"{first.job.kind}-{first.job.name}.json")
    for run in ran.values():
        run.checkpoint.remove()
