"""Pictures: figures 1b and 1c of EfficientVLA (arXiv 2506.10100) for any checkpoint, and where its time goes."""

import os
import warnings
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evla_cli.checkpoint.outputs import check_output_file, new_file
from evla_cli.errors import EvlaError
from evla_cli.plan import LayerImportance

FIGURES = ("layer_importance.png", "layer_similarity.png", "denoise_similarity.png")

# Told apart by colour-blind readers (Okabe and Ito); what must not be confused differs in shape or hatching, too.
BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
_STAGE_STYLES = {
    "preprocessing": {"color": GREY, "hatch": ""},
    "vision": {"color": ORANGE, "hatch": "//"},
    "projector": {"color": SKY, "hatch": ".."},
    "language_model": {"color": BLUE, "hatch": ""},
    "action_head": {"color": VERMILLION, "hatch": "\\\\"},
}


def check_figures(directory: Path, overwrite: bool) -> None:
    """Refuse a folder for figures before any work is done for them."""
    check_matplotlib()
    if not directory.parent.is_dir():
        raise EvlaError(f"{directory.parent} does not exist or is not a directory; create it first.")
    if os.path.lexists(directory) and not directory.is_dir():
        raise EvlaError(f"{directory} is not a directory.")
    for name in FIGURES:
        if directory.is_dir():
            check_output_file(directory / name, overwrite)


def check_figure(path: Path, overwrite: bool) -> None:
    """The same for a single picture."""
    check_matplotlib()
    check_output_file(path, overwrite)


def check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise EvlaError("Drawing needs matplotlib: pip install 'evla[figures]'.")


def draw_importance(result: LayerImportance, directory: Path) -> list[Path]:
    """The first two of `FIGURES`, and the third where there is an action head."""
    directory.mkdir(exist_ok=True)
    drawings: list[Callable[[], Any]] = [lambda: _one(result, importance_bars), lambda: _one(result, similarity_curve)]
    if result.action_head:
        similarity = result.action_head["step_similarity"]
        drawings.append(lambda: denoise_heatmaps(similarity))
    paths = [directory / name for name in FIGURES[: len(drawings)]]
    for path, drawing in zip(paths, drawings, strict=True):
        with new_file(path, overwrite=True) as staging:
            save_picture(drawing, staging)
    return paths


def draw_latency(record: dict[str, Any], path: Path) -> None:
    """What `latency_bars` draws of a report of `evla bench`."""
    with new_file(path, overwrite=True) as staging:
        save_picture(lambda: latency_bars(record), staging)


def save_picture(draw: Callable[[], Any], path: Path) -> None:
    """The figure that `draw` makes, as a PNG: the same bytes for the same figure, whatever style the user prefers."""
    from matplotlib import style

    with style.context("default"), warnings.catch_warnings():
        # An instruction in Chinese is drawn as boxes; the text itself stands in the tables.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # "tight": no letter is cut off, whatever the layout made of a long one.
        draw().savefig(path, dpi=150, format="png", bbox_inches="tight", metadata={"Software": None})


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Any, Any]:
    """A figure of so many inches with its axes; it belongs to nobody's session."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def latency_bars(record: dict[str, Any]) -> Any:
    """Stacked bars, one a row of `evla bench`: the median of every stage."""
    rows = record["rows"]
    stages = [stage for stage in rows[0]["latency_ms"] if stage in _STAGE_STYLES]
    figure, axes = new_figure(9, 1.6 + 0.55 * len(rows))
    left = [0.0] * len(rows)
    for stage in stages:
        widths = [row["latency_ms"][stage]["median"] for row in rows]
        look = {"height": 0.6, "edgecolor": "white", "linewidth": 0.5, **_STAGE_STYLES[stage]}
        axes.barh(range(len(rows)), widths, left=left, label=stage.replace("_", " "), **look)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for number, row in enumerate(rows):
        whole = row["latency_ms"]["whole"]["median"]
        ratio = row["speedup"].get(record["references"][0], {}).get("whole", {}).get("value")
        text = f" {whole:,.1f} ms" + (f" ({ratio:.2f} x)" if ratio is not None else "")
        axes.text(left[number], number, text, va="center")
    axes.set_yticks(range(len(rows)), [plain(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.set_xlabel(
        f"milliseconds a prediction, batch {record['protocol']['batch_size']}; (x): times as fast as the first"
    )
    without_frame(axes)
    figure.legend(loc="outside upper center", ncols=len(stages), frameon=False)
    return figure


def importance_bars(axes: Any, result: LayerImportance, removed: Collection[int] = ()) -> None:
    """`removed` layers look different, and a legend says so."""
    for layers, name, look in (
        ([score for score in result.layers if score.index not in removed], "kept", {"color": BLUE}),
        (
            [score for score in result.layers if score.index in removed],
            "removed",
            {"color": "white", "edgecolor": VERMILLION, "hatch": "////"},
        ),
    ):
        errors = [score.standard_error or 0.0 for score in layers]
        indices, values = [score.index for score in layers], [score.importance for score in layers]
        axes.bar(indices, values, yerr=errors, label=name, error_kw={"elinewidth": 1}, **look)
    if removed:
        axes.legend(frameon=False)
    axes.set(xlabel="decoder layer", ylabel="importance (1 - mean cosine)", title="What each decoder layer does")
    _ticks_by_layer(axes, len(result.layers))


def similarity_curve(axes: Any, result: LayerImportance) -> None:
    values = [1 - score.importance for score in result.layers]
    axes.plot(range(len(values)), values, marker="o", color=VERMILLION)
    axes.set(xlabel="decoder layer", ylabel="cosine of input and output", title="Similarity across decoder layers")
    axes.grid(axis="y", alpha=0.3)
    _ticks_by_layer(axes, len(values))


def denoise_heatmaps(similarity: dict[str, list[list[float]]]) -> Any:
    """Module -> cosine, blocks x pairs of steps. The lighter, the more alike."""
    low = min(min(row) for rows in similarity.values() for row in rows)
    figure, all_axes = new_figure(9.5, 4, nrows=1, ncols=len(similarity), sharey=True)
    for axes, (kind, rows) in zip(all_axes, similarity.items(), strict=True):
        image = axes.imshow(rows, aspect="auto", origin="lower", vmin=low, vmax=1.0, cmap="cividis")
        axes.set(title=f"{kind} output", xlabel="denoising step and the next")
        axes.set_xticks(range(len(rows[0])), [f"{step}-{step + 1}" for step in range(len(rows[0]))])
        axes.set_yticks(range(0, len(rows), max(1, len(rows) // 12)))
    all_axes[0].set_ylabel("action-head block")
    figure.colorbar(image, ax=all_axes, label="cosine between consecutive steps")
    return figure


def layer_width(num_layers: int) -> float:
    """Inches that bars of so many layers need."""
    return max(6.0, 0.28 * num_layers)


def without_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def plain(text: str) -> str:
    """Somebody's text without what matplotlib would read as a formula."""
    return text.replace("$", r"\$")


def _one(result: LayerImportance, draw: Callable[[Any, LayerImportance], None]) -> Any:
    figure, axes = new_figure(layer_width(len(result.layers)), 3.6)
    draw(axes, result)
    return figure


def _ticks_by_layer(axes: Any, num_layers: int) -> None:
    axes.set_xticks(range(0, num_layers, 1 if num_layers <= 40 else 4))
    without_frame(axes)
