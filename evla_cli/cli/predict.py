from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, SEED, device_option, json_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla predict bundle/ --image camera.png --instruction "open the drawer"
  evla predict cogact-base/ --image camera.png --instruction "open the drawer" --unnorm-key bridge_orig
"""


@click.command("predict", epilog=EXAMPLE)
@click.argument("source", type=PATH)
@click.option("--image", type=PATH, required=True, help="The camera image.")
@click.option("--instruction", required=True, help="What the robot should do.")
@click.option("--unnorm-key", help="Dataset whose statistics un-normalise (needed if the model knows several).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the diffusion noise.")
@click.option("--dtype", type=DTYPE_CHOICE, help="To compute in (default: as it is stored).")
@device_option
@json_option
@quiet_option
def command(
    source: Path,
    image: Path,
    instruction: str,
    unnorm_key: str | None,
    seed: int,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Predict one action chunk: one row a time step, in the robot's units.

    SOURCE is a bundle, which runs with its own settings, any other checkpoint that acts, which keeps all visual tokens
    and caches nothing, or either with other settings (PATH@SETTINGS.yaml).
    """
    from evla_cli import pipeline
    from evla_cli.evaluation.report import action_table, print_json

    actions = pipeline.predict(source, image, instruction, unnorm_key=unnorm_key, seed=seed, device=device, dtype=dtype)
    click.echo(print_json({"actions": actions.tolist()}) if as_json else action_table(actions))
