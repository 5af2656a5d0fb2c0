"""Workers: processes of memwatch's own that hash pictures.

They are no children of ``multiprocessing``: those would run the user's script once more to begin with, and load models.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 2  # tasks per worker that wait for it


class WorkerError(RuntimeError):
    """A worker is gone, or never came up."""


class Worker:
    """A process that calls one function again and again.

    Args:
        function: its module and name, ``package.module:name``.
    """

    def __init__(self, function: str) -> None:
        serves = "from memwatch.picking.workers import serve; serve(sys.argv[2])"
        code = f"import sys; sys.path[:] = eval(sys.argv[1]); {serves}"
        command = [sys.executable, "-c", code, repr(sys.path), function]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # it has no use for one
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )  # of its own session: Ctrl-C is for the training script

    def __call__(self, task: Any) -> Any:
        """The function's value.

        Raises:
            WorkerError: the process is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise WorkerError(f"a worker process is gone (exit code {self._process.poll()})") from error

    def close(self) -> None:
        """End the process; safe to call again."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:
                pass
        self._process.wait()


def in_workers(function: str, tasks: Iterable[Any], number: int) -> Iterator[Any]:
    """Values of ``function`` for ``tasks``, in order, by ``number`` processes at most.

    Tasks are drawn, and processes started, as they are needed.

    Raises:
        WorkerError: a process is gone.
    """
    workers: list[Worker] = []
    idle: deque[Worker] = deque()

    def call(task: Any) -> Any:
        try:
            worker = idle.popleft()
        except IndexError:  # there are no more threads than workers may be
            worker = Worker(function)
            workers.append(worker)
        try:
            return worker(task)
        finally:
            idle.append(worker)

    threads = ThreadPoolExecutor(number)
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(threads.submit(call, task))
            if len(waiting) > AHEAD * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in list(workers):
            worker.close()
        threads.shutdown()
        for worker in workers:  # one may have come up in the meantime
            worker.close()


def serve(function: str) -> None:
    """What a worker does: tasks come in, values go out, until the other side is gone."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no value
    module, _, name = function.partition(":")
    call: Callable[[Any], Any] = getattr(__import__(module, fromlist=[name]), name)
    while True:
        try:
            task = pickle.load(source)
        except EOFError:
            return
        pickle.dump(call(task), sink)
        sink.flush()
