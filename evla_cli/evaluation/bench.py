"""`evla bench`: how fast and how large two or more checkpoints or bundles are, beside two baselines."""

import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evla_cli import __version__
from evla_cli.calibration import load_samples
from evla_cli.checkpoint.bundle import library_versions
from evla_cli.checkpoint.tensors import total_elements
from evla_cli.checkpoint.writer import parse_size
from evla_cli.errors import EvlaError, suggest
from evla_cli.evaluation.candidates import Candidate, neutral, open_candidates
from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.intervals import median_estimate
from evla_cli.evaluation.latency import (
    STAGES,
    TOKEN_SELECTION,
    WHOLE,
    Batch,
    Latency,
    measure_head,
    measure_latency,
    rotated,
)
from evla_cli.evaluation.memory import FOR_LESS_MEMORY, available_bytes, peak_memory, release
from evla_cli.evaluation.stock import load_stock_policy
from evla_cli.models.processing import CogACTProcessor
from evla_cli.models.skeleton import build_skeleton, check_device, out_of_memory
from evla_cli.models.tiled_linear import multiplies_natively
from evla_cli.runtime.policy import Policy, policy_from_checkpoint
from evla_cli.schema import SCHEMA_VERSION
from evla_cli.settings import InferenceSettings

BASELINES = ("stock", "neutral")
_CPUINFO = Path("/proc/cpuinfo")  # Linux
_MAX_VISITS = 3  # of each model where not all fit at once
_FREE_SHARE = 0.9  # of the memory that is left, for weights
_INSTRUCTION = "pick up the red block and put it on the plate"


@dataclass(frozen=True)
class Row:
    """One line of the report: a candidate, or a baseline made of the first one's weights.

    Attributes:
        kind: "stock", "neutral", or "own" settings.
    """

    name: str
    kind: str
    candidate: Candidate
    settings: InferenceSettings

    @property
    def model(self) -> tuple[Path, bool]:
        """Rows with the same answer run on one loaded model."""
        return self.candidate.path, self.kind == "stock"


def bench(
    paths: Sequence[Path],
    *,
    baselines: Sequence[str] = BASELINES,
    samples: Path | None = None,
    batch_size: int = 1,
    num_denoise_steps: int | None = None,
    runs: int = 20,
    warmup: int = 3,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    memory_budget: str | None = None,
) -> dict[str, Any]:
    """The report that `--json` prints.

    Args:
        samples: whose first `batch_size` are predicted; None: seeded noise with a fixed instruction.
        memory_budget: for weights that are loaded at once, such as "20GiB"; None: most of what is free. Where not all
            models fit, they are loaded one after the other, several times around.
    """
    check_device(device)
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise EvlaError(f"--baseline: unknown baseline '{unknown[0]}'. {suggest(unknown[0], [*BASELINES, 'none'])}")
    batch = make_batch(samples, batch_size, seed)
    rows = make_rows(open_candidates(paths, num_denoise_steps), baselines)
    budget = int(_FREE_SHARE * available_bytes(device)) if memory_budget is None else parse_size(memory_budget)
    together = weight_bytes(rows, device, dtype) <= budget
    sessions = plan_sessions(rows, runs, together)
    measured = _Measured()
    with _threads(threads), out_of_memory(device, FOR_LESS_MEMORY):
        for session, session_runs in sessions:
            _run_session(session, session_runs, warmup, batch, device, dtype, measured)
            release(device)
        memory = {
            row.name: peak_memory(
                partial(_load_row, row.model, row.settings, device, dtype), batch, device, torch.get_num_threads()
            )
            for row in rows
        }
        environment = describe_environment(device)
    latencies = {name: Latency(tuple(found)) for name, found in measured.stages.items()}
    references = _references(rows)
    records = []
    for number, row in enumerate(rows):
        against = [name for name in references if name in [above.name for above in rows[:number]]]
        records.append(
            _facts(row, batch, measured.dtypes[row.model])
            | {
                "latency_ms": _latency_record(latencies[row.name]),
                "token_selection_share": None if row.kind == "stock" else _selection_share(latencies[row.name]),
                "speedup": {name: _speedups(latencies[name], latencies[row.name], seed) for name in against},
                "head_ms_by_interval": _head_record(measured.heads.get(row.name, {}), seed),
                "load_seconds": float(np.median(measured.load_seconds[row.model])),
                "memory": memory[row.name],
            }
        )
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment,
        "protocol": {
            "batch_size": batch_size,
            "samples": None if samples is None else str(samples),
            "runs": runs,
            "warmup": warmup,
            "seed": seed,
            "dtype": dtype,
            "loaded": "together" if together else "in turn",
            "visits": len(sessions) if together else len(sessions) // len({row.model for row in rows}),
        },
        "references": references,
        "rows": records,
    }


def make_rows(candidates: Sequence[Candidate], baselines: Sequence[str]) -> list[Row]:
    """Baselines of the first candidate, then the candidates. A candidate whose settings are neutral is its own."""
    first = candidates[0]
    rows = []
    if "stock" in baselines:
        rows.append(Row(f"{first.label}, stock", "stock", first, neutral(first.settings)))
    if "neutral" in baselines and first.settings != neutral(first.settings):
        rows.append(Row(f"{first.label}, neutral", "neutral", first, neutral(first.settings)))
    for candidate in candidates:
        is_neutral = candidate.settings == neutral(candidate.settings)
        rows.append(Row(candidate.label, "neutral" if is_neutral else "own", candidate, candidate.settings))
    return rows


def weight_bytes(rows: Sequence[Row], device: str, dtype: str | None) -> int:
    """Of all models at once. On the CPU, weights in their stored dtype are mapped files, which models share."""
    sizes: dict[Any, int] = {}
    for row in rows:
        checkpoint, mapped, copied = row.candidate.checkpoint, 0, 0
        for name, lazy in checkpoint.weights.items():
            computed = checkpoint.family.compute_dtype(name, getattr(torch, dtype) if dtype else lazy.dtype)
            if torch.device(device).type == "cpu" and computed == lazy.dtype:
                mapped += lazy.num_bytes
            else:
                copied += lazy.num_elements * computed.itemsize
        sizes |= {row.candidate.path: mapped, row.model: copied}
    return sum(sizes.values())


def plan_sessions(rows: Sequence[Row], runs: int, together: bool) -> list[tuple[list[Row], int]]:
    """Which rows are loaded at once, and for how many runs: all, or one model at a time, the order going round."""
    if together:
        return [(list(rows), runs)]
    models = list(dict.fromkeys(row.model for row in rows))
    visits = min(runs, _MAX_VISITS)
    shares = [runs // visits + (visit < runs % visits) for visit in range(visits)]
    return [
        ([row for row in rows if row.model == model], share)
        for visit, share in enumerate(shares)
        for model in rotated(models, visit)
    ]


@dataclass
class _Measured:
    """Of rows by name, of models by `Row.model`; one entry a run or a visit."""

    stages: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    heads: dict[str, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    load_seconds: dict[Any, list[float]] = field(default_factory=lambda: defaultdict(list))
    dtypes: dict[Any, dict[str, str]] = field(default_factory=dict)


def _run_session(
    rows: Sequence[Row], runs: int, warmup: int, batch: Batch, device: str, dtype: str | None, measured: _Measured
) -> None:
    """Load the models of `rows`, time them, and let go of them."""
    models: dict[Any, Policy] = {}
    for row in rows:
        if row.model not in models:
            start = time.perf_counter()
            models[row.model] = _load_row(row.model, row.settings, device, dtype)
            measured.load_seconds[row.model].append(time.perf_counter() - start)
            measured.dtypes[row.model] = _dtypes(models[row.model])
    policies = {row.name: models[row.model].with_settings(row.settings) for row in rows}
    for name, latency in measure_latency(policies, batch, runs, warmup).items():
        measured.stages[name] += latency.runs
    for row in rows:
        if row.name == row.candidate.label:
            heads = measure_head(policies[row.name], len(batch.images), runs, warmup, batch.seed)
            for interval, times in heads.items():
                measured.heads[row.name][interval] += times


def _dtypes(policy: Policy) -> dict[str, str]:
    parts = {"dtype": policy.model.projector, "head_dtype": policy.model.action_head}
    return {name: str(next(part.parameters()).dtype).removeprefix("torch.") for name, part in parts.items()}


def _load_row(model: tuple[Path, bool], settings: InferenceSettings, device: str, dtype: str | None) -> Policy:
    path, stock = model
    torch_dtype = getattr(torch, dtype) if dtype else None
    if stock:
        return load_stock_policy(path, settings.diffusion, device=device, dtype=torch_dtype)
    return policy_from_checkpoint(path, settings, device=device, dtype=torch_dtype)


def make_batch(samples: Path | None, batch_size: int, seed: int) -> Batch:
    if samples is not None:
        found = load_samples(samples, "image", batch_size)
        return Batch([sample.image for sample in found], [sample.instruction for sample in found], seed)
    noise = np.random.default_rng(seed).integers(0, 256, (batch_size, 224, 224, 3), dtype=np.uint8)
    return Batch([Image.fromarray(pixels) for pixels in noise], [_INSTRUCTION] * batch_size, seed)


def _references(rows: Sequence[Row]) -> list[str]:
    """Stock, neutral, and the first candidate, as far as there are; the last two may be one."""
    first = rows[0].candidate
    return [row.name for row in rows if row.candidate is first]


def _facts(row: Row, batch: Batch, dtypes: dict[str, str]) -> dict[str, Any]:
    checkpoint = row.candidate.checkpoint
    model = build_skeleton(checkpoint.family, checkpoint.config)
    assert checkpoint.tokenizer_dir is not None
    processor = CogACTProcessor(model.config, checkpoint.tokenizer_dir)
    prompt = max(len(processor.prompt(instruction)[0]) for instruction in batch.instructions)
    executed = "stock" if row.kind == "stock" else "full"
    return {
        "name": row.name,
        "path": str(row.candidate.path),
        "kind": row.kind,
        **dtypes,
        "settings": row.settings.to_record(),
        "parameters": total_elements(checkpoint.weights),
        "bytes_on_disk": checkpoint.reader.bytes_on_disk,
        "decoder_layers": checkpoint.num_layers,
        "intermediate_size": checkpoint.intermediate_size,
        "prompt_tokens": prompt,
        "flops": {
            "paper": count_flops(model, row.settings).to_record(),
            "full": count_flops(model, row.settings, prompt, executed).to_record(),
        },
    }


def _latency_record(latency: Latency) -> dict[str, Any]:
    return {
        stage: {
            "median": latency.median(stage),
            "p95": latency.p95(stage),
            "runs": latency.values(stage).tolist(),
        }
        for stage in (*STAGES, WHOLE, TOKEN_SELECTION)
    }


def _selection_share(latency: Latency) -> dict[str, float]:
    """Of the language model's time."""
    shares = latency.values(TOKEN_SELECTION) / latency.values("language_model")
    return {"median": float(np.median(shares)), "p95": float(np.quantile(shares, 0.95))}


def _speedups(reference: Latency, latency: Latency, seed: int) -> dict[str, Any]:
    """How many times as fast, stage by stage: of the ratios within each round, the median and its interval."""
    return {
        stage: median_estimate(reference.values(stage) / latency.values(stage), seed).to_record()
        for stage in (*STAGES, WHOLE)
    }


def _head_record(times: dict[int, list[float]], seed: int) -> dict[str, Any]:
    return {
        str(interval): {
            "median": float(np.median(values)),
            "p95": float(np.quantile(values, 0.95)),
            "runs": values,
            "speedup": median_estimate(np.array(times[1]) / np.array(values), seed).to_record(),
        }
        for interval, values in times.items()
    }


def describe_environment(device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "native_bfloat16": multiplies_natively(torch.bfloat16),
        "threads": torch.get_num_threads(),
        "versions": {
            "evla": __version__,
            "python": platform.python_version(),
            **library_versions(),
            "cuda": torch.version.cuda if on_gpu else None,
        },
        "system": platform.platform(),
    }


def _processor_name() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
