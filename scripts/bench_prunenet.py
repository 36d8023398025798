"""Time PruneNet's whole choice of rows at full size, and hold its KS statistic against that of full singular values.

    python scripts/bench_prunenet.py                      32 synthetic gate matrices of 11008 x 4096 (2.9 GB of disk)
    python scripts/bench_prunenet.py pruned-or-not/       the gate matrices of a checkpoint

First the statistic: on some layers and for several choices of rows, as the training computes it and from float64
singular values of matrix and slice. Then `train_policy` with its defaults, as `evla prune` runs it.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from evla_cli.checkpoint.safetensors_format import read_safetensors, write_safetensors
from evla_cli.checkpoint.tensors import LazyTensor
from evla_cli.families import open_checkpoint
from evla_cli.methods.mlp_pruning import prune_width
from evla_cli.methods.prunenet import (
    REWARDS,
    Distance,
    SpectralPolicy,
    describe,
    ks_distance,
    top_rows,
    train_policy,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 11008, 4096), metavar=("LAYERS", "ROWS", "COLUMNS"))
    parser.add_argument("--mlp-prune-ratio", type=float, default=0.25)
    parser.add_argument("--check", type=int, default=2, help="Layers on which the statistic is checked.")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="Where the synthetic matrices are written; the default is temporary.")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        gates = read_gates(arguments.checkpoint) if arguments.checkpoint else synthesize(directory, *arguments.shape)
        num_keep = prune_width(gates[0].shape[0], arguments.mlp_prune_ratio)
        print(f"{len(gates)} of {gates[0].shape}, {gates[0].dtype}, {num_keep} rows kept, {arguments.threads} threads")
        checked = [at * len(gates) // arguments.check for at in range(arguments.check)]
        exact_seconds = check_statistic(gates, checked, num_keep)
        if not arguments.check_only:
            run(gates, num_keep, exact_seconds)


def check_statistic(gates: list[LazyTensor], layers: list[int], num_keep: int) -> float:
    """Prints what the statistic in use is and costs beside the exact one; returns the latter's mean CPU seconds."""
    print("layer rows         exact     used     error  exact CPU s  used CPU s  ratio")
    times = []
    for layer in layers:
        gate = gates[layer].load()
        whole = torch.linalg.svdvals(gate.double())
        print(f"{layer:5} singular values: largest {whole[0]:.4g}, median {whole.median():.4g}, least {whole[-1]:.4g}")
        _, spectrum, gram = describe(SpectralPolicy, gate, torch.float32)
        used_distance = REWARDS["gram"](gate, gram, spectrum)
        exact_distance = partial(full_ks, gate, whole)
        generator = torch.Generator().manual_seed(layer)
        scores = {"random": torch.rand(gate.shape[0], generator=generator), "magnitude": gate.float().norm(dim=1)}
        for name, score in scores.items():
            rows = top_rows(score, num_keep)
            exact, exact_time = timed(exact_distance, rows)
            used, used_time = timed(used_distance, rows)
            times.append(exact_time)
            print(
                f"{layer:5} {name:9} {exact:8.5f} {used:8.5f} {used - exact:9.5f} {exact_time:12.1f} {used_time:11.1f} "
                f"{exact_time / used_time:6.1f}",
                flush=True,
            )
    return sum(times) / len(times)


def full_ks(gate: Tensor, whole: Tensor, rows: Tensor) -> float:
    return ks_distance(whole, torch.linalg.svdvals(gate[rows].double()))


def run(gates: list[LazyTensor], num_keep: int, exact_seconds: float) -> None:
    start = time.perf_counter()

    def report(done: int, total: int) -> None:
        print(f"{done} of {total} visits, {time.perf_counter() - start:.0f} s", flush=True)

    cpu = time.process_time()
    with peak_rss_anon() as peak:
        result = train_policy(lambda layer: gates[layer].load(), len(gates), num_keep, progress=report)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    in_training = len(result.training_layers) * (5 * len(result.history) - 4)  # 4 draws and the top rows; at last these
    num_statistics = in_training + 4 * len(gates)
    print(result.report.table())
    print(f"training layers {result.training_layers}, mean KS by episode {[round(ks, 5) for ks in result.history]}")
    print(f"wall {seconds / 60:.1f} min, CPU {cpu / 60:.1f} min, peak RssAnon {peak[0] / 2**30:.2f} GiB")
    print(
        f"{num_statistics} statistics; with full singular values they alone would take "
        f"{num_statistics * exact_seconds / cpu:.1f} x the CPU time"
    )


def timed(distance: Distance, rows: Tensor) -> tuple[float, float]:
    start = time.process_time()
    return distance(rows), time.process_time() - start


@contextmanager
def peak_rss_anon() -> Iterator[list[int]]:
    """Bytes, sampled ten times a second; complete at exit."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(line.split()[1]) * 1024)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def read_gates(path: Path) -> list[LazyTensor]:
    checkpoint = open_checkpoint(path)
    names = [f"{checkpoint.layer_prefix}.{layer}.mlp.gate_proj.weight" for layer in range(checkpoint.num_layers)]
    return [checkpoint.reader.tensors[name] for name in names]


def synthesize(directory: str, num_layers: int, num_rows: int, num_columns: int) -> list[LazyTensor]:
    """Gate matrices in bfloat16, written to a file and mapped, as those of a checkpoint are."""
    lazy = {}
    for layer in range(num_layers):
        load = partial(synthetic_gate, layer, num_layers, num_rows, num_columns)
        lazy[f"{layer:03}"] = LazyTensor(torch.bfloat16, (num_rows, num_columns), load)
    path = Path(directory) / "gates.safetensors"
    write_safetensors(path, lazy, {})
    return list(read_safetensors(path).values())


def synthetic_gate(layer: int, num_layers: int, num_rows: int, num_columns: int) -> Tensor:
    """Long-tailed row norms, and directions whose sizes fall by a power law that is flatter in later layers."""
    generator = torch.Generator().manual_seed(layer)
    matrix = torch.randn(num_rows, num_columns, generator=generator)
    matrix *= torch.arange(1, num_columns + 1) ** -(0.5 - 0.4 * layer / num_layers)
    # A third of the rows works in the first directions alone: rows differ in where they are strong, too.
    matrix[::3, num_columns // 4 :] *= 0.8
    matrix *= torch.randn(num_rows, 1, generator=generator).mul(0.12).exp()
    for _ in range(2):  # rotations of 64 columns at a time, in another order each: no direction stays a column
        order = torch.randperm(num_columns, generator=generator)
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
        matrix = (matrix[:, order].unflatten(1, (-1, 64)) @ rotation).flatten(1)
    return (matrix / matrix.norm(dim=1).mean()).bfloat16()


if __name__ == "__main__":
    main()
