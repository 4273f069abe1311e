"""HTTP connections that must bring a request in time.

uvicorn waits for ever for a request's head: a client that connects and says nothing, or a letter now and then, holds a file handle, and a
thousand of them the whole server. The body's time is bounded by `server.Limits.body_seconds`; this bounds what comes before it.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def with_deadline(seconds: float) -> type[H11Protocol]:
    """A protocol for `uvicorn.run(http=…)` whose connections are closed where no head of a request is whole after `seconds`."""

    class WithDeadline(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._arm()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def _arm(self) -> None:
            self._disarm()
            self._timer = self.loop.call_later(seconds, self._late)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

        def _late(self) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if not answering and not self.transport.is_closing():
                self.transport.close()

    return WithDeadline
