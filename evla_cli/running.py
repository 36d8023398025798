"""`evla run`: the stages of a recipe, each skipped when its inputs, its options and its output are as they were."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evla_cli import __version__, pipeline
from evla_cli.bundling import check_export
from evla_cli.calibration import hold_out, load_samples, samples_sha256, sort_samples
from evla_cli.checkpoint.bundle import MANIFEST, differing_files, library_versions, open_manifest
from evla_cli.checkpoint.files import Stamp, file_stamp, known_sha256, read_json, sha256_file
from evla_cli.checkpoint.outputs import check_apart, check_space, clear_leftovers, locked, made_directory, write_file
from evla_cli.checkpoint.tensors import total_bytes
from evla_cli.checkpoint.writer import parse_size
from evla_cli.choosing import ChoiceOptions
from evla_cli.errors import EvlaError, one_line
from evla_cli.evaluation.held_out import HeldOutError, judge
from evla_cli.families import open_checkpoint
from evla_cli.families.base import Checkpoint
from evla_cli.methods.layer_pruning import prune_weights
from evla_cli.models.skeleton import check_device
from evla_cli.pipeline import OnComplete
from evla_cli.plan import has_activations
from evla_cli.refitting import RefitOptions
from evla_cli.schema import SCHEMA_VERSION, check_schema_version, from_mapping, to_mapping
from evla_cli.settings import Recipe

STATE = "run.json"


@dataclass(frozen=True)
class StageState:
    """A stage that was done.

    Attributes:
        inputs: hash of everything that went in, options included.
        output: SHA-256 of the file that came out; of a directory, that of its manifest, which lists all others.
        stamps: hash of the sizes, times and inodes of a directory's files.
    """

    inputs: str
    output: str
    stamps: str = ""


@dataclass(frozen=True)
class Judgement:
    """What `judge_recipe` found, and the hash of everything that it was found with."""

    inputs: str
    result: HeldOutError


@dataclass(frozen=True)
class RunState:
    """`run.json`, in the recipe's output directory.

    Attributes:
        held_out: how far the result is from the source.
        sha256: of weight files, by their stamps.
        check: hash of that table. Nothing else would show that an entry is wrong: files are not read to see.
    """

    schema_version: int
    stages: dict[str, StageState] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    check: str = ""
    held_out: Judgement | None = None

    @property
    def known(self) -> dict[str, str]:
        """`sha256`, or nothing if it is not as evla wrote it."""
        return self.sha256 if self.check == _table_sha256(self.sha256) else {}

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)

    @classmethod
    def load(cls, path: Path) -> "RunState":
        return from_mapping(cls, read_json(path), str(path)) if path.is_file() else cls(SCHEMA_VERSION)


@dataclass(frozen=True)
class Resources:
    """What the stages that run the model run it with. Nothing that was done is done again because of them.

    Attributes:
        memory_budget: of hidden states, such as "2GiB"; what is more goes to a temporary file. None: no bound.
    """

    device: str = "cpu"
    memory_budget: str | None = None


def run_recipe(
    path: Path, overwrite: bool = False, *, dtype: str | None = None, resources: Resources | None = None
) -> list[tuple[str, Path, bool]]:
    """Follow the recipe. Returns stage, output, and whether it was done (False: unchanged, skipped).

    Args:
        dtype: what analyze computes in, instead of the recipe's.
    """
    resources = resources or Resources()
    check_device(resources.device)
    if resources.memory_budget is not None:
        parse_size(resources.memory_budget)
    recipe = _computed_in(dtype, Recipe.load(path))
    if recipe.analyze is None and resources != Resources():
        raise EvlaError(
            "--device and --memory-budget are for stages that run the model, and without an analyze section the recipe "
            "has none; leave them out."
        )
    output = path.parent / recipe.output
    check_apart(output, path.parent / recipe.source)
    source = open_checkpoint(path.parent / recipe.source)
    num_bytes = _check(recipe, source)
    with made_directory(output), locked(output / ".run.lock", output):
        stages = _Stages(output, source)
        stages.check(num_bytes, overwrite)
        return _run_stages(recipe, path, source, stages, resources)


def judge_recipe(path: Path, *, dtype: str | None = None, resources: Resources | None = None) -> HeldOutError | str:
    """How far the recipe's result, which `run_recipe` made, is from its source on samples that refit did not see; or
    why that is not measured. What was measured with the same inputs is not measured again.

    Args:
        dtype: to compute in, see `judge`.
    """
    resources = resources or Resources()
    recipe = _computed_in(dtype, Recipe.load(path))
    if recipe.prune is None and recipe.export is None:
        return "the recipe makes nothing that could be held against its source"
    if recipe.analyze is None:
        return "the recipe has no analyze section, which names samples"
    if recipe.export is not None and recipe.export.settings.visual_tokens.method == "vla_cache":
        return "vla_cache remembers frames, and held-out samples do not follow one another; see evla compare"
    output, data = path.parent / recipe.output, path.parent / recipe.analyze.samples
    source = open_checkpoint(path.parent / recipe.source)
    samples = sort_samples(load_samples(data, source.family.sample_kind, recipe.analyze.num_samples))
    try:
        _, held_out = hold_out(samples, data)
    except EvlaError as error:  # nothing was fit to them, else prune had refused them
        return one_line(error).rstrip(".")
    with locked(output / ".run.lock", output):
        stages = _Stages(output, source)
        result = stages.outputs["prune" if recipe.export is None else "export"]
        inputs = {
            "source": source.reader.sha256,
            "small_files": source.small_files_sha256(),
            "result": sha256_file(_listing(result)),
            "samples": samples_sha256(samples),
            "dtype": dtype,
        }

        def work() -> HeldOutError:
            return judge(
                path.parent / recipe.source,
                result,
                held_out,
                device=resources.device,
                dtype=dtype,
                memory_budget=resources.memory_budget,
            )

        return stages.judged(_key("held_out", inputs), work)


def _computed_in(dtype: str | None, recipe: Recipe) -> Recipe:
    if dtype is None:
        return recipe
    if recipe.analyze is None:
        raise EvlaError("--dtype is what analyze computes in, and the recipe has no analyze section; leave it out.")
    return replace(recipe, analyze=replace(recipe.analyze, dtype=dtype))


def _check(recipe: Recipe, source: Checkpoint) -> dict[str, int]:
    """Refuse what can be refused before hours of work are done for it. Returns stage -> bytes that it will write."""
    num_bytes, num_layers, weights = {}, source.num_layers, source.weights
    if recipe.analyze is not None:
        num_bytes["analyze"] = 0
    if recipe.prune is not None:
        plan = pipeline.foreseen_plan(source, recipe.prune, ranked=recipe.analyze is not None)
        num_layers = len(plan.keep_layers)
        weights = prune_weights(weights, plan, source.family.decoder_layers, source.family.tower_prefixes)
        num_bytes["prune"] = total_bytes(weights)
    if recipe.export is not None:
        parse_size(recipe.export.max_shard_size)
        check_export(source, recipe.export.settings, num_layers)
        num_bytes["export"] = total_bytes(pipeline.cast(weights, recipe.export.dtype, source.family))
    return num_bytes


def _run_stages(
    recipe: Recipe, path: Path, source: Checkpoint, stages: "_Stages", resources: Resources
) -> list[tuple[str, Path, bool]]:
    root = path.parent / recipe.source
    small_files = source.small_files_sha256()

    def source_sha256() -> str:
        return hashlib.sha256(f"{source.reader.sha256}{small_files}".encode()).hexdigest()

    importance: Path | None = None
    if recipe.analyze is not None:
        analyze = recipe.analyze
        importance = stages.outputs["analyze"]
        data = path.parent / analyze.samples
        samples = sort_samples(load_samples(data, source.family.sample_kind, analyze.num_samples))
        analyze_options = to_mapping(analyze) | {"samples": samples_sha256(samples), "activations": True}
        stages.run(
            "analyze",
            lambda: {"options": analyze_options, "source": source_sha256()},
            lambda dest, on_complete: pipeline.analyze_to_file(
                root,
                data,
                dest,
                num_samples=analyze.num_samples,
                batch_size=analyze.batch_size,
                device=resources.device,
                dtype=analyze.dtype,
                memory_budget=resources.memory_budget,
                weights=analyze.position_weights,
                overwrite=True,
                on_complete=on_complete,
            ),
            has_activations,
        )
    exported = root
    if recipe.prune is not None:
        prune = recipe.prune
        ranking = {} if importance is None else {"importance": sha256_file(importance)}
        refit = None
        if prune.refit and recipe.analyze is not None:
            analyze = recipe.analyze
            refit = RefitOptions(
                path.parent / analyze.samples,
                analyze.num_samples,
                analyze.batch_size,
                prune.refit_last_weight,
                resources.device,
                resources.memory_budget,
            )
        choice = None
        if (prune.layer_method, prune.objective) != ("cosine", "hidden") and recipe.analyze is not None:
            analyze = recipe.analyze
            data = path.parent / analyze.samples
            choice = ChoiceOptions(
                prune.layer_method,
                prune.objective,
                data,
                analyze.num_samples,
                analyze.batch_size,
                resources.device,
                resources.memory_budget,
            )
        exported = stages.outputs["prune"]
        stages.run(
            "prune",
            lambda: {"options": to_mapping(prune), "source": source_sha256(), **ranking},
            lambda dest, on_complete: pipeline.prune(
                root,
                dest,
                importance=importance,
                num_drop=prune.drop_layers,
                drop_ids=prune.drop_layer_ids,
                choice=choice,
                protect_first=prune.protect_first,
                mlp_prune_ratio=prune.mlp_prune_ratio,
                mlp_method=prune.mlp_method,
                seed=prune.seed,
                vision=pipeline.vision_options(prune),
                refit=refit,
                overwrite=True,
                on_complete=on_complete,
            ),
        )
    if recipe.export is not None:
        export = recipe.export
        stages.run(
            "export",
            lambda: {
                "options": to_mapping(export),
                "source": source_sha256() if exported == root else sha256_file(exported / MANIFEST),
            },
            lambda dest, on_complete: pipeline.export(
                exported,
                dest,
                export.settings,
                dtype=export.dtype,
                max_shard_size=export.max_shard_size,
                overwrite=True,
                on_complete=on_complete,
            ),
        )
    return stages.log


class _Stages:
    """What was done, and what is done now.

    A stage is entered into run.json when its output is complete, right before the rename that puts it in its place: a
    process killed before the rename leaves an entry that no output fits, one killed after it leaves both.
    """

    def __init__(self, output: Path, source: Checkpoint):
        self.outputs = {"analyze": output / "importance.json", "prune": output / "pruned", "export": output / "bundle"}
        self.log: list[tuple[str, Path, bool]] = []
        self._output, self._source = output, source
        for dest in (*self.outputs.values(), output / STATE):
            clear_leftovers(dest)
        state = RunState.load(output / STATE)
        self._done, self._judgement = dict(state.stages), state.held_out
        known_sha256.update({_from_text(text): sha256 for text, sha256 in state.known.items()})

    def check(self, num_bytes: dict[str, int], overwrite: bool) -> None:
        """Errors: an output that no recipe made, too little room for the outputs that are not there yet."""
        missing = 0
        for stage, size in num_bytes.items():
            dest = self.outputs[stage]
            if not os.path.lexists(dest):
                missing += size
            elif stage not in self._done and not overwrite:
                raise EvlaError(
                    f"{dest} already exists and was not made by this recipe. Pass --overwrite to replace it."
                )
        check_space(self._output, missing)

    def run(
        self,
        stage: str,
        inputs: Callable[[], dict[str, Any]],
        work: Callable[[Path, OnComplete], Any],
        intact: Callable[[Path], bool] = lambda _: True,
    ) -> None:
        """Do `work` unless it is done. `inputs` are asked for late: doing the work may be what hashes them.

        `intact` says whether what stands beside the output, which its entry does not cover, is there.
        """
        dest = self.outputs[stage]
        entry = self._done.get(stage)
        done = (
            entry is not None
            and _is_output(dest, entry.output, entry.stamps)
            and entry.inputs == _key(stage, inputs())
            and intact(dest)
        )
        if not done:
            work(dest, lambda complete: self._enter(stage, _key(stage, inputs()), complete))
        elif entry is not None and entry.stamps != _stamps(dest):  # it was copied here
            self._enter(stage, entry.inputs, dest)
        self.log.append((stage, dest, not done))

    def _enter(self, stage: str, key: str, output: Path) -> None:
        self._done[stage] = StageState(key, sha256_file(_listing(output)), _stamps(output))
        self._write_state()

    def judged(self, key: str, work: Callable[[], HeldOutError]) -> HeldOutError:
        """What `work` finds, unless that is known."""
        if self._judgement is None or self._judgement.inputs != key:
            self._judgement = Judgement(key, work())
            self._write_state()
        return self._judgement.result

    def _write_state(self) -> None:
        paths = [*self._source.reader.files, *(path for path in self._output.rglob("*") if path.is_file())]
        hashes = {_to_text(stamp): known_sha256.get(stamp) for stamp in map(file_stamp, paths)}
        known = {text: sha256 for text, sha256 in hashes.items() if sha256 is not None}
        state = to_mapping(RunState(SCHEMA_VERSION, self._done, known, _table_sha256(known), self._judgement))
        write_file(self._output / STATE, json.dumps(state, indent=2) + "\n", overwrite=True)


def _is_output(dest: Path, sha256: str, stamps: str) -> bool:
    """Whether `dest` is what was entered: every file by its stamp or, if it was copied or touched, by its content."""
    listing = _listing(dest)
    if not listing.is_file() or sha256_file(listing) != sha256:
        return False
    if listing == dest:
        return True
    try:
        return _stamps(dest) == stamps or not differing_files(open_manifest(dest))
    except EvlaError:
        return False


def _listing(output: Path) -> Path:
    """The file whose hash stands for all of an output."""
    return output / MANIFEST if output.is_dir() else output


def _stamps(output: Path) -> str:
    if not output.is_dir():
        return ""
    lines = [f"{_to_text(file_stamp(output / name))}  {name}\n" for name in open_manifest(output).files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _table_sha256(table: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _to_text(stamp: Stamp) -> str:
    return ":".join(map(str, stamp))


def _from_text(text: str) -> Stamp:
    size, ctime_ns, inode = map(int, text.split(":"))
    return size, ctime_ns, inode


def _key(stage: str, inputs: dict[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps([__version__, library_versions(), stage, inputs], sort_keys=True).encode()
    ).hexdigest()
