"""The runtime under its settings: neutral ones change nothing, others do what a literal reference does."""

import random

import numpy as np
import pico
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from evla_cli import pipeline
from evla_cli.errors import EvlaError
from evla_cli.methods.visual_tokens import select_tokens
from evla_cli.models.processing import unnormalize_actions
from evla_cli.runtime.policy import load_policy
from evla_cli.settings import ActionCacheSettings, DiffusionSettings, InferenceSettings, VisualTokenSettings

PRUNED = InferenceSettings(visual_tokens=VisualTokenSettings(num_keep=7, num_key=2))
FASTV = InferenceSettings(visual_tokens=VisualTokenSettings(7, 3, method="fastv"))
RANDOM = InferenceSettings(visual_tokens=VisualTokenSettings(7, 3, method="random", seed=5))
FULL = InferenceSettings(
    visual_tokens=VisualTokenSettings(num_keep=7, num_key=2, context="instruction", diversity="greedy"),
    action_cache=ActionCacheSettings(interval=5),
)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(8, 16, 7, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def scenes():
    """8 images with instructions of different lengths."""
    return pico.images(8), [pico.INSTRUCTIONS[i % 5] for i in range(8)]


def test_neutral_settings_are_bit_equal_to_the_plain_model(policy, scenes, noise):
    inputs = policy.prepare(*scenes)
    with torch.inference_mode():
        plain = policy.model(*inputs.arguments(), inputs.attention_mask)
    for visual in (
        VisualTokenSettings(),
        VisualTokenSettings(num_keep=pico.NUM_VISUAL, num_key=2),
        VisualTokenSettings(num_keep=pico.NUM_VISUAL, prune_layer=4, task_ratio=1.0, diversity="greedy"),
        VisualTokenSettings(method="none"),
        VisualTokenSettings(method="fastv"),
        VisualTokenSettings(num_keep=pico.NUM_VISUAL, method="random"),
    ):
        neutral = policy.with_settings(InferenceSettings(visual_tokens=visual))
        prediction = neutral.predict(*scenes, noise=noise)
        assert torch.equal(prediction.cognition, plain)
        assert prediction.selection is None
        assert np.array_equal(prediction.actions, policy.predict(*scenes, noise=noise).actions)


@pytest.mark.parametrize(
    "settings", [InferenceSettings(), PRUNED, FASTV, FULL], ids=["neutral", "pruned", "fastv", "full"]
)
def test_a_batch_of_8_equals_8_batches_of_1(policy64, settings, scenes, noise):
    policy = policy64.with_settings(settings)
    together = policy.predict(*scenes, noise=noise)
    with torch.inference_mode():
        chunks = policy.act(together.cognition, noise)
    for number in range(8):
        alone = policy.predict([scenes[0][number]], [scenes[1][number]], noise=noise[number : number + 1])
        if settings.visual_tokens.num_keep is not None:
            assert together.selection.kept[number].tolist() == alone.selection.kept[0].tolist()
        # float64 rounding, grown by ten denoising steps; the action cache's buffer and what predictions are handed out
        # as are float32.
        torch.testing.assert_close(together.cognition[number], alone.cognition[0], rtol=0, atol=1e-9)
        with torch.inference_mode():
            chunk = policy.act(alone.cognition, noise[number : number + 1])[0]
        torch.testing.assert_close(chunks[number], chunk, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(together.actions[number], alone.actions[0], rtol=0, atol=2e-6)


def fingerprint(model):
    """Everything that patching could change: attributes, forwards, hooks, buffers, of every module."""
    return [
        (
            name,
            type(module),
            sorted(module.__dict__),
            {key: id(value) for key, value in module.__dict__.items() if callable(value)},
            [len(value) for key, value in sorted(module.__dict__.items()) if key.endswith("_hooks")],
            sorted(module._buffers),
            sorted(module._parameters),
        )
        for name, module in model.named_modules()
    ]


def test_policies_on_one_model_do_not_disturb_each_other_and_leave_no_trace(policy, scenes, noise):
    before = fingerprint(policy.model)
    config = policy.model.config.to_dict()
    chosen = [InferenceSettings(), PRUNED, FULL, InferenceSettings(action_cache=ActionCacheSettings(5, ("mlp",)))]
    policies = [policy.with_settings(settings) for settings in chosen]
    first = [each.predict(*scenes, noise=noise).actions for each in policies]
    again = [each.predict(*scenes, noise=noise).actions for each in reversed(policies)][::-1]
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one, two)
    for other in first[1:]:
        assert not np.array_equal(first[0], other)
    assert fingerprint(policy.model) == before
    assert policy.model.config.to_dict() == config


def literal_pruned_run(model, inputs, settings, choose):
    """One sample, T positions: attention from explicit masks and softmax, kept positions gathered by hand.

    `choose(scores, features)` says which visual tokens are kept.
    """
    visual, llama = settings.visual_tokens, model.language_model.model
    embeds = model.embed_inputs(*inputs.arguments())
    length, first_text = embeds.shape[1], 1 + pico.NUM_VISUAL
    positions = list(range(length))
    hidden = embeds[0]
    config = model.config.text_config
    width = config.hidden_size // config.num_attention_heads
    rotary = LlamaRotaryEmbedding(config)
    rows = {
        "text": list(range(first_text, length)),
        "cognition": [length - 1],
        "instruction": [
            pico.NUM_VISUAL + i for i in range(1, inputs.input_ids.shape[1]) if inputs.instruction_mask[0, i]
        ],
    }["cognition" if visual.method == "fastv" else visual.context]

    def attention(layer, hidden):
        """Weights (heads, T, T) and the layer's attention output."""
        cos, sin = (part[0] for part in rotary(hidden, position_ids=torch.tensor([positions])))

        def rotate(values):
            half = values.shape[-1] // 2
            return values * cos + torch.cat((-values[..., half:], values[..., :half]), dim=-1) * sin

        normed = layer.input_layernorm(hidden)
        module = layer.self_attn
        queries = rotate(module.q_proj(normed).unflatten(-1, (-1, width)).transpose(0, 1))
        keys = rotate(module.k_proj(normed).unflatten(-1, (-1, width)).transpose(0, 1))
        values = module.v_proj(normed).unflatten(-1, (-1, width)).transpose(0, 1)
        share = len(queries) // len(keys)
        weights, mixed = [], []
        for head in range(len(queries)):
            logits = queries[head] @ keys[head // share].T / width**0.5
            for row in range(len(positions)):
                logits[row, row + 1 :] = -torch.inf
            weights.append(logits.softmax(dim=-1))
            mixed.append(weights[-1] @ values[head // share])
        return torch.stack(weights), module.o_proj(torch.cat(mixed, dim=-1))

    kept = scores = None
    for index, layer in enumerate(llama.layers):
        if index == visual.prune_layer:
            kept = choose(scores, embeds[:, 1:first_text])
            positions = [0, *(1 + token for token in kept), *range(first_text, length)]
            hidden = hidden[positions]
        weights, mixed = attention(layer, hidden)
        if index == visual.prune_layer - 1:
            scores = weights.mean(dim=0)[rows].sum(dim=0)[1:first_text]
        hidden = hidden + mixed
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return llama.norm(hidden)[-1], kept


@pytest.mark.parametrize("context", ["text", "instruction", "cognition"])
@pytest.mark.parametrize(("prune_layer", "diversity"), [(2, "one_shot"), (1, "all_selected"), (5, "greedy")])
def test_pruned_tokens_run_as_a_literal_reference_does(policy64, context, prune_layer, diversity):
    settings = InferenceSettings(
        visual_tokens=VisualTokenSettings(7, prune_layer, 2, 0.5, context=context, diversity=diversity)
    )
    policy = policy64.with_settings(settings)
    for image, instruction in zip(pico.images(3, seed=5), pico.INSTRUCTIONS, strict=False):
        inputs = policy.prepare([image], [instruction])
        assert_runs_literally(
            policy,
            inputs,
            lambda scores, features: select_tokens(scores[None], features, settings.visual_tokens).kept[0].tolist(),
        )


def assert_runs_literally(policy, inputs, choose):
    with torch.inference_mode():
        expected, kept = literal_pruned_run(policy.model, inputs, policy.settings, choose)
        found, selection = policy.think(inputs, policy.see(inputs))
    assert selection.kept[0].tolist() == kept
    # Products are float64, but transformers' own RMS norms and rotary angles are float32, and how those round
    # depends on the shape of the batch they are computed in.
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("prune_layer", [1, 2, 5])
def test_fastv_runs_as_a_literal_reference_does(policy64, prune_layer):
    policy = policy64.with_settings(
        InferenceSettings(visual_tokens=VisualTokenSettings(6, prune_layer, method="fastv"))
    )

    def most_attended(scores, _):
        return sorted(sorted(range(len(scores)), key=lambda token: -scores[token])[:6])

    for image, instruction in zip(pico.images(3, seed=6), pico.INSTRUCTIONS, strict=False):
        assert_runs_literally(policy, policy.prepare([image], [instruction]), most_attended)


def test_random_tokens_run_as_a_literal_reference_does(policy64):
    policy = policy64.with_settings(RANDOM)
    policy.reset(episode=4)
    for call, (image, instruction) in enumerate(zip(pico.images(3, seed=7), pico.INSTRUCTIONS, strict=False)):
        draw = random.Random(f"5/4/{call}/0").random
        numbers = [draw() for _ in range(pico.NUM_VISUAL)]
        kept = sorted(sorted(range(pico.NUM_VISUAL), key=lambda token: -numbers[token])[:7])
        assert_runs_literally(policy, policy.prepare([image], [instruction]), lambda *_, kept=kept: kept)


def test_reset_brings_an_episodes_random_choices_back(policy, scenes, noise):
    one = policy.with_settings(RANDOM)

    def kept(count=2):
        return [one.predict(*scenes, noise=noise).selection.kept.tolist() for _ in range(count)]

    first = kept()
    assert first[0] != first[1]
    one.reset()
    assert kept() == first
    one.reset(episode=1)
    assert kept()[0] not in first
    one = policy.with_settings(RANDOM)
    assert kept() == first


def test_reset_leaves_the_stream_of_noise_alone(policy):
    image = pico.images(1)[0]
    one, two = (policy.with_settings(InferenceSettings(), seed=9) for _ in range(2))
    expected = [one.predict_action(image, "open drawer") for _ in range(2)]
    found = [two.predict_action(image, "open drawer")]
    two.reset()
    found.append(two.predict_action(image, "open drawer"))
    assert np.array_equal(expected, found)


def test_pruning_tokens_changes_the_action(policy, scenes, noise):
    full = policy.predict(*scenes, noise=noise).actions
    pruned = policy.with_settings(PRUNED).predict(*scenes, noise=noise).actions
    assert abs(full - pruned).max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_seed_gives_the_same_actions(policy, sampler):
    image = pico.images(1)[0]
    settings = InferenceSettings(diffusion=DiffusionSettings(sampler=sampler))
    one, two = policy.with_settings(settings), policy.with_settings(settings)
    first = one.predict_action(image, "open drawer", seed=5)
    assert np.array_equal(first, one.predict_action(image, "open drawer", seed=5))
    assert np.array_equal(first, two.predict_action(image, "open drawer", seed=5))
    assert not np.array_equal(first, one.predict_action(image, "open drawer", seed=6))


def test_without_a_seed_the_policys_own_stream_goes_on(policy):
    image = pico.images(1)[0]
    one, two = (policy.with_settings(InferenceSettings(), seed=9) for _ in range(2))
    first, second = (one.predict_action(image, "open drawer") for _ in range(2))
    assert not np.array_equal(first, second)
    two.predict_action(image, "open drawer", seed=1)  # a seeded call takes nothing from the stream
    assert np.array_equal(two.predict_action(image, "open drawer"), first)
    assert np.array_equal(two.predict_action(image, "open drawer"), second)


def test_actions_are_unnormalised_by_cogacts_rule():
    stats = pico.STATS["kitchen"]["action"]
    normalized = np.random.default_rng(0).normal(size=(3, 16, 7)).astype(np.float32)
    normalized[0, 0, 6], normalized[0, 1, 6] = 0.5, 0.49
    actions, clipped = unnormalize_actions(normalized, stats)
    for sample, step, dim in np.ndindex(normalized.shape):
        value = min(max(float(normalized[sample, step, dim]), -1.0), 1.0)
        if dim == 6:
            value = 0.0 if value < 0.5 else 1.0
        assert clipped[sample, step, dim] == value
        if stats["mask"][dim]:
            low, high = stats["q01"][dim], stats["q99"][dim]
            value = 0.5 * (value + 1) * (high - low) + low
        assert actions[sample, step, dim] == pytest.approx(value, abs=1e-15)


def test_predictions_are_in_the_robots_units(policy):
    stats = pico.STATS["kitchen"]["action"]
    actions = policy.predict_action(pico.images(1)[0], "open drawer", seed=0)
    assert actions.shape == (16, 7)
    assert actions.dtype == np.float64
    assert (actions[:, :6] >= np.array(stats["q01"])[:6] - 1e-12).all()
    assert (actions[:, :6] <= np.array(stats["q99"])[:6] + 1e-12).all()
    assert set(actions[:, 6]) <= {0.0, 1.0}


def test_statistics_must_be_named_where_there_are_several(policy, monkeypatch):
    stats = pico.STATS["kitchen"]
    monkeypatch.setattr(policy.model.config, "norm_stats", {"kitchen": stats, "lab": stats})
    with pytest.raises(EvlaError, match="kitchen, lab"):
        policy.action_stats(None)
    with pytest.raises(EvlaError, match="Did you mean 'kitchen'"):
        policy.action_stats("kichen")
    assert policy.action_stats("lab") == stats["action"]


def test_an_array_is_as_good_as_an_image(policy):
    image = pico.images(1)[0]
    expected = policy.predict_action(image, "open drawer", seed=3)
    assert np.array_equal(policy.predict_action(np.asarray(image), "open drawer", seed=3), expected)


@pytest.mark.parametrize(
    ("image", "instruction", "message"),
    [
        ("camera.png", "open", "uint8 array \\(height, width, 3\\), got str"),
        (np.zeros((60, 80, 3)), "open", "got float64 \\(60, 80, 3\\)"),
        (np.zeros((3, 60, 80), np.uint8), "open", "got uint8 \\(3, 60, 80\\)"),
        (np.zeros((60, 80, 3), np.uint8), b"open", "must be a text, got bytes"),
        (np.zeros((60, 80, 3), np.uint8), None, "must be a text, got NoneType"),
        (np.zeros((60, 80, 3), np.uint8), "", "instruction is empty"),
    ],
)
def test_what_is_no_image_or_no_instruction_is_refused(policy, image, instruction, message):
    with pytest.raises(EvlaError, match=message):
        policy.predict_action(image, instruction)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_what_is_no_dtype_to_compute_in_is_refused(bundle, dtype):
    with pytest.raises(EvlaError, match=r"floating-point torch\.dtype such as torch\.bfloat16, got"):
        load_policy(bundle, dtype=dtype)


def test_an_exported_bundle_acts_as_its_source_under_its_own_settings(policy, cogact_run, tmp_path, scenes, noise):
    pipeline.export(cogact_run, tmp_path / "bundle", FULL)
    bundle = load_policy(tmp_path / "bundle")
    assert bundle.settings == FULL
    expected = policy.with_settings(FULL).predict(*scenes, noise=noise)
    assert np.array_equal(bundle.predict(*scenes, noise=noise).actions, expected.actions)
