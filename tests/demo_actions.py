"""Actions of the shipped demo, which every version of every library must give: `python tests/demo_actions.py` writes
demo_actions.json anew, with what is installed."""

import json
from pathlib import Path

import numpy as np
import torch

from evla_cli.calibration import load_samples
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, InferenceSettings, VisualTokenSettings

DEMO = Path(__file__).resolve().parent.parent / "demo"
FILE = Path(__file__).with_suffix(".json")
SETTINGS = {
    "neutral": InferenceSettings(),
    "pruned": InferenceSettings(visual_tokens=VisualTokenSettings(14, 6), action_cache=ActionCacheSettings(5)),
    "vla_cache": InferenceSettings(visual_tokens=VisualTokenSettings(method="vla_cache")),
}


def demo_actions() -> dict[str, np.ndarray]:
    """By setting (calls, B, H, A), normalised: two calls for two frames each, whose prompts differ in length."""
    dense = policy_from_checkpoint(DEMO / "cogact-metaworld", dtype=torch.float32)
    samples = load_samples(DEMO / "samples", "image")
    first = samples[0]
    other = next(sample for sample in samples if len(sample.instruction) != len(first.instruction))
    images, instructions = [first.image, other.image], [first.instruction, other.instruction]
    actions = {}
    for name, settings in SETTINGS.items():
        policy = dense.with_settings(settings)
        noise = torch.Generator().manual_seed(0)
        calls = [policy.predict(images, instructions, generator=noise).normalized_actions for _ in range(2)]
        actions[name] = np.stack(calls)
    return actions


if __name__ == "__main__":
    record = {name: values.round(6).tolist() for name, values in demo_actions().items()}
    FILE.write_text(json.dumps(record) + "\n")
