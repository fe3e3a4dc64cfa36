"""Processes that do jobs and may be ended for it. Importing this takes no time: they start with it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from fastkit.bench.case import Fault

Work = Callable[[Iterator[Any], Any], Iterator[Any]]  # (jobs, settings) -> a result for each job


class Child:
    """A process that does jobs one at a time; it starts with the first, and anew after one that failed."""

    def __init__(self, work: Work, settings: Any, env: dict[str, str], limit: float) -> None:
        self._work = work, settings
        self._env = env
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None

    def do(self, job: Any) -> Any:
        """What ``work`` yields for the job; a Fault if it takes over ``limit`` seconds or ends it."""
        process = self._process or self._start()
        try:
            self._connection.send(job)
            if self._connection.poll(self._limit):
                return self._connection.recv()
            reason = f"took over {self._limit:g} s"
        except (EOFError, OSError):
            reason = f"its process ended with exit code {process.wait()}"
        self.close()
        return Fault(reason)

    def _start(self) -> subprocess.Popen[bytes]:
        self._connection, theirs = Pipe()
        code = f"from fastkit.bench.child import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=self._env,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a group of its own: compilers that it has started end with it
        )
        theirs.close()
        with suppress(EOFError, OSError):
            self._connection.send(self._work)
            self._connection.recv()  # the limit counts from here, when it has imported what it needs
        return self._process

    def close(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(descriptor: int) -> None:
    """The child's main: receives (work, settings) and then jobs, sends what ``work`` yields for each."""
    with Connection(descriptor) as connection:
        work, settings = connection.recv()
        gc.freeze()  # what this has imported stays: collections, of which there are many, need not look at it
        connection.send("ready")
        for result in work(_received(connection), settings):
            connection.send(result)


def _received(connection: Connection) -> Iterator[Any]:
    """Job by job, until the parent closes its end."""
    with suppress(EOFError):
        while True:
            yield connection.recv()
