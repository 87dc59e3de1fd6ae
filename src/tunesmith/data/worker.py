"""A worker process of `crew`: it is sent a tokeniser and then chunks of rows, and answers each with the outcomes of its rows."""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
from typing import IO

from tunesmith.core.errors import TunesmithError
from tunesmith.data.tokenise import Outcome, Tokeniser

_HEAD = 8  # bytes in front of a message that say how long it is


def send(pipe: IO[bytes], message: bytes) -> None:
    """Write one message. Raises OSError when nobody reads any more."""
    pipe.write(len(message).to_bytes(_HEAD, "little"))
    pipe.write(message)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """Read one message. Raises EOFError when the other side has gone."""
    size = int.from_bytes(_exactly(pipe, _HEAD), "little")
    return _exactly(pipe, size)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError("the other process has gone")
    return data


def main() -> None:
    """Answer until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    chunks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    try:
        tokeniser: Tokeniser = pickle.loads(receive(sys.stdin.buffer))
        send(answers, tokeniser.hash.encode())
        threading.Thread(target=_listen, args=(chunks,), daemon=True).start()
        while (chunk := chunks.get()) is not None:
            send(answers, pickle.dumps(_outcomes(tokeniser, chunk)))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the one that asked is no longer there


def _listen(chunks: queue.SimpleQueue[bytes | None]) -> None:
    # Read at once: the other side must be able to hand over the next chunk before it takes an answer.
    try:
        while True:
            chunks.put(receive(sys.stdin.buffer))
    except EOFError:
        chunks.put(None)


def _outcomes(tokeniser: Tokeniser, chunk: bytes) -> list[Outcome] | None:
    try:
        return tokeniser.rows(*pickle.loads(chunk))
    except TunesmithError:
        return None  # it is done again, and raised, where the rows are entered


if __name__ == "__main__":
    main()
