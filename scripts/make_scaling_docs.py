"""Write docs/scaling.md: what every stage reads, computes and holds, and what that takes on two kinds of machine.

    python scripts/make_scaling_docs.py            # write it
    python scripts/make_scaling_docs.py --check    # is it up to date?

Bytes and operations follow from the shapes (tests compare them with real checkpoints and with operations counted by
torch); the rates of the small machine are measured by scripts/bench_scale.py, those of the GPUs are assumed and say so.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
TOKENS = 282  # of a CogACT sample: BOS, 256 visual, 25 of prompt
WIDTH_KEPT, LAYERS_KEPT = 0.75, 22 / 32


@dataclass(frozen=True)
class Decoder:
    """Shapes of a Llama-like decoder, and what stands around it.

    Attributes:
        other_parameters: of embeddings, vision towers, projector and action head.
        other_flops: of what runs before the decoder, for one sample.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    other_parameters: int
    other_flops: float

    @property
    def attention_parameters(self) -> int:
        key_value = self.hidden_size * self.num_key_value_heads // self.num_heads
        return 2 * self.hidden_size * (self.hidden_size + key_value)

    def layer_parameters(self, intermediate_size: int | None = None) -> int:
        mlp = 3 * self.hidden_size * (intermediate_size or self.intermediate_size)
        return self.attention_parameters + mlp + 2 * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.num_layers * self.layer_parameters() + self.hidden_size + self.other_parameters

    def pruned_parameters(self) -> int:
        layers = round(self.num_layers * LAYERS_KEPT)
        width = round(self.intermediate_size * WIDTH_KEPT / 64) * 64
        return layers * self.layer_parameters(width) + self.hidden_size + self.other_parameters

    def flops(self, tokens: int) -> float:
        """Of all layers for one sample: two a weight a token, and the attention products, computed in full."""
        linear = 2.0 * (self.layer_parameters() - 2 * self.hidden_size) * tokens
        return self.num_layers * (linear + 4.0 * tokens * tokens * self.hidden_size)

    def hidden_bytes(self, tokens: int) -> int:
        """Of one sample, in bfloat16."""
        return 2 * tokens * self.hidden_size


# Towers, projector and action head of CogACT-Base have 0.89 B parameters; embeddings and lm_head 0.26 B.
COGACT = Decoder("CogACT-Base (7.6 B)", 4096, 32, 32, 32, 11008, 1_153_954_503, 0.39e12)
LLAMA_70B = Decoder("a VLA on Llama-2 70B", 8192, 80, 64, 8, 28672, 1_416_000_000, 0.39e12)
PREPARE_SECONDS = 0.06  # one image resized for two towers, by one process


@dataclass(frozen=True)
class Machine:
    """Rates that bound a stage; `processes` share the samples of an analysis, the rest is done by one.

    Attributes:
        disk, hash, upload: bytes a second; upload to each GPU, infinite where the processor computes.
        flops: operations a second of each process, in bfloat16.
        memory: bytes that hidden states may take in each process before they go to a file.
    """

    name: str
    processes: int
    disk: float
    hash: float
    flops: float
    upload: float
    memory: float


SMALL = Machine("2 cores, 24 GB, one disk", 1, 0.95e9, 1.45e9, 330e9, math.inf, 8e9)
GPUS = Machine("8 x A100, NVMe", 8, 5e9, 1.9e9, 140e12, 20e9, 40e9)


def analyze_seconds(model: Decoder, machine: Machine, num_samples: int) -> float:
    """Images first, then the layers, one after another: the slowest of reading, uploading and computing counts.

    The first process hashes the checkpoint meanwhile.
    """
    mine = math.ceil(num_samples / machine.processes)
    images = mine * (PREPARE_SECONDS + model.other_flops / machine.flops)
    weights = 2.0 * model.num_layers * model.layer_parameters()
    compute = mine * model.flops(TOKENS) / machine.flops
    hidden = mine * model.hidden_bytes(TOKENS)
    # Beyond the memory, every layer reads and writes the hidden states of this machine's processes once more.
    spilled = max(0.0, hidden - machine.memory) * machine.processes
    files = 2.0 * model.num_layers * spilled
    slowest = max(weights / machine.disk, weights / machine.upload, compute, files / machine.disk)
    first_layer = weights / model.num_layers / machine.disk
    layers = 2.0 * model.other_parameters / machine.disk + first_layer + slowest
    return images + max(layers, 2.0 * model.parameters / machine.hash)


def prune_seconds(model: Decoder, machine: Machine) -> float:
    """The source is read and hashed once while what stays is written and hashed."""
    source, kept = 2.0 * model.parameters, 2.0 * model.pruned_parameters()
    return max((source + kept) / machine.disk, source / machine.hash)


def export_seconds(model: Decoder, machine: Machine) -> float:
    """Read, written, and read again to verify."""
    kept = 2.0 * model.pruned_parameters()
    return max(3.0 * kept / machine.disk, 2.0 * kept / machine.hash)


def held_bytes(model: Decoder, machine: Machine, num_samples: int) -> float:
    """By each process of an analysis: two layers, hidden states up to the memory, and the rest as it was measured for
    CogACT-Base: Python, torch, one batch of 8 at work."""
    mine = math.ceil(num_samples / machine.processes)
    hidden = min(machine.memory, mine * model.hidden_bytes(TOKENS))
    return 2 * 2.0 * model.layer_parameters() + hidden + 1.5e9


def span(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (2 * 86400, 3600, "h"), (math.inf, 86400, "days")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if seconds / unit >= 10 else f"{seconds / unit:.1f} {name}"
    raise AssertionError


def render() -> str:
    lines = [
        "# What it costs at scale",
        "",
        "Written by `python scripts/make_scaling_docs.py`, which holds the formulas; tests compare its bytes and",
        "operations with real ones. A stage takes as long as the slowest of what it needs: the disk, the hash, the",
        "bus, the arithmetic. Everything streams, so that not memory decides what can be done, but the disk's room.",
        "",
        "| | " + " | ".join(machine.name for machine in (SMALL, GPUS)) + " |",
        "|---|---|---|",
        *(
            f"| {label} | {show(SMALL)} | {show(GPUS)} |"
            for label, show in (
                ("disk", lambda m: f"{m.disk / 1e9:.2f} GB/s"),
                ("SHA-256, one stream", lambda m: f"{m.hash / 1e9:.2f} GB/s"),
                ("bfloat16 arithmetic, each process", lambda m: f"{m.flops / 1e12:.3g} TFLOP/s"),
                ("bus to each GPU", lambda m: "-" if m.upload == math.inf else f"{m.upload / 1e9:.0f} GB/s"),
                ("processes of an analysis", lambda m: str(m.processes)),
                ("hidden states held before they go to a file", lambda m: f"{m.memory / 1e9:.0f} GB each"),
            )
        ),
        "",
        "The small machine's rates are measured (`scripts/bench_scale.py`, AMD EPYC with AVX512-BF16, two virtual",
        "cores, a virtual disk); those of the GPUs are assumed: 45 % of the A100's 312 TFLOP/s, pinned memory over",
        "PCIe 4. For comparison, measured beside other jobs: 241 s for the first line below, 28 to 33 s for pruning,",
        "31 to 33 s for exporting CogACT-Base from a cold page cache.",
        "",
        "## Analysis",
        "",
        f"{TOKENS} tokens a sample, bfloat16. A sample's hidden states take {COGACT.hidden_bytes(TOKENS) / 1e6:.1f} MB "
        f"(hidden size 4096) or {LLAMA_70B.hidden_bytes(TOKENS) / 1e6:.1f} MB (8192):",
        "one layer's, over which the next layer's are written. Weights are read once, whatever the number of samples.",
        "",
        "| model | samples | operations | hidden states | " + SMALL.name + " | held | " + GPUS.name + " | held each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in (COGACT, LLAMA_70B):
        for samples in (16, 256, 1_000_000):
            cells = [model.name, f"{samples:,}", f"{samples * (model.flops(TOKENS) + model.other_flops):.1e}"]
            cells.append(f"{samples * model.hidden_bytes(TOKENS) / 1e9:,.3g} GB")
            for machine in (SMALL, GPUS):
                cells.append(span(analyze_seconds(model, machine, samples)))
                cells.append(f"{held_bytes(model, machine, samples) / 2**30:.1f} GiB")
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "    torchrun --nproc-per-node 8 -m evla_cli analyze CHECKPOINT --samples DATA -o importance.json \\",
        "        --device cuda --dtype bfloat16 --memory-budget 40GB",
        "",
        "Nobody needs a million samples for a ranking. `importance.json` holds the standard error of every score,",
        "which falls with the root of their number: once the scores of the last layer to go and the first to stay lie",
        "several standard errors apart, more samples change nothing. A few hundred are usual. Where the million is",
        "wanted for another reason, the hidden states need a disk of their size (`TMPDIR`), and on the small machine",
        "the arithmetic alone takes months.",
        "",
        "## Pruning and exporting",
        "",
        f"To {LAYERS_KEPT * 32:.0f} of 32 layers (in proportion) and 75 % of the MLP width, bfloat16. One process, on "
        "the processor; it",
        "holds a few tensors at a time (0.3 to 0.6 GiB for 7.6 B parameters), and a GPU would not help.",
        "",
        "| model | source | pruned | prune, small | export, small | prune, large | export, large |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in (COGACT, LLAMA_70B):
        sizes = [f"{2 * count / 1e9:.1f} GB" for count in (model.parameters, model.pruned_parameters())]
        times = [span(stage(model, machine)) for machine in (SMALL, GPUS) for stage in (prune_seconds, export_seconds)]
        lines.append("| " + " | ".join([model.name, *sizes, *times]) + " |")
    lines += [
        "",
        "Choosing rows comes on top: seconds by activation or magnitude, a minute of one core with PruneNet for the 32",
        "layers of 7.6 B parameters (see [prunenet.md](prunenet.md)); all of them grow with the number of weights.",
        "",
        "## Room on the disk",
        "",
        "Source, pruned checkpoint and bundle stand side by side until you remove one: about 2.3 times the source.",
        "Every stage checks before its first byte that there is room for what it will write.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = render()
    if check and (not PATH.is_file() or PATH.read_text(encoding="utf-8") != text):
        sys.exit(f"{PATH.name} is not what scripts/make_scaling_docs.py says; run make docs.")
    if not check:
        PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
