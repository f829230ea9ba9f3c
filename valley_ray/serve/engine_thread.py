"""EngineThread: one thread steps an Engine, asyncio callers read their requests' token events.

The engine is touched by this thread alone; callers hand it work through a queue. Knows no Ray and no text.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from uuid import uuid4

from valley_ray.engine.engine import Engine, Prompt, SamplingParams, TokenEvent
from valley_ray.errors import ValleyError

logger = logging.getLogger(__name__)

_Item = TokenEvent | BaseException


class _Caller:
    """Where the events of one request go: a queue of the caller's own event loop."""

    def __init__(self) -> None:
        self._loop, self.events = asyncio.get_running_loop(), asyncio.Queue[_Item]()

    def send(self, item: _Item) -> None:
        """Called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, item)
        except RuntimeError:
            logger.info("a caller's event loop closed before its request ended")


class EngineThread:
    """Start with the engine; end with `close`. After a failed step it is `broken` and refuses further requests.

    Args:
        engine: from now on this thread's.
        on_load: told (running, waiting) requests in this thread, at the start and when they change.
    """

    def __init__(self, engine: Engine, on_load: Callable[[int, int], None] = lambda running, waiting: None) -> None:
        self._engine, self._on_load, self._load = engine, on_load, (-1, -1)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._callers: dict[str, _Caller] = {}
        self.broken: BaseException | None = None
        self.num_abandoned = 0
        """Requests whose caller left before their end."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Requests waiting or running; a snapshot."""
        return self._engine.num_unfinished

    async def generate(self, prompt: Prompt, params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """Token events of one request; closing the iterator early frees the request's slot.

        Raises PromptTooLongError, or whatever broke the engine.
        """
        request_id, caller = uuid4().hex, _Caller()
        self._work.put(lambda: self._add(request_id, caller, prompt, params))
        try:
            while True:
                item = await caller.events.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._work.put(lambda: self._abort(request_id))

    def close(self) -> None:
        """Stop after the step in progress, wait for the thread and close the engine."""
        self._work.put(None)
        self._thread.join()
        self._engine.close()

    def _run(self) -> None:
        self._tell_load()
        while self._do_work(wait=self.broken is not None or not self._engine.num_unfinished):
            if self.broken is None and self._engine.num_unfinished:
                self._step()
            self._tell_load()

    def _tell_load(self) -> None:
        running = self._engine.num_running
        load = running, self._engine.num_unfinished - running
        if load != self._load:
            self._load = load
            self._on_load(*load)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # whatever it is: no caller may wait for ever, and the replica must go
            logger.exception("the engine broke; the replica has to be replaced")
            self.broken = error
            for caller in self._callers.values():
                caller.send(error)
            return
        for event in events:
            self._callers[event.request_id].send(event)
            if event.finish_reason is not None:
                del self._callers[event.request_id]

    def _do_work(self, *, wait: bool) -> bool:
        """Run what callers asked for; False: stop."""
        while True:
            try:
                work = self._work.get(block=wait)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()
            wait = False

    def _add(self, request_id: str, caller: _Caller, prompt: Prompt, params: SamplingParams) -> None:
        if self.broken is not None:
            caller.send(self.broken)
            return
        try:
            self._engine.add(prompt, params, request_id=request_id)
        except Exception as error:  # whatever it is: the thread must live for the others, and this caller not wait
            if not isinstance(error, ValleyError):
                logger.exception("a request could not be added")
            caller.send(error)
            return
        self._callers[request_id] = caller

    def _abort(self, request_id: str) -> None:
        if self._callers.pop(request_id, None) is not None and self.broken is None:
            self._engine.abort(request_id)
            self.num_abandoned += 1
