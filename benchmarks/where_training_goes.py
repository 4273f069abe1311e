"""Where a training's time goes: `python -m benchmarks.where_training_goes MODEL TRANSFER [TUNING]`, seconds by kind of operation."""

import json
import sys
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.student import write_lesson
from benchmarks.student_rows import load, own
from pipeline.models.machine import use_machine

STEPS, BATCH_SIZE = 6, 16
KINDS = {
    "products with weights": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::amax"),
    "gathers and scatters": (
        "aten::index",
        "aten::index_put_",
        "aten::_index_put_impl_",
        "aten::index_add_",
        "aten::embedding_dense_backward",
    ),
    "activations": ("aten::silu", "aten::silu_backward", "aten::gelu", "aten::gelu_backward"),
    "optimizer and clipping": (
        "aten::_fused_adamw_",
        "aten::_foreach_norm",
        "aten::linalg_vector_norm",
        "aten::_foreach_mul_",
        "aten::zero_",
    ),
    "elementwise: norms, rotary positions, residuals, sums of gradients": (
        "aten::mul",
        "aten::mul_",
        "aten::add",
        "aten::add_",
        "aten::addcmul",
        "aten::sum",
        "aten::mean",
        "aten::cat",
        "aten::neg",
        "aten::rsqrt_",
    ),
    "copies and fills": ("aten::copy_", "aten::fill_"),
}


def main() -> None:
    """Print seconds by kind; what is none of `KINDS` is "the rest"."""
    folder, transfer, *tuning = sys.argv[1:]
    use_machine(None)
    model = load(folder)
    with tempfile.TemporaryDirectory() as scratch:
        lesson = json.loads(
            write_lesson(Path(folder), Path(transfer), STEPS * BATCH_SIZE, Path(scratch) / "lesson.json").read_text("utf-8")
        )
    with profile(activities=[ProfilerActivity.CPU]) as run:
        own(tuning[0] if tuning else "full", model, lesson, STEPS, BATCH_SIZE)
    times = {event.key: event.self_cpu_time_total / 1e6 for event in run.key_averages()}
    seconds = {kind: sum(times.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    rest = {name: value for name, value in times.items() if not any(name in names for names in KINDS.values())}
    largest = dict(sorted(rest.items(), key=lambda item: -item[1])[:6])
    print(json.dumps(seconds | {"the rest": sum(rest.values()), "largest of the rest": largest}, indent=1))


if __name__ == "__main__":
    main()
