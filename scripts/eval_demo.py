"""Closed-loop success of a policy in the demo's Meta-World tasks, controls included, and what weakening it costs.

    python scripts/eval_demo.py demo/cogact-metaworld --samples demo/samples --results results.json

Every row runs the same episodes with the same noise, so rows can be compared episode by episode.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from demo_env import FIRST_SEED, MAX_STEPS, TASKS, DemoEnv
from torch import nn

from evla_cli.evaluation.latency import STAGES, Batch, measure_latency
from evla_cli.pipeline import analyze
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, DiffusionSettings, InferenceSettings, VisualTokenSettings


class ActingPolicy(Protocol):
    def reset(self, episode: int) -> None:
        """An episode starts; its number decides every random choice but the noise."""

    def predict_action(self, image: Any, instruction: str, *, seed: int) -> np.ndarray:
        """uint8 (S, S, 3) and text -> un-normalised actions (H, A); `seed` decides the diffusion noise."""


@dataclass(frozen=True)
class Trial:
    """How episodes are run.

    Attributes:
        executed: how many of a chunk's actions are executed before the next prediction.
        opposite: give the instruction of the reversed task.
        blind: the camera shows the first frame of another episode for ever.
    """

    executed: int = 8
    opposite: bool = False
    blind: bool = False


@dataclass(frozen=True)
class Variant:
    """A policy made worse, or the policy itself."""

    dropped_layers: tuple[int, ...] = ()
    settings: InferenceSettings = field(default_factory=InferenceSettings)

    def load(self, run: Path) -> ActingPolicy:
        policy = policy_from_checkpoint(run, self.settings, dtype=torch.float32)
        llama = policy.model.language_model.model
        kept = [layer for index, layer in enumerate(llama.layers) if index not in self.dropped_layers]
        llama.layers = nn.ModuleList(kept)
        return policy


def evaluate(
    load_policy: Callable[[], ActingPolicy], episodes: int, trial: Trial | None = None, processes: int = 2
) -> dict[str, list[bool]]:
    """Success of every episode by task. Episode i of a task is the same for every policy: its seed decides it all."""
    trial = trial or Trial()
    tasks = [task for task in TASKS if not trial.opposite or TASKS[task].opposite]
    jobs = [(task, first, min(first + 10, episodes)) for first in range(0, episodes, 10) for task in tasks]
    with multiprocessing.get_context("spawn").Pool(processes, _start, (load_policy,)) as pool:
        parts = pool.map(partial(_run_episodes, trial=trial), jobs, chunksize=1)
    return {
        task: [success for job, part in zip(jobs, parts, strict=True) if job[0] == task for success in part]
        for task in tasks
    }


_policy: ActingPolicy


def _start(load_policy: Callable[[], ActingPolicy]) -> None:
    global _policy
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _policy = load_policy()


def _run_episodes(job: tuple[str, int, int], trial: Trial) -> list[bool]:
    task, first, end = job
    env = DemoEnv(task)
    successes = [run_episode(env, _policy, FIRST_SEED["evaluation"] + i, trial) for i in range(first, end)]
    env.close()
    return successes


def run_episode(env: DemoEnv, policy: ActingPolicy, seed: int, trial: Trial) -> bool:
    task = TASKS[env.task]
    if trial.opposite:
        task = TASKS[str(task.opposite)]
    instruction = task.phrasings[seed % len(task.phrasings)]
    frozen = None
    if trial.blind:
        env.reset(seed + 1000)
        frozen = env.render()
    env.reset(seed)
    policy.reset(seed)
    for step in range(MAX_STEPS):
        if step % trial.executed == 0:
            image = env.render() if frozen is None else frozen
            actions = policy.predict_action(image, instruction, seed=seed * 1000 + step)
        if env.step(actions[step % trial.executed]):
            return True
    return False


def wilson_interval(successes: int, episodes: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson)."""
    rate, spread = successes / episodes, z * z / episodes
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / episodes + spread / episodes / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def rows(run: Path, samples: Path, episodes: int, fewer: int) -> dict[str, tuple[Variant, Trial, int]]:
    """What is measured: name -> policy, trial, episodes per task."""
    ranked = sorted(analyze(run, samples).layers, key=lambda layer: layer.importance, reverse=True)
    most, least = (tuple(layer.index for layer in layers) for layers in (ranked[:3], ranked[:-4:-1]))
    # The lower half of this language model finds hand and object, so its tokens can leave from layer 4 on, not before.
    fewer_tokens = {}
    for num_keep, layer in ((28, 4), (14, 4), (14, 6)):
        for method, how in (("random", "at random"), ("evla", "by score")):
            tokens = VisualTokenSettings(num_keep, layer, method=method)
            name = f"{num_keep} of 64 visual tokens from layer {layer}, {how}"
            fewer_tokens[name] = (Variant(settings=InferenceSettings(visual_tokens=tokens)), Trial(), fewer)
    cached = InferenceSettings(action_cache=ActionCacheSettings(interval=5))
    two_steps = InferenceSettings(diffusion=DiffusionSettings(num_denoise_steps=2))
    return {
        "as trained": (Variant(), Trial(), episodes),
        "control: opposite instruction": (Variant(), Trial(opposite=True), fewer),
        "control: blind": (Variant(), Trial(blind=True), fewer),
        f"without the 3 most important layers {most}": (Variant(most), Trial(), fewer),
        f"without the 3 least important layers {least}": (Variant(least), Trial(), fewer),
        f"without the least important layer ({least[0]})": (Variant(least[:1]), Trial(), fewer),
        **fewer_tokens,
        "2 denoising steps": (Variant(settings=two_steps), Trial(), episodes),
        "10 denoising steps, head cached at 8 of them": (Variant(settings=cached), Trial(), fewer),
    }


def stage_shares(run: Path) -> dict[str, float]:
    """Median milliseconds of each stage of one prediction, one thread."""
    torch.set_num_threads(1)
    policy = policy_from_checkpoint(run, dtype=torch.float32)
    image = np.zeros((112, 112, 3), np.uint8)
    latency = measure_latency({"dense": policy}, Batch([image], ["open the drawer"]), runs=50)["dense"]
    return {stage: round(latency.median(stage), 2) for stage in STAGES}


def measure(run: Path, samples: Path, results_file: Path, episodes: int, fewer: int, processes: int) -> None:
    """Run every row that `results_file` does not hold yet, and write the model card from all of them."""
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    planned = rows(run, samples, episodes, fewer)
    for name, (variant, trial, count) in planned.items():
        if name in results:
            continue
        started = time.time()
        results[name] = evaluate(partial(variant.load, run), count, trial, processes)
        print(f"{name}: {rate(results[name])}, {time.time() - started:.0f} s", flush=True)
        results_file.write_text(json.dumps(results))
    if "stages" not in results:
        results["stages"] = stage_shares(run)
        results_file.write_text(json.dumps(results))
    card = model_card({name: results[name] for name in planned}, results["stages"])
    (run / "README.md").write_text(card, encoding="utf-8")


def rate(success: dict[str, list[bool]]) -> str:
    total, count = sum(map(sum, success.values())), sum(map(len, success.values()))
    low, high = wilson_interval(total, count)
    return f"{total}/{count} = {total / count:.0%} ({low:.0%} to {high:.0%})"


def model_card(results: dict[str, dict[str, list[bool]]], stages: dict[str, float]) -> str:
    """README.md of the run: how it was made and what was measured."""
    dense = results["as trained"]
    per_task = [f"| {task} | {rate({task: success})} |" for task, success in dense.items()]
    others = []
    for name, success in list(results.items())[1:]:
        same = {task: dense[task][: len(episodes)] for task, episodes in success.items()}  # the same episodes
        others.append(f"| {name} | {rate(success)} | {rate(same)} |")
    total = sum(stages.values())
    times = [f"| {stage.replace('_', ' ')} | {value:.1f} | {value / total:.0%} |" for stage, value in stages.items()]
    return _CARD.format(
        total=rate(dense), per_task="\n".join(per_task), others="\n".join(others), times="\n".join(times)
    )


_CARD = """\
# cogact-metaworld: a small CogACT, trained from nothing

The demo model of evla: CogACT's architecture at a small scale (5.2 million parameters, 10 MB in bfloat16), in CogACT's
native layout. It sees one 112 x 112 camera picture and an instruction, and predicts 16 actions
`[dx, dy, dz, 0, 0, 0, gripper]` (gripper 1 is open), of which 8 are executed before it looks again. It knows eight
tasks of Meta-World and their phrasings, one camera and one robot: enough to measure compression on, no robot's brain.

| part | size |
|---|---|
| DINOv2-like tower | 3 blocks (2 run) x 96, 3 heads, 4 registers, patch 14: 64 visual tokens |
| SigLIP-like tower | 3 blocks (2 run) x 96, 3 heads |
| projector | 192 - 768 - 160 - 160 |
| Llama | 10 layers x 160, 5 heads, MLP 512, 64 words |
| diffusion action head | 2 blocks x 128, 4 heads, 16 actions |

## Training

    pip install -e .[demo]          # and the system library libosmesa6
    python scripts/train_demo.py --work out/train-demo --output demo --seed 0

Behaviour cloning of Meta-World's scripted experts: 140 noisy episodes a task, every third frame, labelled with what the
expert would do from that very state. First 400 steps of 32 frames in which the towers, the projector and the lower
half of the language model learn to locate the hand and the object, then 3000 steps of 32 frames of CogACT's diffusion
loss on the whole model, with auxiliary position and action regression heads that are not shipped. No stochastic depth,
no token dropping: nothing teaches the model to do without a part. The weights are an exponential average.
Recording took a quarter of an hour and training 80 minutes on two cores that had other work to do as well.
Seeds: training episodes 0 to 139 of each task, validation from 10000, calibration samples (`../samples`) from 20000,
evaluation from 30000.

## Success

Closed loop, Meta-World's own success flag at any of 200 steps, unseen object positions; in brackets the 95 % confidence
interval (Wilson). DDIM with 10 steps, guidance 1.5, float32 arithmetic on the bfloat16 weights.

| task | success |
|---|---|
{per_task}
| **all** | **{total}** |

## What it relies on

The same episodes and the same diffusion noise in both columns. Layers count from 0 and are ranked by `evla analyze`
over `../samples`. The opposite instruction asks to close what the task wants opened, or the other way round, and the
task's own success is counted; the blind policy sees the first frame of another episode all the time. "By score" is
EfficientVLA's choice of visual tokens.

| | success | as trained, same episodes |
|---|---|---|
{others}

## Where the time goes

One prediction, batch 1, one CPU thread, float32.

| stage | milliseconds | share |
|---|---|---|
{times}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=50, help="per task, of the policy as trained")
    parser.add_argument("--fewer", type=int, default=15, help="per task, of every other row")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, required=True, help="JSON; rows that it holds already are kept")
    args = parser.parse_args()
    measure(args.run, args.samples, args.results, args.episodes, args.fewer, args.processes)


if __name__ == "__main__":
    main()
