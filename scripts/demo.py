"""`make demo`: compress the shipped CogACT with `configs/demo.yaml`, and print what that gained and what it cost."""

import argparse
import os
from pathlib import Path

import torch

from evla_cli.calibration import load_samples
from evla_cli.checkpoint.tensors import total_elements
from evla_cli.evaluation.fidelity import fidelity, predict_samples
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.latency import STAGES, WHOLE, Batch, measure_latency
from evla_cli.evaluation.report import table
from evla_cli.families import open_checkpoint
from evla_cli.running import run_recipe
from evla_cli.runtime.policy import Policy, load_policy, policy_from_checkpoint
from evla_cli.settings import Recipe

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--runs", type=int, default=30, help="timed predictions of each model")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    for stage, output, done in run_recipe(arguments.recipe, overwrite=True):
        print(f"{stage:8} {os.path.relpath(output)}{'' if done else '  (unchanged, skipped)'}")
    recipe = Recipe.load(arguments.recipe)
    source = arguments.recipe.parent / recipe.source
    bundle = arguments.recipe.parent / recipe.output / "bundle"
    assert recipe.analyze is not None
    samples = load_samples(arguments.recipe.parent / recipe.analyze.samples, "image")

    # float32 on the CPU: most have no fast bfloat16.
    dense = policy_from_checkpoint(source, dtype=torch.float32)
    compressed = load_policy(bundle, dtype=torch.float32)
    print()
    print(comparison(source, bundle, dense, compressed, samples, arguments.runs))


def comparison(source: Path, bundle: Path, dense: Policy, compressed: Policy, samples: list, runs: int) -> str:
    rows = []
    before, after = open_checkpoint(source), open_checkpoint(bundle)
    rows.append(row("parameters (M)", total_elements(before.weights) / 1e6, total_elements(after.weights) / 1e6))
    rows.append(row("weights on disk (MB)", before.reader.bytes_on_disk / 1e6, after.reader.bytes_on_disk / 1e6))
    prompt = len(dense.processor.prompt(samples[0].instruction)[0])
    flops = [count_flops(policy.model, policy.settings, prompt) for policy in (dense, compressed)]
    for stage in (*STAGES[1:], "total"):
        rows.append(row(f"MFLOPs, {stage.replace('_', ' ')}", *(getattr(f, stage) / 1e6 for f in flops)))
    batch = Batch([samples[0].image], [samples[0].instruction])
    latency = measure_latency({"dense": dense, "compressed": compressed}, batch, runs)
    for stage in (*STAGES, WHOLE):
        rows.append(
            row(f"ms, {stage.replace('_', ' ')} (median)", *(entry.median(stage) for entry in latency.values()))
        )
    # What the actions differ by anyway: the dense model against itself, denoising from other noise.
    reference = predict_samples(dense, samples)
    noise = fidelity(reference, predict_samples(dense, samples, seed=1))
    moved = fidelity(reference, predict_samples(compressed, samples))
    flips = [0.0 if each.gripper_flips is None else each.gripper_flips.mean() for each in (noise, moved)]
    for name, before_after, form in (
        ("action error, mean *", [each.action_error.mean() for each in (noise, moved)], "{:.4f}"),
        ("action error, largest *", [each.largest_error.max() for each in (noise, moved)], "{:.4f}"),
        ("gripper commands changed *", flips, "{:.2%}"),
        ("cosine of cognition tokens *", [each.cognition_cosine.mean() for each in (noise, moved)], "{:.4f}"),
    ):
        rows.append([name, *map(form.format, before_after), ""])
    return table(["", "before", "after", "after / before"], rows) + (
        f"\n* against the dense model's predictions for {len(samples)} camera frames; actions lie in [-1, 1]."
        "\n  after: from the same noise. before: the dense model itself from other noise, for scale."
        f"\n  latency: batch 1, float32, {torch.get_num_threads()} threads, {runs} interleaved runs."
        "\n  FLOPs: in the paper's convention (linear layers alone)."
    )


def row(name: str, before: float, after: float) -> list[str]:
    return [name, f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.3f}"]


if __name__ == "__main__":
    main()
