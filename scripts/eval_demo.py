"""Closed-loop success of the demo model in its Meta-World tasks, controls included, and what weakening it costs.

    python scripts/eval_demo.py demo/cogact-metaworld --samples demo/samples --work out/eval-demo

Every row runs the same episodes with the same noise, so rows can be compared episode by episode. What was finished is
kept in the work folder. Writes the model card.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evla_cli import pipeline
from evla_cli.evaluation.latency import STAGES, Batch, measure_latency
from evla_cli.evaluation.rollout import Candidate, evaluate
from evla_cli.evaluation.success import verdict, wilson_interval
from evla_cli.evaluation.suites import Suite
from evla_cli.evaluation.suites.metaworld import TASKS, MetaWorld, MetaWorldScene, phrasing
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, DiffusionSettings, InferenceSettings, VisualTokenSettings

TRAINED = "as trained"


class Opposite(MetaWorld):
    """A control: the instruction asks for the reverse."""

    tasks = tuple(name for name, task in TASKS.items() if task.opposite)

    def open(self, task: str) -> MetaWorldScene:
        return _OppositeScene(task)


class _OppositeScene(MetaWorldScene):
    def reset(self, seed: int) -> str:
        super().reset(seed)
        return phrasing(str(TASKS[self.task].opposite), seed)


class Blind(MetaWorld):
    """A control: the camera shows the first frame of another episode for ever."""

    def open(self, task: str) -> MetaWorldScene:
        return _BlindScene(task)


class _BlindScene(MetaWorldScene):
    def reset(self, seed: int) -> str:
        super().reset(seed + 1000)
        self._frozen = super().render()
        return super().reset(seed)

    def render(self) -> np.ndarray:
        return self._frozen


def without_layers(run: Path, samples: Path, work: Path) -> dict[str, Candidate]:
    """Pruned copies of the run: row -> candidate."""
    ranked = sorted(pipeline.analyze(run, samples).layers, key=lambda layer: layer.importance, reverse=True)
    most, least = (tuple(layer.index for layer in layers) for layers in (ranked[:3], ranked[:-4:-1]))
    rows = {
        f"without the 3 most important layers {most}": most,
        f"without the 3 least important layers {least}": least,
        f"without the least important layer ({least[0]})": least[:1],
    }
    candidates = {}
    for name, layers in rows.items():
        pruned = work / f"without-{'-'.join(map(str, layers))}"
        pipeline.prune(run, pruned, drop_ids=layers, protect_first=0, overwrite=True)
        candidates[name] = Candidate(name, pruned, InferenceSettings())
    return candidates


def with_settings(run: Path) -> dict[str, Candidate]:
    # The lower half of this language model finds hand and object, so its tokens can leave from layer 4 on, not before.
    rows = {}
    for num_keep, layer in ((28, 4), (14, 4), (14, 6)):
        for method, how in (("random", "at random"), ("evla", "by score")):
            tokens = VisualTokenSettings(num_keep, layer, method=method)
            rows[f"{num_keep} of 64 visual tokens from layer {layer}, {how}"] = InferenceSettings(visual_tokens=tokens)
    rows["2 denoising steps"] = InferenceSettings(diffusion=DiffusionSettings(num_denoise_steps=2))
    cached = InferenceSettings(action_cache=ActionCacheSettings(interval=5))
    rows["10 denoising steps, head cached at 8 of them"] = cached
    return {name: Candidate(name, run, settings) for name, settings in rows.items()}


def stage_shares(run: Path) -> dict[str, float]:
    """Median milliseconds of each stage of one prediction, one thread."""
    torch.set_num_threads(1)
    policy = policy_from_checkpoint(run, dtype=torch.float32)
    image = np.zeros((112, 112, 3), np.uint8)
    latency = measure_latency({"dense": policy}, Batch([image], ["open the drawer"]), runs=50)["dense"]
    return {stage: round(latency.median(stage), 2) for stage in STAGES}


def measure(run: Path, samples: Path, work: Path, episodes: int, fewer: int, processes: int) -> None:
    """Run what the logs in `work` lack, and write the model card."""
    work.mkdir(parents=True, exist_ok=True)
    trained = Candidate(TRAINED, run, InferenceSettings())
    variants = without_layers(run, samples, work) | with_settings(run)
    two_steps = "2 denoising steps"

    def rows(suite: Suite, log: str, candidates: list[Candidate], count: int) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"episodes": count, "num_workers": processes, "dtype": "float32"}
        return evaluate([trained, *candidates], suite, work / f"{log}.jsonl", **options)["candidates"]

    first, chance, steps = rows(MetaWorld(), "policies", [variants[two_steps]], episodes)
    fewer_first, fewer_chance, *others = rows(
        MetaWorld(), "policies", [variant for name, variant in variants.items() if name != two_steps], fewer
    )
    table = {
        f"control: {name}": control_row(suite, rows(suite, name.split()[0], [], fewer)[0], fewer_first)
        for name, suite in (("opposite instruction", Opposite()), ("blind", Blind()))
    }
    compared = (chance, fewer_chance | {"name": f"{chance['name']}, fewer episodes"}, *others[:-1], steps, others[-1])
    table |= {row["name"]: paired_row(row) for row in compared}
    (run / "README.md").write_text(model_card(first, table, stage_shares(run)), encoding="utf-8")


def control_row(suite: Suite, row: dict[str, Any], trained: dict[str, Any]) -> tuple[str, str, str]:
    """Success under the control, and without it in the same episodes."""
    same = [trained["tasks"][task] for task in suite.tasks]
    return rate(row["all"]), rate({key: sum(task[key] for task in same) for key in ("successes", "episodes")}), ""


def paired_row(row: dict[str, Any]) -> tuple[str, str, str]:
    everything, against = row["all"], row["against_first"]
    same = {"successes": everything["successes"] - against["gained"] + against["lost"]}
    return rate(everything), rate(everything | same), verdict(against["real"])


def rate(row: dict[str, Any]) -> str:
    total, count = row["successes"], row["episodes"]
    low, high = wilson_interval(total, count)
    return f"{total}/{count} = {total / count:.0%} ({low:.0%} to {high:.0%})"


def model_card(trained: dict[str, Any], others: dict[str, tuple[str, str, str]], stages: dict[str, float]) -> str:
    """README.md of the run: how it was made and what was measured."""
    total = sum(stages.values())
    times = [f"| {stage.replace('_', ' ')} | {value:.1f} | {value / total:.0%} |" for stage, value in stages.items()]
    return _CARD.format(
        total=rate(trained["all"]),
        per_task="\n".join(f"| {task} | {rate(row)} |" for task, row in trained["tasks"].items()),
        others="\n".join(f"| {name} | {mine} | {same} | {real} |" for name, (mine, same, real) in others.items()),
        times="\n".join(times),
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
EfficientVLA's choice of visual tokens. A difference is real if its 95 % interval excludes 0 and it is larger than the
farther end of the interval of the row with other noise, of as many episodes: what chance alone does.

| | success | as trained, same episodes | real |
|---|---|---|---|
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
    parser.add_argument("--episodes", type=int, default=50, help="per task, of the policy as trained and of 2 steps")
    parser.add_argument("--fewer", type=int, default=15, help="per task, of every other row")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="for logs and pruned copies")
    args = parser.parse_args()
    measure(args.run, args.samples, args.work, args.episodes, args.fewer, args.processes)


if __name__ == "__main__":
    main()
