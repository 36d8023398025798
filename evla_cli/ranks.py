"""The processes that torchrun starts for one analysis: how they share it, what they tell each other, how they end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from evla_cli.errors import EvlaError
from evla_cli.progress import set_quiet

T = TypeVar("T")

# For a rank that hangs. One that dies is noticed at once: its connections close, and torchrun ends the others.
_TIMEOUT = timedelta(hours=1)


class RankLost(EvlaError):
    """A process of the job is gone, so that no more can be exchanged."""


class _Failed:
    """Stands among what is exchanged for a rank that an error has stopped."""


@dataclass(frozen=True)
class Ranks:
    """One process among the `size` of a job; by default the only one.

    Every rank makes the same calls in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's: consecutive ones; none, where there are more ranks than things."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, mine: list[T]) -> list[T]:
        """Everyone's, in the order of their ranks, on every rank."""
        return [value for values in self._exchange(mine) for value in values]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others enter the block once the first rank has left it: what is wrong for all is found by one."""
        if not self.first:
            self.gather([])
        yield
        if self.first:
            self.gather([])

    def finish(self, error: EvlaError | None) -> None:
        """Wait until every rank calls this. Where one has an error, the lowest of those returns, the others exit."""
        self._exchange(_Failed() if error else None)

    def _exchange(self, mine: Any) -> list[Any]:
        if self.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(everyones, mine)
        except RuntimeError as error:
            if not self.first:
                sys.exit(RankLost.exit_code)
            raise RankLost(
                "Another process of this job ended before its time; torchrun's report says which one and how "
                f"({str(error).splitlines()[0]})."
            ) from error
        failed = [rank for rank, value in enumerate(everyones) if isinstance(value, _Failed)]
        if failed and self.rank != failed[0]:
            sys.exit(EvlaError.exit_code)
        return everyones


ALONE = Ranks()


@contextmanager
def torchrun_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """Join the job if torchrun started this process. Gives the ranks, and this rank's own device of the kind `device`.

    No rank leaves the block before all do. An error in it ends every rank: the lowest rank that has one raises it, and
    the others exit silently.

    Errors: the ranks cannot reach one another; one GPU for all of them.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Ranks(), device
        return
    # With too few GPUs the ranks still meet, so that one of them can say so.
    gpus = device == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if gpus else "gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise EvlaError(f"The processes of torchrun cannot reach one another: {str(error).splitlines()[0]}.") from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if not ranks.first:
        set_quiet(True)
    try:
        yield ranks, _own_device(device)
    except RankLost:
        raise
    except EvlaError as error:
        ranks.finish(error)
        raise
    ranks.finish(None)
    dist.destroy_process_group()


def _own_device(device: str) -> str:
    if device == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda:"):
        raise EvlaError(f"--device {device} is one GPU for every process of torchrun; pass --device cuda.")
    return device
