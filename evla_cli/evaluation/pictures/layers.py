"""What each decoder layer does, and which ones the plan removed (figure 1b of EfficientVLA, arXiv 2506.10100)."""

from typing import Any

from evla_cli.evaluation.figures import importance_bars, layer_width, new_figure, similarity_curve
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table, number
from evla_cli.evaluation.pictures.inputs import IMPORTANCE, Inputs
from evla_cli.plan import LayerImportance

NAME, TITLE = "layers", "Decoder layers: importance and similarity"


def layers(inputs: Inputs) -> Section:
    if inputs.importance is None:
        why = f"{inputs.request.directory} has no {IMPORTANCE}, and the bundle no plan with scores."
        return Missing(NAME, TITLE, why, [inputs.analyze()])
    result, file = inputs.importance
    plan = inputs.plan
    removed = plan.dropped_layers if plan is not None and plan.checkpoint_sha256 == result.checkpoint_sha256 else ()
    rank = {layer: place for place, layer in enumerate(result.ranking(), start=1)}
    most, least = result.ranking()[-1], result.ranking()[0]
    values = [score.importance for score in result.layers]
    source = f"From {file}" if file else "From the bundle's prune_plan.yaml, which has no standard errors"
    alt = (
        f"Bars for {len(values)} decoder layers: layer {most} does most ({number(values[most])}), layer {least} least "
    )
    alt += f"({number(values[least])}). " + (
        f"Removed: {_list(removed)}." if removed else "No layer is marked as removed."
    )
    return Picture(
        NAME,
        TITLE,
        [
            "Importance is 1 minus the mean cosine of a layer's input and output: a layer that changes nothing scores "
            "0 and goes first. Lines on the bars: standard error over samples. Hatched: removed.",
            f"{source}: {result.num_samples} samples, computed in {result.dtype}.",
        ],
        alt,
        {
            "metric": result.metric,
            "importance": values,
            "standard_error": [score.standard_error for score in result.layers],
            "ranking": result.ranking(),
            "removed": list(removed),
        },
        [
            Table(
                "Rank 1 does least.",
                ["layer", "importance", "std. error", "cosine", "rank", ""],
                [
                    [
                        str(score.index),
                        f"{score.importance:.5f}",
                        "" if score.standard_error is None else f"{score.standard_error:.5f}",
                        f"{1 - score.importance:.5f}",
                        str(rank[score.index]),
                        "removed" if score.index in removed else "kept" if removed else "",
                    ]
                    for score in result.layers
                ],
            )
        ],
        lambda: _draw(result, removed),
    )


def _draw(result: LayerImportance, removed: tuple[int, ...]) -> Any:
    figure, (above, below) = new_figure(max(9.0, layer_width(len(result.layers))), 6, nrows=2, sharex=True)
    importance_bars(above, result, removed)
    above.set_xlabel("")
    similarity_curve(below, result)
    return figure


def _list(layers: tuple[int, ...]) -> str:
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(map(str, layers))
