"""VLA-Cache against its formulas written as loops: plan, keys and values, streams of a batch, episodes."""

import math

import numpy as np
import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from evla_cli.methods.frame_reuse import patch_similarity, plan_reuse, reuse_shares
from evla_cli.settings import InferenceSettings, VisualTokenSettings

V = pico.NUM_VISUAL
EAGER = {"similarity_threshold": 0.9, "num_task": 5, "entropy_scale": 40.0}  # much is reused, and not all at once
ALL = {"similarity_threshold": 0.0, "num_task": 0, "entropy_scale": 1e9}  # as much as can be


def vla_cache(**keys):
    return InferenceSettings(visual_tokens=VisualTokenSettings(method="vla_cache", **keys))


def film(seed, length=4):
    """Frames of a camera that stands still: in each, another part of the picture changes."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    frames = []
    for _ in range(length):
        top, left = generator.integers(0, 36, 2)
        pixels = pixels.copy()
        pixels[top : top + 20, left : left + 20] = generator.integers(0, 256, (20, 20, 3))
        frames.append(Image.fromarray(pixels))
    return frames


@torch.inference_mode()
def think(policy, images, instructions):
    inputs = policy.prepare(images, instructions)
    cognition, selection = policy.think(inputs, policy.see(inputs))
    return cognition[:, 0], selection


# The plan


def literal_plan(similarity, relevance, entropies, tokens):
    """One row: lists of floats in, the exit layer of every token out."""
    ranked = sorted(range(len(similarity)), key=lambda i: (-similarity[i], i))
    static = [i for i in ranked if similarity[i] >= tokens.similarity_threshold][: tokens.num_static]
    attended = sorted(range(len(similarity)), key=lambda i: (-relevance[i], i))
    num_task = len(similarity) // 2 if tokens.num_task is None else tokens.num_task
    reusable = sorted(set(static) - set(attended[:num_task]), key=lambda i: (relevance[i], i))
    exits = [len(entropies)] * len(similarity)
    total = 0.0
    for layer in range(1, len(entropies)):
        total += (entropies[layer - 1] - entropies[layer]) / entropies[layer - 1]
        share = min(tokens.entropy_scale * total, 1)
        for token in reusable[: math.floor(max(share, 0) * len(reusable))]:
            exits[token] = min(exits[token], layer)
    return exits


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_plan_equals_the_formulas_written_as_loops(data):
    count = data.draw(st.integers(2, 20))
    few = st.sampled_from([0.0, 0.5, 0.996, 1.0])  # ties are common
    similarity, relevance = (data.draw(st.lists(few, min_size=count, max_size=count)) for _ in range(2))
    entropies = data.draw(st.lists(st.floats(0.1, 3), min_size=1, max_size=6))
    counts = st.none() | st.integers(0, count)
    tokens = VisualTokenSettings(
        method="vla_cache",
        similarity_threshold=data.draw(few),
        num_static=data.draw(counts),
        num_task=data.draw(counts),
        entropy_scale=data.draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
    )
    rows = (torch.tensor([values, values], dtype=torch.float64) for values in (similarity, relevance, entropies))
    reuse = plan_reuse(*rows, tokens)
    expected = literal_plan(similarity, relevance, entropies, tokens)
    assert reuse.exit_layers.tolist() == [expected, expected]
    layers = range(len(entropies))
    assert reuse.reused == [sum(layer >= exit_layer for exit_layer in expected) for layer in layers]
    assert reuse.share == pytest.approx(sum(reuse.reused) / count / len(entropies))


def test_shares_never_fall_and_attention_without_entropy_shares_nothing():
    entropies = torch.tensor([[2.0, 1.0, 4.0, 0.5], [2.0, 2.0, 3.0, 3.0], [0.0, 0.0, 1.0, 0.0]])
    shares = reuse_shares(entropies, 1.0)
    assert shares.tolist() == [[0.0, 0.5, 0.5, 0.5], [0.0] * 4, [0.0] * 4]


def test_similarity_is_the_cosine_of_each_patchs_pixels():
    before, after = (torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    found = patch_similarity(after, before, 9)
    for row in range(2):
        for patch in range(9):
            top, left = 4 * (patch // 3), 4 * (patch % 3)
            a, b = (image[row, :, top : top + 4, left : left + 4].flatten().tolist() for image in (after, before))
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            assert found[row, patch].item() == pytest.approx(dot / (math.hypot(*a) * math.hypot(*b)), abs=1e-6)


# The pass


class LiteralStream:
    """One stream: every hidden state, key and value under the position it belongs to."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.last = model, tokens, None

    def step(self, inputs):
        """The cognition token (D,) and every visual token's exit layer."""
        llama, config = self.model.language_model.model, self.model.config.text_config
        embeds = self.model.embed_inputs(*inputs.arguments())[0]
        length, width = len(embeds), config.hidden_size // config.num_attention_heads
        groups = config.num_attention_heads // config.num_key_value_heads
        cos, sin = (part[0] for part in LlamaRotaryEmbedding(config)(embeds, position_ids=torch.arange(length)[None]))

        def rotate(values, at):  # (heads, width)
            half = width // 2
            return values * cos[at] + torch.cat((-values[:, half:], values[:, :half]), dim=1) * sin[at]

        exits = [len(llama.layers)] * V
        if self.last:
            cosine = patch_similarity(inputs.picture, self.last["picture"], V)[0].tolist()
            exits = literal_plan(cosine, self.last["relevance"], self.last["entropies"], self.tokens)
        state = dict(enumerate(embeds))
        keys_values, relevance, entropies = [], [0.0] * V, []
        for index, layer in enumerate(llama.layers):
            state = {at: x for at, x in state.items() if not (1 <= at <= V and exits[at - 1] <= index)}
            known = {} if not self.last else dict(self.last["keys_values"][index])
            module, queries = layer.self_attn, {}
            for at, x in state.items():
                normed = layer.input_layernorm(x)
                queries[at] = rotate(module.q_proj(normed).unflatten(0, (-1, width)), at)
                key = rotate(module.k_proj(normed).unflatten(0, (-1, width)), at)
                known[at] = (key, module.v_proj(normed).unflatten(0, (-1, width)))
            entropy = []
            for at in state:
                mixed, mean = [], torch.zeros(at + 1, dtype=torch.float64)
                for head in range(config.num_attention_heads):
                    logits = [queries[at][head] @ known[k][0][head // groups] / width**0.5 for k in range(at + 1)]
                    weights = torch.stack(logits).softmax(dim=0)
                    mixed.append(sum(w * known[k][1][head // groups] for k, w in enumerate(weights)))
                    mean += weights / config.num_attention_heads
                if at > V:
                    entropy.append(-sum(w * math.log(w) for w in mean.tolist()))
                    relevance = [r + w for r, w in zip(relevance, mean[1 : 1 + V].tolist(), strict=True)]
                state[at] = state[at] + module.o_proj(torch.cat(mixed))
            for at, x in state.items():
                state[at] = x + layer.mlp(layer.post_attention_layernorm(x))
            keys_values.append(known)
            entropies.append(sum(entropy) / len(entropy))
        self.last = {
            "picture": inputs.picture,
            "keys_values": keys_values,
            "relevance": relevance,
            "entropies": entropies,
        }
        return llama.norm(state[length - 1]), exits


def test_a_stream_of_frames_runs_as_a_literal_reference_does(policy64):
    chosen = vla_cache(**EAGER)
    policy = policy64.with_settings(chosen)
    literal = LiteralStream(policy.model, chosen.visual_tokens)
    seen = set()
    for frame in film(4, 3):
        inputs = policy.prepare([frame], ["close the drawer"])
        with torch.inference_mode():
            expected, exits = literal.step(inputs)
        found, reuse = think(policy, [frame], ["close the drawer"])
        assert reuse.exit_layers[0].tolist() == exits
        # Products are float64, but transformers' own RMS norms and rotary angles and our attention rows are float32.
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
        seen.update(exits)
    assert len(seen) > 2  # tokens left, and not all at once
    dense, _ = think(policy64.with_settings(InferenceSettings()), [frame], ["close the drawer"])
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 3])
def test_where_nothing_is_static_the_result_is_the_dense_ones_bits(policy, rows):
    never, dense = policy.with_settings(vla_cache(num_static=0)), policy.with_settings(InferenceSettings())
    films = [film(row, 3) for row in range(rows)]
    for frames in zip(*films, strict=True):
        found, reuse = think(never, frames, pico.INSTRUCTIONS[:rows])
        assert torch.equal(found, think(dense, frames, pico.INSTRUCTIONS[:rows])[0])
        assert reuse.share == 0


def test_the_same_frame_again_gives_the_same_keys_values_and_result(policy64):
    policy = policy64.with_settings(vla_cache(**ALL))
    images = pico.images(3)
    first, _ = think(policy, images, pico.INSTRUCTIONS[:3])
    before = policy._frames.frame.keys_values
    second, reuse = think(policy, images, pico.INSTRUCTIONS[:3])
    assert reuse.static.all()
    assert reuse.share > 0.5
    torch.testing.assert_close(second, first, rtol=0, atol=1e-5)  # float32 in transformers' RMS norms
    for old, new in zip(before, policy._frames.frame.keys_values, strict=True):
        for ours, theirs in zip(new, old, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    exits = reuse.exit_layers
    last = len(before) - 1
    taken = (exits <= last)[:, None, :, None].expand(-1, 2, -1, 16)
    ours, theirs = (frame[last][0][:, :, 1 : 1 + V] for frame in (policy._frames.frame.keys_values, before))
    assert torch.equal(ours[taken], theirs[taken])


@pytest.mark.parametrize("keys", [EAGER, ALL], ids=["eager", "all"])
def test_rows_of_a_batch_are_streams_of_their_own(policy64, keys):
    """Prompts of different lengths, pictures that change to different degrees."""
    together = policy64.with_settings(vla_cache(**keys))
    films = [film(0), film(1), [film(2)[0]] * 4]
    alone = [policy64.with_settings(vla_cache(**keys)) for _ in films]
    for frames in zip(*films, strict=True):
        found, reuse = think(together, frames, pico.INSTRUCTIONS[:3])
        for row, policy in enumerate(alone):
            expected, own = think(policy, [frames[row]], [pico.INSTRUCTIONS[row]])
            assert reuse.exit_layers[row].tolist() == own.exit_layers[0].tolist()
            torch.testing.assert_close(found[row], expected[0], rtol=0, atol=1e-5)  # float32 in RMS norms
    assert len(set(map(tuple, reuse.exit_layers.tolist()))) == 3


def test_a_row_whose_prompt_changes_starts_anew_and_the_others_go_on(policy64):
    policy = policy64.with_settings(vla_cache(**ALL))
    images = pico.images(2)
    think(policy, images, ["open drawer", "close block"])
    found, reuse = think(policy, images, ["open drawer", "open block"])
    assert reuse.static.any(dim=1).tolist() == [True, False]
    fresh, _ = think(policy64.with_settings(InferenceSettings()), images, ["open drawer", "open block"])
    torch.testing.assert_close(found[1], fresh[1], rtol=0, atol=1e-5)


def test_reset_and_a_batch_of_another_shape_forget_the_frame_before(policy):
    cached, dense = policy.with_settings(vla_cache(**ALL)), policy.with_settings(InferenceSettings())
    first, second = film(3, 2)
    expected = think(dense, [second], ["open drawer"])[0]
    think(cached, [first], ["open drawer"])
    cached.reset()
    assert torch.equal(think(cached, [second], ["open drawer"])[0], expected)
    think(cached, [first, first], ["open drawer", "open drawer"])
    assert torch.equal(think(cached, [second], ["open drawer"])[0], expected)
    think(cached, [first], ["pick up the red block"])
    assert torch.equal(think(cached, [second], ["open drawer"])[0], expected)


def test_an_interrupted_pass_leaves_no_frame_behind(policy):
    cached, dense = policy.with_settings(vla_cache(**ALL)), policy.with_settings(InferenceSettings())
    first, second, third = film(4, 3)
    think(cached, [first], ["open drawer"])

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = policy.model.language_model.model.layers[3].mlp.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            think(cached, [second], ["open drawer"])
    finally:
        handle.remove()
    found, reuse = think(cached, [third], ["open drawer"])
    assert reuse.share == 0
    assert torch.equal(found, think(dense, [third], ["open drawer"])[0])
