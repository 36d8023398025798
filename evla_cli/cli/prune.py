from pathlib import Path

import click

from evla_cli.cli.options import METHOD_CHOICE, PATH, SEED, IdList, json_option, overwrite_option, quiet_option
from evla_cli.errors import EvlaError

EXAMPLE = """
\b
Examples:
  evla prune cogact-base/ pruned/ --importance importance.json --drop-layers 10 --mlp-prune-ratio 0.25
  evla prune llama/ pruned/ --drop-layer-ids 13,14,15
  evla prune cogact-base/ pruned/ --importance importance.json --keep-layers 22 --dry-run
  evla prune cogact-base/ again/ --plan pruned/prune_plan.yaml
"""


@click.command("prune", epilog=EXAMPLE)
@click.argument("source", type=PATH)
@click.argument("dest", type=PATH)
@click.option("--importance", type=PATH, help="From evla analyze, of this very checkpoint.")
@click.option("--drop-layers", "num_drop", type=int, help="How many decoder layers go in all: the least important.")
@click.option("--keep-layers", "num_keep", type=int, help="The same said the other way: how many stay.")
@click.option(
    "--drop-layer-ids", "drop_ids", type=IdList(), default=(), help="Layers that go whatever their rank: 3,7,9."
)
@click.option(
    "--protect-first",
    type=int,
    help="Layers at the start that stay (default: 2 for a VLA, whose visual tokens leave after them; else 0).",
)
@click.option(
    "--mlp-prune-ratio",
    type=float,
    default=0.0,
    show_default=True,
    help="Fraction of MLP width removed; what stays is rounded to a multiple of 64 (narrow MLPs: less).",
)
@click.option("--mlp-method", type=METHOD_CHOICE, default="prunenet", show_default=True, help="How rows are chosen.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of prunenet's training and of random rows.")
@click.option(
    "--plan", "plan_file", type=PATH, help="Follow a prune_plan.yaml of this very checkpoint instead of deciding anew."
)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@json_option
@quiet_option
@overwrite_option
def command(
    source: Path,
    dest: Path,
    importance: Path | None,
    num_drop: int | None,
    num_keep: int | None,
    drop_ids: tuple[int, ...],
    protect_first: int | None,
    mlp_prune_ratio: float,
    mlp_method: str,
    seed: int,
    plan_file: Path | None,
    dry_run: bool,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Write a copy of SOURCE to DEST without its least important decoder layers and with narrower MLPs.

    DEST has SOURCE's own layout: layers are renumbered, the config is adapted, everything else is copied.
    """
    decided = num_drop is not None or num_keep is not None or bool(drop_ids) or mlp_prune_ratio != 0
    if plan_file is None and not decided:
        raise EvlaError("Nothing to remove: give --drop-layers, --keep-layers, --drop-layer-ids or --mlp-prune-ratio.")
    if plan_file is not None and (decided or importance is not None):
        raise EvlaError("--plan says what goes; leave out --importance and the options that decide it.")
    from evla_cli import pipeline
    from evla_cli.evaluation.report import print_json, prune_table

    result = pipeline.prune(
        source,
        dest,
        importance=importance,
        num_drop=num_drop,
        num_keep=num_keep,
        drop_ids=drop_ids,
        protect_first=protect_first,
        mlp_prune_ratio=mlp_prune_ratio,
        mlp_method=mlp_method,
        seed=seed,
        plan_file=plan_file,
        dry_run=dry_run,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(print_json(result.to_record()))
    else:
        click.echo(prune_table(result))
        if dry_run:
            click.echo(f"{dest} would take {result.bytes_after:,} bytes; nothing was written.")
