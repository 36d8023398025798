"""Speed against success, every candidate that was both timed (`evla bench`) and run in closed loop (`evla eval`)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from evla_cli.evaluation.episode_log import LoggedEpisodes, control_row
from evla_cli.evaluation.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    new_figure,
    plain,
    without_frame,
)
from evla_cli.evaluation.latency import WHOLE
from evla_cli.evaluation.pictures.base import Missing, Picture, Section, Table
from evla_cli.evaluation.pictures.inputs import Inputs
from evla_cli.evaluation.success import Outcomes, against, is_real, reach, success_rate, verdict

NAME, TITLE = "speed_success", "Speed against success"
_COLOURS = (BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE)
_MARKERS = "osD^vP*X<>h"  # one more than colours do not share a factor with: 88 rows differ


def speed_success(inputs: Inputs) -> Section:
    bench, log = inputs.bench, inputs.log
    if bench is None or log is None:
        wanted = (("a report of evla bench", bench), ("a log of evla eval", log))
        both = [text for text, there in wanted if there is None]
        commands = [inputs.run_bench()] * (bench is None) + [inputs.run_eval()] * (log is None)
        return Missing(NAME, TITLE, f"Not named: {' and '.join(both)}.", commands)
    assert log.header is not None
    rows, left_out = matched(bench, log)
    if not rows:
        why = "evla bench and evla eval have no candidate in common: " + "; ".join(left_out) + "."
        return Missing(
            NAME, TITLE, why, ["evla bench CANDIDATES --json > bench.json  # those that evla eval was given"]
        )
    protocol, header = bench["protocol"], log.header
    counts = " to ".join(map(str, sorted({min(row["episodes"] for row in rows), max(row["episodes"] for row in rows)})))
    caption = [
        f"Across: how many times as fast as {rows[0]['reference']} a prediction is (median of the ratios within each "
        "round). Upwards: success over all episodes. Lines: 95 % intervals (bootstrap over rounds; Wilson).",
        _judging(rows),
        f"Time from {inputs.request.bench}: batch {protocol['batch_size']}, dtype {protocol['dtype'] or 'as stored'}. "
        f"Success from {inputs.request.results}: {header.get('suite')}, dtype {header.get('dtype')}, "
        f"{counts} episodes a row.",
    ]
    if left_out:
        caption.append(f"Left out: {'; '.join(left_out)}.")
    if any(row["method"] == "vla_cache" for row in rows):
        caption.append("VLA-Cache is timed before a camera where nothing moves, its best case.")
    best = max(rows, key=lambda row: row["speedup"]["value"])
    return Picture(
        NAME,
        TITLE,
        caption,
        f"Points for {len(rows)} candidates. Fastest: {best['name']}, {best['speedup']['value']:.2f} times as fast, "
        f"{best['rate']:.1%} success. Real differences: {_names(rows) or 'none'}.",
        {"rows": rows, "left_out": left_out},
        [
            Table(
                f"Points of success against {rows[0]['paired_with']}, in the same episodes; p: exact sign-flip test "
                "over start states (with one episode each, McNemar's)",
                ["", "ms", "times as fast", "solved", "success %", "points", "p", "real"],
                [_cells(row) for row in rows],
            )
        ],
        lambda: _draw(rows),
    )


def matched(bench: dict[str, Any], log: LoggedEpisodes) -> tuple[list[dict[str, Any]], list[str]]:
    """The candidates that both know by the same name, with the same settings; and why each other one is left out."""
    *baselines, reference = bench["references"]  # of the first candidate, and itself
    solved: dict[str, _Episodes] = {name: {} for name in log.identities}
    for (name, *key), success in log.success.items():
        solved.setdefault(name, {})[tuple(key)] = success
    paired = next((name for name, episodes in solved.items() if episodes), "")
    chance = _control(log, paired)
    rows, left_out = [], []
    for row in bench["rows"]:
        name, episodes = row["name"], solved.get(row["name"], {})
        if name in baselines:
            continue
        if not episodes:
            left_out.append(f"{name} (no episodes)")
            continue
        identity = log.identities.get(name)
        if not isinstance(identity, dict) or identity.get("settings") != row["settings"]:
            left_out.append(f"{name} (timed with other settings than its episodes were run with)")
            continue
        if not _same_shares(episodes, solved[paired]):
            left_out.append(f"{name} (its episodes are not of the same tasks in the same shares as {paired}'s)")
            continue
        shared = [key for key in episodes if key in solved[paired]] if name != paired else []
        found = against(*(_by_state(each, shared) for each in (episodes, solved[paired]))) if shared else None
        control = _against_control(solved.get(chance, {}), solved[paired], shared) if name != chance else None
        rows.append(
            {
                "name": name,
                "method": row["settings"]["visual_tokens"]["method"],
                "whole_ms": row["latency_ms"][WHOLE]["median"],
                "reference": reference,
                "speedup": _ONE if name == reference else row["speedup"][reference][WHOLE],
                **success_rate(_by_state(episodes, episodes)),
                "paired_with": paired,
                "control": chance or None,
                "control_reach": None if control is None else reach(control),
                "against": None
                if found is None
                else found | {"episodes": len(shared), "real": None if control is None else is_real(found, control)},
            }
        )
    timed = [row["name"] for row in bench["rows"]]
    untimed = [name for name, episodes in solved.items() if episodes and name not in timed and name != chance]
    return rows, left_out + [f"{name} (not timed)" for name in untimed]


_Key = tuple[Any, ...]  # task, number of the start state, repetition
_Episodes = dict[_Key, bool]


def _control(log: LoggedEpisodes, paired: str) -> str:
    """The candidate that is the first one with other noise; "" if there is none."""
    known = {name: each for name, each in log.identities.items() if isinstance(each, dict)}
    return control_row({paired: known[paired]} | known) or "" if paired in known else ""


def _by_state(episodes: _Episodes, keys: Iterable[_Key]) -> Outcomes:
    states: dict[_Key, list[bool]] = {}
    for key in keys:
        states.setdefault(key[:2], []).append(episodes[key])
    return list(states.values())


def _against_control(control: _Episodes, first: _Episodes, shared: Sequence[_Key]) -> dict[str, Any] | None:
    """What other noise alone does in the episodes that a candidate and the first one share; None where they are not run
    yet."""
    keys = [key for key in shared if key in control]
    if not keys or not _same_shares(keys, shared):
        return None
    return against(_by_state(control, keys), _by_state(first, keys))


def _same_shares(episodes: Iterable[_Key], others: Iterable[_Key]) -> bool:
    """Whether each task has the same part of both: while a log is being written, the last candidate has had the first
    tasks alone, and its rate says nothing beside the others'."""
    mine, theirs = (Counter(key[0] for key in each) for each in (episodes, others))
    return all(mine[task] * theirs.total() == theirs[task] * mine.total() for task in {*mine, *theirs})


_ONE = {"value": 1.0, "low": None, "high": None}


def _cells(row: dict[str, Any]) -> list[str]:
    speedup, (low, high) = row["speedup"], row["interval"]
    fast = f"{speedup['value']:.2f}"
    if speedup["low"] is not None:
        fast += f" [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    points, chance, real = "", "", ""
    if row["against"] is not None:
        least, most = row["against"]["interval"]
        points = f"{100 * row['against']['difference']:+.1f} [{100 * least:+.1f}, {100 * most:+.1f}]"
        chance, real = f"{row['against']['p_value']:.2g}", verdict(row["against"]["real"])
    rate = f"{100 * row['rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return [
        row["name"],
        f"{row['whole_ms']:.2f}",
        fast,
        f"{row['successes']}/{row['episodes']}",
        rate,
        points,
        chance,
        real,
    ]


def _judging(rows: Sequence[dict[str, Any]]) -> str:
    """How differences are marked, for who reads the picture."""
    reaches = [row["control_reach"] for row in rows if row["control_reach"] is not None]
    if not reaches:
        return "Hollow: no difference is called real without a control row, the first candidate with other noise."
    return (
        f"Filled: the difference from {rows[0]['paired_with']} is real: its interval excludes 0, and it is larger than "
        f"the farther end of the interval of '{rows[0]['control']}', which is chance alone "
        f"({100 * max(reaches):.1f} points; the grey band). Hollow: it is not."
    )


def _names(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(row["name"] for row in rows if _is_real(row))


def _is_real(row: dict[str, Any]) -> bool:
    return row["against"] is not None and bool(row["against"]["real"])


def _draw(rows: list[dict[str, Any]]) -> Any:
    figure, axes = new_figure(9.5, 4.8)
    first = next((row for row in rows if row["name"] == row["paired_with"]), None)
    reaches = [row["control_reach"] for row in rows if row["control_reach"] is not None]
    if first is not None and reaches:
        axes.axhspan(100 * (first["rate"] - max(reaches)), 100 * (first["rate"] + max(reaches)), color=GREY, alpha=0.2)
    for place, row in enumerate(rows):
        speedup, rate, (low, high) = row["speedup"], 100 * row["rate"], row["interval"]
        across = None
        if speedup["low"] is not None:
            across = [[speedup["value"] - speedup["low"]], [speedup["high"] - speedup["value"]]]
        axes.errorbar(
            [speedup["value"]],
            [rate],
            xerr=across,
            yerr=[[rate - 100 * low], [100 * high - rate]],
            fmt="none",
            ecolor=GREY,
            elinewidth=1,
            capsize=3,
            zorder=1,
        )
        axes.plot(
            [speedup["value"]],
            [rate],
            marker=_MARKERS[place % len(_MARKERS)],
            **_filling(row, _COLOURS[place % len(_COLOURS)]),
            markersize=10,
            linestyle="none",
            zorder=3,
            label=plain(row["name"]),
        )
    axes.set(xlabel=f"times as fast as {plain(rows[0]['reference'])}", ylabel="success, % of episodes")
    bottom = min(100 * row["interval"][0] for row in rows)
    axes.set_ylim(max(-2, bottom - 5), 102)
    axes.grid(alpha=0.3)
    without_frame(axes)
    note = f"filled: the difference\nfrom {plain(rows[0]['paired_with'])} is real"
    figure.legend(loc="outside right center", frameon=False, title=note)
    return figure


def _filling(row: dict[str, Any], colour: str) -> dict[str, Any]:
    if _is_real(row) or row["name"] == row["paired_with"]:
        return {"color": colour, "markeredgecolor": BLACK}
    return {"color": colour, "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 2}
