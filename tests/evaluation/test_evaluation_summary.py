"""The one row a method has in `dvc metrics show`."""

import pytest

from pipeline.evaluation.metrics import summary

SETS = {
    "movie": {"accuracy": 0.9, "ece": 0.1, "log_loss": 0.3},
    "amazon": {"accuracy": 0.8, "ece": 0.2, "log_loss": 0.5},
    "tweets": {"accuracy": 0.6, "ece": 0.3, "log_loss": 0.7},
}


def test_means_are_unweighted_over_the_sets_of_a_domain():
    row = summary(SETS, {"movie": "in", "amazon": "out", "tweets": "out"})
    expected = {"accuracy_in": 0.9, "accuracy_out": 0.7, "accuracy_lowest": 0.6, "ece": 0.2, "log_loss": 0.5}
    assert row == pytest.approx(expected)
    assert all(isinstance(value, float) for value in row.values()), "dvc metrics shows numbers at the top level alone"


def test_a_domain_without_sets_has_no_column():
    assert "accuracy_in" not in summary(SETS, dict.fromkeys(SETS, "out"))
