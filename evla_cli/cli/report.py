from pathlib import Path

import click

from evla_cli.cli.options import DTYPE_CHOICE, PATH, SEED, device_option, overwrite_option, quiet_option

EXAMPLE = """
\b
Examples:
  evla report out/demo --dense demo/cogact-metaworld --samples demo/samples -o report/
  evla report out/demo --samples demo/samples --sample 7 --sample 40 --runs 0 -o report/
  evla report out/demo --dense demo/cogact-metaworld --samples demo/samples --bench bench.json \\
    --results results.jsonl -o report/ --overwrite
"""


@click.command("report", epilog=EXAMPLE)
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Folder for index.html, PNGs and their numbers.")
@click.option("--dense", type=PATH, help="The checkpoint that the bundle was made from.")
@click.option("--samples", type=PATH, help="Folder with samples.jsonl.")
@click.option(
    "--sample",
    "chosen",
    metavar="N",
    type=click.IntRange(min=0),
    multiple=True,
    help="Which of them are shown, counted from 0; may be repeated (default: three from all over the file).",
)
@click.option("--bench", type=PATH, help="What evla bench --json printed.")
@click.option("--results", type=PATH, help="The log of evla eval.")
@click.option(
    "--runs",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Timed predictions with each number of visual tokens; 0: none.",
)
@click.option("--unnorm-key", help="Dataset whose statistics un-normalise (needed if the models know several).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the diffusion noise.")
@click.option("--dtype", type=DTYPE_CHOICE, help="To compute in (default: as each is stored).")
@device_option
@quiet_option
@overwrite_option
def command(
    directory: Path,
    output: Path,
    dense: Path | None,
    samples: Path | None,
    chosen: tuple[int, ...],
    bench: Path | None,
    results: Path | None,
    runs: int,
    unnorm_key: str | None,
    seed: int,
    dtype: str | None,
    device: str,
    overwrite: bool,
) -> None:
    """Draw what DIR holds and what its bundle does: one HTML page that needs no network, and PNGs.

    DIR is what evla run wrote, a bundle, or any folder with a bundle or an importance.json in it. Drawn are layer
    importance, denoising steps, operations and time against visual tokens, the tokens kept of camera images, predicted
    motion beside the dense model's, time per stage, and speed against success. Where something is missing for a
    picture, the page says what, and which command makes it.
    """
    from evla_cli.evaluation.pictures.inputs import Request
    from evla_cli.evaluation.pictures.report import write_report

    request = Request(
        directory,
        dense=dense,
        samples=samples,
        chosen=chosen,
        bench=bench,
        results=results,
        runs=runs,
        unnorm_key=unnorm_key,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    click.echo(write_report(request, output, overwrite).table())
