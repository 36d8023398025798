"""evla and lerobot in one process, in lerobot's environment: python -m pytest FILE

evla reads none of lerobot's policies yet: what is tested is that neither changes what the other computes.
"""

import subprocess
import sys
from pathlib import Path

import draccus
import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors

from evla_cli.runtime.policy import policy_from_checkpoint

DEMO = Path(__file__).resolve().parent.parent.parent / "demo" / "cogact-metaworld"
CAMERA, STATE = "observation.images.front", "observation.state"

# evla alone, as the first thing that its process imports.
ALONE = """
import sys
import numpy, pathlib, torch
from evla_cli.runtime.policy import policy_from_checkpoint
policy = policy_from_checkpoint(pathlib.Path(sys.argv[1]), dtype=torch.float32)
image = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], policy.predict_action(image, "open the drawer", seed=1))
"""


@pytest.mark.parametrize("name", ["smolvla", "pi0", "pi05", "act"])
def test_lerobots_factory_finds_its_policies(name):
    assert get_policy_class(name).name == name


def test_each_computes_what_it_computes_alone(tmp_path):
    act = tiny_act()
    before = act_chunk(act)
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    evla = policy_from_checkpoint(DEMO, dtype=torch.float32)
    actions = evla.predict_action(image, "open the drawer", seed=1)
    assert torch.equal(act_chunk(act), before)

    np.save(tmp_path / "image.npy", image)
    command = [sys.executable, "-c", ALONE, DEMO, tmp_path / "image.npy", tmp_path / "alone.npy"]
    subprocess.run(list(map(str, command)), check=True)
    assert np.array_equal(np.load(tmp_path / "alone.npy"), actions)


def tiny_act():
    """ACT, because it needs no pretrained weights or tokenizer."""
    torch.manual_seed(0)
    config = make_policy_config(
        "act",
        input_features={
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
            STATE: PolicyFeature(FeatureType.STATE, (7,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        chunk_size=8,
        n_action_steps=8,
        device="cpu",
    )
    return get_policy_class("act")(config).eval()


def act_chunk(policy) -> torch.Tensor:
    """(1, 8, 7), of a fixed observation."""
    generator = torch.Generator().manual_seed(1)
    observation = {
        CAMERA: torch.rand(1, 3, 64, 64, generator=generator),
        STATE: torch.rand(1, 7, generator=generator),
    }
    preprocess, postprocess = make_pre_post_processors(policy.config)
    with torch.no_grad():
        return postprocess(policy.predict_action_chunk(preprocess(observation)))


def test_lerobots_evaluation_starts_and_reads_its_options():
    command = [Path(sys.executable).parent / "lerobot-eval", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--policy" in result.stdout
    config = draccus.parse(EvalPipelineConfig, args=["--env.type=pusht", "--policy.type=smolvla"])
    assert (config.env.type, config.policy.type) == ("pusht", "smolvla")
