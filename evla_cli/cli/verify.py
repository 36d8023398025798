from collections import Counter
from pathlib import Path
from typing import Any

import click

from evla_cli.cli.options import PATH, act_option, json_option, quiet_option
from evla_cli.errors import CheckFailed, EvlaError

_MAX_LINES = 40

EXAMPLE = """
\b
Examples:
  evla verify bundle/
  evla verify bundle/ --no-act
  evla verify bundle/ --against published/
"""


@click.command("verify", epilog=EXAMPLE)
@click.argument("bundle", type=PATH)
@click.option("--against", "other", type=PATH, help="Compare with this bundle or checkpoint instead.")
@act_option("Do not let the bundle act.")
@json_option
@quiet_option
def command(bundle: Path, other: Path | None, act: bool, as_json: bool) -> None:
    """Check a BUNDLE: hashes, weights and settings against the model, and one action. Exit code 1 if it differs.

    The bundle acts on the CPU, and the action must be that of its check.json, which export wrote: to the bit where
    versions, processor and number of threads are the same, else within 0.0001 (float32) or 0.1 (bfloat16, float16).

    With --against, say whether two bundles (or pruned checkpoints, or native runs) are the same and, if not, which
    tensors, settings, plan entries or versions differ.
    """
    if other is not None and not act:
        raise EvlaError("--no-act does nothing with --against, which compares files.")
    if other is None:
        _verify(bundle, act, as_json)
    else:
        _compare(bundle, other, as_json)


def _verify(bundle: Path, act: bool, as_json: bool) -> None:
    from evla_cli.checkpoint.read_ahead import start_early

    start_early(bundle)
    from evla_cli.bundling import verify_bundle
    from evla_cli.evaluation.report import print_json

    facts = verify_bundle(bundle, act)
    if as_json:
        click.echo(print_json({"bundle": str(bundle), "ok": True, **facts}))
    else:
        click.echo(
            f"{bundle}: {facts['files']} files and {facts['tensors']} tensors as the manifest and the model say."
        )
        click.echo(_acted(facts["act"]))


def _acted(act: dict[str, Any]) -> str:
    if not act["acted"]:
        return f"It did not act: {act['reason']}."
    if not act["compared"]:
        return f"It acts; not compared, since {act['reason']}."
    others = f" (other {', '.join(act['elsewhere'])})" if act["elsewhere"] else ""
    distance = f"largest difference {act['largest_difference']:g}, allowed {act['tolerance']:g}"
    return f"It acts as check.json says: {distance}{others}."


def _compare(bundle: Path, other: Path, as_json: bool) -> None:
    from evla_cli.comparison import compare_checkpoints
    from evla_cli.evaluation.report import print_json

    comparison = compare_checkpoints(bundle, other)
    differences = comparison.differences
    if as_json:
        records = [difference.to_record() for difference in differences]
        facts = {"same": not differences, "tensors": comparison.num_tensors, "differences": records}
        click.echo(print_json({"bundle": str(bundle), "against": str(other), **facts}))
    elif differences:
        for difference in differences[:_MAX_LINES]:
            click.echo(str(difference))
        if len(differences) > _MAX_LINES:
            click.echo(f"... and {len(differences) - _MAX_LINES} more; --json lists them all.")
    else:
        click.echo(f"{bundle} and {other} are the same: {comparison.num_tensors} tensors, {comparison.scope}.")
    if differences:
        counts = Counter(difference.kind for difference in differences)
        raise CheckFailed(f"{bundle} and {other} differ: {', '.join(f'{kind} ({n})' for kind, n in counts.items())}.")
