"""Time PruneNet's whole choice of rows at full size.

    python scripts/bench_prunenet.py                      32 synthetic MLPs of 11008 x 4096
    python scripts/bench_prunenet.py --layers 4           4 of them

`train_policy` with its defaults, as `evla prune` runs it, and how much of that is reading and describing the layers.
The matrices, bfloat16, are mapped from a file, as those of a checkpoint are. `--distinct` MLPs are written, 270 MB
each, and layers take turns with them, every one over its own channels.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from evla_cli.checkpoint.safetensors_format import read_safetensors, write_safetensors
from evla_cli.checkpoint.tensors import LazyTensor
from evla_cli.methods.mlp_pruning import prune_width
from evla_cli.methods.prunenet import train_policy

KINDS = ("gate", "up", "down")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--distinct", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=2, default=(11008, 4096), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--mlp-prune-ratio", type=float, default=0.25)
    parser.add_argument("--work", type=Path, help="Where the matrices are written; the default is temporary.")
    arguments = parser.parse_args()
    num_rows, num_columns = arguments.shape
    num_keep = prune_width(num_rows, arguments.mlp_prune_ratio)
    print(f"{arguments.layers} MLPs of {num_rows} x {num_columns}, bfloat16, {num_keep} rows kept", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        weights = synthesize(Path(directory) / "mlps.safetensors", arguments.distinct, num_rows, num_columns)

        def read_mlp(layer: int) -> tuple[Tensor, Tensor, Tensor]:
            gate, up, down = (weights[f"{layer % arguments.distinct}.{kind}"].load() for kind in KINDS)
            return gate, up, down

        def read_rms(layer: int) -> Tensor:
            return torch.randn(num_rows, generator=torch.Generator().manual_seed(layer)).div(2).exp()

        with measured() as described:
            train_policy(read_mlp, read_rms, arguments.layers, num_keep, episodes=0)
        with measured() as whole:
            result = train_policy(read_mlp, read_rms, arguments.layers, num_keep)
    print(f"mean KS untrained {result.history[0]:.4f}, best {min(result.history):.4f}")
    for name, found in (("layers read and described", described), ("whole choice", whole)):
        print(f"{name:26} wall {found[0]:7.1f} s, CPU {found[1]:7.1f} s, peak RssAnon {found[2] / 2**30:.2f} GiB")


def synthesize(path: Path, num_layers: int, num_rows: int, num_columns: int) -> dict[str, LazyTensor]:
    """MLPs of random directions with long-tailed row norms."""
    lazy = {}
    for layer in range(num_layers):
        for number, kind in enumerate(KINDS):
            generator = torch.Generator().manual_seed(3 * layer + number)
            matrix = torch.randn(num_rows, num_columns, generator=generator)
            matrix *= torch.randn(num_rows, 1, generator=generator).mul(0.12).exp()
            matrix = (matrix.T.contiguous() if kind == "down" else matrix).bfloat16()
            lazy[f"{layer}.{kind}"] = LazyTensor.of(matrix)
    write_safetensors(path, lazy, {})
    return read_safetensors(path)


@contextmanager
def measured() -> Iterator[list[float]]:
    """Wall and CPU seconds, and the largest anonymous memory, looked at every 20 ms."""
    found: list[float] = []
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found += [time.perf_counter() - wall, time.process_time() - cpu]
        done.set()
        thread.join()
        found.append(peak[0])


if __name__ == "__main__":
    main()
