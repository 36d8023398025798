import os
from pathlib import Path

import click

from evla_cli.cli.options import (
    DTYPE_CHOICE,
    PATH,
    KindWeight,
    device_option,
    json_option,
    overwrite_option,
    quiet_option,
)

EXAMPLE = """
\b
Examples:
  evla analyze cogact-base/ --samples calibration/ -o importance.json
  evla analyze llama/ --samples texts.jsonl -o importance.json --num-samples 64 --figures figures/
  torchrun --nproc-per-node 8 -m evla_cli analyze llama/ --samples texts.jsonl -o importance.json --device cuda
"""


@click.command("analyze", epilog=EXAMPLE)
@click.argument("source", type=PATH)
@click.option("--samples", "data", type=PATH, required=True, help="Folder with samples.jsonl, or a file of texts.")
@click.option("-o", "--output", type=PATH, required=True, help="Where importance.json goes.")
@click.option(
    "--num-samples",
    type=int,
    help="Use N samples, spread over instructions and episodes; of texts the first N (default: all).",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--dtype", type=DTYPE_CHOICE, default="float32", show_default=True, help="To compute in.")
@click.option("--memory-budget", metavar="SIZE", help="For hidden states, such as 2GiB; more go to a temporary file.")
@click.option(
    "--position-weight",
    "weights",
    type=KindWeight(),
    multiple=True,
    help="How often a kind of position counts, such as cognition=20 (kinds: visual, text, cognition; default: once).",
)
@click.option("--figures", type=PATH, help="Also draw importance and similarity into this folder.")
@device_option
@json_option
@quiet_option
@overwrite_option
def command(
    source: Path,
    data: Path,
    output: Path,
    num_samples: int | None,
    batch_size: int,
    dtype: str,
    memory_budget: str | None,
    weights: tuple[tuple[str, float], ...],
    figures: Path | None,
    device: str,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Measure how much each decoder layer of SOURCE does, and each block of its vision towers.

    The importance of a layer is 1 minus the mean cosine of its input and output over calibration samples: a layer that
    changes nothing scores 0. Of a tower's block, what it does to lengths counts, too: its features are not normed.
    Layers are read one at a time, so a checkpoint need not fit into memory. The order of the samples means nothing.

    For a model that acts, the table also has every layer's importance over the visual tokens, the text and the
    cognition token alone. The total counts every position once, as the paper does, unless --position-weight says
    otherwise.

    importance.activations.safetensors is written beside importance.json: how large every MLP channel is on the samples
    (root mean square), by which evla prune chooses rows. Pruning at another ratio needs no new analysis.

    Processes that torchrun starts share the samples; the first of them writes and prints.
    """
    from evla_cli.checkpoint.read_ahead import start_early

    if os.environ.get("RANK", "0") == "0":  # of a job's processes the first alone hashes the checkpoint
        start_early(source)
    from evla_cli import pipeline
    from evla_cli.evaluation.report import importance_table
    from evla_cli.ranks import torchrun_ranks

    with torchrun_ranks(device) as (ranks, own_device):
        result = pipeline.analyze_to_file(
            source,
            data,
            output,
            num_samples=num_samples,
            batch_size=batch_size,
            device=own_device,
            dtype=dtype,
            memory_budget=memory_budget,
            weights=dict(weights),
            figures=figures,
            overwrite=overwrite,
            ranks=ranks,
        )
    if ranks.first:
        click.echo(result.to_json() if as_json else importance_table(result), nl=not as_json)
