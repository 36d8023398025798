"""lerobot's environment, as its users have it: SmolVLA, pi0 and pi0.5, evaluation; a CUDA build of torch."""

from pathlib import Path

from environments.building import Environment, create, install

PACKAGE = "lerobot[smolvla,pi,dataset,evaluation]==0.6.1"


def build(folder: Path) -> Environment:
    environment = create(folder, [(3, 12), (3, 13)])
    install(environment, PACKAGE)
    return environment
