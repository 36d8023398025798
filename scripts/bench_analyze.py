"""Time `evla analyze` against one bare forward pass over the same samples by the fully loaded model.

    python scripts/bench_analyze.py demo/cogact-metaworld --samples demo/samples

Both compute in the same dtype with the same batch size and threads, one after the other, several rounds; the ratio is
taken round by round. The bare pass loads the model outside of its time; analyze pays for its own reading. It is timed
with and without MLP channels, which the command always measures, on processor time, too.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.checkpoint.tensors import LazyTensors
from evla_cli.families import open_checkpoint
from evla_cli.models.skeleton import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--num-samples", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=pipeline.DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    checkpoint = open_checkpoint(arguments.source)
    samples = load_samples(arguments.samples, checkpoint.family.sample_kind, arguments.num_samples)
    dtype = pipeline.DTYPES[arguments.dtype]
    model = load_model(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root, dtype)

    @torch.inference_mode()
    def forward() -> None:
        assert checkpoint.tokenizer_dir is not None
        for start in range(0, len(samples), arguments.batch_size):
            batch = samples[start : start + arguments.batch_size]
            checkpoint.family.embed(model, batch, checkpoint.tokenizer_dir, torch.empty(0, dtype=dtype))

    def analyze(channel_rms: LazyTensors | None = None) -> None:
        pipeline.analyze(
            arguments.source,
            arguments.samples,
            channel_rms=channel_rms,
            num_samples=arguments.num_samples,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
        )

    forward()
    analyze()
    runs: dict[str, Callable[[], Any]] = {
        "bare forward": forward,
        "without channels": analyze,
        "analyze": lambda: analyze({}),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, function in runs.items():
            found[name].append(seconds(function))
    print(f"{len(samples)} samples, batch {arguments.batch_size}, {arguments.dtype}, {torch.get_num_threads()} threads")
    for name, times in found.items():
        for kind, values in zip(("wall s", "CPU s"), zip(*times, strict=True), strict=True):
            print_line(f"{name} ({kind})", values)
    for first, second in (("analyze", "bare forward"), ("analyze", "without channels")):
        pairs = zip(found[first], found[second], strict=True)
        wall, cpu = zip(*((a[0] / b[0], a[1] / b[1]) for a, b in pairs), strict=True)
        print_line(f"{first} / {second} (wall)", wall)
        print_line(f"{first} / {second} (CPU)", cpu)


def print_line(name: str, values: Sequence[float]) -> None:
    print(f"{name:36} median {statistics.median(values):8.3f}   min {min(values):8.3f}   max {max(values):8.3f}")


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Of wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
