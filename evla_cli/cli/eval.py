from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, IdList, device_option, json_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla eval demo/cogact-metaworld out/demo/bundle --suite metaworld -o results.jsonl --episodes 100 --workers 2
  evla eval dense/ dense/@fastv.yaml bundle/ --suite metaworld -o results.jsonl --tasks drawer-open,window-close
  evla eval configs/eval/demo_table.yaml --suite metaworld -o results.jsonl --dtype float32 --video videos/
  evla eval dense/ bundle/ --suite metaworld -o results.jsonl --noise-seeds 4 --unnorm-key metaworld
  evla eval bundle/ --suite simpler -o results.jsonl --tasks widowx_carrot_on_plate --device cuda --dtype bfloat16
"""


@click.command("eval", epilog=EXAMPLE)
@click.argument("candidates", type=PATH, nargs=-1, required=True)
@click.option("--suite", required=True, help="metaworld, simpler, or module:Class for one of your own.")
@click.option("-o", "--output", type=PATH, required=True, help="Log of episodes; gone on with if it is there.")
@click.option("--tasks", metavar="NAMES", help="Separated by commas (default: all of the suite's).")
@click.option(
    "--episodes", type=click.IntRange(min=1), help="Start states of each task (default: metaworld 50, simpler all)."
)
@click.option(
    "--noise-seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Episodes of each start state, with other noise each.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    help="Of each task's first start state (default: metaworld 30000, simpler 0).",
)
@click.option(
    "--no-control",
    "control",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Add no row of the first candidate with other noise; without one no difference is called real.",
)
@click.option(
    "--execute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Actions of a chunk before the next prediction (metaworld; default: 8, or all of a shorter chunk).",
)
@click.option(
    "--unnorm-key",
    "unnorm_keys",
    multiple=True,
    metavar="[NAME=]KEY",
    help="Dataset whose statistics un-normalise actions, of all candidates or of one; repeatable.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, each with a model."
)
@click.option("--denoise-steps", type=click.IntRange(min=1), help="Of every candidate (default: as its settings say).")
@click.option("--video", type=PATH, help="Also film episodes into this folder.")
@click.option("--video-episodes", type=IdList(), default="0", show_default=True, help="Which ones of every task.")
@click.option("--video-format", type=click.Choice(["gif", "mp4"]), default="gif", show_default=True)
@click.option("--dtype", type=DTYPE_CHOICE, help="To compute in (default: as each is stored).")
@device_option
@json_option
@quiet_option
def command(
    candidates: tuple[Path, ...],
    suite: str,
    output: Path,
    tasks: str | None,
    episodes: int | None,
    noise_seeds: int,
    seed: int | None,
    control: bool,
    execute: int | None,
    unnorm_keys: tuple[str, ...],
    workers: int,
    denoise_steps: int | None,
    video: Path | None,
    video_episodes: tuple[int, ...],
    video_format: str,
    dtype: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure how often CANDIDATES succeed in closed loop, and compare each with the first, episode by episode.

    A candidate is a checkpoint that acts, a bundle, either of them with other settings (PATH@SETTINGS.yaml), or a YAML
    list of candidates. All run the same episodes with the same noise, which task, start state and seed decide.

    Where there are two or more, one row is added: the first candidate with other noise. A difference is called real
    only if its interval excludes 0 and it is larger than what the interval of that row reaches.

    Every episode that ends is a line in the log. The same command goes on where an earlier one ended; a log of other
    checkpoints, settings, seeds or versions is refused.
    """
    from evla_cli.evaluation.report import print_json
    from evla_cli.evaluation.rollout import Videos, evaluate, open_candidates, with_unnorm_keys
    from evla_cli.evaluation.success import success_table

    record = evaluate(
        with_unnorm_keys(open_candidates(candidates, denoise_steps), unnorm_keys),
        suite,
        output,
        tasks=None if tasks is None else tasks.split(","),
        episodes=episodes,
        num_noises=noise_seeds,
        seed=seed,
        num_executed=execute,
        control=control,
        num_workers=workers,
        device=device,
        dtype=dtype,
        videos=Videos(video, video_episodes, video_format) if video else None,
    )
    click.echo(print_json(record) if as_json else success_table(record["candidates"], record["control"]))
