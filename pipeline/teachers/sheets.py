"""What a worker is sent of a request: token ids, and nothing of the store or the transfer set's file."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.teachers.asked import Asked, TokenIds


@dataclass(frozen=True)
class Sheet:
    """Some inputs of a request behind one context, in place of `Asked`."""

    prefixes: TokenIds
    examples: tuple[str, ...]
    queries: list[list[int]]
    answers: list[list[int]] | None

    @classmethod
    def of(cls, asked: Asked, context: str, examples: Sequence[str]) -> "Sheet":
        """Those `examples` behind `context`."""
        return cls({context: list(asked.prefixes[context])}, tuple(examples), *asked.rows(examples))

    @classmethod
    def probe(cls, asked: Asked, count: int) -> "Sheet":
        """What an engine is chosen with: the longest context, and `count` inputs from the shortest to the longest."""
        longest = max(asked.prefixes, key=lambda context: (len(asked.prefixes[context]), asked.prefixes[context]))
        return cls.of(asked, longest, asked.spread(count))

    def rows(self, examples: Sequence[str]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of its inputs and their answers. Raises ValueError where others are asked for."""
        if tuple(examples) != self.examples:
            raise ValueError("a worker is asked for inputs that it was not sent")
        return self.queries, self.answers

    def spread(self, count: int) -> list[str]:  # noqa: ARG002  they were spread when they were chosen
        """All of its inputs."""
        return list(self.examples)
