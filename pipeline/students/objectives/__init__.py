"""What a student minimises: over the labels (`labels`), or over the vocabulary against a cache (`vocabulary`, `fused`)."""

from pipeline.students.objectives.labels import (
    cross_entropy_nats,
    jensen_shannon_nats,
    kl_nats,
    label_log_probabilities,
    positions_per_row,
    reverse_kl_nats,
)

__all__ = [
    "cross_entropy_nats",
    "jensen_shannon_nats",
    "kl_nats",
    "label_log_probabilities",
    "positions_per_row",
    "reverse_kl_nats",
]
