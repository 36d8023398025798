"""What `--dtype` means: the VLM follows it, CogACT's action head and sampler are in float32 whatever it says."""

import numpy as np
import pico
import pytest
import torch

from evla_cli import pipeline
from evla_cli.calibration import load_samples
from evla_cli.evaluation.stock import load_stock_policy
from evla_cli.families import open_checkpoint
from evla_cli.families.cogact import COGACT
from evla_cli.families.decoder import DECODER
from evla_cli.models.streaming import DecoderStream
from evla_cli.runtime.policy import Policy, load_policy, policy_from_checkpoint

HALF = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def half_run(cogact_run, tmp_path_factory):
    """The pico CogACT with all its weights stored in bfloat16, as the demo's are."""
    return pico.cast_run(cogact_run, tmp_path_factory.mktemp("half") / "run", torch.bfloat16)


@pytest.fixture(scope="module")
def scene():
    return pico.images(2), pico.INSTRUCTIONS[:2]


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


def vlm_and_head(policy: Policy) -> tuple[set[torch.dtype], set[torch.dtype]]:
    model = policy.model
    vlm = [dtypes(part) for part in (model.dino, model.siglip, model.projector, model.language_model)]
    return set().union(*vlm), dtypes(model.action_head)


def test_families_say_what_does_not_follow():
    for dtype in HALF:
        assert COGACT.compute_dtype("action_head.blocks.0.attn.qkv.weight", dtype) == torch.float32
        assert COGACT.compute_dtype("projector.projector.0.weight", dtype) == dtype
        assert COGACT.compute_dtype("action_header.weight", dtype) == dtype
        assert DECODER.compute_dtype("model.layers.0.mlp.up_proj.weight", dtype) == dtype
    assert COGACT.compute_dtype("action_head.x_embedder.linear.bias", torch.float64) == torch.float64


@pytest.mark.parametrize("load", [policy_from_checkpoint, load_stock_policy])
@pytest.mark.parametrize("dtype", HALF)
def test_the_head_is_loaded_in_float32(cogact_run, half_run, load, dtype):
    for run in (cogact_run, half_run):
        assert vlm_and_head(load(run, dtype=dtype)) == ({dtype}, {torch.float32})
        assert vlm_and_head(load(run, dtype=torch.float64)) == ({torch.float64}, {torch.float64})
    assert vlm_and_head(load(half_run)) == ({torch.bfloat16}, {torch.float32})
    assert vlm_and_head(load(cogact_run)) == ({torch.float32}, {torch.float32})


@pytest.mark.parametrize("load", [policy_from_checkpoint, load_stock_policy])
def test_actions_are_what_the_float32_model_makes_of_the_rounded_cognition_token(cogact_run, load, scene):
    noise = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(1))
    predicted = load(cogact_run, dtype=torch.bfloat16).predict(*scene, noise=noise)
    assert predicted.cognition.dtype == torch.bfloat16
    with torch.inference_mode():
        expected = load(cogact_run, dtype=torch.float32).act(predicted.cognition.float(), noise)
    assert expected.dtype == torch.float32
    clipped = expected.numpy().clip(-1, 1).astype(np.float64)
    assert np.array_equal(predicted.normalized_actions[..., :6], clipped[..., :6])


def test_export_leaves_the_heads_weights_as_they_are_stored(cogact_run, half_run, tmp_path, scene):
    noise = torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(1))
    for run, stored, wanted in ((cogact_run, "float32", "bfloat16"), (half_run, "bfloat16", "float32")):
        bundle = tmp_path / wanted
        facts = pipeline.export(run, bundle, pipeline.settings_with(None), dtype=wanted)
        weights = open_checkpoint(bundle).weights
        head = {lazy.dtype for name, lazy in weights.items() if name.startswith("action_head.")}
        rest = {lazy.dtype for name, lazy in weights.items() if not name.startswith("action_head.")}
        assert (head, rest) == ({getattr(torch, stored)}, {getattr(torch, wanted)})
        assert facts["bytes"] == sum(lazy.num_bytes for lazy in weights.values())
        whole = policy_from_checkpoint(run, load_policy(bundle).settings, dtype=getattr(torch, wanted))
        expected = whole.predict(*scene, noise=noise).actions
        assert np.array_equal(load_policy(bundle).predict(*scene, noise=noise).actions, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_analysis_runs_the_head_in_float32(half_run, image_samples, dtype):
    samples = load_samples(image_samples, "image", 2)
    head = DecoderStream(open_checkpoint(half_run), samples, 2, dtype).load_part("action_head")
    assert dtypes(head) == {torch.float32}
    assert {type(module) for module in head.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
