"""Options that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource


class PathOption(click.Path):
    """A path that the system can look up, whether something is there or not."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            path = Path(os.fsdecode(super().convert(value, param, ctx)))
            os.lstat(path)
            str(path).encode()  # what is no text can be neither printed nor given to the tokenizers library
        except (FileNotFoundError, NotADirectoryError):
            pass  # each command says itself what it misses
        except (OSError, ValueError) as error:  # too long, forbidden, a null byte, no UTF-8
            self.fail(
                f"'{str(value)[:80]}' is not a path that can be used: {getattr(error, 'strerror', None) or error}."
            )
        if not str(value):
            self.fail("The path is empty.")
        return path


PATH = PathOption()

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    def set_quiet(_ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        from evla_cli.progress import set_quiet

        set_quiet(value)

    option = click.option("--quiet", is_flag=True, expose_value=False, callback=set_quiet, help="No progress bars.")
    return option(command)


def given_options() -> list[str]:
    """The options of the running command that stand on its command line, as they are called in the help."""
    context = click.get_current_context()
    return [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if isinstance(parameter, click.Option)
        and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]


def act_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--no-act", "act", is_flag=True, default=True, flag_value=False, help=help)


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(command)


METHOD_CHOICE = click.Choice(["activation", "prunenet", "magnitude", "random"])
VISION_METHOD_CHOICE = click.Choice(["activation", "magnitude", "random"])
LAYER_METHOD_CHOICE = click.Choice(["cosine", "iterative", "refit-aware"])
OBJECTIVE_CHOICE = click.Choice(["hidden", "action"])
SEED = click.IntRange(0, 2**63 - 1)
DTYPE_CHOICE = click.Choice(["float32", "bfloat16", "float16"])


class IdList(click.ParamType):
    """Numbers such as `3,7,9`."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of whole numbers such as 3,7,9.", param, ctx)


class KindWeight(click.ParamType):
    """A kind of position and its weight, such as `cognition=20`."""

    name = "kind=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        kind, _, number = value.partition("=")
        try:
            return kind.strip(), float(number)
        except ValueError:
            self.fail(f"'{value}' is not a kind of position and a number, such as cognition=20.", param, ctx)
