from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, SEED, device_option, json_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla compare cogact-base/ bundle/ --samples calibration/
  evla compare dense-bundle/ bundle/ --samples calibration/ --dtype bfloat16 --unnorm-key bridge_orig --json
"""


@click.command("compare", epilog=EXAMPLE)
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option("--samples", "data", type=PATH, required=True, help="Folder with samples.jsonl.")
@click.option("--num-samples", type=int, help="Use N, spread over instructions and episodes (default: all).")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--unnorm-key", help="Dataset whose statistics un-normalise (needed if both models know several).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the diffusion noise and the intervals.")
@click.option("--dtype", type=DTYPE_CHOICE, help="To compute in (default: as each is stored).")
@device_option
@json_option
@quiet_option
def command(
    first: Path,
    second: Path,
    data: Path,
    num_samples: int | None,
    batch_size: int,
    unnorm_key: str | None,
    seed: int,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure how far the actions of B lie from those of A on the same samples with the same noise.

    Either may be named with other settings than its own: PATH@SETTINGS.yaml.

    Cognition tokens, actions, gripper commands, positions along the chunk, and what the action head's cache reuses.
    What B does differently (layers, MLP width, vision towers, visual tokens, cache) is switched on in A one at a time,
    to tell which of them costs how much; the first three by B's prune_plan.yaml, if it was made of A.
    """
    from evla_cli.evaluation.compare import compare
    from evla_cli.evaluation.report import compare_table, print_json

    record = compare(
        first,
        second,
        data,
        num_samples=num_samples,
        batch_size=batch_size,
        unnorm_key=unnorm_key,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    click.echo(print_json(record) if as_json else compare_table(record))
