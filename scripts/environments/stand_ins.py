"""Stand-ins for assets that a copy of SIMPLER lacks, run in its environment: python stand_ins.py DATA

Snapshots often leave out big files: table scenes and the textured meshes of some objects. What is there stays.

A scene becomes a box, its top where SIMPLER puts objects down: in visual matching a photo covers it, and it only
carries. An object becomes its own collision mesh in one colour: it moves as it should and looks wrong, so a released
policy's success with it is not SIMPLER's.
"""

import sys
from pathlib import Path

import numpy as np
import trimesh

# Scenes of the visual-matching tasks, as far as a table in them matters: the workspace's place in the scene's file
# (mani_skill2_real2sim/envs/custom_scenes/base_env.py subtracts it), and the table about it in metres: x, y, height.
BRIDGE, GOOGLE = (-2.0634, -2.8313), (-1.6616, -3.0337)
STAGES = {
    "bridge_table_1_v1": (BRIDGE, (-0.7, 0.35), (-0.7, 0.7), 0.87),
    "bridge_table_1_v2": (BRIDGE, (-0.7, 0.35), (-0.7, 0.7), 0.85),  # the sink stands in it
    "google_pick_coke_can_1_v4": (GOOGLE, (-0.7, 0.02), (-0.35, 0.7), 0.87),
}
THICKNESS = 0.07
COLOURS = {"eggplant": (0.16, 0.05, 0.2), "blue_plastic_bottle": (0.1, 0.3, 0.7), "redbull_can": (0.35, 0.4, 0.6)}
GREY = (0.5, 0.5, 0.5)


def main() -> None:
    data = Path(sys.argv[1])
    for name, place in STAGES.items():
        file = data / "hab2_bench_assets" / "stages" / f"{name}.glb"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(trimesh.Scene(table(*place)).export(file_type="glb"))
            print(f"{file.name}: a box")
    for collision in sorted((data / "custom" / "models").glob("*/collision.obj")):
        folder = collision.parent
        if not any((folder / f"textured.{kind}").exists() for kind in ("obj", "dae", "glb")):
            colour = next((colour for name, colour in COLOURS.items() if name in folder.name), GREY)
            write_in_one_colour(folder, colour)
            print(f"{folder.name}: its collision mesh")


def table(
    workspace: tuple[float, float], xs: tuple[float, float], ys: tuple[float, float], height: float
) -> trimesh.Trimesh:
    corners = np.array([[xs[0], ys[0], height - THICKNESS], [xs[1], ys[1], height]])
    box = trimesh.creation.box(bounds=corners + np.array([*workspace, 0.0]))
    # The file's y axis points up; SIMPLER turns it by 90 degrees about x.
    box.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[0.45, 0.3, 0.2, 1.0], metallicFactor=0.0, roughnessFactor=0.8
    )
    box.visual = trimesh.visual.TextureVisuals(material=material)
    return box


def write_in_one_colour(folder: Path, colour: tuple[float, float, float]) -> None:
    """`textured.obj` with a material of its own; normals, which SAPIEN does not compute."""
    mesh = trimesh.load(folder / "collision.obj", force="mesh")
    material = f"newmtl plain\nKd {' '.join(map(str, colour))}\nKs 0.1 0.1 0.1\nNs 20\n"
    (folder / "textured.mtl").write_text(material)
    lines = ["mtllib textured.mtl", "usemtl plain"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in mesh.vertices]
    lines += [f"vn {x:.6f} {y:.6f} {z:.6f}" for x, y, z in mesh.vertex_normals]
    lines += [f"f {a}//{a} {b}//{b} {c}//{c}" for a, b, c in mesh.faces + 1]
    (folder / "textured.obj").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
