"""Jobs shared among processes of one thread each; results as they are done, whatever the order."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch

from evla_cli.errors import EvlaError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    start: Callable[[], Callable[[Job], Result]], jobs: Sequence[Job], num_workers: int
) -> Iterator[tuple[Job, Result]]:
    """
    Args:
        start: called once in every process; what it returns does a job. Both go through pickle.

    Errors: what a job raises as an EvlaError; a process that ends before its job is done.
    """
    # Not forked from this process: its threads, its device and what was loaded are not theirs. The server that they are
    # forked from has imported the libraries and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evla_cli.evaluation.rollout"])
    remaining = iter(jobs)
    workers: dict[Any, _Worker[Job]] = {}
    try:
        for job in islice(remaining, num_workers):
            worker = _Worker(context, start, job)
            workers[worker.connection] = worker
        while workers:
            for connection in wait(list(workers)):
                worker = workers[connection]
                result = worker.result()
                yield worker.job, result
                following = next(remaining, None)
                if following is None:
                    worker.end()
                    del workers[connection]
                else:
                    worker.send(following)
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.end()


class _Worker(Generic[Job]):
    """A process and the job it is doing."""

    def __init__(self, context: Any, start: Callable[[], Callable[[Job], Any]], job: Job):
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, start), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process, whatever ends it
        self.send(job)

    def send(self, job: Job) -> None:
        self.job = job
        try:
            self.connection.send(job)
        except BrokenPipeError:
            self._died()

    def result(self) -> Any:
        try:
            result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._died()
        if isinstance(result, EvlaError):
            raise result
        return result

    def end(self) -> None:
        self.connection.close()
        self.process.join()

    def _died(self) -> None:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name} (out of memory?)" if code < 0 else f"ended with code {code}"
        raise EvlaError(
            f"A worker process {how}. What was finished is in the log: run the same command again, perhaps with fewer "
            "--workers."
        )


def _work(connection: Connection, start: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through every `finally`: half a video is removed
    torch.set_num_threads(1)
    try:
        do = start()
        while (job := _receive(connection)) is not None:
            connection.send(do(job))
    except EvlaError as error:
        connection.send(error)
    except BrokenPipeError:
        pass  # the first process has ended


def _receive(connection: Connection) -> Any:
    """None where the first process has ended or has no more jobs."""
    try:
        return connection.recv()
    except EOFError:
        return None
