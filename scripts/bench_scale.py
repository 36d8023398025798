"""Memory and time of every stage on a checkpoint of real size, as ratios against a baseline of the same run.

    python scripts/make_synthetic_checkpoint.py --family cogact --size base out/cogact-base
    python scripts/bench_scale.py out/cogact-base --work out/bench-scale

Every job is a process of its own. Its anonymous memory (RssAnon: what only this process holds) and resident memory
(RSS: with the pages of mapped files, which the system can drop) are sampled 50 times a second; what it read from the
disk is the system's count. "Cold" means that the source's pages were dropped from the page cache before, "warm" that it
was read through once. The baselines: `cp` for what writes a checkpoint, one forward pass of the wholly loaded model
over the same samples for what computes (same dtype, same batch size, same kernels, loading not counted). "prune"
follows a plan, "prune-unchecked" does so with --no-check; "decide+prune" chooses layers and rows first, by importance
and by magnitude. "refit", which only runs where `--jobs` names it (most of an hour), is "decide+prune" with `--refit`
on the same samples, in float32, against the forward pass; "refit+towers" removes 10 blocks and
a quarter of the rows of each vision tower, too, and refits them.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
EVLA = [sys.executable, "-m", "evla_cli"]
GIB = 2**30
MORE_JOBS = ("refit", "refit+towers")  # only where they are named
JOBS = ("help", "cp", "decide+prune", "prune-unchecked", "prune", "export", "verify", "act", "bare", "analyze")
DECIDING_JOBS = ("decide+prune", *MORE_JOBS)
PRUNING_JOBS = (*DECIDING_JOBS, "prune-unchecked", "prune")


@dataclass
class Measured:
    """Seconds and bytes of one process."""

    wall: float
    cpu: float
    anonymous: int
    resident: int
    read: int
    printed: str


def measure(command: list[str]) -> Measured:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous = resident = read = 0
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            anonymous = max(anonymous, kilobytes(status.get("RssAnon", "0")))
            resident = max(resident, kilobytes(status.get("VmRSS", "0")))
            io = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
            read = max(read, int(io["read_bytes"]))
        except (OSError, ValueError):  # it has just ended
            pass
        time.sleep(0.02)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{printed}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(wall, cpu, anonymous, resident, read, printed)


def kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def weight_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.suffix in {".pt", ".safetensors", ".bin"}]


def make_cold(directory: Path) -> None:
    os.sync()
    for path in weight_files(directory):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_warm(directory: Path) -> None:
    os.sync()
    buffer = bytearray(2**24)
    for path in weight_files(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="on the source's disk; copies go there and away again")
    parser.add_argument("--samples", type=Path, default=HERE.parent.parent / "demo/samples")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--importance", type=Path, help="of this source; default: made by the analyze job")
    parser.add_argument("--drop-layers", type=int, default=10)
    parser.add_argument("--num-keep", type=int, default=56, help="visual tokens")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"comma-separated, of {', '.join((*MORE_JOBS, *JOBS))}")
    parser.add_argument("--cache", default="cold,warm")
    arguments = parser.parse_args()
    jobs = arguments.jobs.split(",")
    problem = missing_job(jobs, arguments.work, arguments.importance)
    if problem is not None:
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(2)
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, work = arguments.source, arguments.work
    importance = arguments.importance or work / "importance.json"
    same = ["--num-samples", str(arguments.num_samples), "--batch-size", str(arguments.batch_size)]
    same += ["--dtype", arguments.dtype]
    samples = ["--samples", str(arguments.samples)]
    source_bytes = sum(path.stat().st_size for path in weight_files(source))
    print(f"{source}: {source_bytes / 1e9:.2f} GB, {os.cpu_count()} cores, {arguments.num_samples} samples", flush=True)
    print("| job | cache | seconds | CPU s | RssAnon GiB | RSS GiB | read from disk | against the baseline |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    baseline: dict[tuple[str, str], float] = {}

    def run(job: str, command: list[str], reads: Path, compare: str | None = None, keep: Path | None = None) -> None:
        if job not in jobs:
            return
        for cache in arguments.cache.split(","):
            if keep is not None:
                shutil.rmtree(keep, ignore_errors=True)
            make_cold(reads) if cache == "cold" else make_warm(reads)
            found = measure(command)
            seconds = float(json.loads(found.printed)["seconds"]) if job == "bare" else found.wall
            baseline[job, cache] = seconds
            size = sum(path.stat().st_size for path in weight_files(reads))
            against = ""
            if compare is not None and (compare, cache) in baseline:
                against = f"{seconds / baseline[compare, cache]:.2f} x {compare}"
            if job == "act":
                against = " ".join(found.printed.split())
            print(
                f"| {job} | {cache} | {seconds:.1f} | {found.cpu:.1f} | {found.anonymous / GIB:.2f} | "
                f"{found.resident / GIB:.2f} | {found.read / size:.2f} x its file | {against} |",
                flush=True,
            )

    if "help" in jobs:
        found = min((measure([*EVLA, "--help"]) for _ in range(5)), key=lambda one: one.cpu)
        print(
            f"| evla --help | warm | {found.wall:.2f} | {found.cpu:.2f} | {found.anonymous / GIB:.2f} | | | |",
            flush=True,
        )
    this = [sys.executable, str(HERE), "job"]
    run("bare", [*this, "bare", str(source), *samples, *same], source)
    analyze = [*EVLA, "analyze", str(source), *samples, *same, "-o", str(work / "importance.json"), "--overwrite"]
    run("analyze", analyze, source, compare="bare")
    run("cp", ["cp", "-r", str(source), str(work / "copy")], source, keep=work / "copy")
    shutil.rmtree(work / "copy", ignore_errors=True)
    pruned, bundle = work / "pruned", work / "bundle"
    decide = ["--importance", str(importance), "--drop-layers", str(arguments.drop_layers)]
    decide += ["--mlp-prune-ratio", "0.25", "--mlp-method", "magnitude"]
    run("decide+prune", [*EVLA, "prune", str(source), str(pruned), *decide], source, compare="cp", keep=pruned)
    plan = work / "plan.yaml"
    if "decide+prune" in jobs:
        shutil.copyfile(pruned / "prune_plan.yaml", plan)
    follow = [*EVLA, "prune", str(source), str(pruned), "--plan", str(plan)]
    run("prune-unchecked", [*follow, "--no-check"], source, compare="cp", keep=pruned)
    run("prune", follow, source, compare="cp", keep=pruned)
    export = [*EVLA, "export", str(pruned), str(bundle), "--num-visual-tokens", str(arguments.num_keep)]
    export += ["--cache-interval", "5"]
    refit = [*decide, "--refit", *samples, *same[:4], "--memory-budget", "256MB"]
    run("refit", [*EVLA, "prune", str(source), str(pruned), *refit], source, compare="bare", keep=pruned)
    towers = [*refit, "--vision-drop-layers", "10", "--vision-mlp-prune-ratio", "0.25"]
    towers += ["--vision-mlp-method", "magnitude"]
    run("refit+towers", [*EVLA, "prune", str(source), str(pruned), *towers], source, compare="bare", keep=pruned)
    run("export", export, pruned, compare="cp", keep=bundle)
    run("verify", [*EVLA, "verify", str(bundle)], bundle, compare="cp")
    run("act", [*this, "act", str(bundle), *samples], bundle)


def missing_job(jobs: list[str], work: Path, importance: Path | None) -> str | None:
    """What a job needs that neither an earlier one of `jobs` nor a run before has left in `work`, in one line."""
    known = (*MORE_JOBS, *JOBS)
    needs = {
        **dict.fromkeys(DECIDING_JOBS, (importance or work / "importance.json", ("analyze",))),
        **dict.fromkeys(("prune-unchecked", "prune"), (work / "plan.yaml", ("decide+prune",))),
        "export": (work / "pruned", PRUNING_JOBS),
        **dict.fromkeys(("verify", "act"), (work / "bundle", ("export",))),
    }
    for name in jobs:
        if name not in known:
            return f"--jobs: unknown job '{name}'; known: {', '.join(known)}."
        file, makers = needs.get(name, (work, ()))
        if makers and not file.exists() and not set(makers) & set(jobs):
            return f"--jobs {name} needs {file}, which the job {makers[0]} makes; name it, too."
    return None


def job(arguments: list[str]) -> None:
    """What the benchmark runs in a process of its own besides evla's commands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=("bare", "act"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--num-samples", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype")
    options = parser.parse_args(arguments)
    bare(options) if options.name == "bare" else act(options)


def bare(options: argparse.Namespace) -> None:
    import torch

    from evla_cli.calibration import load_samples
    from evla_cli.families import open_checkpoint
    from evla_cli.models.skeleton import load_model

    checkpoint = open_checkpoint(options.source)
    samples = load_samples(options.samples, checkpoint.family.sample_kind, options.num_samples)
    dtype = getattr(torch, options.dtype)
    model = load_model(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root, dtype)
    assert checkpoint.tokenizer_dir is not None
    start = time.perf_counter()
    with torch.inference_mode():
        for begin in range(0, len(samples), options.batch_size):
            batch = samples[begin : begin + options.batch_size]
            checkpoint.family.embed(model, batch, checkpoint.tokenizer_dir, torch.empty(0, dtype=dtype))
    print(json.dumps({"seconds": time.perf_counter() - start}))


def act(options: argparse.Namespace) -> None:
    import numpy as np

    from evla_cli.calibration import load_samples
    from evla_cli.runtime.policy import load_policy

    sample = load_samples(options.samples, "image", 1)[0]
    start = time.perf_counter()
    policy = load_policy(options.source)
    loaded = time.perf_counter()
    actions = policy.predict_action(sample.image, sample.instruction, unnorm_key="bridge_orig", seed=0)
    first = time.perf_counter()
    policy.predict_action(sample.image, sample.instruction, unnorm_key="bridge_orig", seed=0)
    second = time.perf_counter()
    assert np.isfinite(actions).all()
    print(f"load {loaded - start:.1f} s, first action {first - loaded:.1f} s, next {second - first:.1f} s")


if __name__ == "__main__":
    job(sys.argv[2:]) if sys.argv[1:2] == ["job"] else main()
