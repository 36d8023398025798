"""Action error of the demo model after every way of removing a quarter of its decoder's MLP rows, and nothing else.

    python scripts/bench_rows.py out/bench-rows

The shipped samples once measure the channels and judge as well, all 64; once the first 5 of each 8 frames of a task
measure and the others judge. The error is that of `evla compare`, in float32. `bench_perplexity.py --choices` does the
same to a language model.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from published_prunenet import published_rows
from torch import Tensor

from evla_cli import pipeline
from evla_cli.checkpoint.files import write_yaml
from evla_cli.checkpoint.safetensors_format import read_safetensors
from evla_cli.evaluation.compare import compare
from evla_cli.evaluation.report import table
from evla_cli.families import open_checkpoint
from evla_cli.methods.mlp_pruning import prune_width
from evla_cli.methods.prunenet import train_policy
from evla_cli.methods.row_selection import MlpLayers, Rows, select_channels
from evla_cli.plan import PrunePlan, activations_file
from evla_cli.progress import set_quiet

DEMO, SAMPLES, RATIO = Path("demo/cogact-metaworld"), Path("demo/samples"), 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    set_quiet(True)
    columns = {"all 64": measure(out / "all", SAMPLES, SAMPLES)}
    lines = (SAMPLES / "samples.jsonl").read_text().splitlines()
    parts = [[line for at, line in enumerate(lines) if (at % 8 < 5) == fit] for fit in (True, False)]
    fit, test = (write_samples(out / name, part) for name, part in zip(("fit", "test"), parts, strict=True))
    columns[f"{len(parts[1])} held out"] = measure(out / "apart", fit, test)
    rows = [[name, *(f"{column[name]:.4f}" for column in columns.values())] for name in columns["all 64"]]
    print(table(["action error", *columns], rows))


def row_choices(source: Path, importance: Path, mlp_prune_ratio: float) -> Iterator[tuple[str, Rows]]:
    """The rows that stay in every layer, by name: evla's ways, PruneNet untrained and as published, random controls."""
    checkpoint, rms = open_checkpoint(source), read_safetensors(activations_file(importance))
    num_keep = prune_width(checkpoint.intermediate_size, mlp_prune_ratio)
    num_layers = checkpoint.num_layers

    def read(layer: int) -> tuple[Tensor, Tensor, Tensor]:
        mlp = f"{checkpoint.family.decoder_layers}.{layer}.mlp"
        gate, up, down = (checkpoint.weights[f"{mlp}.{kind}_proj.weight"].load() for kind in ("gate", "up", "down"))
        return gate, up, down

    def read_rms(layer: int) -> Tensor:
        return rms[str(layer)].load()

    mlps = MlpLayers(range(num_layers), read, checkpoint.intermediate_size, num_keep, read_rms)
    for method in ("activation", "prunenet", "magnitude"):
        yield method, select_channels(method, mlps, 0).rows
    yield "prunenet, untrained", plain(train_policy(read, read_rms, num_layers, num_keep, episodes=0).rows)
    for seed in range(5):
        yield f"random, seed {seed}", select_channels("random", mlps, seed).rows
    published, _ = published_rows([read(layer)[0].float() for layer in range(num_layers)], num_keep)
    yield "prunenet, as published", plain(published)


def plain(rows: Sequence[Tensor]) -> Rows:
    return tuple(tuple(each.tolist()) for each in rows)


def measure(out: Path, fit: Path, test: Path) -> dict[str, float]:
    out.mkdir(parents=True, exist_ok=True)
    importance = out / "importance.json"
    result = pipeline.analyze_to_file(DEMO, fit, importance, overwrite=True)
    num_layers, width = len(result.layers), open_checkpoint(DEMO).intermediate_size
    errors = {}
    for name, rows in row_choices(DEMO, importance, RATIO):
        plan = PrunePlan(num_layers, width, tuple(range(num_layers)), rows, result.checkpoint_sha256)
        record = replace(plan, how={"mlp_method": name}).to_record()
        write_yaml(out / "rows.yaml", record, "Rows to be measured.")
        pipeline.prune(DEMO, out / "pruned", plan_file=out / "rows.yaml", overwrite=True)
        found = compare(DEMO, out / "pruned", test, dtype="float32")["measures"]["all"]
        errors[name] = found["action_error"]["value"]
    return errors


def write_samples(directory: Path, lines: list[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in lines]
    for record in records:
        name = record["image"].replace("/", "-")
        (directory / name).write_bytes((SAMPLES / record["image"]).read_bytes())
        record["image"] = name
    (directory / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


if __name__ == "__main__":
    main()
