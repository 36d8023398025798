"""The FLOPs counter against the table of EfficientVLA (arXiv 2506.10100), on CogACT's real sizes without weights."""

import math
from functools import cache
from pathlib import Path

import pico
import pytest
from make_synthetic_checkpoint import cogact_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evla_cli.evaluation.flops import count_flops
from evla_cli.evaluation.stock import load_stock_policy
from evla_cli.families.base import prune_config
from evla_cli.families.cogact import COGACT
from evla_cli.methods.mlp_pruning import prune_width
from evla_cli.models.skeleton import build_skeleton, expected_shapes
from evla_cli.plan import PrunePlan, StackPlan
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.settings import ActionCacheSettings, InferenceSettings, Recipe, VisualTokenSettings


@cache
def skeleton(layers=32, mlp=11008, head="base"):
    config = cogact_config(head)
    config["text_config"] |= {"num_hidden_layers": layers, "intermediate_size": mlp}
    return build_skeleton(COGACT, config)


def settings(tokens=None, interval=1):
    return InferenceSettings(
        visual_tokens=VisualTokenSettings(num_keep=tokens), action_cache=ActionCacheSettings(interval=interval)
    )


def dense():
    return count_flops(skeleton(), settings())


def parameters(model):
    return sum(math.prod(shape) for shape in expected_shapes(model).values())


def test_dense_total_of_every_part():
    flops = dense()
    parts = (flops.vision + flops.projector, flops.language_model, flops.action_head, flops.total)
    assert parts == pytest.approx((405.5e9, 3726.5e9, 57.96e9, 4190e9), rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "mlp", "tokens", "interval", "percent"),
    [
        pytest.param(32, 11008, 112, 1, 58.5, id="random, T=112"),
        pytest.param(32, 11008, 56, 1, 42.0, id="FastV, T=56"),
        pytest.param(28, 8256, 112, 5, 45.1, id="L=28, T=112"),
        pytest.param(28, 8256, 56, 5, 32.9, id="L=28, T=56"),
        pytest.param(22, 8256, 112, 5, 38.2, id="L=22, T=112"),
        pytest.param(22, 8256, 56, 5, 28.9, id="L=22, T=56"),
    ],
)
def test_percentage_of_the_dense_flops(layers, mlp, tokens, interval, percent):
    flops = count_flops(skeleton(layers, mlp), settings(tokens, interval))
    assert 100 * flops.total / dense().total == pytest.approx(percent, abs=0.7)


@pytest.mark.parametrize(("tokens", "tflops"), [(56, 1.76), (72, 1.96), (96, 2.25), (112, 2.45), (256, 4.19)])
def test_tflops_of_token_pruning_alone(tokens, tflops):
    assert count_flops(skeleton(), settings(tokens)).total / 1e12 == pytest.approx(tflops, abs=0.01)


@pytest.mark.parametrize(
    ("layers", "mlp", "head", "billions"),
    [
        (32, 11008, "base", 7.63),
        (28, 8256, "base", 5.87),
        (22, 8256, "base", 4.86),
        (32, 11008, "small", 7.554),
        (22, 8256, "small", 4.786),
        (32, 11008, "large", 7.849),
        (22, 8256, "large", 5.081),
    ],
)
def test_parameters(layers, mlp, head, billions):
    assert parameters(skeleton(layers, mlp, head)) / 1e9 == pytest.approx(billions, abs=0.01)


def without_vision(layers, drop, ratio):
    """CogACT-Base with 25 % of the decoder's rows, `drop` blocks of each tower and `ratio` of their rows removed."""
    config = cogact_config("base")

    def stack(num_layers, width, kept_layers, kept_width):
        keep = (*range(kept_layers - 1), num_layers - 1)
        return {"num_layers": num_layers, "intermediate_size": width, "keep_layers": keep} | (
            {"mlp_keep": (tuple(range(kept_width)),) * len(keep)} if kept_width < width else {}
        )

    towers = {
        name: StackPlan(**stack(blocks, width, blocks - drop, prune_width(width, ratio)))
        for name, blocks, width in (("dino", 24, 4096), ("siglip", 27, 4304))
    }
    plan = PrunePlan(**stack(32, 11008, layers, 8256), vision=towers)
    return build_skeleton(COGACT, prune_config(config, COGACT, plan))


@pytest.mark.parametrize(
    ("layers", "kept", "drop", "ratio", "percent", "billions"),
    [
        (22, 56, 0, 0.0, 28.72, 4.862),
        (22, 56, 6, 0.0, 26.67, 4.695),
        (22, 56, 0, 0.25, 27.26, 4.741),
        (22, 56, 6, 0.25, 25.55, 4.602),
        (22, 56, 12, 0.5, 23.09, 4.400),
        (22, 40, 0, 0.25, 24.69, 4.741),
        (22, 40, 10, 0.25, 21.83, 4.509),
        (20, 40, 8, 0.25, 21.25, 4.218),
        (18, 40, 6, 0.25, 20.66, 3.927),
        (16, 56, 6, 0.25, 21.30, 3.590),
    ],
)
def test_pruned_towers(layers, kept, drop, ratio, percent, billions):
    """The table of docs/vision.md; the towers' operations by hand."""
    model = without_vision(layers, drop, ratio)
    flops = count_flops(model, settings(kept, interval=5))
    assert 100 * flops.total / dense().total == pytest.approx(percent, abs=0.005)
    assert parameters(model) / 1e9 == pytest.approx(billions, abs=0.0006)
    dino, siglip = {0.0: (4096, 4304), 0.25: (3072, 3200), 0.5: (2048, 2176)}[ratio]
    expected = 2 * 261 * (24 - drop) * (4 * 1024**2 + 2 * 1024 * dino)
    expected += 2 * 256 * (27 - drop) * (4 * 1152**2 + 2 * 1152 * siglip)
    expected += 2 * 256 * 3 * 14**2 * (1024 + 1152)
    assert flops.vision == expected
    full = count_flops(model, settings(kept, interval=5), convention="full").vision  # the last block never runs
    expected -= 2 * 261 * (4 * 1024**2 + 2 * 1024 * dino) + 2 * 256 * (4 * 1152**2 + 2 * 1152 * siglip)
    assert full == expected + 4 * (261**2 * 1024 * (23 - drop) + 256**2 * 1152 * (26 - drop))


def test_what_is_recommended_takes_a_quarter():
    recipe = Recipe.load(Path(__file__).resolve().parent.parent / "configs" / "cogact_recommended.yaml")
    prune = recipe.prune
    assert prune.mlp_prune_ratio == 0.25
    assert prune.vision_drop_layers == 0
    model = without_vision(32 - prune.drop_layers, 0, prune.vision_mlp_prune_ratio)
    assert count_flops(model, recipe.export.settings).total / dense().total == pytest.approx(0.2469, abs=0.00005)


def tokens(method, convention="full", reused=(), **keys):
    chosen = InferenceSettings(visual_tokens=VisualTokenSettings(method=method, **keys))
    return count_flops(skeleton(), chosen, convention=convention, reused=reused).language_model


@pytest.mark.parametrize("convention", ["paper", "full"])
def test_reused_tokens_are_not_computed_but_attended_to(convention):
    """Llama-2-7B: 4 x 4096^2 + 3 x 4096 x 11008 weights a layer, 288 positions, 31 prompt rows that score."""
    weights = 4 * 4096**2 + 3 * 4096 * 11008
    reused = [0, 0, *range(1, 31)]
    expected = sum(2 * weights * (288 - count) for count in reused)
    if convention == "full":
        expected += sum(4 * (288 - count) * 288 * 4096 for count in reused)
        expected += 32 * 2 * 31 * 288 * 4096
    assert tokens("vla_cache", convention, reused) == expected
    assert tokens("vla_cache", convention) == tokens("vla_cache", convention, [0] * 32)


def test_the_share_of_flops_that_vla_cache_leaves_in_the_paper():
    """80.1 % of CogACT-Base's: a quarter of all visual tokens of all layers taken over."""
    chosen = InferenceSettings(visual_tokens=VisualTokenSettings(method="vla_cache"))
    flops = count_flops(skeleton(), chosen, reused=[256 / 4] * 32)
    assert 100 * flops.total / dense().total == pytest.approx(80.1, abs=0.7)


def test_scores_are_counted_where_there_are_any():
    scored, at_random = tokens("evla", num_keep=56), tokens("random", num_keep=56)
    assert tokens("fastv", num_keep=56) == scored
    assert scored - at_random == 2 * 31 * 288 * 4096
    assert tokens("evla", "paper", num_keep=56) == tokens("random", "paper", num_keep=56)
    assert tokens("none") == tokens("evla")


def test_the_full_convention_counts_what_runs():
    """Attention products on top, the unused last block of each tower off."""
    full = count_flops(skeleton(), settings(), convention="full")
    paper = dense()
    assert full.language_model > paper.language_model
    assert full.vision < paper.vision


@pytest.mark.parametrize("interval", [1, 5])
def test_full_and_stock_are_what_torch_counts(cogact_run, interval):
    """torch's own counter sees every product that is executed; those of attention where it is not fused."""
    image, instruction = pico.images(1), ["open drawer"]
    neutral = policy_from_checkpoint(cogact_run, settings(interval=interval))
    policies = {"full": neutral} | ({"stock": load_stock_policy(cogact_run)} if interval == 1 else {})
    for convention, policy in policies.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            policy.predict(image, instruction)
        length = len(policy.processor.prompt(instruction[0])[0])
        expected = count_flops(policy.model, policy.settings, length, convention).total
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12), convention
