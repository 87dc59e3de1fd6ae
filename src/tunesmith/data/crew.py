"""Chunks of rows are tokenised here, and by worker processes as well once it is clear that there is much to do.

Workers are plain child processes that speak over pipes: nothing is forked, so it does not matter which threads or devices this
process has, and a script needs no `if __name__ == "__main__"`. A chunk gives the same outcomes wherever it is done and they are handed on
in the order of the chunks. What a worker cannot do (it died, its tokenizer is not the same) is done here.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

from tunesmith.core.log import logger
from tunesmith.data.readers import Found
from tunesmith.data.tokenise import Outcome, Tokeniser
from tunesmith.data.worker import receive, send

PATIENCE = 2.0  # seconds of work before workers are started: that is what it takes to start them
_MOST = 32  # workers; reading and entering rows is done by one process
_GIVEN = 3  # chunks given to one worker: it has the next one before it ends the last
_AHEAD = 6  # chunks a worker that may wait for an earlier one, so that memory stays bounded


class Work(Protocol):
    """What a chunk has to have."""

    @property
    def format(self) -> str:
        """The shape of its rows."""

    @property
    def found(self) -> list[Found]:
        """Its rows."""


Chunk = TypeVar("Chunk", bound=Work)


class _Task(Generic[Chunk]):
    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.outcomes: list[Outcome] | None = None  # None when it is done: it has to be done here
        self.done = threading.Event()


class Crew:
    """A tokeniser and the workers that help it (`workers` at most; None: one less than the cores this process may use)."""

    def __init__(self, tokeniser: Tokeniser, workers: int | None = None) -> None:
        self._tokeniser = tokeniser
        self._most = min(_cores() - 1, _MOST) if workers is None else workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.stop()

    def outcomes(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        """Every chunk with the outcomes of its rows, in order."""
        start = time.perf_counter()
        for chunk in chunks:
            yield chunk, self._here(chunk)
            if self._most and time.perf_counter() - start > PATIENCE:
                self.start()
                break
        yield from self._shared(chunks)

    def start(self) -> None:
        """Start the workers; they are given chunks as soon as they are ready."""
        try:
            setup = pickle.dumps(self._tokeniser)
            self._workers = [_Worker(setup, self._tokeniser.hash) for _ in range(self._most)]
        except (pickle.PicklingError, TypeError, AttributeError, OSError) as error:
            logger.info("rows are tokenised by one process: %s", error)

    def wait(self) -> int:
        """Wait until every worker is ready or has failed, and count those that are ready."""
        return sum(worker.wait() for worker in self._workers)

    def _here(self, chunk: Work) -> list[Outcome]:
        return self._tokeniser.rows(chunk.format, chunk.found)

    def _shared(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, list[Outcome]]]:
        tasks: deque[_Task[Chunk]] = deque()
        more = True
        while more or tasks:
            if tasks and tasks[0].done.is_set():
                task = tasks.popleft()
                yield task.chunk, self._here(task.chunk) if task.outcomes is None else task.outcomes
                continue
            free = next((worker for worker in self._workers if worker.has_room()), None)
            if more and (free is not None or len(tasks) <= _AHEAD * len(self._workers)):
                chunk = next(chunks, None)
                more = chunk is not None
                if chunk is not None:
                    task = _Task(chunk)
                    tasks.append(task)
                    if free is None:
                        task.outcomes = self._here(chunk)
                        task.done.set()
                    else:
                        free.give(task)
            elif tasks:
                tasks[0].done.wait()


class _Worker:
    """One child process and the thread that speaks with it."""

    def __init__(self, setup: bytes, hash: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,  # Ctrl-C is for this process, which then stops its workers
        )
        self._lock = threading.Lock()
        self._given: queue.SimpleQueue[_Task[Work]] = queue.SimpleQueue()
        self._open: deque[_Task[Work]] = deque()  # given and not answered
        self._state: Literal["starting", "ready", "gone"] = "starting"
        self._decided = threading.Event()
        threading.Thread(target=self._speak, args=(setup, hash), daemon=True).start()

    def has_room(self) -> bool:
        """Can it be given another chunk?"""
        return self._state == "ready" and len(self._open) < _GIVEN

    def give(self, task: _Task[Any]) -> None:
        """Have a chunk done; the task is done without outcomes when the worker has gone."""
        with self._lock:
            if self._state == "gone":
                task.done.set()
            else:
                self._open.append(task)
                self._given.put(task)

    def wait(self) -> bool:
        """Wait until it is ready (True) or has gone."""
        self._decided.wait()
        return self._state == "ready"

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def _speak(self, setup: bytes, hash: str) -> None:
        try:
            self._converse(setup, hash)
        except (OSError, EOFError, ValueError, TypeError, AttributeError, pickle.PickleError) as error:
            logger.debug("a worker has gone: %s", error)
        finally:
            with self._lock:
                self._state = "gone"
                for task in self._open:
                    task.done.set()
            self._decided.set()

    def _converse(self, setup: bytes, hash: str) -> None:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        send(to, setup)
        if receive(back).decode() != hash:
            raise ValueError("its tokenizer is not the same")
        self._state = "ready"
        self._decided.set()
        sent = 0
        while True:
            while sent == 0 or (sent < _GIVEN and not self._given.empty()):
                chunk = self._given.get().chunk
                send(to, pickle.dumps((chunk.format, chunk.found)))
                sent += 1
            outcomes = pickle.loads(receive(back))
            sent -= 1
            with self._lock:
                task = self._open.popleft()
            task.outcomes = outcomes
            task.done.set()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
