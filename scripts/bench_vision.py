"""What pruning the demo model's vision towers saves and costs, with and without refit.

    python scripts/bench_vision.py out/bench-vision

Blocks, rows and refit are decided on 40 of the shipped frames (or on those of `--fit`, a folder with samples.jsonl);
features and actions are judged against the dense model's on the other 24. Feature error: norm of the difference over
norm of the dense features. "towers": their fc2 layers are refit; "all": so is the decoder, behind the refit towers.
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from evla_cli import pipeline
from evla_cli.calibration import Sample, hold_out, load_samples
from evla_cli.checkpoint.tensors import total_elements
from evla_cli.evaluation.compare import with_pruned_towers
from evla_cli.evaluation.fidelity import Fidelity, Predictions, fidelity, predict_samples
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.report import table
from evla_cli.families import open_checkpoint
from evla_cli.refitting import RefitOptions
from evla_cli.runtime.policy import Policy, policy_from_checkpoint, policy_from_weights
from evla_cli.vision.planning import VisionOptions
from evla_cli.vision.refitting import refit_towers

ROOT = Path(__file__).resolve().parent.parent
DENSE = ROOT / "demo" / "cogact-metaworld"
SAMPLES = ROOT / "demo" / "samples"
VARIANTS = {
    # A quarter is asked for; of 384 channels 320 stay, the nearest multiple of 64.
    "1 block of each tower": VisionOptions(1),
    "a sixth of the rows, activation": VisionOptions(0, 0.25, "activation"),
    "a sixth of the rows, magnitude": VisionOptions(0, 0.25, "magnitude"),
    "a sixth of the rows, random": VisionOptions(0, 0.25, "random"),
    "half of the rows, activation": VisionOptions(0, 0.5, "activation"),
    "1 block and a sixth of the rows": VisionOptions(1, 0.25, "activation"),
}


@dataclass(frozen=True)
class Judge:
    dense: Policy
    samples: list[Sample]
    predicted: Predictions  # by the dense model

    def cells(self, policy: Policy) -> list[str]:
        moved = self.fidelity(policy, 0)
        return [f"{self.feature_error(policy):.4f}", self._mean(moved), f"{moved.cognition_cosine.mean():.4f}"]

    def fidelity(self, policy: Policy, seed: int) -> Fidelity:
        return fidelity(self.predicted, predict_samples(policy, self.samples, seed=seed))

    @staticmethod
    def _mean(found: Fidelity) -> str:
        """Mean and its standard error over samples."""
        errors = found.action_error
        return f"{errors.mean():.4f} ± {errors.std(ddof=1) / math.sqrt(len(errors)):.4f}"

    @torch.inference_mode()
    def feature_error(self, policy: Policy) -> float:
        inputs = policy.prepare([s.image for s in self.samples], [s.instruction for s in self.samples])
        theirs, ours = (p.model.vision_features(inputs.dino_pixels, inputs.siglip_pixels) for p in (self.dense, policy))
        return float((ours - theirs).norm() / theirs.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fit", type=Path, help="other samples to decide on than 40 of the shipped ones")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    lines = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text().splitlines()]
    held_out = [number for number in range(len(lines)) if number % 8 in (1, 4, 7)]  # 3 of the 8 frames of each task
    others = [line for number, line in enumerate(lines) if number not in held_out]
    fit = arguments.fit or _write_samples(arguments.output / "fit", others)
    test = _write_samples(arguments.output / "test", [lines[number] for number in held_out])
    importance = arguments.output / "importance.json"
    pipeline.analyze_to_file(DENSE, fit, importance)
    dense, samples = policy_from_checkpoint(DENSE, dtype=torch.float32), load_samples(test, "image")
    judge = Judge(dense, samples, predict_samples(dense, samples))
    rows = [["other noise", "", "", judge._mean(judge.fidelity(judge.dense, 1)), ""]]
    checkpoint = open_checkpoint(DENSE)
    before = count_flops(judge.dense.model, judge.dense.settings).vision, total_elements(checkpoint.weights)
    for name, options in VARIANTS.items():
        dest = arguments.output / name.replace(" ", "_").replace("%", "percent")
        result = pipeline.prune(DENSE, dest, importance=importance, vision=options, refit=RefitOptions(fit))
        fit_to, judging = hold_out(load_samples(fit, "image"), fit)  # as in evla_cli.refitting
        towers = refit_towers(checkpoint, result.plan, fit_to + judging, len(fit_to), 8, "cpu", None)
        plain = policy_from_weights(with_pruned_towers(checkpoint, result.plan), dtype=torch.float32)
        for kind, policy in (
            ("no", plain),
            ("towers", policy_from_weights(towers.checkpoint, dtype=torch.float32)),
            ("all", policy_from_checkpoint(dest, dtype=torch.float32)),
        ):
            rows.append([name, kind, *judge.cells(policy)])
            print(*rows[-1], sep=" | ", file=sys.stderr)
        share = count_flops(plain.model, plain.settings).vision / before[0]
        print(f"{name}: {share:.1%} of the towers' FLOPs, {result.parameters_after / before[1]:.1%} of all parameters")
    print(table(["removed", "refit", "feature error", "action error", "cosine of cognition"], rows))


def _write_samples(directory: Path, lines: list[dict[str, str]]) -> Path:
    directory.mkdir()
    copied = []
    for line in lines:
        name = Path(line["image"]).name
        shutil.copyfile(SAMPLES / line["image"], directory / name)
        copied.append(line | {"image": name})
    (directory / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in copied))
    return directory


if __name__ == "__main__":
    main()
