"""Every plain decoder of transformers, small: what evla writes of it is right, or it is refused in one line."""

import json
from pathlib import Path

import decoder_types
import pico
import pytest
import torch
from decoder_types import causal_types, difference, evla, make_checkpoint, outcome
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from evla_cli import checking
from evla_cli.calibration import load_samples
from evla_cli.families import open_checkpoint
from evla_cli.families.layer_entries import layer_entries, of_kept_layers
from evla_cli.models.streaming import DecoderStream
from evla_cli.plan import StackPlan

# Of transformers 5.23: whose layers can be dropped and whose MLPs can be narrowed; whose layers can be dropped.
BOTH = """
    cohere cohere2 cwm doge ernie4_5 exaone4 gemma gemma2 gemma3_text gemma4_text gemma4_unified_text granite
    granite_swa helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder llama ministral ministral3 mistral
    olmo olmo2 olmo3 qwen2 qwen3 qwen3_5_text seed_oss smollm3 stablelm vaultgemma youtu
"""
LAYERS = """
    apertus arcee bamba bitnet falcon_h1 glm glm4 gpt_oss granitemoe_swa inkling_text jais2 jetmoe lfm2
    llama4_text minimax_m3_vl_text modernbert-decoder moshi nanochat nemotron persimmon phi phi3 starcoder2
    zamba
"""


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma4_text", "qwen2", "smollm3"])
def test_layers_and_width_are_right(kind: str, tmp_path: Path):
    found = outcome(kind, tmp_path, ("magnitude",))
    assert found == dict.fromkeys(("inspect", "analyze", "layers", "magnitude"), "right")


@pytest.mark.parametrize("kind", ["bamba", "llama4_text", "modernbert-decoder", "lfm2", "gpt_oss", "phi"])
def test_layers_are_right_and_width_is_refused(kind: str, tmp_path: Path):
    found = outcome(kind, tmp_path, ("magnitude",))
    assert "only gated MLPs can be narrowed" in found.pop("magnitude")
    assert found == dict.fromkeys(("inspect", "analyze", "layers"), "right")


def test_experts_one_by_one_are_refused_alike(tmp_path: Path):
    found = outcome("mixtral", tmp_path, ("magnitude",))
    assert found.keys() == {"inspect", "analyze", "layers", "magnitude"}
    assert all("mixture of experts whose experts stand one by one on disk" in text for text in found.values())


def test_a_layer_that_depends_on_its_number_is_refused(tmp_path: Path):
    found = outcome("diffllama", tmp_path, ("magnitude",))
    assert "model.layers.2 would be built as another layer (self_attn.lambda_init" in found.pop("layers")
    assert found == dict.fromkeys(("inspect", "analyze", "magnitude"), "right")


@pytest.mark.parametrize("kind", ["phi", "modernbert-decoder", "lfm2"])  # final_layernorm, final_norm, embedding_norm
def test_a_final_norm_may_have_any_name(kind: str, tmp_path: Path):
    """Its output decides where layers are chosen by what changes there."""
    source = make_checkpoint(tmp_path / "source", kind)
    pico.write_text_samples(tmp_path / "texts.jsonl")
    (sample,) = load_samples(tmp_path / "texts.jsonl", "text", 1)
    stream = DecoderStream(open_checkpoint(source), [sample], 1, torch.float32)
    for index, layer in enumerate(stream.layers()):
        (batch,) = stream.batches
        batch.hidden_states = layer(batch.hidden_states, **stream.arguments(batch, index))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.tensor([Tokenizer.from_file(str(source / "tokenizer.json")).encode(sample.text).ids])
    with torch.inference_mode():
        wanted = model.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(stream.load_last_parts()(batch.hidden_states), wanted)


@pytest.mark.parametrize("kind", ["phi", pytest.param("bamba", marks=pytest.mark.slow)])
def test_layers_that_give_tuples_are_chosen_by_samples(kind: str, tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", kind)
    pico.write_text_samples(tmp_path / "texts.jsonl")
    options = ("--drop-layers", "1", "--layer-method", "iterative", "--samples", tmp_path / "texts.jsonl")
    assert evla("prune", source, tmp_path / "pruned", *options) is None
    assert difference(source, tmp_path / "pruned") <= decoder_types.TOLERANCE


def test_only_the_last_layer_of_its_kind_can_be_asked_for(tmp_path: Path):
    """Gemma 4's config makes the last layer a global one, whatever it says."""
    source = make_checkpoint(tmp_path / "source", "gemma4_text")
    error = evla("prune", source, tmp_path / "pruned", "--drop-layer-ids", "5,7")
    assert error is not None
    assert ": without layers 5, 7 model.layers.6 would be built as another layer" in error
    assert not (tmp_path / "pruned").exists()


def test_an_attention_layer_stays(tmp_path: Path):
    """Without one, transformers could not say how many tokens its cache holds: `generate` would fail."""
    source = make_checkpoint(tmp_path / "source", "bamba")
    error = evla("prune", source, tmp_path / "pruned", "--drop-layer-ids", "2,5")
    assert error is not None
    assert "Keep one attention layer" in error


def test_the_layer_whose_keys_others_read_stays(tmp_path: Path):
    sizes = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 2}
    kinds = ["sliding_attention", "full_attention"] * 4
    source = make_checkpoint(tmp_path / "source", "gemma4_text", layer_types=kinds, **sizes)
    options = ("--drop-layer-ids", "4", "--no-check")
    error = evla("prune", source, tmp_path / "pruned", *options)
    assert error is not None
    assert "would be built as another layer" in error


@pytest.mark.parametrize("entry", [{"return_dict": False}, {"attn_implementation": "flash_attention_2"}])
def test_how_somebody_runs_the_model_is_no_part_of_it(entry: dict[str, object], tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | entry))
    assert evla("prune", source, tmp_path / "pruned", "--drop-layer-ids", "1") is None


def test_a_switch_is_no_number(tmp_path: Path):
    """Layer 1 that becomes layer 0 may have a number that changes with it, but no True that becomes False."""
    before, after = torch.nn.Identity(), torch.nn.Identity()
    before.layer_idx, after.layer_idx = 1, 0
    assert checking._difference(before, after, 1, 0, StackPlan(2, 8, (1,))) is None
    before.is_causal, after.is_causal = True, False
    assert checking._difference(before, after, 1, 0, StackPlan(2, 8, (1,))) == "is_causal False, not True"


@pytest.mark.parametrize("read", ["source/config.json", "texts.jsonl"])
def test_analyze_replaces_nothing_that_it_reads(read: str, tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "llama")
    pico.write_text_samples(tmp_path / "texts.jsonl")
    before = (tmp_path / read).read_bytes()
    options = ("--samples", tmp_path / "texts.jsonl", "-o", tmp_path / read, "--overwrite")
    error = evla("analyze", source, *options)
    assert error is not None
    assert "which is read; choose another output" in error
    assert (tmp_path / read).read_bytes() == before


def test_a_first_layer_without_a_norm_stays_first(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", "modernbert-decoder")
    error = evla("prune", source, tmp_path / "pruned", "--drop-layer-ids", "0")
    assert error is not None
    assert ": without layer 0 model.layers.1 would be built as another layer (" in error


def test_what_is_packed_over_layers_loses_the_parts_of_removed_ones(tmp_path: Path):
    packed = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256}
    found = outcome("gemma4_text", tmp_path, (), **packed)
    assert found == dict.fromkeys(("inspect", "analyze", "layers"), "right")
    table = "model.embed_tokens_per_layer.weight"
    before, after = (open_checkpoint(tmp_path / name).weights[table] for name in ("source", "layers"))
    parts = before.load().unflatten(1, (8, 16))
    assert torch.equal(after.load(), parts[:, [0, 2, 3, 5, 6, 7]].flatten(1))


def test_values_are_compared_where_the_structure_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_checkpoint(tmp_path / "source", "diffllama")
    monkeypatch.setattr("evla_cli.checking._check_blocks", lambda *_: None)
    arguments = ("prune", source, tmp_path / "pruned", "--drop-layer-ids", "1,4")
    error = evla(*arguments)
    assert error is not None
    assert "model.layers.1 of the output (model.layers.2 of the source) differs by" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert evla(*arguments, "--no-check") is None
    assert '"checked": false' in (tmp_path / "pruned/manifest.json").read_text()


def test_a_lost_weight_is_seen_before_the_output_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is checked is what was written, not what was meant to be."""
    from evla_cli.families import huggingface

    write = huggingface.write_huggingface_weights

    def written_wrongly(dest, tensors, **options):
        first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
        return write(dest, tensors | {first: tensors[second], second: tensors[first]}, **options)

    source = make_checkpoint(tmp_path / "source", "llama")
    monkeypatch.setattr(huggingface, "write_huggingface_weights", written_wrongly)
    error = evla("prune", source, tmp_path / "pruned", "--drop-layer-ids", "1,4")
    assert error is not None
    assert "model.layers.0 of the output (model.layers.0 of the source) differs by" in error
    assert not (tmp_path / "pruned").exists()


def test_removed_channels_are_compared_with_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from evla_cli.methods import layer_pruning

    kept = layer_pruning.slice_columns
    monkeypatch.setattr(layer_pruning, "slice_columns", lambda down, keep: kept(down, keep.flip(0)))
    source = make_checkpoint(tmp_path / "source", "llama")
    error = evla("prune", source, tmp_path / "pruned", "--mlp-prune-ratio", "0.25", "--mlp-method", "magnitude")
    assert error is not None
    assert "model.layers.0 of the output (model.layers.0 of the source) differs by" in error


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("layer_types", ["a", "b", "c", "d"], ["a", "c", "d"]),
        ("no_rope_layers", [1, 1, 0, 1], [1, 0, 1]),
        ("attn_layer_indices", [1, 3], [2]),
        ("full_attn_idxs", [0, 2], [0, 1]),
        ("moe_layers", [0, 1, 2, 3], [0, 1, 2]),
        ("per_layer_config", {"1": {"head_dim": 8}, "3": {"head_dim": 16}}, {"2": {"head_dim": 16}}),
    ],
)
def test_entries_about_layers_follow_them(key: str, value: object, kept: object):
    assert of_kept_layers({key: value}, 4, [0, 2, 3]) == {key: kept}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["A", "B", "C", "D"]),
        ("languages", ["en", "de", "fr", "it"]),
        ("time_step_limit", [0.0, 1.0, 2.0, 3.0]),
        ("ssm_multipliers", [0.5, 1.0, 2.0, 3.0]),
        ("eos_token_id", [1, 2, 3, 4]),
        ("id2label", {"0": "a", "1": "b"}),
        ("rope_parameters", {"rope_theta": 10000.0}),
        ("mlp_only_layers", []),
    ],
)
def test_entries_about_other_things_stay(key: str, value: object):
    assert layer_entries({key: value}, 4) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH.split())
def test_every_type_with_gated_mlps(kind: str, tmp_path: Path):
    found = outcome(kind, tmp_path)
    assert found == dict.fromkeys(("inspect", "analyze", "layers", *decoder_types.ROW_METHODS), "right")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS.split())
def test_every_type_with_other_mlps(kind: str, tmp_path: Path):
    found = outcome(kind, tmp_path)
    assert found.pop("magnitude").startswith("refused: ")
    assert found == dict.fromkeys(("inspect", "analyze", "layers"), "right")


@pytest.mark.slow
def test_every_other_type_is_right_or_refused(tmp_path: Path):
    wrong = {}
    for kind in causal_types():
        if kind not in (*BOTH.split(), *LAYERS.split()):
            found = outcome(kind, tmp_path / kind)
            wrong[kind] = [text for text in found.values() if text != "right" and not text.startswith("refused: ")]
            if found["inspect"] != "right":  # what inspect refuses, all refuse
                wrong[kind] += [text for text in found.values() if text == "right"]
    assert {kind: texts for kind, texts in wrong.items() if texts} == {}
