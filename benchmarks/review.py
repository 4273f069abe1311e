"""What 16 chosen labels are worth beside 16 random ones, and how many flipped labels are found, simulated with gold labels.

    python -m benchmarks.review ENCODER_FOLDER TASK_FOLDER … [--draws 10 11 12]

A task's folder has pool.jsonl and test.jsonl (`text`, `label`). The learner is logistic regression on an encoder's embeddings, with 8
labels a class at first; voters are five such learners on bootstrap draws of these labels, and itself. It is then given 16 more of 1,000
texts: those that `pipeline.review.choose` chooses, or random ones (the mean of ten draws). Suspects: of 16 labels a class 10 % are flipped,
and voters answer those of a fold that they did not learn.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from pipeline.cache.labelled import folds_of
from pipeline.review import choose, suspects

PER_LABEL, MORE, TEXTS, VOTERS, RANDOM, FLIPPED, MOST_ROWS = 8, 16, 1000, 5, 10, 0.1, 1500


@torch.inference_mode()
def embedded(file: Path, encoder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, H] of a file's first rows, of length 1, and their labels [N]."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()[:MOST_ROWS]]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    order, found = sorted(range(len(rows)), key=lambda row: len(rows[row]["text"])), list[torch.Tensor]()
    for start in range(0, len(order), 32):
        texts = [rows[row]["text"] for row in order[start : start + 32]]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1), dim=-1))
    return torch.cat(found).numpy().astype(np.float64)[np.argsort(order)], np.array([row["label"] for row in rows])


def learner(x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """A model that has learnt some labels."""
    return LogisticRegression(C=10, max_iter=1000).fit(x, y)


def voters(x: np.ndarray, y: np.ndarray, asked: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Probabilities [V, N, L] of what is `asked` from learners of bootstrap draws of each label, and of all."""
    by_label = [np.flatnonzero(y == label) for label in np.unique(y)]
    draws = [np.concatenate([rng.choice(own, len(own)) for own in by_label]) for _ in range(VOTERS)]
    return np.stack([learner(x[own], y[own]).predict_proba(asked) for own in [*draws, np.arange(len(y))]])


def gains(x: np.ndarray, y: np.ndarray, test: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> dict[str, float]:
    """Accuracy in percent at first, with random texts more, with chosen ones; and what was found of flipped labels, in percent."""
    by_label = [rng.permutation(np.flatnonzero(y == label)) for label in np.unique(y)]
    start = np.concatenate([own[:PER_LABEL] for own in by_label])
    rest = rng.permutation(np.setdiff1d(np.arange(len(y)), start))[:TEXTS]

    def accuracy(*more: np.ndarray) -> float:
        rows = np.concatenate([start, *more])
        return 100 * float(learner(x[rows], y[rows]).score(*test))

    chosen = choose(voters(x[start], y[start], x[rest], rng).mean(0), x[rest], MORE)
    random = np.mean([accuracy(rng.choice(rest, MORE, replace=False)) for _ in range(RANDOM)])
    found = {"start": accuracy(), "random": float(random), "chosen": accuracy(rest[chosen])}

    rows = np.concatenate([own[: 2 * PER_LABEL] for own in by_label])
    gold, labels = np.searchsorted(np.unique(y), y[rows]), len(by_label)
    wrong = rng.choice(len(rows), round(FLIPPED * len(rows)), replace=False)
    given = gold.copy()
    given[wrong] = (given[wrong] + rng.integers(1, labels, len(wrong))) % labels
    answers = np.empty((VOTERS + 1, len(rows), labels))
    for fold in folds_of(given.tolist()):
        others = np.setdiff1d(np.arange(len(rows)), fold)
        answers[:, fold] = voters(x[rows[others]], given[others], x[rows[fold]], rng)
    doubted = suspects(answers, given)
    hits = np.isin(doubted, wrong).sum()
    return found | {"flipped": len(wrong), "doubted": len(doubted), "of these flipped": float(hits)}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--draws", type=int, nargs="+", default=[10, 11, 12])
    asked = parser.parse_args()
    for task in asked.tasks:
        (x, y), test = embedded(task / "pool.jsonl", asked.encoder), embedded(task / "test.jsonl", asked.encoder)
        draws = [gains(x, y, test, np.random.default_rng(draw)) for draw in asked.draws]
        means = {key: round(float(np.mean([draw[key] for draw in draws])), 1) for key in draws[0]}
        spread = np.std([draw["chosen"] - draw["random"] for draw in draws], ddof=1) / len(draws) ** 0.5
        print(task.name, means, f"gain {means['chosen'] - means['random']:+.1f} ± {spread:.1f}", flush=True)


if __name__ == "__main__":
    main()
