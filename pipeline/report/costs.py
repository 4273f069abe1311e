"""The tables of cost: one example with each method, prompts of more and more demonstrations, and when a student has paid for itself."""

from pipeline.report.cells import Cell, Rows, Table, as_float
from pipeline.report.collect import Inputs, Json
from pipeline.report.formatting import DASH, quantity, scaled


def cost(document: Json, inputs: Inputs) -> Table:
    """What one example costs with each method; unmeasured ones say so."""
    columns = [
        "Method",
        "prompt tokens",
        "passes an example",
        "latency, ms",
        "examples a second, batched",
        "peak memory",
        "parameters",
        "size on disk",
    ]
    rows = []
    for name, method in document["methods"].items():
        found = method["cost"]
        if found is None:
            why = "measured on another model" if name in inputs.stale_cost else "not measured"
            rows.append([Cell(name, why, code=True), *[Cell(DASH)] * (len(columns) - 1)])
            continue
        rows.append(
            [
                Cell(name, code=True),
                Cell(quantity(as_float(found.get("prompt_tokens")))),
                Cell(quantity(found.get("forward_passes"))),
                Cell(quantity(as_float(found.get("latency_ms"))), _p95(found)),
                Cell(_throughput(found)),
                Cell(scaled(found.get("peak_rss_bytes"), "B")),
                Cell(scaled(found.get("parameters"))),
                Cell(scaled(found.get("disk_bytes", found.get("weights_bytes")), "B")),
            ]
        )
    return Table("cost-table", "Cost of answering one example on this machine; latency is the median.", columns, [Rows("", rows)])


def by_demonstrations(inputs: Inputs, reference: str) -> Table | None:
    """What a prompt of so many demonstrations costs, for each model that the reference prompts; None where it was not measured."""
    rows = []
    for entry in inputs.cost.get(reference, {}).get("by_demonstrations") or []:
        note = f"no room: the model takes {entry['too_long_for']:,} tokens" if "too_long_for" in entry else ""
        note = "demonstrations used again to fill it" if entry.get("repeated") else note
        rows.append(
            [
                Cell(str(entry["demonstrations"]), note),
                Cell(str(entry["model"]).removeprefix("models/")),
                Cell(quantity(as_float(entry.get("prompt_tokens")))),
                Cell(quantity(as_float(entry.get("latency_ms"))), _p95(entry)),
                Cell(scaled(entry.get("peak_rss_bytes"), "B")),
                Cell(_throughput(entry)),
            ]
        )
    columns = ["Demonstrations", "model", "prompt tokens", "latency, ms", "peak memory", "examples a second, batched"]
    caption = "What the same model costs, prompted with more and more demonstrations."
    return Table("by-demonstrations", caption, columns, [Rows("", rows)], text_columns=(0, 1)) if rows else None


def break_even(inputs: Inputs) -> Table | None:
    """Seconds spent on each student and the number of predictions that win them back; None where nobody has counted them."""
    rows = []
    for name, entry in ((inputs.break_even or {}).get("students") or {}).items():
        parts = [seconds for key in ("capture_seconds", "tuning_seconds") for seconds in (entry.get(key) or {}).values()]
        teachers = None if None in parts else float(sum(parts))
        alone, batched = (entry.get(key) or {} for key in ("one_by_one", "batched"))
        rows.append(
            [
                Cell(name, code=True),
                Cell(quantity(teachers)),
                Cell(quantity(as_float(entry.get("training_seconds")))),
                *(_won(part) for part in (alone, batched)),
            ]
        )
    columns = ["Student", "teachers’ tuning and scoring, s", "training, s", "predictions one by one", "predictions in batches"]
    reference = (inputs.break_even or {}).get("reference")
    caption = f"After how many predictions a student has won back the time spent on it, against prompting {reference} each time."
    return Table("break-even", caption, columns, [Rows("", rows)]) if rows else None


def lacking(inputs: Inputs) -> list[str]:
    """What break-even could not be counted from, with the commands that make it, each once."""
    students = ((inputs.break_even or {}).get("students") or {}).values()
    return list(dict.fromkeys(line for entry in students for line in entry.get("missing") or []))


def _won(part: Json) -> Cell:
    count = part.get("predictions")
    saved = as_float(part.get("saved_seconds"))
    if count is None:
        return Cell("never" if saved is not None and saved <= 0 else DASH)
    return Cell(f"{count:,}", "" if saved is None else f"saves {1000 * saved:,.0f} ms each")


def _p95(entry: Json) -> str:
    value = as_float(entry.get("latency_p95_ms"))
    return "" if value is None else f"p95 {value:,.0f}"


def _throughput(entry: Json) -> str:
    value = as_float((entry.get("throughput") or {}).get("examples_per_second"))
    return quantity(value, digits=0 if value is None or value >= 10 else 1)
