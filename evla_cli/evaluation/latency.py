"""Time per stage of a prediction, candidates interleaved so that a drift of the machine's speed hits all alike."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from evla_cli.progress import progress_bar
from evla_cli.runtime.policy import Policy
from evla_cli.settings import ActionCacheSettings

STAGES = ("preprocessing", "vision", "projector", "language_model", "action_head")  # in order, nothing between them
WHOLE = "whole"  # from the camera image to actions that the processor can read
TOKEN_SELECTION = "token_selection"  # within language_model: what happens between two decoder layers

Stages = dict[str, float]  # milliseconds of one run: every stage, the whole, and token selection


@dataclass(frozen=True)
class Batch:
    """What is predicted in each run."""

    images: Sequence[Any]
    instructions: Sequence[str]
    seed: int = 0  # of the diffusion noise


@dataclass(frozen=True)
class Latency:
    """All timed runs of one candidate, in order."""

    runs: tuple[Stages, ...]

    def values(self, stage: str) -> np.ndarray:
        return np.array([run[stage] for run in self.runs])

    def median(self, stage: str) -> float:
        return float(np.median(self.values(stage)))

    def p95(self, stage: str) -> float:
        return float(np.quantile(self.values(stage), 0.95))


def measure_latency(
    policies: Mapping[str, Policy], batch: Batch, runs: int = 20, warmup: int = 3
) -> dict[str, Latency]:
    """Each candidate once a round; who is first in a round goes round, too.

    The image is always the same: under `vla_cache`, that is a camera before which nothing moves.
    """
    timed: dict[str, list[Stages]] = {name: [] for name in policies}
    with progress_bar("timing", (warmup + runs) * len(policies), "run") as bar:
        for number in range(warmup + runs):
            for name in rotated(list(policies), number):
                stages = time_stages(policies[name], batch)
                bar.update()
                if number >= warmup:
                    timed[name].append(stages)
    return {name: Latency(tuple(stages)) for name, stages in timed.items()}


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    """The same items, beginning with the one at `number` modulo their count."""
    start = number % len(items)
    return [*items[start:], *items[:start]]


@torch.inference_mode()
def time_stages(policy: Policy, batch: Batch) -> Stages:
    """One prediction. Projector and decoder layers are told apart by hooks, which are gone afterwards."""
    clock = Clock(_device(policy))
    noise = policy.draw_noise(len(batch.images), torch.Generator().manual_seed(batch.seed))
    layers: Any = policy.model.language_model.model.layers
    # A layer begins with its first norm and ends with its MLP: these run also where the layer itself is not called.
    starts = [policy.model.projector, *(layer.input_layernorm for layer in layers)]
    with _marked(clock, starts, [policy.model.projector, *(layer.mlp for layer in layers)]) as (begins, ends):
        clock.synchronize()
        marks = [clock.mark()]
        inputs = policy.prepare(batch.images, batch.instructions)
        marks.append(clock.mark())
        embeds = policy.see(inputs)
        marks.append(clock.mark())
        cognition, _ = policy.think(inputs, embeds)
        marks.append(clock.mark())
        policy.act(cognition, noise).float().cpu()
        marks.append(clock.mark())
        clock.synchronize()
    start, prepared, seen, thought, acted = marks
    points = (start, prepared, begins[0], seen, thought, acted)
    times = {stage: clock.milliseconds(*points[i : i + 2]) for i, stage in enumerate(STAGES)}
    # What precedes the first layer (positions, mask) is no selection. Nothing but the loop and one addition stands
    # between most layers, so the median is what measuring itself takes.
    between = [clock.milliseconds(end, begin) for end, begin in zip(ends[1:-1], begins[2:], strict=True)]
    selection = sum(between) - len(between) * statistics.median(between) if between else 0.0
    return times | {WHOLE: clock.milliseconds(start, acted), TOKEN_SELECTION: selection}


def head_intervals(num_steps: int) -> list[int]:
    """The smallest cache interval for every possible number of computed steps: 1, 2, 3, 4, 5, 10 of 10 steps."""
    computed = [-(-num_steps // interval) for interval in range(1, num_steps + 1)]
    return [i for i in range(1, num_steps + 1) if i == 1 or computed[i - 1] != computed[i - 2]]


@torch.inference_mode()
def measure_head(
    policy: Policy, batch_size: int, runs: int = 20, warmup: int = 3, seed: int = 0
) -> dict[int, tuple[float, ...]]:
    """Milliseconds of the action head's every run, by cache interval; intervals interleaved.

    The head is given a random cognition token: its time does not depend on the values.
    """
    settings, config = policy.settings, policy.model.config
    sampler = settings.diffusion
    steps = config.action_config.num_train_steps if sampler.sampler == "ddpm" else sampler.num_denoise_steps
    policies = {
        interval: policy.with_settings(replace(settings, action_cache=ActionCacheSettings(interval)))
        for interval in head_intervals(steps)
    }
    generator = torch.Generator().manual_seed(seed)
    noise = policy.draw_noise(batch_size, generator)
    cognition = torch.randn(batch_size, 1, config.action_config.condition_size, generator=generator)
    clock = Clock(_device(policy))
    cognition = cognition.to(next(policy.model.projector.parameters()))
    times: dict[int, list[float]] = {interval: [] for interval in policies}
    for number in range(warmup + runs):
        for interval in rotated(list(policies), number):
            clock.synchronize()
            start = clock.mark()
            policies[interval].act(cognition, noise).float().cpu()
            end = clock.mark()
            clock.synchronize()
            if number >= warmup:
                times[interval].append(clock.milliseconds(start, end))
    return {interval: tuple(values) for interval, values in times.items()}


class Clock:
    """Points in time: events in the queue of a GPU, which runs behind the program; the system's clock elsewhere."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        """Wait until all that was queued is done: before the first mark, and before the first question."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1000 * (end - start)


@contextmanager
def _marked(
    clock: Clock, first: Sequence[nn.Module], last: Sequence[nn.Module]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """When each of the `first` modules began and each of the `last` ended, in the order in which they ran."""
    begins: list[Any] = []
    ends: list[Any] = []
    handles = [module.register_forward_pre_hook(lambda *_: begins.append(clock.mark())) for module in first]
    handles += [module.register_forward_hook(lambda *_: ends.append(clock.mark())) for module in last]
    try:
        yield begins, ends
    finally:
        for handle in handles:
            handle.remove()


def _device(policy: Policy) -> torch.device:
    return next(policy.model.parameters()).device
