"""Peak memory of a process that does nothing but load one policy and predict once; what the machine has left."""

import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from evla_cli.checkpoint.system import physical_bytes
from evla_cli.errors import EvlaError
from evla_cli.evaluation.latency import Batch, time_stages
from evla_cli.models.skeleton import out_of_memory
from evla_cli.runtime.policy import Policy

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")  # Linux
FOR_LESS_MEMORY = (
    "use a smaller --batch-size, a --memory-budget, beyond which models are loaded one after the other, --dtype "
    "bfloat16, or --device cpu"
)
_SECONDS_BETWEEN_SAMPLES = 0.005
START_METHOD = "spawn"  # a forked process would share the pages of its libraries, and count too few


def peak_memory(load: Callable[..., Policy], batch: Batch, device: str, threads: int) -> dict[str, int | None]:
    """In bytes, in a process of its own. `load` must be picklable.

    Returns:
        peak_rss_anon_bytes: memory that nobody else can have: private copies, activations, libraries' own. None where
            the system does not tell it from the rest (macOS).
        peak_rss_bytes: with the pages of mapped files, weights among them, which the system can drop.
        imported_rss_anon_bytes: of the first, what was there before loading began.
        peak_device_bytes: torch's allocations on a GPU; None elsewhere.
    """
    context: Any = multiprocessing.get_context(START_METHOD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, load, batch, device, threads), daemon=True)
    # Ctrl-C reaches every process of a terminal; the child inherits that it is not told.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError as error:
        process.join()
        raise EvlaError(
            f"The process that measures memory ended with {process.exitcode}; -9 is the system's answer to too little "
            "memory."
        ) from error
    finally:
        process.kill()
        process.join()
    if isinstance(answer, EvlaError):
        raise answer
    return answer


def _answer(sender: Connection, *arguments: Any) -> None:
    try:
        with out_of_memory(arguments[2], FOR_LESS_MEMORY):
            sender.send(_load_and_predict(*arguments))
    except EvlaError as error:
        sender.send(error)


def _load_and_predict(load: Callable[..., Policy], batch: Batch, device: str, threads: int) -> dict[str, int | None]:
    torch.set_num_threads(threads)
    imported = _bytes(_STATUS, "RssAnon")
    with _Sampler() as sampler:
        time_stages(load(), batch)  # what is timed, so that no dataset's statistics are asked for here either
    on_gpu = torch.device(device).type == "cuda"
    return {
        "peak_rss_anon_bytes": sampler.peak,
        "peak_rss_bytes": _bytes(_STATUS, "VmHWM") or _peak_resident_bytes(),
        "imported_rss_anon_bytes": imported,
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def available_bytes(device: str) -> int:
    """What can be taken without pushing anything else out; the page cache counts as free. Where the system does not
    say, half of its memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _bytes(_MEMINFO, "MemAvailable") or (physical_bytes() or 0) // 2


def release(device: str) -> None:
    """Give back what models held that nothing refers to any more, for another model or another process."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


class _Sampler:
    """The highest RssAnon inside a block, in bytes: the system keeps a record of the highest RSS alone."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        parent = multiprocessing.parent_process()
        while not self._ended.is_set():
            self._sample()
            if parent is not None and not parent.is_alive():
                os._exit(1)  # nobody waits for the answer
            time.sleep(_SECONDS_BETWEEN_SAMPLES)

    def _sample(self) -> None:
        found = _bytes(_STATUS, "RssAnon")
        if found is not None:
            self.peak = max(self.peak or 0, found)


def _bytes(file: Path, key: str) -> int | None:
    """None where there is no such file, or no such line in it."""
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]  # in kB
    return 1024 * found[0] if found else None


def _peak_resident_bytes() -> int:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else 1024 * highest
