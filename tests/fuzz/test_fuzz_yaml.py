"""Every YAML that evla reads, right and wrong: what is accepted is what the text says, in value and type."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import yaml
from damage import damaged_yaml
from guard import REFUSED, attempt, run_examples
from reference import assert_holds, yaml_value

from evla_cli import pipeline
from evla_cli.plan import PLAN
from evla_cli.running import run_recipe
from evla_cli.runtime.policy import Policy
from evla_cli.schema import to_mapping
from evla_cli.settings import Recipe

SETTINGS: dict[str, Any] = {
    "schema_version": 1,
    "visual_tokens": {"num_keep": 8, "prune_layer": 2, "num_key": 4, "task_ratio": 0.5, "context": "text"},
    "action_cache": {"interval": 5, "modules": ["attention", "mlp"], "blocks": [0, 2]},
    "diffusion": {"sampler": "ddim", "num_denoise_steps": 10, "cfg_scale": 1.5},
}
RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "source": "run",
    "output": "out",
    "analyze": {"samples": "samples", "num_samples": 2, "batch_size": 8, "dtype": "float32"},
    "prune": {"drop_layers": 2, "drop_layer_ids": [4], "mlp_prune_ratio": 0.5, "mlp_method": "magnitude", "seed": 3},
    "export": {"settings": {"visual_tokens": {"num_keep": 8}}, "dtype": "bfloat16", "max_shard_size": "5GB"},
}


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_settings(num_cases: int, policy: Policy, tmp_path: Path, counted: Any) -> None:
    path = tmp_path / "inference.yaml"
    (image,) = pico.images(1)

    def case(text: bytes) -> bool:
        path.write_bytes(text)
        settings = attempt(lambda: pipeline.settings_with(path))
        if settings is REFUSED:
            return False
        assert_holds(settings.to_record(), yaml_value(text))
        configured = attempt(lambda: policy.with_settings(settings))
        if configured is REFUSED:
            return False
        prediction = attempt(lambda: configured.predict([image], ["open"]))
        if prediction is REFUSED:  # a guidance beyond the numbers that the model computes with
            return False
        assert np.isfinite(prediction.actions).all()
        num_keep = settings.visual_tokens.num_keep
        if num_keep is not None and num_keep < pico.NUM_VISUAL:
            assert prediction.selection.kept.shape[-1] == num_keep
        return True

    counted("inference.yaml", run_examples("settings", num_cases, damaged_yaml(SETTINGS), case))


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_recipe(num_cases: int, tmp_path: Path, counted: Any) -> None:
    path = tmp_path / "recipe.yaml"

    def case(text: bytes) -> bool:
        path.write_bytes(text)
        recipe = attempt(lambda: Recipe.load(path))
        if recipe is REFUSED:
            return False
        assert_holds(_without_absent(to_mapping(recipe)), _without_absent(yaml_value(text)))
        return True

    counted("recipe", run_examples("recipe", num_cases, damaged_yaml(RECIPE), case))


@pytest.mark.parametrize("num_cases", [3, pytest.param(100, marks=pytest.mark.fuzz)])
def test_recipe_that_is_run(
    num_cases: int, cogact_run: Path, image_samples: Path, tmp_path: Path, counted: Any
) -> None:
    shutil.copytree(cogact_run, tmp_path / "run")
    shutil.copytree(image_samples, tmp_path / "samples")
    path = tmp_path / "recipe.yaml"

    def case(text: bytes) -> bool:
        path.write_bytes(text)
        stages = attempt(lambda: run_recipe(path))
        if stages is REFUSED:
            return False
        said = _without_absent(yaml_value(text))
        out = tmp_path / said["output"]
        assert {stage for stage, _, _ in stages} == said.keys() & {"analyze", "prune", "export"}
        if "prune" in said:
            how = yaml.safe_load((out / "pruned" / PLAN).read_text())["how"]
            if how["mlp_method"] is None:  # none was used
                said["prune"].pop("mlp_method", None)
            assert_holds(how, said["prune"] | {"drop_layers": how["drop_layers"]})
            assert how["drop_layers"] in (said["prune"].get("drop_layers", 0), len(how["drop_layer_ids"]))
        if "export" in said:
            assert_holds(
                yaml.safe_load((out / "bundle/inference.yaml").read_text()), said["export"].get("settings", {})
            )
        shutil.rmtree(out)
        return True

    counted("recipe, run", run_examples("recipe that is run", num_cases, damaged_yaml(RECIPE), case))


def _without_absent(record: Any) -> Any:
    """Without the sections that are null, which is as if they were not there."""
    return {key: value for key, value in record.items() if value is not None}


@pytest.mark.parametrize("num_cases", [12, pytest.param(1000, marks=pytest.mark.fuzz)])
def test_plan(num_cases: int, cogact_run: Path, tmp_path: Path, counted: Any) -> None:
    options = {"mlp_prune_ratio": 0.5, "mlp_method": "magnitude"}
    valid = pipeline.prune(cogact_run, tmp_path / "out", drop_ids=(3,), dry_run=True, **options).plan.to_record()
    path = tmp_path / PLAN

    def case(text: bytes) -> bool:
        path.write_bytes(text)
        result = attempt(lambda: pipeline.prune(cogact_run, tmp_path / "out", plan_file=path, dry_run=True))
        if result is REFUSED:
            return False
        said = yaml_value(text)
        record = result.plan.to_record()
        assert record["checkpoint_sha256"] == said["checkpoint_sha256"] == valid["checkpoint_sha256"]
        assert_holds(record, {key: said[key] for key in ("num_layers", "intermediate_size", "keep_layers", "how")})
        for key in said.keys() & {"dropped_layers", "kept_intermediate_size", "schema_version"}:  # if there, then true
            assert_holds(record[key], said[key], key)
        if said["mlp_keep"] is None:
            assert result.plan.mlp_keep is None
        else:
            masks = [np.frombuffer(bytes.fromhex(said["mlp_keep"][layer]), np.uint8) for layer in said["keep_layers"]]
            kept = [np.flatnonzero(np.unpackbits(mask)).tolist() for mask in masks]
            assert [list(channels) for channels in result.plan.mlp_keep] == kept
            assert said["mlp_keep"].keys() == set(said["keep_layers"])
        return True

    counted("prune_plan.yaml", run_examples("plan", num_cases, damaged_yaml(valid), case))
