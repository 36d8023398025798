"""evla's action head, samplers, towers and image transforms against what CogACT's own code and timm computed.

`tests/golden/` holds their outputs, and says which commits and versions made them (scripts/make_golden_files.py). The
weights come from a seed, go into a native checkpoint under the names that the original code gave them, and are loaded
as a user's are.
"""

import copy
import json
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import seeded
from PIL import Image
from torch import Tensor

from evla_cli import pipeline
from evla_cli.evaluation.stock import load_stock_policy
from evla_cli.families import cogact, open_checkpoint
from evla_cli.models.processing import CogACTProcessor
from evla_cli.runtime.policy import Policy, policy_from_checkpoint
from evla_cli.settings import DiffusionSettings, InferenceSettings
from evla_cli.vision.planning import VisionOptions

GOLDEN = Path(__file__).resolve().parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "cogact.json").read_text())
HEAD, TOWERS, SEEDS = FACTS["head"], FACTS["towers"], FACTS["seeds"]
TOLERANCE = 1e-5  # of the largest value: float32 sums in another order give up to 1.3e-6


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN / "cogact.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def run(cogact_run, tmp_path_factory) -> Path:
    """The pico run with the golden weights as its towers and action model; the golden sizes are pico's."""
    run = tmp_path_factory.mktemp("golden") / "run"
    shutil.copytree(cogact_run, run)
    (file,) = (run / "checkpoints").glob("*.pt")
    parts = torch.load(file, weights_only=True)["model"]
    for part, facts, seed in (("action_model", HEAD, "head"), ("vision_backbone", TOWERS, "towers")):
        weights = seeded.weights(facts["weight_shapes"], SEEDS[seed])
        assert seeded.digest(weights) == facts["weights_sha256"]
        parts[part] = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    torch.save({"model": parts}, file)
    return run


@pytest.fixture(scope="module", params=[policy_from_checkpoint, load_stock_policy], ids=["runtime", "stock"])
def policy(request, run) -> Policy:
    return request.param(run)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    arrays = seeded.inputs(HEAD["input_shapes"], SEEDS["head_inputs"])
    assert seeded.digest(arrays) == HEAD["inputs_sha256"]
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.fromarray(seeded.image(*size, seed=SEEDS["images"])) for size in TOWERS["images"]]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, as a part of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_noise_that_the_head_predicts(policy, golden, inputs):
    with torch.inference_mode():
        timesteps = torch.tensor(HEAD["timesteps"])
        found = policy.model.action_head(inputs["noise"], timesteps, inputs["cognition"])
    assert difference(found, golden["predicted_noise"]) < TOLERANCE


@pytest.mark.parametrize("name", HEAD["samplers"])
def test_the_actions_that_are_sampled(policy, run, golden, inputs, monkeypatch, name):
    steps, scale = HEAD["samplers"][name]
    sampled = {"sampler": "ddpm"} if steps is None else {"num_denoise_steps": steps}
    settings = InferenceSettings(diffusion=DiffusionSettings(cfg_scale=scale, **sampled))
    fresh = iter(inputs["fresh"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(fresh))  # what DDPM adds at every step
    with torch.inference_mode():
        found = type(policy)(policy.model, policy.processor, settings).act(inputs["cognition"], inputs["noise"])
    assert difference(found, golden[f"actions_{name}"]) < TOLERANCE


def test_the_features_of_both_towers(policy, golden, images):
    """As the projector gets them, which the decoder's input then shows."""
    prepared = policy.prepare(images, ["open drawer"] * len(images))
    seen: list[Tensor] = []
    handle = policy.model.projector.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        policy.see(prepared)
    handle.remove()
    width = policy.model.config.dino_config.hidden_size
    for tower in (slice(None, width), slice(width, None)):
        assert difference(seen[0][..., tower], golden["features"][..., tower]) < TOLERANCE


def test_the_pixels_at_full_size(policy, run, golden, images):
    """To the bit. A smaller picture enlarged to 224 pixels, a camera's reduced."""
    config = copy.deepcopy(policy.model.config)
    config.dino_config.image_size = config.siglip_config.image_size = TOWERS["full_size"]
    prepared = CogACTProcessor(config, run)(images, ["open drawer"] * len(images))
    stride = TOWERS["stride"]
    for name, pixels in (("dino", prepared.dino_pixels), ("siglip", prepared.siglip_pixels)):
        kept = pixels[:, :, stride // 2 :: stride, stride // 2 :: stride]
        assert torch.equal(kept, golden[f"{name}_pixels"])


def test_attention_heads_of_the_published_models():
    """Weights do not tell them."""
    published = {
        "action_model": {sizes["hidden_size"]: sizes["num_heads"] for sizes in HEAD["published_sizes"].values()},
    }
    dino, siglip = TOWERS["published_sizes"].values()
    for part, sizes in (("dino", dino), ("siglip", siglip)):
        published[part] = {sizes["embed_dim"]: sizes["num_heads"]}
    assert published == cogact._NUM_HEADS


def test_pruned_towers_are_those_that_timm_makes_by_the_lines_of_loading(run, tmp_path):
    """The names and shapes that timm itself gave the same arguments."""
    vision = VisionOptions(mlp_prune_ratio=0.5, mlp_method="magnitude")
    pipeline.prune(run, tmp_path / "pruned", vision=vision, check=False)
    text = (tmp_path / "pruned" / "LOADING.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(("create,", "timm.create"))]
    given: dict[str, Any] = {}
    timm = types.SimpleNamespace(create_model=lambda name, **options: given.update({name: options}))
    exec("\n".join(lines), {"timm": timm})
    tensors = open_checkpoint(tmp_path / "pruned").reader.tensors
    for (name, expected), tower in zip(TOWERS["pruned"].items(), ("dino", "siglip"), strict=True):
        timm.create_model(name, pretrained=True)
        assert given[name] == expected["given"] | {"pretrained": False}
        prefix = f"model.vision_backbone.{tower}_featurizer."
        found = {key.removeprefix(prefix): list(lazy.shape) for key, lazy in tensors.items() if key.startswith(prefix)}
        assert found == expected["shapes"]
