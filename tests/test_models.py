"""Our CogACT against one built here from transformers' own classes, plain tensor operations and textbook diffusion."""

import copy
import math
import re

import numpy as np
import pico
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    Dinov2WithRegistersModel,
    LlamaModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from evla_cli.errors import EvlaError
from evla_cli.models.diffusion import NoiseSchedule, ddim_timesteps, sample_ddim, sample_ddpm
from evla_cli.models.processing import CogACTProcessor
from evla_cli.settings import DiffusionSettings, InferenceSettings


def part_of(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def in_its_names(tower, state):
    """Weights of a tower under the names that this version of transformers has for them."""
    if hasattr(tower, "vision_model"):  # SigLIP before 5.6
        return {f"vision_model.{name}": tensor for name, tensor in state.items()}
    if not any("attention.attention.query" in name for name in tower.state_dict()):
        return state
    old = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    return {  # DINOv2 before 5.18
        re.sub(r"(?<=\.attention\.)[qkvo]_proj", lambda match: old[match[0]], name): tensor
        for name, tensor in state.items()
    }


def reference_cognition(model, input_ids, dino_pixels, siglip_pixels):
    """Whole towers with eager attention, all hidden states; then the whole Llama with eager attention."""
    # A copy: the kind of attention is written into the config, which the model shares.
    config, state = copy.deepcopy(model.config), model.state_dict()
    towers = []
    for owner, prefix, pixels in (
        (Dinov2WithRegistersModel(config.dino_config), "dino.", dino_pixels),
        (SiglipVisionModel(config.siglip_config), "siglip.", siglip_pixels),
    ):
        owner.load_state_dict(in_its_names(owner, part_of(state, prefix)), strict=True)
        owner.set_attn_implementation("eager")
        outputs = owner.eval().to(pixels.dtype)(pixels, output_hidden_states=True)
        towers.append(outputs.hidden_states[-2])  # after the second-to-last block; the last entry is the last block's
    features = torch.cat((towers[0][:, 5:], towers[1]), dim=-1)  # without the class token and 4 registers

    weights = part_of(state, "projector.projector.")
    for layer in (0, 2, 4):
        features = features @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        if layer < 4:
            features = 0.5 * features * (1 + torch.erf(features / math.sqrt(2)))

    llama = LlamaModel(config.text_config).eval()
    llama.load_state_dict(part_of(state, "language_model.model."), strict=True)
    llama.set_attn_implementation("eager")
    text = state["language_model.model.embed_tokens.weight"][input_ids]
    sequence = torch.cat((text[:, :1], features, text[:, 1:]), dim=1)
    return llama.to(sequence.dtype)(inputs_embeds=sequence, use_cache=False).last_hidden_state[:, -1:]


def reference_noise(state, config, noisy, timestep, condition):
    """The action head as equations: softmax attention written out, one head at a time."""

    def linear(values, name):
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(values):
        centred = values - values.mean(dim=-1, keepdim=True)
        return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def gelu(values):
        return 0.5 * values * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))

    angles = torch.tensor([timestep * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    time = linear(torch.cat((angles.cos(), angles.sin())).to(noisy), "t_embedder.mlp.0")
    time = linear(time / (1 + torch.exp(-time)), "t_embedder.mlp.2")
    first = time + linear(condition, "z_embedder.linear")
    tokens = torch.cat((first, linear(noisy, "x_embedder.linear")), dim=1) + state["positional_embedding"]
    width = config.hidden_size // config.num_attention_heads
    for block in range(config.num_hidden_layers):
        query, key, value = linear(norm(tokens), f"blocks.{block}.attn.qkv").chunk(3, dim=-1)
        mixed = []
        for head in range(config.num_attention_heads):
            span = slice(head * width, (head + 1) * width)
            weights = (query[..., span] @ key[..., span].transpose(1, 2) / math.sqrt(width)).softmax(dim=-1)
            mixed.append(weights @ value[..., span])
        tokens = tokens + linear(torch.cat(mixed, dim=-1), f"blocks.{block}.attn.proj")
        hidden = gelu(linear(norm(tokens), f"blocks.{block}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"blocks.{block}.mlp.fc2")
    return linear(norm(tokens), "final_layer.linear")[:, 1:]


def alpha_bar(step):
    """Cumulative product of 1 - beta_t of the squared-cosine schedule with betas cut at 0.999; step -1 is no noise."""
    product = 1.0
    for t in range(step + 1):
        ratio = math.cos(((t + 1) / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
        ratio /= math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
        product *= 1 - min(1 - ratio, 0.999)
    return product


def reference_ddim(predict, sample, steps):
    """Song et al., Eq. 12 with sigma 0."""
    for t, t_next in zip(steps, [*steps[1:], -1], strict=True):
        noise = predict(sample, t)
        clean = (sample - math.sqrt(1 - alpha_bar(t)) * noise) / math.sqrt(alpha_bar(t))
        sample = math.sqrt(alpha_bar(t_next)) * clean + math.sqrt(1 - alpha_bar(t_next)) * noise
    return sample


def reference_actions(model, cognition, noise, steps, scale):
    """Guidance as two separate runs of the head."""
    state = part_of(model.state_dict(), "action_head.")
    null = state["z_embedder.uncondition"].expand(len(cognition), 1, -1)

    def predict(sample, t):
        with_condition = reference_noise(state, model.config.action_config, sample, t, cognition)
        without = reference_noise(state, model.config.action_config, sample, t, null)
        return without + scale * (with_condition - without)

    return reference_ddim(predict, noise, steps)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 16, 7, generator=torch.Generator().manual_seed(1))


# float32: some hundred sums of up to some hundred products in another order. float64: the time embedding's sinusoids
# are float32 in both networks' lineage, 1e-7, and denoising amplifies them.
@pytest.mark.parametrize(("name", "tolerance"), [("policy", 2e-4), ("policy64", 2e-6)])
def test_forward_equals_a_reference_built_from_transformers(request, name, tolerance, noise):
    policy = request.getfixturevalue(name)
    settings = InferenceSettings(diffusion=DiffusionSettings(num_denoise_steps=10, cfg_scale=1.5))
    instructions = ["open drawer", "close drawer"]  # of one length: the reference knows no padding
    inputs = policy.prepare(pico.images(2), instructions)
    assert inputs.attention_mask is None
    with torch.inference_mode():
        cognition = reference_cognition(policy.model, *inputs.arguments())
        found = policy.model(*inputs.arguments())
        assert (found - cognition).abs().max() < tolerance * cognition.abs().max()
        expected = reference_actions(policy.model, cognition, noise.to(cognition), range(90, -1, -10), 1.5)
        actions = policy.with_settings(settings).act(found, noise)
    assert (actions - expected).abs().max() < tolerance * expected.abs().max()
    prediction = policy.with_settings(settings).predict(pico.images(2), instructions, noise=noise)
    assert torch.equal(prediction.cognition, found)


@pytest.mark.parametrize(
    ("num_steps", "steps"),
    [
        (10, list(range(90, -1, -10))),
        (5, [80, 60, 40, 20, 0]),
        (2, [50, 0]),
        (1, [50]),
        (4, [75, 50, 25, 0]),
        (20, list(range(95, -1, -5))),
        (34, list(range(99, -1, -3))),
        (100, list(range(99, -1, -1))),
    ],
)
def test_ddim_visits_the_training_steps_that_cogact_visits(num_steps, steps):
    assert ddim_timesteps(num_steps) == steps


@pytest.mark.parametrize("num_steps", [11, 35, 51, 99, 101])
def test_step_counts_without_a_whole_stride_are_refused(num_steps):
    with pytest.raises(EvlaError, match="possible: 1, 2, 3, 4, 5"):
        ddim_timesteps(num_steps)


def test_schedule_falls_from_almost_one_to_almost_zero():
    found = NoiseSchedule.squared_cosine().alphas_cumprod
    assert found == pytest.approx([alpha_bar(t) for t in range(100)], rel=1e-12)
    assert found[0] > 0.999
    assert 0 < found[99] < 1e-5


def test_ddim_equals_an_independent_one(noise):
    def predict(sample, t, _step=0):
        return torch.sin(3 * sample) * (1 + t / 50)

    expected = reference_ddim(predict, noise.double(), [80, 60, 40, 20, 0])
    torch.testing.assert_close(sample_ddim(predict, noise.double(), 5), expected, rtol=1e-11, atol=1e-11)


def test_ddim_recovers_the_actions_when_the_noise_is_predicted_exactly():
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(2, 16, 7, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, 16, 7, generator=generator, dtype=torch.float64)
    schedule = NoiseSchedule.squared_cosine()
    noisy = schedule.add_noise(actions, noise, torch.tensor([90, 90]))
    torch.testing.assert_close(sample_ddim(lambda *_: noise, noisy, 10), actions, rtol=0, atol=1e-12)


def test_ddpm_equals_an_independent_one(noise):
    """Ho et al., algorithm 2, with the posterior's variance."""

    def predict(sample, t, _step=0):
        return torch.sin(3 * sample) * (1 + t / 50)

    generator = torch.Generator().manual_seed(7)
    sample = noise.double()
    for t in range(99, -1, -1):
        alpha = alpha_bar(t) / alpha_bar(t - 1)
        mean = (sample - (1 - alpha) / math.sqrt(1 - alpha_bar(t)) * predict(sample, t)) / math.sqrt(alpha)
        variance = (1 - alpha_bar(t - 1)) / (1 - alpha_bar(t)) * (1 - alpha)
        fresh = torch.randn(noise.shape, generator=generator).double() if t else torch.zeros_like(sample)
        sample = mean + math.sqrt(variance) * fresh
    found = sample_ddpm(predict, noise.double(), torch.Generator().manual_seed(7))
    # The first step divides by sqrt(1 - 0.999): rounding grows by the size that the samples reach.
    torch.testing.assert_close(found, sample, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(640, 480), (37, 431), (7, 13), (224, 224)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_transformers_own_image_processors(policy, cogact_run, mode, size):
    """SigLIP's as published; DINOv2's (BiT's processor, ImageNet's mean and deviation) squeezed instead of cropped."""
    config = copy.deepcopy(policy.model.config)
    config.dino_config.image_size = config.siglip_config.image_size = 224
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    inputs = CogACTProcessor(config, cogact_run)([image], ["open drawer"])

    square = {"height": 224, "width": 224}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    for pixels, processor in (
        (inputs.dino_pixels, BitImageProcessorPil(size=square, do_center_crop=False, **imagenet)),
        (inputs.siglip_pixels, SiglipImageProcessorPil(size=square, do_convert_rgb=True)),
    ):
        assert torch.equal(pixels, processor(image, return_tensors="pt").pixel_values)


def test_the_image_changes_the_action(policy):
    from PIL import Image

    black, white = Image.new("RGB", (80, 60)), Image.new("RGB", (80, 60), "white")
    actions = [policy.predict_action(image, "open the drawer", seed=0) for image in (black, white)]
    assert abs(actions[0] - actions[1]).max() > 1e-2


def test_the_instruction_changes_the_action(policy):
    image = pico.images(1)[0]
    actions = [policy.predict_action(image, text, seed=0) for text in ("open drawer", "close drawer")]
    assert abs(actions[0] - actions[1]).max() > 1e-2


def test_padding_does_not_change_the_cognition_token(policy64):
    inputs = policy64.prepare(pico.images(5), pico.INSTRUCTIONS)
    with torch.inference_mode():
        together = policy64.model(*inputs.arguments(), inputs.attention_mask)
        for number, (image, text) in enumerate(zip(pico.images(5), pico.INSTRUCTIONS, strict=True)):
            alone = policy64.model(*policy64.prepare([image], [text]).arguments())
            # float64 rounding; rotary embeddings are float32 on both sides and equal.
            torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-10)
