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

    --dtype is one of those options: another one analyzes again. --device and --memory-budget are not: what was finished
    with others counts as done.
    """
    from evla_cli.evaluation.report import print_json
    from evla_cli.running import Resources, run_recipe

    done_or_not = run_recipe(recipe, overwrite, dtype=dtype, resources=Resources(device, memory_budget))
    stages = [(name, os.path.normpath(path), done) for name, path, done in done_or_not]
    if as_json:
        click.echo(
            print_json({"stages": [{"stage": name, "output": path, "done": done} for name, path, done in stages]})
        )
    else:
        for name, path, done in stages:
            click.echo(f"{name:8} {path}  ({'done' if done else 'unchanged, skipped'})")
