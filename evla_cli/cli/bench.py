from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, SEED, device_option, json_option, overwrite_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla bench bundle/
  evla bench cogact-base/ bundle/ --dtype bfloat16 --runs 10 --figure bench.png
  evla bench dense/ l28/ l22/ --baseline none --device cuda --batch-size 8 --json
  evla bench configs/eval/demo_table.yaml --baseline none --dtype float32 --json > bench.json
"""


@click.command("bench", epilog=EXAMPLE)
@click.argument("candidates", type=PATH, nargs=-1, required=True)
@click.option(
    "--baseline",
    metavar="NAMES",
    default="stock,neutral",
    show_default=True,
    help="Of the first candidate's weights: stock, neutral, both, or none.",
)
@click.option("--samples", type=PATH, help="Folder with samples.jsonl whose first ones are predicted (default: noise).")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--denoise-steps", type=click.IntRange(min=1), help="Of every candidate (default: as its settings say; else 10)."
)
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Timed predictions of each.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Untimed ones before.")
@click.option("--threads", type=click.IntRange(min=1), help="That torch uses on the CPU (default: its own choice).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of images, diffusion noise and intervals.")
@click.option("--dtype", type=DTYPE_CHOICE, help="To compute in (default: as each is stored).")
@click.option(
    "--memory-budget",
    metavar="SIZE",
    help="For weights loaded at once, such as 20GiB (default: most of what is free); candidates that do not fit "
    "together are loaded in turn.",
)
@click.option("--figure", type=PATH, help="Also draw the time per stage into this PNG.")
@device_option
@json_option
@quiet_option
@overwrite_option
def command(
    candidates: tuple[Path, ...],
    baseline: str,
    samples: Path | None,
    batch_size: int,
    denoise_steps: int | None,
    runs: int,
    warmup: int,
    threads: int | None,
    seed: int,
    dtype: str | None,
    memory_budget: str | None,
    figure: Path | None,
    device: str,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Measure how fast and how large CANDIDATES are: checkpoints that act, bundles with their own settings, either of
    them with others (PATH@SETTINGS.yaml), or a YAML list of candidates.

    Time per stage of a prediction, FLOPs, parameters, bytes, peak memory, load time. All are timed in turn, run by run,
    so that a drift of the machine hits all alike, and compared within each round. Two baselines: "stock" runs the first
    candidate's weights with transformers' own classes, "neutral" with evla's runtime, all tokens and no caching.
    """
    from evla_cli.evaluation.bench import bench
    from evla_cli.evaluation.figures import check_figure, draw_latency
    from evla_cli.evaluation.report import bench_table, print_json

    if figure is not None:
        check_figure(figure, overwrite)
    record = bench(
        candidates,
        baselines=() if baseline == "none" else baseline.split(","),
        samples=samples,
        batch_size=batch_size,
        num_denoise_steps=denoise_steps,
        runs=runs,
        warmup=warmup,
        device=device,
        dtype=dtype,
        threads=threads,
        seed=seed,
        memory_budget=memory_budget,
    )
    if figure is not None:
        draw_latency(record, figure)
    click.echo(print_json(record) if as_json else bench_table(record))
