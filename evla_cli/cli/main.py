"""The command line: click only; everything heavy is imported inside the commands."""

import logging
import sys
from typing import Any

import click

from evla_cli import __version__
from evla_cli.cli import analyze, bench, compare, export, inspect, predict, prune, report, run, verify
from evla_cli.cli import eval as eval_
from evla_cli.cli.stopping import stoppable
from evla_cli.errors import EvlaError, one_line


class Group(click.Group):
    """Prints an EvlaError as one line on stderr and exits with its code; leaves bugs their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        try:
            with stoppable():
                return super().invoke(ctx)
        except EvlaError as error:
            click.echo(f"Error: {one_line(error)}", err=True)
            sys.exit(error.exit_code)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:  # in one line, too: click would print the usage before it
            command = error.ctx.command_path if error.ctx else "evla"
            click.echo(f"Error: {error.format_message().rstrip('.')}. See {command} --help.", err=True)
            sys.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="evla")
def cli() -> None:
    """Make Vision-Language-Action models small and fast enough for robots, without training.

    \b
    evla inspect  CHECKPOINT                     what it is and what can be done with it
    evla analyze  CHECKPOINT --samples DATA ...  how much each decoder layer does
    evla prune    CHECKPOINT DEST ...            remove layers and MLP width
    evla export   CHECKPOINT BUNDLE ...          a self-contained bundle with its inference settings
    evla run      RECIPE.yaml                    all three, resumable
    evla verify   BUNDLE                         is it whole, and does it fit its settings?
    evla predict  SOURCE ...                     one action chunk
    evla bench    A B ...                        how fast and how large they are
    evla compare  A B --samples DATA             how far B's actions lie from A's, and why
    evla eval     A B ... --suite SUITE          how often they succeed in closed loop
    evla report   DIR -o REPORT                  pictures of all this on one page
    """


for module in (inspect, analyze, prune, export, run, verify, predict, bench, compare, eval_, report):
    cli.add_command(module.command)
