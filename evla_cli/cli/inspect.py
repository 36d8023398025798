from pathlib import Path

import click

from evla_cli.cli.options import PATH, json_option, quiet_option

EXAMPLE = """
\b
Example:
  evla inspect cogact-base/
"""


@click.command("inspect", epilog=EXAMPLE)
@click.argument("source", type=PATH)
@json_option
@quiet_option
def command(source: Path, as_json: bool) -> None:
    """Say what SOURCE is: family, parts, sizes, dtypes, and what evla can do with it. Reads no weights."""
    from evla_cli.evaluation.report import inspect_table, inspection, print_json

    facts = inspection(source)
    click.echo(print_json(facts) if as_json else inspect_table(facts))
