"""The shipped demo from analysis to actions, in whatever environment this is run: python -m pytest FILE

`demo_actions.json` has what the pinned environment (constraints.txt) predicts. To write it again there:
python tests/environments/demo_path.py out/demo/bundle
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from evla_cli.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demo" / "cogact-metaworld"
SAMPLES = ROOT / "demo" / "samples"
EXPECTED = Path(__file__).with_name("demo_actions.json")
FRAMES = (0, 21, 42)

# Other versions add in another order; ten denoising steps with guidance carry that along. Actions lie in [-1, 1].
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where `configs/demo.yaml` was run by the installed command."""
    work = tmp_path_factory.mktemp("demo")
    recipe = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    recipe |= {"source": str(DEMO), "output": str(work / "out")}
    recipe["analyze"]["samples"] = str(SAMPLES)
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    evla = Path(sys.executable).parent / "evla"
    subprocess.run([evla, "run", work / "recipe.yaml", "--quiet"], check=True)
    return work / "out"


def test_its_bundle_is_sound(work):
    assert "8 files and 228 tensors as the manifest and the model say" in evla("verify", work / "bundle")


def test_its_actions_are_the_expected_ones(work):
    expected = json.loads(EXPECTED.read_text())
    predicted = predictions(work / "bundle")
    assert predicted["kept"] == expected["kept"]
    difference = np.abs(np.array(predicted["actions"]) - np.array(expected["actions"])).max()
    print(f"largest difference {difference:.1e}")
    assert difference < TOLERANCE


def test_it_differs_from_the_dense_model_as_expected(work):
    expected = json.loads(EXPECTED.read_text())["action_error"]
    assert action_error(work / "bundle") == pytest.approx(expected, abs=TOLERANCE)


def predictions(bundle: Path) -> dict:
    """What was removed, and the chunks (frames, H, A) from fixed noise."""
    samples = [json.loads(line) for line in (SAMPLES / "samples.jsonl").read_text().splitlines()]
    chosen = [samples[number] for number in FRAMES]
    arguments = [("--image", SAMPLES / sample["image"], "--instruction", sample["instruction"]) for sample in chosen]
    options = ("--dtype", "float32", "--seed", 0, "--json", "--quiet")
    chunks = [json.loads(evla("predict", bundle, *each, *options))["actions"] for each in arguments]
    plan = yaml.safe_load((bundle / "prune_plan.yaml").read_text())
    kept = {name: plan[name] for name in ("keep_layers", "mlp_keep")}
    return {"kept": {**kept, "mlp_keep": list(kept["mlp_keep"].values())}, "actions": np.round(chunks, 7).tolist()}


def action_error(bundle: Path) -> float:
    options = ("--samples", SAMPLES, "--num-samples", 8, "--dtype", "float32", "--json", "--quiet")
    return json.loads(evla("compare", DEMO, bundle, *options))["measures"]["all"]["action_error"]["value"]


def evla(*arguments) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


if __name__ == "__main__":
    bundle = Path(sys.argv[1])
    EXPECTED.write_text(json.dumps(predictions(bundle) | {"action_error": action_error(bundle)}) + "\n")
