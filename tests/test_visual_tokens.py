"""Token selection against Eqs. 2-5 written out as loops, and its scores against transformers' own attention weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evla_cli.errors import EvlaError
from evla_cli.methods.visual_tokens import attention_received, random_scores, row_attention, select_tokens
from evla_cli.settings import VisualTokenSettings


def select(scores, features, num_keep, num_key=4, task_ratio=0.5, diversity="one_shot"):
    settings = VisualTokenSettings(num_keep, num_key=num_key, task_ratio=task_ratio, diversity=diversity)
    return select_tokens(scores, features, settings)


def literal_selection(scores, features, num_keep, num_key, task_ratio, diversity):
    """One sample: lists of floats in, (key, task, diverse) out. The paper's sets, one loop a symbol."""
    low, high = min(scores), max(scores)
    relevance = [(score - low) / (high - low) for score in scores]  # Eq. 3
    num_augment = num_keep - num_key
    num_task = math.floor(task_ratio * num_augment)
    ranked = sorted(range(len(scores)), key=lambda token: (-relevance[token], token))
    key = ranked[:num_key]
    task = ranked[num_key : num_key + num_task]
    rest = sorted(set(range(len(scores))) - set(key) - set(task))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(features[a], features[b], strict=True))
        return dot / (math.hypot(*features[a]) * math.hypot(*features[b]))

    diverse = []
    anchors = list(key) if diversity == "one_shot" else [*key, *task]
    while len(diverse) < num_augment - num_task:
        distance = {token: 1 - max(cosine(token, anchor) for anchor in anchors) for token in rest}  # Eq. 4
        best = min(rest, key=lambda token: (-distance[token], token))
        diverse.append(best)
        rest.remove(best)
        if diversity == "greedy":
            anchors.append(best)
    return key, task, diverse


@st.composite
def selections(draw):
    num_tokens = draw(st.integers(3, 24))
    num_keep = draw(st.integers(1, num_tokens))
    num_key = draw(st.integers(1, num_keep))
    # Few different values, so that ties are common.
    numbers = st.integers(0, draw(st.sampled_from([2, 1000])))
    scores = draw(st.lists(numbers, min_size=num_tokens, max_size=num_tokens).filter(lambda s: len(set(s)) > 1))
    return scores, num_keep, num_key, draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])), draw(st.integers(0, 10**6))


@pytest.mark.parametrize("diversity", ["one_shot", "all_selected", "greedy"])
@settings(max_examples=60, deadline=None)
@given(case=selections())
def test_selection_equals_the_equations_written_as_loops(diversity, case):
    scores, num_keep, num_key, task_ratio, seed = case
    features = torch.randn(len(scores), 5, generator=torch.Generator().manual_seed(seed))
    found = select(
        torch.tensor([scores], dtype=torch.float32), features[None], num_keep, num_key, task_ratio, diversity
    )
    key, task, diverse = literal_selection(scores, features.tolist(), num_keep, num_key, task_ratio, diversity)
    assert found.reasons["key"][0].tolist() == key
    assert found.reasons["task"][0].tolist() == task
    assert found.reasons["diverse"][0].tolist() == diverse
    assert found.kept[0].tolist() == sorted(key + task + diverse)


def test_every_sample_of_a_batch_is_selected_on_its_own():
    generator = torch.Generator().manual_seed(0)
    scores, features = torch.rand(6, 20, generator=generator), torch.randn(6, 20, 8, generator=generator)
    for diversity in ("one_shot", "all_selected", "greedy"):
        together = select(scores, features, 11, 3, 0.5, diversity)
        for row in range(6):
            alone = select(scores[row : row + 1], features[row : row + 1], 11, 3, 0.5, diversity)
            assert torch.equal(together.kept[row], alone.kept[0])


@pytest.mark.parametrize(("num_keep", "sizes"), [(56, (4, 26, 26)), (112, (4, 54, 54)), (57, (4, 26, 27))])
def test_shares_are_those_of_the_paper(num_keep, sizes):
    generator = torch.Generator().manual_seed(0)
    found = select(torch.rand(1, 256, generator=generator), torch.randn(1, 256, 8, generator=generator), num_keep)
    assert (found.reasons["key"].shape[1], found.reasons["task"].shape[1], found.reasons["diverse"].shape[1]) == sizes
    assert len(set(found.kept[0].tolist())) == num_keep


def test_keeping_all_tokens_keeps_them_in_order():
    generator = torch.Generator().manual_seed(0)
    for diversity in ("one_shot", "all_selected", "greedy"):
        found = select(
            torch.rand(2, 9, generator=generator), torch.randn(2, 9, 4, generator=generator), 9, 2, 0.5, diversity
        )
        assert found.kept.tolist() == [list(range(9))] * 2


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0]])
    features = torch.ones(1, 7, 3)  # every distance is the same
    found = select(scores, features, 5, num_key=2, task_ratio=0.5)
    assert (found.reasons["key"].tolist(), found.reasons["task"].tolist(), found.reasons["diverse"].tolist()) == (
        [[1, 2]],
        [[3]],
        [[0, 4]],
    )


@pytest.mark.parametrize("bad", [[[2.0, 2.0, 2.0]], [[0.0, 1.0, float("nan")]], [[0.0, 1.0, float("inf")]]])
def test_scores_that_rank_nothing_are_refused(bad):
    good = [[0.0, 1.0, 2.0]]
    with pytest.raises(EvlaError, match="cannot be ranked"):
        select(torch.tensor(good + bad), torch.randn(2, 3, 4), 2, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_received_equals_transformers_eager_attention(padded):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        vocab_size=8, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaModel(config).eval()
    hidden = torch.randn(3, 14, 32)
    mask = torch.ones(3, 14, dtype=torch.long)
    if padded:
        mask[0, 11:] = 0
        mask[2, 13:] = 0
    first_row = 8
    context = mask[:, first_row:].clone()
    context[1, 2] = 0  # a real row that does not count
    with torch.inference_mode():
        weights = model(inputs_embeds=hidden, attention_mask=mask, output_attentions=True).attentions[0]
        attention = model.layers[0].self_attn
        normed = model.layers[0].input_layernorm(hidden)
        cos, sin = model.rotary_emb(hidden, position_ids=torch.arange(14)[None])
        queries, keys = (
            projection(normed).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        shares = row_attention(queries[:, :, first_row:], keys, mask if padded else None)
        received = attention_received(shares, context)
    expected = torch.zeros(3, 14)
    for sample in range(3):
        for row in range(first_row, 14):
            if context[sample, row - first_row]:
                expected[sample] += weights[sample, :, row].mean(dim=0)
    # The same products in another order: float32 rounding of sums of at most 6 numbers below 1.
    torch.testing.assert_close(received, expected, rtol=0, atol=2e-6)


def test_fastv_keeps_the_highest_scores():
    scores = torch.tensor([[0.1, 0.4, 0.4, 0.2, 0.3], [0.5, 0.1, 0.2, 0.3, 0.4]])
    found = select_tokens(scores, torch.zeros(2, 5, 1), VisualTokenSettings(3, method="fastv"))
    assert found.reasons["attended"].tolist() == [[1, 2, 4], [0, 4, 3]]
    assert found.kept.tolist() == [[1, 2, 4], [0, 3, 4]]


def test_random_choices_depend_on_seed_episode_call_and_row_alone():
    settings = VisualTokenSettings(5, method="random")

    def kept(rows, *moment):
        return select_tokens(random_scores(rows, 12, *moment), torch.zeros(rows, 12, 1), settings).kept

    four = kept(4, 7, 1, 2)
    assert torch.equal(four, kept(4, 7, 1, 2))
    assert torch.equal(four[:2], kept(2, 7, 1, 2))
    others = [kept(4, 8, 1, 2), kept(4, 7, 2, 2), kept(4, 7, 1, 3), four.roll(1, dims=0)]
    assert not any(torch.equal(four, other) for other in others)
    # Every token has the same chance: 5 in 12 of 4000, deviation 31.
    counts = torch.cat([kept(4, 0, 0, call) for call in range(1000)]).flatten().bincount()
    assert (counts - 4000 * 5 / 12).abs().max() < 5 * 31
