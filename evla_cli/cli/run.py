import os
from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, device_option, json_option, overwrite_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla run configs/cogact_l22_t56.yaml
  evla run configs/cogact_recommended.yaml --device cuda --dtype bfloat16 --memory-budget 40GB
"""


@click.command("run", epilog=EXAMPLE)
@click.argument("recipe", type=PATH)
@click.option("--dtype", type=DTYPE_CHOICE, help="For analyze to compute in, instead of the recipe's analyze.dtype.")
@click.option("--memory-budget", metavar="SIZE", help="For hidden states, such as 2GiB; more go to a temporary file.")
@device_option
@json_option
@quiet_option
@overwrite_option
def command(
    recipe: Path, dtype: str | None, memory_budget: str | None, device: str, as_json: bool, overwrite: bool
) -> None:
    """Analyze, prune and export as RECIPE says; a stage whose inputs and options are unchanged is skipped.

    Below each stage stands what it found: the layers that do least, what goes, whether refit helped. The last line says
    how far the result lies from the source on held-out samples: a fifth, which refit does not see, at most 32 of them.
    For a policy that is the error of its actions from the same noise, as in evla compare.

    --dtype is one of a stage's options: another one analyzes again. --device and --memory-budget are not: what was
    finished with others counts as done. Without --dtype the last line's policies compute as they are stored.
    """
    from evla_cli.evaluation.report import held_out_line, print_json, stage_verdicts
    from evla_cli.running import Resources, judge_recipe, run_recipe
    from evla_cli.schema import to_mapping

    resources = Resources(device, memory_budget)
    stages = []
    for name, path, done in run_recipe(recipe, overwrite, dtype=dtype, resources=resources):
        verdicts = stage_verdicts(name, path)
        stages.append({"stage": name, "output": os.path.normpath(path), "done": done, "verdicts": verdicts})
        if not as_json:
            click.echo(f"{name:8} {os.path.normpath(path)}  ({'done' if done else 'unchanged, skipped'})")
            for verdict in verdicts:
                click.echo(f"         {verdict}")
    found = judge_recipe(recipe, dtype=dtype, resources=resources)
    if as_json:
        held_out = {"not_measured": found} if isinstance(found, str) else to_mapping(found)
        click.echo(print_json({"stages": stages, "held_out": held_out}))
    else:
        click.echo(held_out_line(found))
