"""Parts of a benchmark in a process of their own: one that hangs or poisons the device costs only itself."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import time
from contextlib import suppress
from typing import Any

# After these the device answers nothing more in this process.
_FATAL = ("CUDA error", "AcceleratorError", "CUDA driver error", "out of memory", "OutOfMemory")


def one_line(error: BaseException) -> str:
    return (type(error).__name__ + ": " + " ".join(str(error).split()))[:300]


def _serve(module: str, pipe: Any) -> None:
    parts = importlib.import_module(module)
    with suppress(EOFError, OSError):  # the other side has gone
        while True:
            name, arguments = pipe.recv()
            try:
                result = getattr(parts, name)(*arguments)
            except Exception as error:
                result = one_line(error)
            pipe.send(result)


class Worker:
    """Runs functions of a module by name, one by one, in one process that is replaced when it fails."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.process: Any = None
        self.pipe: Any = None

    def ask(self, seconds: float, name: str, *arguments: Any) -> Any:
        """The result, or one line that says why there is none."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send((name, arguments))
            if not self.pipe.poll(max(seconds, 1)):
                self.stop()
                return f"Timeout: {name} took more than {seconds:.0f} s"
            result = self.pipe.recv()
        except (EOFError, OSError):
            code = self.process.exitcode
            self.stop()
            return f"Crash: {name} ended the process (exit code {code})"
        if isinstance(result, str) and any(mark in result for mark in _FATAL):
            self.stop()
        return result

    def start(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.module, theirs))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(5)
            self.pipe.close()
            self.process = None


def all_at_once(module: str, requests: list[tuple[Any, ...]], seconds: float) -> list[Any]:
    """Each (name, *arguments) in a process of its own, together."""
    workers = [Worker(module) for _ in requests]
    results: list[Any] = []
    for worker, request in zip(workers, requests, strict=True):
        worker.start()
        worker.pipe.send((request[0], request[1:]))
    deadline = time.perf_counter() + seconds
    for worker, request in zip(workers, requests, strict=True):
        try:
            ready = worker.pipe.poll(max(deadline - time.perf_counter(), 0))
            results.append(worker.pipe.recv() if ready else f"Timeout: {request[0]}")
        except (EOFError, OSError):
            results.append(f"Crash: {request[0]}")
        worker.stop()
    return results
