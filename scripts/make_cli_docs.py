"""Write docs/cli.md from the commands' own --help; with --check, say whether it is up to date."""

import argparse
import sys
from pathlib import Path

import click

from evla_cli.cli.main import cli

PATH = Path(__file__).resolve().parent.parent / "docs" / "cli.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = render()
    if check and (not PATH.is_file() or PATH.read_text(encoding="utf-8") != text):
        sys.exit(f"{PATH.name} is not what --help says; run make docs.")
    if not check:
        PATH.write_text(text, encoding="utf-8")


def render() -> str:
    parts = [
        "# Commands\n\nWritten by `make docs` from `--help`. "
        "Exit codes: 0, 1 for a failed check, 2 for bad usage or input, 130 and 143 for SIGINT and SIGTERM.\n"
    ]
    # As a terminal of 100 columns shows it: click leaves two of them free.
    root = click.Context(cli, info_name="evla", terminal_width=98, **cli.context_settings)
    parts.append(_block("evla", cli.get_help(root)))
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root)
        parts.append(_block(f"evla {name}", command.get_help(context)))
    return "\n".join(parts)


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    main()
