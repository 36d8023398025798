import os
from pathlib import Path

import click

from evla_cli.cli.options import PATH, json_option, overwrite_option, quiet_option

EXAMPLE = """
\b
Example:
  evla run configs/cogact_l22_t56.yaml
"""


@click.command("run", epilog=EXAMPLE)
@click.argument("recipe", type=PATH)
@json_option
@quiet_option
@overwrite_option
def command(recipe: Path, as_json: bool, overwrite: bool) -> None:
    """Analyze, prune and export as RECIPE says; a stage whose inputs and options are unchanged is skipped."""
    from evla_cli.evaluation.report import print_json
    from evla_cli.running import run_recipe

    stages = [(name, os.path.normpath(path), done) for name, path, done in run_recipe(recipe, overwrite=overwrite)]
    if as_json:
        click.echo(
            print_json({"stages": [{"stage": name, "output": path, "done": done} for name, path, done in stages]})
        )
    else:
        for name, path, done in stages:
            click.echo(f"{name:8} {path}  ({'done' if done else 'unchanged, skipped'})")
