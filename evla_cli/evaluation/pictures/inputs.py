"""What a report is made from: a directory that `evla run` wrote, and whatever else was named. Nothing runs here."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evla_cli.calibration import Sample, load_samples, spread
from evla_cli.checkpoint.bundle import MANIFEST, SETTINGS, open_bundle
from evla_cli.checkpoint.files import read_json
from evla_cli.errors import EvlaError
from evla_cli.evaluation.candidates import Candidate, open_candidates
from evla_cli.evaluation.compare import check_comparable, common_unnorm_key, source_hashes
from evla_cli.evaluation.episode_log import LoggedEpisodes, read_log
from evla_cli.evaluation.fidelity import check_episodes
from evla_cli.evaluation.latency import STAGES, WHOLE
from evla_cli.models.skeleton import check_device
from evla_cli.plan import PLAN, LayerImportance, LayerScore, PrunePlan
from evla_cli.schema import SCHEMA_VERSION, check_schema_version

IMPORTANCE = "importance.json"
_NUM_SAMPLES = 3  # that are shown where none is named


@dataclass(frozen=True)
class Request:
    """What was asked for, as `evla report` was told."""

    directory: Path
    dense: Path | None = None
    samples: Path | None = None
    chosen: tuple[int, ...] = ()
    bench: Path | None = None
    results: Path | None = None
    runs: int = 5
    unnorm_key: str | None = None
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"

    def command(self) -> str:
        """As a shell takes it, but for the output: what a report shows does not depend on where it is written."""
        words = ["evla", "report", quote(self.directory)]
        for name in ("dense", "samples", "bench", "results", "unnorm_key", "dtype"):
            if getattr(self, name) is not None:
                words += [f"--{name.replace('_', '-')}", quote(getattr(self, name))]
        words += [f"--sample {index}" for index in self.chosen]
        words += [
            f"--{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name in ("runs", "seed", "device") and getattr(self, field.name) != field.default
        ]
        return " ".join([*words, "-o REPORT"])


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        bundle, dense: None where there is none.
        plan: that made the bundle's weights; None if they are as they were.
        importance: with its file; with None if the bundle's plan alone has the scores.
        samples: all of them; `chosen` are the numbers of those that are shown.
        unnorm_key: the dataset whose statistics turn actions into the robot's units, for bundle and dense model.
        warnings: inputs that do not belong together, for the reader to know.
    """

    request: Request
    bundle: Candidate | None
    dense: Candidate | None
    plan: PrunePlan | None
    importance: tuple[LayerImportance, Path | None] | None
    samples: list[Sample]
    chosen: tuple[int, ...]
    bench: dict[str, Any] | None
    log: LoggedEpisodes | None
    unnorm_key: str | None
    warnings: tuple[str, ...]

    def directories(self) -> list[Path]:
        """What must not be written into. Beside the bundle, in what `evla run` wrote, a report may well stand."""
        named = [
            self.request.samples,
            *(each.checkpoint.root for each in (self.bundle, self.dense) if each is not None),
        ]
        return [path for path in (*named, self.request.directory / IMPORTANCE) if path is not None]

    def again(self, *options: str) -> str:
        """This command with further options, so that one picture more can be drawn."""
        return " ".join([self.request.command(), *options])

    def analyze(self) -> str:
        dense, samples = _or(self.request.dense, "CHECKPOINT"), _or(self.request.samples, "SAMPLES")
        return f"evla analyze {dense} --samples {samples} -o {quote(self.request.directory / IMPORTANCE)}"

    def make_bundle(self) -> str:
        return f"evla export CHECKPOINT {quote(self.request.directory / 'bundle')}"

    def run_bench(self) -> str:
        return f"evla bench {self._both()} --json > bench.json"

    def run_eval(self) -> str:
        return f"evla eval {self._both()} --suite SUITE -o results.jsonl"

    def _both(self) -> str:
        bundle = None if self.bundle is None else self.bundle.path
        return f"{_or(self.request.dense, 'CHECKPOINT')} {_or(bundle, 'BUNDLE')}"


def open_inputs(request: Request) -> Inputs:
    """Errors: nothing to draw, or something named that is not what it is said to be."""
    check_device(request.device)
    root = _bundle_directory(request.directory)
    bundle = None if root is None else open_candidates([root])[0]
    plan = PrunePlan.load(root / PLAN) if root is not None and (root / PLAN).is_file() else None
    file = request.directory / IMPORTANCE
    if bundle is None and not file.is_file():
        raise EvlaError(
            f"{request.directory} holds neither a bundle nor {IMPORTANCE}; give what evla run wrote, or a bundle."
        )
    dense = None if request.dense is None else _dense(request.dense)
    samples = [] if request.samples is None else load_samples(request.samples, "image")
    if bundle is not None and samples and bundle.settings.visual_tokens.remembers_frames:
        check_episodes(samples)
    key, warnings = None, []
    if bundle is not None and dense is not None:
        key = common_unnorm_key(dense, bundle, request.unnorm_key)
        check_comparable(dense, bundle, key)
        if _origin(bundle, plan) not in source_hashes(dense.checkpoint):
            warnings.append(f"{request.dense} is not what the bundle was made from: its hash is another.")
    importance = _importance(file, plan)
    if importance is not None and bundle is not None and importance[0].checkpoint_sha256 != _origin(bundle, plan):
        warnings.append(f"{importance[1]} was measured on another checkpoint than the bundle was made from.")
    return Inputs(
        request,
        bundle,
        dense,
        plan,
        importance,
        samples,
        _chosen(request, samples),
        None if request.bench is None else read_bench(request.bench),
        None if request.results is None else read_log(request.results),
        key,
        tuple(warnings),
    )


def read_bench(path: Path) -> dict[str, Any]:
    """What `evla bench --json` printed."""
    record = read_json(path)
    check_schema_version(record.get("schema_version"))
    try:
        names = [row["name"] for row in record["rows"]]
        good = bool(names) and len(set(names)) == len(names) and all(isinstance(name, str) for name in names)
        good = good and bool(record["references"]) and set(record["references"]) <= set(names)
        first = record["references"][-1]
        good = good and all(first in row["speedup"] for row in record["rows"][names.index(first) + 1 :])
        times = [row["latency_ms"][stage]["median"] for row in record["rows"] for stage in (*STAGES, WHOLE)]
        ratios = [each[WHOLE] for row in record["rows"] for each in row["speedup"].values()]
        ends = [ratio[end] for ratio in ratios for end in ("low", "high") if ratio[end] is not None]
        values = (*times, *(ratio["value"] for ratio in ratios), *ends)
        good = good and all(math.isfinite(value) and value > 0 for value in values)
        for row in record["rows"]:
            row["settings"]["visual_tokens"]["method"]
        [record["protocol"][name] for name in ("batch_size", "runs", "dtype")]
        [record["environment"][name] for name in ("device", "device_name", "threads")]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise EvlaError(f"{path} is not what evla bench --json prints.") from error
    if not good:
        raise EvlaError(f"{path} is not what evla bench --json prints.")
    return record


def quote(path: Path | str) -> str:
    return shlex.quote(str(path))


def _or(path: Path | None, name: str) -> str:
    return name if path is None else quote(path)


def _bundle_directory(directory: Path) -> Path | None:
    """`directory` itself, or the one bundle in it."""
    if not directory.is_dir():
        raise EvlaError(f"{directory} {'is not a directory' if directory.exists() else 'does not exist'}.")
    if (directory / SETTINGS).is_file():
        return directory
    found = [path.parent for path in sorted(directory.glob(f"*/{SETTINGS}")) if (path.parent / MANIFEST).is_file()]
    if len(found) > 1:
        raise EvlaError(f"{directory} holds {len(found)} bundles; give one of them: {', '.join(map(str, found))}.")
    return found[0] if found else None


def _dense(path: Path) -> Candidate:
    candidates = open_candidates([path])
    if len(candidates) != 1:
        raise EvlaError(f"{path} names {len(candidates)} candidates; --dense takes one.")
    return candidates[0]


def _origin(bundle: Candidate, plan: PrunePlan | None) -> str | None:
    """Hash of the weights that it was made from."""
    return open_bundle(bundle.checkpoint.root).unpruned_sha256 if plan is None else plan.checkpoint_sha256


def _importance(file: Path, plan: PrunePlan | None) -> tuple[LayerImportance, Path | None] | None:
    """From its file, or what the plan says of it: the scores without their errors."""
    if file.is_file():
        return LayerImportance.load(file), file
    scores = None if plan is None else plan.how.get("importance")
    if plan is None or not isinstance(scores, list) or len(scores) != plan.num_layers:
        return None
    analyze = plan.how.get("analyze") or {}
    return LayerImportance(
        schema_version=SCHEMA_VERSION,
        metric="block_influence",
        num_samples=analyze.get("num_samples", 1),
        checkpoint_sha256=plan.checkpoint_sha256,
        samples_sha256=plan.how["samples_sha256"],
        layers=tuple(LayerScore(index, score, None) for index, score in enumerate(scores)),
        dtype=analyze.get("dtype", ""),
    ), None


def _chosen(request: Request, samples: Sequence[Sample]) -> tuple[int, ...]:
    """Those that were named, or a few of different instructions and episodes."""
    num_samples = len(samples)
    if request.samples is None:
        if request.chosen:
            raise EvlaError("--sample chooses among the samples of --samples, which is missing.")
        return ()
    for index in request.chosen:
        if not 0 <= index < num_samples:
            raise EvlaError(f"--sample {index}: {request.samples} holds {num_samples} samples, 0 to {num_samples - 1}.")
    return tuple(dict.fromkeys(request.chosen)) or tuple(sorted(spread(samples)[:_NUM_SAMPLES]))
