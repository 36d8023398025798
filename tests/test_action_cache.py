"""Caching of the action head: against the network without a cache and against caching written out block by block."""

import pytest
import torch

from evla_cli.methods.action_cache import ModuleCache, StackCache, cache_schedule, step_similarity
from evla_cli.models.action_head import ActionHead, ActionHeadConfig
from evla_cli.models.diffusion import sample_ddim
from evla_cli.settings import ActionCacheSettings, DiffusionSettings, InferenceSettings

ALL = ("attention", "mlp")


@pytest.fixture(scope="module")
def head():
    import pico

    torch.manual_seed(0)
    config = ActionHeadConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, condition_size=24
    )
    return pico.randomize(ActionHead(config)).double().eval().requires_grad_(False)


@pytest.fixture
def start(head):
    generator = torch.Generator().manual_seed(3)
    weight = head.x_embedder.linear.weight
    return torch.randn(2, 16, 7, generator=generator).to(weight), torch.randn(2, 1, 24, generator=generator).to(weight)


def sample(head, start, cache, num_steps=10):
    noise, condition = start

    def predict_noise(noisy, timestep, step):
        return head(noisy, torch.full((len(noisy),), timestep), condition, cache.at(step) if cache else None)

    return sample_ddim(predict_noise, noise, num_steps)


def literal_sample(head, start, computed, reused, num_steps=10):
    """Every block's outputs in a dict, taken from there where the step is not computed and (block, module) reused."""
    noise, condition = start
    memory = {}

    def predict_noise(noisy, timestep, step):
        tokens = head.embed(
            noisy, head.t_embedder(torch.full((len(noisy),), timestep)).unsqueeze(1) + head.z_embedder(condition)
        )
        for number, block in enumerate(head.blocks):
            for module, norm, function in (("attention", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
                if step in computed or (number, module) not in reused:
                    memory[number, module] = function(norm(tokens))
                tokens = tokens + memory[number, module]
        return head.final_layer(tokens)[:, 1:]

    return sample_ddim(predict_noise, noise, num_steps)


@pytest.mark.parametrize(
    ("num_steps", "interval", "computed"),
    [(10, 5, [0, 5]), (10, 1, list(range(10))), (10, 3, [0, 3, 6, 9]), (5, 5, [0]), (100, 40, [0, 40, 80])],
)
def test_schedule_counts_steps_since_the_start(num_steps, interval, computed):
    schedule = cache_schedule(num_steps, interval)
    assert [step for step in range(num_steps) if schedule[step]] == computed


def test_caching_computes_the_blocks_only_at_the_scheduled_steps(head, start):
    calls = []
    handle = head.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    try:
        for cache in (StackCache(cache_schedule(10, 5)), ModuleCache(cache_schedule(10, 5), ALL, range(4))):
            calls.clear()
            sample(head, start, cache)
            assert len(calls) == 2
    finally:
        handle.remove()


@pytest.mark.parametrize("interval", [2, 3, 5, 10])
def test_whole_stack_change_equals_per_module_caching(head, start, interval):
    schedule = cache_schedule(10, interval)
    reused = {(block, module) for block in range(4) for module in ALL}
    expected = literal_sample(head, start, {s for s in range(10) if schedule[s]}, reused)
    scale = expected.abs().max()
    # The sum of all outputs, added at once or one by one: float64 rounding. The stack's change is kept in float32,
    # so it has 24 bits: 6e-8 a cached step, grown by what denoising amplifies.
    assert (sample(head, start, ModuleCache(schedule, ALL, range(4))) - expected).abs().max() <= 1e-13 * scale
    assert (sample(head, start, StackCache(schedule)) - expected).abs().max() <= 2e-6 * scale


def test_whole_stack_change_is_exact_in_real_arithmetic(head, start):
    """The identity itself, without the cache's float32 buffer."""
    noise, condition = start
    before = head.embed(noise, head.t_embedder(torch.full((2,), 90)).unsqueeze(1) + head.z_embedder(condition))
    tokens, outputs = before, []
    for block in head.blocks:
        outputs.append(block.attn(block.norm1(tokens)))
        tokens = tokens + outputs[-1]
        outputs.append(block.mlp(block.norm2(tokens)))
        tokens = tokens + outputs[-1]
    torch.testing.assert_close(tokens - before, sum(outputs), rtol=0, atol=1e-14 * float(tokens.abs().max()))


def test_caching_changes_the_sample(head, start):
    plain, cached = sample(head, start, None), sample(head, start, StackCache(cache_schedule(10, 5)))
    assert (plain - cached).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize(
    ("modules", "blocks"),
    [(("attention",), range(4)), (("mlp",), range(4)), (ALL, (1, 3)), (("mlp",), (0,)), (("attention",), (2, 3))],
)
def test_partial_schedules_equal_a_literal_loop(head, start, modules, blocks):
    schedule = cache_schedule(10, 4)
    reused = {(block, module) for block in blocks for module in modules}
    expected = literal_sample(head, start, {0, 4, 8}, reused)
    assert torch.equal(sample(head, start, ModuleCache(schedule, modules, blocks)), expected)


def settings(interval=1, steps=10, modules=ALL, blocks=None, cfg_scale=1.5):
    return InferenceSettings(
        action_cache=ActionCacheSettings(interval, modules, blocks),
        diffusion=DiffusionSettings(num_denoise_steps=steps, cfg_scale=cfg_scale),
    )


def act(policy, chosen):
    generator = torch.Generator().manual_seed(4)
    cognition, noise = torch.randn(3, 1, 64, generator=generator), torch.randn(3, 16, 7, generator=generator)
    with torch.inference_mode():
        return policy.with_settings(chosen).act(cognition, noise)


def test_interval_1_is_bit_equal_to_no_cache(policy):
    head = policy.model.action_head
    generator = torch.Generator().manual_seed(4)
    cognition, noise = torch.randn(3, 1, 64, generator=generator), torch.randn(3, 16, 7, generator=generator)
    condition = torch.cat((cognition, head.null_condition(3)))

    def predict_noise(noisy, timestep, step):
        predicted = head(torch.cat((noisy, noisy)), torch.full((6,), timestep), condition)
        return predicted[3:] + 1.5 * (predicted[:3] - predicted[3:])

    with torch.inference_mode():
        expected = sample_ddim(predict_noise, noise, 10)
    assert torch.equal(act(policy, settings(interval=1)), expected)
    assert torch.equal(act(policy, settings(interval=1, modules=("mlp",), blocks=(1,))), expected)


def test_no_state_leaks_between_sampling_calls_or_step_counts(policy):
    chosen = [settings(5), settings(2, steps=4), settings(5, modules=("mlp",)), settings(5, cfg_scale=1.0), settings(1)]
    first = [act(policy, each) for each in chosen]
    again = [act(policy, each) for each in reversed(chosen)][::-1]
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before, after)
    same = policy.with_settings(settings(5))
    generator = torch.Generator().manual_seed(4)
    cognition, noise = torch.randn(3, 1, 64, generator=generator), torch.randn(3, 16, 7, generator=generator)
    with torch.inference_mode():
        same.act(cognition[:1] * 3, noise[:1])  # another batch size and condition on the same policy
        assert torch.equal(same.act(cognition, noise), first[0])


def test_step_similarity_is_the_mean_cosine_of_consecutive_steps():
    features = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    expected = []
    for a, b in ((0, 1), (1, 2)):
        cosines = (features[a] * features[b]).sum(-1) / (features[a].norm(dim=-1) * features[b].norm(dim=-1))
        expected.append(float(cosines.mean()))
    assert step_similarity(features) == pytest.approx(expected, abs=1e-6)  # float32
