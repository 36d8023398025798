from pathlib import Path
from typing import TYPE_CHECKING

import click

from evla_cli.cli.options import (
    LAYER_METHOD_CHOICE,
    METHOD_CHOICE,
    OBJECTIVE_CHOICE,
    PATH,
    SEED,
    VISION_METHOD_CHOICE,
    IdList,
    device_option,
    given_options,
    json_option,
    overwrite_option,
    quiet_option,
)
from evla_cli.errors import EvlaError

if TYPE_CHECKING:
    from evla_cli.settings import PruneScope

EXAMPLE = """
\b
Examples:
  evla prune cogact-base/ pruned/ --importance importance.json --drop-layers 10 --mlp-prune-ratio 0.25
  evla prune llama/ pruned/ --drop-layer-ids 13,14,15
  evla prune llama/ pruned/ --importance importance.json --drop-layers 8 --mlp-prune-ratio 0.25 \\
      --mlp-method activation --refit --samples texts.jsonl
  evla prune cogact-base/ pruned/ --importance importance.json --drop-layers 10 \\
      --vision-drop-layers 6 --vision-mlp-prune-ratio 0.25 --refit --samples calibration/
  evla prune llama/ pruned/ --drop-layers 8 --layer-method refit-aware --refit --samples texts.jsonl
  evla prune cogact-base/ pruned/ --drop-layers 10 --objective action --samples calibration/
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
    "--layer-method",
    type=LAYER_METHOD_CHOICE,
    default="cosine",
    show_default=True,
    help="cosine: rank by importance, once, as the paper does. iterative: measure again after every removal. "
    "refit-aware: the set whose removal, after --refit, moves the output least. The latter two run on --samples.",
)
@click.option(
    "--objective",
    type=OBJECTIVE_CHOICE,
    default="hidden",
    show_default=True,
    help="What must not change: hidden states, or the predicted action chunk (runs on --samples).",
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
@click.option(
    "--mlp-method",
    type=METHOD_CHOICE,
    default="activation",
    show_default=True,
    help="How rows are chosen. activation: those that put out most on the samples of evla analyze. prunenet: by a "
    "policy that is trained to keep the output, for the paper's recipes. Both need --importance.",
)
@click.option(
    "--vision-drop-layers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many blocks go from each vision tower: the least important of those that run.",
)
@click.option(
    "--vision-mlp-prune-ratio",
    type=float,
    default=0.0,
    show_default=True,
    help="Fraction of the towers' MLP width removed, rounded like the decoder's.",
)
@click.option(
    "--vision-mlp-method",
    type=VISION_METHOD_CHOICE,
    default="activation",
    show_default=True,
    help="How the towers' rows are chosen.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of prunenet's training and of random rows.")
@click.option(
    "--plan", "plan_file", type=PATH, help="Follow a prune_plan.yaml of this very checkpoint instead of deciding anew."
)
@click.option("--refit", is_flag=True, help="Fit the layers that stay to the dense model on --samples.")
@click.option(
    "--samples",
    "data",
    type=PATH,
    help="For --refit, --layer-method, --objective: folder with samples.jsonl, or a file of texts.",
)
@click.option(
    "--refit-last-weight",
    type=float,
    help="How often a sample's last position counts in the fit, where others count once (default: in a VLA, whose "
    "cognition token it is, as often as all positions of the sample together; in a text once).",
)
@click.option(
    "--num-samples",
    type=int,
    help="Of --samples: use N, spread over instructions and episodes; of texts the first N (default: all).",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Of --samples.")
@click.option("--memory-budget", metavar="SIZE", help="For hidden states of --samples; more go to a temporary file.")
@device_option
@click.option(
    "--no-check",
    "check",
    flag_value=False,
    default=True,
    help="Do not run SOURCE without what goes, and what was written, on a few tokens, to see that both are the same "
    "before DEST appears. Saves reading both once more; the manifest says so.",
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
    layer_method: str,
    objective: str,
    protect_first: int | None,
    mlp_prune_ratio: float,
    mlp_method: str,
    vision_drop_layers: int,
    vision_mlp_prune_ratio: float,
    vision_mlp_method: str,
    seed: int,
    plan_file: Path | None,
    refit: bool,
    data: Path | None,
    refit_last_weight: float | None,
    num_samples: int | None,
    batch_size: int,
    memory_budget: str | None,
    device: str,
    check: bool,
    dry_run: bool,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Write a copy of SOURCE to DEST without its least important decoder layers and with narrower MLPs.

    The --vision options do the same to the blocks of a VLA's vision towers.

    DEST has SOURCE's own layout: layers are renumbered, the config is adapted, everything else is copied.

    With --refit, the last linear layer of every MLP that stays is fit to the dense model's hidden states on calibration
    samples, in closed form: it makes up for what was removed before it and in it. A fifth of them, whole episodes of
    every instruction, judges the fit to the others; where that does not bring it nearer to the dense model, all weights
    stay as they are.

    The table says which layers other samples might have chosen: in how many of 1000 bootstrap resamples each goes.
    """
    from evla_cli.settings import PruneScope

    given = given_options()
    deciding = [option for option in given if option in _DECIDING]
    if plan_file is not None and deciding:
        raise EvlaError(f"--plan says what goes; leave out {', '.join(deciding)}.")
    removes = num_drop is not None or num_keep is not None or bool(drop_ids) or mlp_prune_ratio != 0
    removes = removes or vision_drop_layers != 0 or vision_mlp_prune_ratio != 0
    if plan_file is None and not removes:
        raise EvlaError(
            "Nothing to remove: give --drop-layers, --keep-layers, --drop-layer-ids, --mlp-prune-ratio or one of the "
            "--vision options."
        )
    by_samples = (layer_method, objective) != ("cosine", "hidden")
    if (refit or by_samples) != (data is not None):
        raise EvlaError(
            "--samples are what --refit, --layer-method and --objective run the model on: give both, or neither."
        )
    _refuse_idle(
        given,
        PruneScope(
            drops_layers=num_keep is not None or bool(num_drop) or bool(drop_ids),
            ranks_layers=num_keep is not None or (num_drop or 0) > len(set(drop_ids)),
            mlp_method=mlp_method if mlp_prune_ratio else None,
            vision_mlp_method=vision_mlp_method if vision_mlp_prune_ratio else None,
            refit=refit,
            runs_samples=data is not None,
        ),
    )
    from evla_cli.checkpoint.read_ahead import start_early

    start_early(source)
    from evla_cli import pipeline
    from evla_cli.choosing import ChoiceOptions
    from evla_cli.evaluation.report import print_json, prune_table
    from evla_cli.refitting import RefitOptions
    from evla_cli.vision.planning import VisionOptions

    result = pipeline.prune(
        source,
        dest,
        importance=importance,
        num_drop=num_drop,
        num_keep=num_keep,
        drop_ids=drop_ids,
        choice=ChoiceOptions(layer_method, objective, data, num_samples, batch_size, device, memory_budget)
        if by_samples and data is not None
        else None,
        protect_first=protect_first,
        mlp_prune_ratio=mlp_prune_ratio,
        mlp_method=mlp_method,
        seed=seed,
        vision=VisionOptions(vision_drop_layers, vision_mlp_prune_ratio, vision_mlp_method),
        plan_file=plan_file,
        refit=RefitOptions(data, num_samples, batch_size, refit_last_weight, device, memory_budget)
        if refit and data is not None
        else None,
        check=check,
        dry_run=dry_run,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(print_json(result.to_record()))
    else:
        click.echo(prune_table(result))
        if dry_run:
            click.echo(f"{dest} would take {result.bytes_after:,} bytes; nothing was written.")


# What --plan says already.
_DECIDING = ["--importance", "--drop-layers", "--keep-layers", "--drop-layer-ids", "--layer-method", "--objective"]
_DECIDING += ["--protect-first", "--mlp-prune-ratio", "--mlp-method", "--seed"]
_DECIDING += ["--vision-drop-layers", "--vision-mlp-prune-ratio", "--vision-mlp-method"]


class _Flags(dict[str, str]):
    """A recipe's key as an option."""

    def __missing__(self, key: str) -> str:
        return f"--{key.replace('_', '-')}"


def _refuse_idle(given: list[str], scope: "PruneScope") -> None:
    """Errors: one of the options that are given does nothing beside the others."""
    for option in given:
        reason = scope.why_idle(option.removeprefix("--").replace("-", "_"))
        if reason is not None:
            raise EvlaError(f"{option} does nothing {reason.format_map(_Flags())}; leave it out.")
