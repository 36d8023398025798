"""Where the predicted chunk takes the hand: bundle against dense model from the same noise, other noises for scale."""

import textwrap
from typing import Any

import numpy as np

from evla_cli.evaluation.fidelity import Predictions
from evla_cli.evaluation.figures import BLACK, GREY, VERMILLION, new_figure, plain, without_frame
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table, number
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.evaluation.pictures.measured import NUM_OTHER_NOISES, Measured
from evla_cli.models.processing import GRIPPER

NAME, TITLE = "trajectories", "Predicted motion: dense against compressed"


def trajectories(inputs: Inputs, measured: Measured) -> Section:
    needs = [
        text
        for text, there in (("--dense CHECKPOINT", inputs.dense), ("--samples SAMPLES", inputs.samples))
        if not there
    ]
    if inputs.bundle is None:
        return Missing(NAME, TITLE, f"{inputs.request.directory} has no bundle.", [inputs.make_bundle()])
    if needs:
        missing = " and ".join("the dense model" if "dense" in text else "camera images" for text in needs)
        return Missing(NAME, TITLE, f"Not named: {missing}.", [inputs.again(*needs)])
    assert inputs.dense is not None
    shown = []
    for index in inputs.chosen:
        dense, compressed = (path(each[index]) for each in (measured.dense, measured.compressed))
        others = [path(each) for each in measured.other_noises[index]]
        shown.append(
            {
                "sample": index,
                "instruction": inputs.samples[index].instruction,
                "dense": dense.tolist(),
                "compressed": compressed.tolist(),
                "dense_other_noise": [each.tolist() for each in others],
                "end_distance": _apart(dense, compressed),
                "end_distance_other_noise": [_apart(dense, each) for each in others],
            }
        )
    first = measured.dense[inputs.chosen[0]].actions
    names = ["x", "y", "z", "gripper"][: 4 if first.shape[-1] > GRIPPER else 3]
    seed = inputs.request.seed
    ends = [each["end_distance"] for each in shown]
    remembers = inputs.bundle.settings.visual_tokens.remembers_frames
    alone = "the compressed model after the frames of its episode before it" if remembers else "one at a time"
    return Picture(
        NAME,
        TITLE,
        [
            f"Positions that the {first.shape[1]} actions of a chunk add up to, in the robot's units, and the command "
            f"to the gripper. {inputs.dense.label} (dense) and {inputs.bundle.label} (compressed) start from the same "
            f"noise, seed {seed}; grey: the dense model from {NUM_OTHER_NOISES} other noises, seeds {seed + 1} to "
            f"{seed + NUM_OTHER_NOISES}. Within the grey, compression changes no more than chance does.",
            f"Statistics of the dataset '{inputs.unnorm_key}'. Samples of {inputs.request.samples}, {alone}.",
        ],
        f"For {len(shown)} samples, lines of {', '.join(names)} over the chunk's steps. At the end the compressed "
        f"model's position is {number(min(ends), 3)} to {number(max(ends), 3)} from the dense model's.",
        {"unnorm_key": inputs.unnorm_key, "seed": seed, "dimensions": names, "samples": shown},
        [
            Table(
                "Distance of the chunk's last position from the dense model's, in the robot's units",
                ["sample", "instruction", "compressed", "other noise, median [least, most]"],
                [
                    [str(each["sample"]), each["instruction"], number(each["end_distance"], 3), _spread(each)]
                    for each in shown
                ],
            ),
            Table(
                f"{', '.join(names)} after the last step",
                ["sample", "dense", "compressed"],
                [
                    [
                        str(each["sample"]),
                        *(", ".join(number(v, 3) for v in each[which][-1]) for which in ("dense", "compressed")),
                    ]
                    for each in shown
                ],
            ),
        ],
        lambda: _draw(shown, names),
    )


def path(predictions: Predictions) -> np.ndarray:
    """(H, 3 or 4) of the only sample: positions after every step, and the gripper's command at it if there is one."""
    actions = predictions.actions[0]  # (H, A)
    return np.concatenate((actions[:, :3].cumsum(axis=0), actions[:, GRIPPER : GRIPPER + 1]), axis=1)


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one[-1, :3] - other[-1, :3]))


def _spread(each: dict[str, Any]) -> str:
    distances = each["end_distance_other_noise"]
    low, middle, high = (number(float(value), 3) for value in np.quantile(distances, (0, 0.5, 1)))
    return f"{middle} [{low}, {high}]"


def _draw(shown: list[dict[str, Any]], names: list[str]) -> Any:
    figure, all_axes = new_figure(
        9.5, 2.1 * len(shown) + 0.8, nrows=len(shown), ncols=len(names), sharex=True, squeeze=False
    )
    for row, each in zip(all_axes, shown, strict=True):
        for column, (axes, name) in enumerate(zip(row, names, strict=True)):
            steps = range(1, 1 + len(each["dense"]))
            for other in each["dense_other_noise"]:
                axes.plot(steps, [at[column] for at in other], color=GREY, linewidth=0.8, label="dense, other noise")
            for which, look in (("dense", _DENSE), ("compressed", _COMPRESSED)):
                axes.plot(steps, [at[column] for at in each[which]], label=which, **look)
            axes.margins(y=0.1)
            low, high = (end(at[column] for at in each["dense"] + each["compressed"]) for end in (min, max))
            axes.locator_params(axis="y", nbins=5)
            if name == "gripper" and low >= 0 and high <= 1:
                axes.set(ylim=(-0.1, 1.1), yticks=(0, 1))
            axes.set_ylabel(name if name == "gripper" else f"{name} (robot's units)", fontsize=9)
            without_frame(axes)
        title = textwrap.shorten(f"sample {each['sample']}: {each['instruction']}", 110)
        row[0].set_title(plain(title), loc="left", fontsize=10)
    for axes in all_axes[-1]:
        axes.set_xlabel("step of the chunk")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=len(unique), frameon=False)
    return figure


_DENSE = {"color": BLACK, "marker": "o", "markersize": 4, "linewidth": 1.5}
_COMPRESSED = {"color": VERMILLION, "marker": "^", "markersize": 4.5, "linestyle": "--", "linewidth": 1.5}
