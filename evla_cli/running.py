"""`evla run`: the stages of a recipe, each skipped when its inputs, its options and its output are as they were."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evla_cli import __version__, pipeline
from evla_cli.bundling import check_export
from evla_cli.calibration import load_samples, samples_sha256
from evla_cli.checkpoint.bundle import library_versions
from evla_cli.checkpoint.files import read_json, sha256_file
from evla_cli.checkpoint.outputs import check_apart, locked, made_directory, write_file
from evla_cli.checkpoint.writer import parse_size
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.schema import from_mapping, to_mapping
from evla_cli.settings import Recipe

STATE = "run.json"
_SMALL_FILES = ("*.json", "*.yaml", "*.model", "llm_config/*")
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class StageState:
    """A stage that was done: hashes of everything that went in (options included) and of what came out."""

    inputs: str
    output: str


@dataclass(frozen=True)
class RunState:
    """`run.json`, in the recipe's output directory."""

    schema_version: int
    stages: dict[str, StageState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise EvlaError(f"schema_version is {self.schema_version}; this evla reads {SCHEMA_VERSION}.")

    @classmethod
    def load(cls, path: Path) -> "RunState":
        return from_mapping(cls, read_json(path), str(path)) if path.is_file() else cls(SCHEMA_VERSION)


def run_recipe(path: Path, overwrite: bool = False) -> list[tuple[str, Path, bool]]:
    """Follow the recipe. Returns stage, output, and whether it was done (False: unchanged, skipped)."""
    recipe = Recipe.load(path)
    source, output = path.parent / recipe.source, path.parent / recipe.output
    check_apart(output, source)
    if recipe.export is not None:  # before hours of work are done for it
        parse_size(recipe.export.max_shard_size)
        check_export(open_checkpoint(source), recipe.export.settings)
    with made_directory(output), locked(output / ".run.lock", output):
        return _run_stages(recipe, path, source, _Stages(output, overwrite))


def _run_stages(recipe: Recipe, path: Path, source: Path, stages: "_Stages") -> list[tuple[str, Path, bool]]:
    output = stages.output
    source_hash = _hash(source)
    current = source
    importance: Path | None = None
    if recipe.analyze is not None:
        importance, analyze = output / "importance.json", recipe.analyze
        data = path.parent / analyze.samples
        samples = load_samples(data, open_checkpoint(source).family.sample_kind, analyze.num_samples)
        options = to_mapping(analyze) | {"samples": samples_sha256(samples)}
        stages.run(
            "analyze",
            importance,
            {"options": options, "source": source_hash},
            lambda: pipeline.analyze_to_file(
                source,
                data,
                output / "importance.json",
                num_samples=analyze.num_samples,
                batch_size=analyze.batch_size,
                dtype=analyze.dtype,
                overwrite=True,
            ),
        )
    if recipe.prune is not None:
        prune, dest = recipe.prune, output / "pruned"
        inputs = {"options": to_mapping(prune), "source": source_hash}
        if importance is not None:
            inputs["importance"] = sha256_file(importance)
        stages.run(
            "prune",
            dest,
            inputs,
            lambda: pipeline.prune(
                source,
                dest,
                importance=importance,
                num_drop=prune.drop_layers or None,  # the recipe's default
                drop_ids=prune.drop_layer_ids,
                protect_first=prune.protect_first,
                mlp_prune_ratio=prune.mlp_prune_ratio,
                mlp_method=prune.mlp_method,
                seed=prune.seed,
                overwrite=True,
            ),
        )
        current = dest
    if recipe.export is not None:
        export, bundle, exported = recipe.export, output / "bundle", current
        stages.run(
            "export",
            bundle,
            {"options": to_mapping(export), "source": source_hash if exported == source else _hash(exported)},
            lambda: pipeline.export(
                exported,
                bundle,
                export.settings,
                dtype=export.dtype,
                max_shard_size=export.max_shard_size,
                overwrite=True,
            ),
        )
    return stages.log


class _Stages:
    def __init__(self, output: Path, overwrite: bool):
        self.output, self._overwrite = output, overwrite
        self._path = output / STATE
        self._done = dict(RunState.load(self._path).stages)
        self.log: list[tuple[str, Path, bool]] = []

    def run(self, stage: str, dest: Path, inputs: dict[str, Any], work: Callable[[], Any]) -> None:
        key = hashlib.sha256(
            json.dumps([__version__, library_versions(), stage, inputs], sort_keys=True).encode()
        ).hexdigest()
        entry = self._done.get(stage)
        if entry is not None and dest.exists() and entry == StageState(key, _fingerprint(dest)):
            self.log.append((stage, dest, False))
            return
        if dest.exists() and entry is None and not self._overwrite:
            raise EvlaError(f"{dest} already exists and was not made by this recipe. Pass --overwrite to replace it.")
        work()
        self._done[stage] = StageState(key, _fingerprint(dest))
        state = to_mapping(RunState(SCHEMA_VERSION, self._done))
        write_file(self._path, json.dumps(state, indent=2) + "\n", overwrite=True)
        self.log.append((stage, dest, True))


def _hash(source: Path) -> str:
    """Of everything that a stage reads from a checkpoint: weights, configs, statistics, tokenizer, plan."""
    checkpoint = open_checkpoint(source)
    root = checkpoint.root
    small = sorted(path for pattern in _SMALL_FILES for path in root.glob(pattern) if path.is_file())
    lines = [f"{sha256_file(path)}  {path.relative_to(root).as_posix()}\n" for path in small]
    return hashlib.sha256("".join([checkpoint.reader.sha256, *lines]).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    """Of a stage's output: a file's content; a directory's content, file by file."""
    if path.is_file():
        return sha256_file(path)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{sha256_file(path / n)}  {n}\n" for n in names).encode()).hexdigest()
