from pathlib import Path

import click

from evla_cli.cli.options import PATH, json_option, quiet_option

EXAMPLE = """
\b
Example:
  evla verify bundle/
"""


@click.command("verify", epilog=EXAMPLE)
@click.argument("bundle", type=PATH)
@json_option
@quiet_option
def command(bundle: Path, as_json: bool) -> None:
    """Check a BUNDLE: hashes, weights against the model, settings against the model. Exit code 1 if it differs."""
    from evla_cli.bundling import verify_bundle
    from evla_cli.evaluation.report import print_json

    facts = verify_bundle(bundle)
    if as_json:
        click.echo(print_json({"bundle": str(bundle), "ok": True, **facts}))
    else:
        click.echo(
            f"{bundle}: {facts['files']} files and {facts['tensors']} tensors as the manifest and the model say."
        )
