"""SIMPLER's environment: its sources at a path, SAPIEN 2.2.2, numpy 1, and a renderer where the machine has none.

Its files are copied; nothing is fetched but packages. What the copy lacks of its assets gets a stand-in.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from environments import sources
from environments.building import Environment, Failed, Missing, create, install
from environments.renderer import lavapipe

SOURCES = Path(__file__).resolve().parent

# Under numpy 2, SAPIEN 2 simulates without collisions. OpenCV asks for numpy 2 from 4.12 on. SAPIEN imports
# pkg_resources, which setuptools 82 no longer has; torch 2.14 asks for 77.0.3, and pip would bring the newest.
PINS = ("numpy==1.26.4", "opencv-python<4.12", "opencv-python-headless<4.12", "setuptools>=77.0.3,<81")
# Beside what SimplerEnv asks for: its evaluator imports the first, and writes the policy's pictures with the second.
UNDECLARED = ("mediapy", "matplotlib")

ONE_FRAME = """
import simpler_env
from simpler_env.utils.env.observation_utils import get_image_from_maniskill2_obs_dict
env = simpler_env.make("widowx_carrot_on_plate")
observation, _ = env.reset(seed=0)
image = get_image_from_maniskill2_obs_dict(env, observation)
height = env.unwrapped.source_obj_pose.p[2]
assert image.shape == (480, 640, 3) and image.std() > 10, f"the picture is empty: {image.shape}, {image.std()}"
assert 0.86 < height < 0.92, f"the carrot lies at a height of {height} m, not on the table"
"""


def build(folder: Path, given: Path | None) -> Environment:
    """`given`: where the sources are; None goes on with those that were copied before."""
    if given is None and not _record(folder):
        raise Missing(f"SIMPLER's sources: make test-environments SIMPLER=DIR, {sources.EXPECTED}")
    simpler = folder / "src" / "SimplerEnv"
    maniskill = simpler / "ManiSkill2_real2sim"
    if given is not None and _record(folder).get("given") != str(given.resolve()):
        _copy(given, simpler, maniskill, folder)
    environment = create(folder, [(3, 11)])  # SAPIEN 2.2.2 has no wheels for newer ones
    pins = folder / "pins.txt"
    pins.write_text("\n".join(PINS) + "\n")
    install(environment, "--constraint", pins, "setuptools", "wheel")
    # Without isolation they build with this setuptools.
    both = ("--editable", maniskill, "--editable", simpler)
    install(environment, "--constraint", pins, "--no-build-isolation", *both, *UNDECLARED)
    _provide_opencv(environment, pins)
    _provide_ffmpeg(environment)
    assets = maniskill / "data"
    environment.run([environment.python, SOURCES / "stand_ins.py", assets], "stand-in assets could not be made")
    return _with_renderer(replace(environment, variables={"MS2_REAL2SIM_ASSET_DIR": str(assets)}))


def commits(folder: Path) -> str:
    return "\n".join(f"{name} {commit}" for name, commit in _record(folder)["commits"].items())


def _record(folder: Path) -> dict[str, Any]:
    """What was copied; empty before."""
    file = folder / "sources.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _copy(given: Path, simpler: Path, maniskill: Path, folder: Path) -> None:
    found = sources.find(given)
    shutil.rmtree(folder / "src", ignore_errors=True)
    absent = [
        *sources.copy(found["SimplerEnv"], simpler),
        *sources.copy(found["ManiSkill2_real2sim"], maniskill),
    ]
    record = {
        "given": str(given.resolve()),
        "commits": {name: source.commit for name, source in found.items()},
        "absent": absent,
    }
    (folder / "sources.json").write_text(json.dumps(record, indent=1))


def _provide_opencv(environment: Environment, pins: Path) -> None:
    """Without libGL, its variant without windows. The other one stays for pip, whose files this one replaces."""
    try:
        environment.run([environment.python, "-c", "import cv2"], "OpenCV does not load")
    except Failed:
        variant = ("--force-reinstall", "--no-deps", "opencv-python-headless")
        install(environment, "--constraint", pins, *variant)


def _provide_ffmpeg(environment: Environment) -> None:
    """The one that imageio-ffmpeg brings along, where the machine has none."""
    if shutil.which("ffmpeg") is None:
        code = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
        found = environment.run([environment.python, "-c", code], "imageio-ffmpeg has no ffmpeg").strip()
        link = environment.python.parent / "ffmpeg"
        link.unlink(missing_ok=True)
        link.symlink_to(found.splitlines()[-1])


def _with_renderer(environment: Environment) -> Environment:
    """The machine's own Vulkan driver if SIMPLER draws with it, else lavapipe."""
    frame = [environment.python, "-c", ONE_FRAME]
    if not (environment.folder / "lavapipe.json").exists():
        try:
            environment.run(frame, "SIMPLER draws nothing with this machine's Vulkan driver")
            return environment
        except Failed:
            pass
    environment = replace(environment, variables=environment.variables | lavapipe(environment))
    environment.run(frame, "SIMPLER draws nothing")
    return environment
