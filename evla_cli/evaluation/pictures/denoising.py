"""How alike the action head's denoising steps are, block by block (figure 1c of EfficientVLA, arXiv 2506.10100)."""

from typing import Any

from evla_cli.errors import EvlaError
from evla_cli.evaluation.figures import denoise_heatmaps
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.evaluation.pictures.measured import Measured

NAME, TITLE = "denoising_steps", "Action head: similarity of consecutive denoising steps"


def denoising(inputs: Inputs, measured: Measured) -> Section:
    facts = None if inputs.importance is None else inputs.importance[0].action_head
    if facts is not None:
        source = f"From {inputs.importance[1]}" if inputs.importance else ""
    elif measured.step_similarity is not None:
        facts, name, count = measured.step_similarity
        source = f"Measured now: {name}, the first {count} samples of {inputs.request.samples}"
    else:
        return Missing(NAME, TITLE, "Nothing to measure on was named.", [inputs.again("--samples SAMPLES")])
    similarity = _checked(facts, source)
    numbers = {"num_denoise_steps": facts["num_denoise_steps"], "seed": facts["seed"], "step_similarity": similarity}
    each = [
        (value, kind, block, step)
        for kind, rows in similarity.items()
        for block, row in enumerate(rows)
        for step, value in enumerate(row)
    ]
    low, kind, block, step = min(each)
    return Picture(
        NAME,
        TITLE,
        [
            "Cosine between what a block puts out at one denoising step and at the next, nothing reused. Where it is "
            "close to 1, a cached output is a good one.",
            f"{source}; {facts['num_denoise_steps']} DDIM steps, noise of seed {facts['seed']}.",
        ],
        f"Two heat maps, blocks by pairs of steps. Cosines lie between {low:.3f} ({kind} of block {block}, steps "
        f"{step} and {step + 1}) and {max(each)[0]:.3f}.",
        numbers,
        [
            Table(
                f"{kind} output: cosine of steps",
                ["block", *(f"{step}-{step + 1}" for step in range(len(rows[0])))],
                [[str(block), *(f"{value:.3f}" for value in row)] for block, row in enumerate(rows)],
            )
            for kind, rows in similarity.items()
        ],
        lambda: denoise_heatmaps(similarity),
    )


def _checked(facts: dict[str, Any], source: str) -> dict[str, list[list[float]]]:
    """What an importance file says of the action head is nobody's but the drawing's to check."""
    try:
        similarity = {kind: facts["step_similarity"][kind] for kind in ("attention", "mlp")}
        shapes = {(len(rows), len(row)) for rows in similarity.values() for row in rows}
        good = len(shapes) == 1 and 0 not in next(iter(shapes))
        good = good and all(-1.01 <= value <= 1.01 for rows in similarity.values() for row in rows for value in row)
        good = good and isinstance(facts["num_denoise_steps"], int) and isinstance(facts["seed"], int)
    except (KeyError, TypeError) as error:
        raise EvlaError(f"{source}: action_head is not what evla analyze --figures writes.") from error
    if not good:
        raise EvlaError(f"{source}: action_head is not what evla analyze --figures writes.")
    return similarity
