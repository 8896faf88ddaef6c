"""Worker processes that answer math-verify questions, with limits: start on first use, kill and replace on a timeout,
keep the order of the questions."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from prism_fast.rewards.verdict import Question

_LENGTH = 4
_MESSAGE_LIMIT = 32768
_START_LIMIT_S = 120.0
_ENDED_BY_CPU_TIMER = -27  # SIGPROF, see worker.py


class WorkerPool:
    """Up to `workers` child processes; `ask` returns one of "holds", "fails", "error", "timeout", "worker_died",
    "too_large" (a question above 32 KiB is never sent) per question, in order.

    `timeout_s` is CPU seconds per question, enforced by the kernel in the child, and three times as much wall-clock
    time, enforced here (a loaded machine then does not turn a slow answer into a wrong one). `memory_mb` limits the
    child's address space. `command` replaces the child program (tests). A pool inherited by a forked process starts
    workers of its own and leaves its parent's alone.
    """

    def __init__(
        self, *, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 1024, command: Sequence[str] | None = None
    ):
        if workers < 1 or timeout_s <= 0 or memory_mb < 256:
            raise ValueError(
                f"need workers >= 1, timeout_s > 0, memory_mb >= 256; got {workers}, {timeout_s}, {memory_mb}"
            )
        self.workers, self.timeout_s, self.memory_mb = workers, timeout_s, memory_mb
        self._command = command
        self._idle: list[_Worker] = []
        self._owner = os.getpid()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool may be used again afterwards; it then starts new ones."""
        for worker in self._idle:
            worker.kill()
        self._idle.clear()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._idle]

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """Ask every question once. RuntimeError when a worker does not start (math-verify missing, no interpreter)."""
        if self._owner != os.getpid():
            for worker in self._idle:
                worker.abandon()
            self._idle, self._owner = [], os.getpid()
        answers: list[str] = [""] * len(questions)
        waiting = deque(range(len(questions)))
        busy: dict[int, tuple[_Worker, int, float]] = {}
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self.workers:
                        index = waiting.popleft()
                        message = _request(questions[index], self.timeout_s)
                        if len(message) > _MESSAGE_LIMIT:
                            answers[index] = "too_large"
                            continue
                        worker = self._idle.pop() if self._idle else _Worker(self.memory_mb, self._command)
                        busy[worker.descriptor] = (worker, index, time.monotonic() + 3 * self.timeout_s)
                        selector.register(worker.descriptor, selectors.EVENT_READ)
                        worker.send(message)
                    if not busy:
                        break
                    nearest = min(deadline for _, _, deadline in busy.values())
                    ready = {key.fd for key, _ in selector.select(max(0.0, nearest - time.monotonic()))}
                    for descriptor, (worker, index, deadline) in list(busy.items()):
                        answer = worker.receive() if descriptor in ready else None
                        if answer is None and time.monotonic() >= deadline:
                            answer = "timeout"
                        if answer is None:
                            continue
                        answers[index] = answer
                        selector.unregister(descriptor)
                        del busy[descriptor]
                        if answer in ("timeout", "worker_died"):
                            worker.kill()
                        else:
                            self._idle.append(worker)
            finally:  # an exception (a signal handler's, say) must not leave a worker in the middle of a question
                for worker, _, _ in busy.values():
                    worker.kill()
        return answers


def _request(question: Question, cpu_s: float) -> bytes:
    body = json.dumps(
        {"question": [[asdict(probe) for probe in probes] for probes in question], "cpu_s": cpu_s}
    ).encode()
    return len(body).to_bytes(_LENGTH, "big") + body


class _Worker:
    """One child process and its pipes."""

    def __init__(self, memory_mb: int, command: Sequence[str] | None):
        if command is None:
            if not sys.executable:
                raise RuntimeError("sys.executable is empty: math-verify workers need the path of a Python interpreter")
            # -P keeps this folder off the child's import path, where its modules could shadow installed ones.
            command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py")), str(memory_mb)]
        self._errors: BinaryIO = tempfile.TemporaryFile()
        self._buffer = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # Ctrl-C ends the step in the trainer, not the worker in the middle of it
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order in which sympy tries things is the same in every run
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self.descriptor = self._stdout.fileno()
        self._finalizer = weakref.finalize(self, _end, self.process, os.getpid())
        self._await_start()

    def _await_start(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        message: dict | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self.descriptor, selectors.EVENT_READ)
            while message is None and time.monotonic() < deadline:
                if selector.select(deadline - time.monotonic()):
                    if not self._fill():
                        break
                    message = self._message()
        if message is None or not message.get("ready"):
            self.kill()
            self._errors.seek(0)
            reason = (
                message["failure"]
                if message
                else self._errors.read()[-2000:].decode(errors="replace").strip() or "no reason given"
            )
            raise RuntimeError(
                f"the math-verify worker did not start: {reason}. "
                "Cure: install math-verify in this environment (pip install math-verify)"
            )

    def send(self, message: bytes) -> None:
        try:
            self._stdin.write(message)  # fits into the empty pipe, so it neither blocks nor is cut
        except BrokenPipeError:
            pass  # the child has ended: `receive` will report it

    def receive(self) -> str | None:
        """The answer that has arrived, None while it is incomplete."""
        if not self._fill():
            status = self.process.wait()
            return "timeout" if status == _ENDED_BY_CPU_TIMER else "worker_died"
        message = self._message()
        if message is None:
            return None
        if message["holds"]:
            return "holds"
        return "error" if message["errors"] else "fails"

    def _fill(self) -> bool:
        piece = os.read(self.descriptor, 65536)
        self._buffer += piece
        return bool(piece)

    def _message(self) -> dict | None:
        if len(self._buffer) < _LENGTH:
            return None
        end = _LENGTH + int.from_bytes(self._buffer[:_LENGTH], "big")
        if len(self._buffer) < end:
            return None
        body, self._buffer = self._buffer[_LENGTH:end], self._buffer[end:]
        return json.loads(body)

    def kill(self) -> None:
        self._finalizer()
        self._stdin.close()
        self._stdout.close()

    def abandon(self) -> None:
        """Drop a worker of the parent of a fork: neither kill it nor wait for it."""
        self._finalizer.detach()


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
