from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, act_option, json_option, overwrite_option, quiet_option
from evla_cli.errors import EvlaError

EXAMPLE = """
\b
Examples:
  evla export pruned/ bundle/ --num-visual-tokens 56 --cache-interval 5
  evla export pruned/ bundle/ --settings inference.yaml --dtype bfloat16
"""


@click.command("export", epilog=EXAMPLE)
@click.argument("source", type=PATH)
@click.argument("bundle", type=PATH)
@click.option("--settings", type=PATH, help="An inference.yaml to start from; options given here win over it.")
@click.option("--num-visual-tokens", type=int, help="Visual tokens to keep (default: all).")
@click.option("--num-key-tokens", type=int, help="Of them, the highest-scoring ones.  [default: 4]")
@click.option("--task-ratio", type=float, help="Share of the rest taken by score.  [default: 0.5]")
@click.option("--prune-layer", type=int, help="Tokens leave before this decoder layer.  [default: 2]")
@click.option("--cache-interval", type=int, help="Compute the action head every N steps.  [default: 1: always]")
@click.option("--num-denoise-steps", type=int, help="DDIM steps.  [default: 10]")
@click.option("--cfg-scale", type=float, help="Classifier-free guidance; 1: none.  [default: 1.5]")
@click.option("--dtype", type=DTYPE_CHOICE, help="Of the weights but CogACT's action head's (default: as in SOURCE).")
@click.option("--max-shard-size", default="5GB", show_default=True)
@act_option("Do not act with the bundle: it gets no check.json.")
@json_option
@quiet_option
@overwrite_option
def command(
    source: Path,
    bundle: Path,
    settings: Path | None,
    num_visual_tokens: int | None,
    num_key_tokens: int | None,
    task_ratio: float | None,
    prune_layer: int | None,
    cache_interval: int | None,
    num_denoise_steps: int | None,
    cfg_scale: float | None,
    dtype: str | None,
    max_shard_size: str,
    act: bool,
    as_json: bool,
    overwrite: bool,
) -> None:
    """Write SOURCE as a self-contained BUNDLE: weights, tokenizer, statistics, inference.yaml and a manifest.

    Without options, the runtime saves nothing: all visual tokens, no caching, so that the bundle acts as SOURCE does.

    A robot process loads it with evla_cli.load_policy(BUNDLE) and needs nothing else. The bundle is read again, acts
    once, and keeps what it did in check.json, with which evla verify compares.
    """
    from evla_cli.checkpoint.read_ahead import start_early

    start_early(source)
    from evla_cli import pipeline
    from evla_cli.evaluation.report import print_json

    chosen = pipeline.settings_with(
        settings,
        visual_tokens={
            "num_keep": num_visual_tokens,
            "num_key": num_key_tokens,
            "task_ratio": task_ratio,
            "prune_layer": prune_layer,
        },
        action_cache={"interval": cache_interval},
        diffusion={"num_denoise_steps": num_denoise_steps, "cfg_scale": cfg_scale},
    )
    idle = {"--num-key-tokens": num_key_tokens, "--task-ratio": task_ratio, "--prune-layer": prune_layer}
    for option, value in idle.items():
        if value is not None and chosen.visual_tokens.num_keep is None:
            raise EvlaError(f"{option} does nothing while all visual tokens are kept; give --num-visual-tokens.")
    if num_denoise_steps is not None and chosen.diffusion.sampler == "ddpm":
        raise EvlaError("--num-denoise-steps does nothing under sampler ddpm, which takes every training step.")
    facts = pipeline.export(
        source, bundle, chosen, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, act=act
    )
    if as_json:
        click.echo(print_json({"bundle": str(bundle), **facts}))
    else:
        done = "verified, acted once" if facts["acted"] else "verified, but for acting"
        click.echo(f"{bundle}: {facts['tensors']} tensors, {facts['bytes'] / 1e6:,.1f} MB, {done}.")
