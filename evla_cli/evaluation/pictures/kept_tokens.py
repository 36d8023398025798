"""Which visual tokens the bundle keeps of a camera image, and why each of them."""

import math
import textwrap
from typing import Any

import numpy as np

from evla_cli.evaluation.figures import GREEN, PURPLE, SKY, VERMILLION, YELLOW, new_figure, plain
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.evaluation.pictures.measured import Measured

NAME, TITLE = "kept_tokens", "Visual tokens kept, and why"
_MARKS = {  # reason -> colour and marker
    "key": (VERMILLION, "o"),
    "task": (SKY, "s"),
    "diverse": (YELLOW, "^"),
    "attended": (GREEN, "D"),
    "random": (PURPLE, "v"),
}
_WHY = {
    "key": "key: the highest attention from the prompt",
    "task": "task: the next highest attention",
    "diverse": "diverse: least like the key tokens",
    "attended": "attended: the highest attention from the last token",
    "random": "random: drawn by lot",
}
_COLUMNS = 3


def kept_tokens(inputs: Inputs, measured: Measured) -> Section:
    bundle = inputs.bundle
    if bundle is None:
        return Missing(NAME, TITLE, f"{inputs.request.directory} has no bundle.", [inputs.make_bundle()])
    tokens, num_visual = bundle.settings.visual_tokens, bundle.config.num_visual_tokens
    if tokens.method == "vla_cache":
        why = "The bundle drops no tokens: which ones it takes over (vla_cache) depends on the frame before."
        return Missing(NAME, TITLE, why, ["evla export CHECKPOINT BUNDLE --num-visual-tokens N"])
    if tokens.num_keep is None or tokens.num_keep == num_visual:
        why = f"The bundle keeps all of its {num_visual} visual tokens."
        return Missing(NAME, TITLE, why, ["evla export CHECKPOINT BUNDLE --num-visual-tokens N"])
    if not inputs.chosen:
        return Missing(NAME, TITLE, "No camera images were named.", [inputs.again("--samples SAMPLES")])
    side = math.isqrt(num_visual)
    shown: list[dict[str, Any]] = []
    for index in inputs.chosen:
        selection, sample = measured.selections[index], inputs.samples[index]
        assert selection is not None
        kept = {reason: chosen[0].tolist() for reason, chosen in selection.reasons.items()}
        shown.append({"sample": index, "instruction": sample.instruction, "kept": kept})
    reasons = list(shown[0]["kept"])
    counts = ", ".join(f"{len(shown[0]['kept'][reason])} {reason}" for reason in reasons)
    return Picture(
        NAME,
        TITLE,
        [
            f"{tokens.num_keep} of {num_visual} tokens stay from layer {tokens.prune_layer} on ({counts}); the patches "
            "of the others are dimmed. " + "; ".join(_WHY[reason] for reason in reasons) + ".",
            f"Samples are counted from 0 in {inputs.request.samples}; patches row by row from the upper left one, 0 to "
            f"{num_visual - 1}.",
        ],
        f"{len(shown)} camera images, each a grid of {side} x {side} patches of which {tokens.num_keep} are marked by "
        "the reason for which they were kept.",
        {
            "method": tokens.method,
            "prune_layer": tokens.prune_layer,
            "grid": [side, side],
            "num_keep": tokens.num_keep,
            "samples": shown,
        },
        [
            Table(
                "Patches by reason; key and task with the highest attention first",
                ["sample", "instruction", *reasons],
                [
                    [str(each["sample"]), each["instruction"], *(", ".join(map(str, each["kept"][r])) for r in reasons)]
                    for each in shown
                ],
            )
        ],
        lambda: _draw(inputs, shown, side),
    )


def _draw(inputs: Inputs, shown: list[dict[str, Any]], side: int) -> Any:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    columns = min(_COLUMNS, len(shown))
    num_rows = -(-len(shown) // columns)
    images = [inputs.samples[each["sample"]].image for each in shown]
    tallest = max(image.height / image.width for image in images)
    width = 3.2 if columns > 1 else 4.5
    titles = [textwrap.wrap(f"{each['sample']}: {each['instruction']}", 36, max_lines=2) for each in shown]
    height = (width * tallest + 0.15 + 0.2 * max(map(len, titles))) * num_rows + 0.3
    # Not narrower than the legend.
    figure, all_axes = new_figure(max(5.0, width * columns), height, nrows=num_rows, ncols=columns, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    thick = min(1, 8 / side)  # points
    for axes, each, image, title in zip(all_axes.flat, shown, images, titles, strict=False):
        # The towers see the image squeezed to a square: a patch has the image's own shape.
        height, width = image.height / side, image.width / side
        axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0), interpolation="nearest")
        veil = np.zeros((side, side, 4))
        veil[..., 3] = 0.6
        for patches in each["kept"].values():
            veil[np.unravel_index(patches, (side, side))] = 0
        axes.imshow(veil, extent=(0, image.width, image.height, 0), interpolation="nearest")
        for reason, patches in each["kept"].items():
            colour, marker = _MARKS[reason]
            rows, places = np.unravel_index(patches, (side, side))
            axes.scatter(
                (places + 0.5) * width,
                (rows + 0.5) * height,
                s=(0.38 * 72 * 3 / side * min(1, height / width))
                ** 2,  # points²: a little more than a third of a patch
                color=colour,
                marker=marker,
                edgecolors="white",
                linewidths=thick,
                path_effects=[withStroke(linewidth=2.5 * thick, foreground="black")],  # seen on any image
                label=reason,
            )
            for row, place in zip(rows, places, strict=True):
                corner = ((place + 0.05) * width, (row + 0.05) * height)
                outline = Rectangle(
                    corner, 0.9 * width, 0.9 * height, fill=False, edgecolor=colour, linewidth=1.5 * thick
                )
                outline.set_path_effects([withStroke(linewidth=3 * thick, foreground="black")])
                axes.add_patch(outline)
        axes.set_title(plain("\n".join(title)), fontsize=10)
        axes.set_xlim(0, image.width)
        axes.set_ylim(image.height, 0)
        axes.set_aspect("equal")
    handles, labels = all_axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    return figure
