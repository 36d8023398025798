"""What every family must do: identity plans change nothing, pruned models are the original run on what was kept."""

import json
import shutil

import numpy as np
import pico
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from evla_cli import pipeline
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.families.base import check_weights
from evla_cli.families.cogact import NativeNames
from evla_cli.models import skeleton
from evla_cli.models.skeleton import build_skeleton, expected_shapes, load_model
from evla_cli.runtime.policy import Policy, policy_from_checkpoint
from evla_cli.settings import InferenceSettings

DROPPED = (2, 3)  # with windows, no-rope layers and depths of the pico models, other kinds of layers move up


class Skip(nn.Module):
    """Stands where a dropped layer stood."""

    attention_type = "full_attention"

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def without(layers: nn.ModuleList, plan) -> None:
    """The original with dropped layers skipped and dropped channels zeroed."""
    for number, layer in enumerate(plan.keep_layers):
        if plan.mlp_keep is not None:
            dropped = sorted(set(range(plan.intermediate_size)) - set(plan.mlp_keep[number]))
            with torch.no_grad():
                layers[layer].mlp.down_proj.weight[:, dropped] = 0
    for layer in plan.dropped_layers:
        layers[layer] = Skip()


class FamilyContract:
    """A family supplies `source` (fixture), `layers(model)`, `load(path)` and `run(model)`."""

    def prune(self, source, dest, **options):
        options = {"protect_first": 0, "mlp_method": "random", **options}
        return pipeline.prune(source, dest, **options).plan

    def test_identity_plan_is_bit_exact(self, source, tmp_path):
        self.prune(source, tmp_path / "same")
        before, after = open_checkpoint(source), open_checkpoint(tmp_path / "same")
        where = {"_name_or_path": None}  # transformers' note of where a config was read
        assert {**before.config, **where} == {**after.config, **where}
        assert list(before.reader.tensors) == list(after.reader.tensors)
        for name, lazy in before.reader.tensors.items():
            assert torch.equal(lazy.load(), after.reader.tensors[name].load()), name
        assert torch.equal(self.run(self.load(source)), self.run(self.load(tmp_path / "same")))

    def test_pruned_weights_fit_the_rebuilt_skeleton(self, source, tmp_path):
        plan = self.prune(source, tmp_path / "pruned", drop_ids=DROPPED, mlp_prune_ratio=0.5)
        checkpoint = open_checkpoint(tmp_path / "pruned")
        model = build_skeleton(checkpoint.family, checkpoint.config)
        check_weights(expected_shapes(model), checkpoint.weights, checkpoint.root)
        assert checkpoint.num_layers == len(plan.keep_layers) == 4
        assert checkpoint.intermediate_size == 64

    def test_dropping_layers_is_bit_equal_to_skipping_them(self, source, tmp_path):
        plan = self.prune(source, tmp_path / "pruned", drop_ids=DROPPED)
        original = self.load(source)
        whole = self.run(original)
        without(self.layers(original), plan)
        expected = self.run(original)
        assert torch.equal(self.run(self.load(tmp_path / "pruned")), expected)
        assert (whole - expected).abs().max() > 1e-2 * whole.abs().max()

    def test_dropping_layers_and_channels_equals_skipping_and_zeroing(self, source, tmp_path):
        plan = self.prune(source, tmp_path / "pruned", drop_ids=DROPPED, mlp_prune_ratio=0.5, seed=3)
        original = self.load(source)
        without(self.layers(original), plan)
        expected = self.run(original)
        # Sums over 64 products instead of 128 of which half are zero: float32 rounding through four layers.
        found = self.run(self.load(tmp_path / "pruned"))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_the_same_prune_twice_gives_the_same_bytes(self, source, tmp_path):
        for name in ("one", "two"):
            self.prune(source, tmp_path / name, drop_ids=DROPPED, mlp_prune_ratio=0.5)
        files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
        assert any(path.suffix in (".pt", ".safetensors") for path in files)
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file

    def test_layers_drop_again_from_what_was_pruned(self, source, tmp_path):
        self.prune(source, tmp_path / "once", drop_ids=[1])
        self.prune(tmp_path / "once", tmp_path / "twice", drop_ids=[3])  # layer 4 of the original
        self.prune(source, tmp_path / "both", drop_ids=[1, 4])
        assert torch.equal(self.run(self.load(tmp_path / "twice")), self.run(self.load(tmp_path / "both")))


class CogACTContract(FamilyContract):
    def load(self, path) -> Policy:
        return policy_from_checkpoint(path)

    def layers(self, policy):
        return policy.model.language_model.model.layers

    def run(self, policy):
        """Cognition tokens and action chunks of prompts of different lengths."""
        noise = torch.randn(5, 16, 7, generator=torch.Generator().manual_seed(0))
        inputs = policy.prepare(pico.images(5), pico.INSTRUCTIONS)
        with torch.inference_mode():
            cognition, _ = policy.think(inputs, policy.see(inputs))
            return torch.cat((cognition.flatten(), policy.act(cognition, noise).flatten() / 10))


class TestCogACTNative(CogACTContract):
    @pytest.fixture
    def source(self, cogact_run):
        return cogact_run

    def test_layout_stays_native(self, source, tmp_path):
        self.prune(source, tmp_path / "pruned", drop_ids=DROPPED, mlp_prune_ratio=0.5)
        saved = torch.load(tmp_path / "pruned" / "checkpoints" / "pico.pt", weights_only=True)["model"]
        assert set(saved) == {"vision_backbone", "llm_backbone", "projector", "action_model"}
        assert saved["llm_backbone"]["llm.model.layers.3.mlp.down_proj.weight"].shape == (64, 64)
        assert not any(name.startswith("llm.model.layers.4.") for name in saved["llm_backbone"])
        config = json.loads((tmp_path / "pruned" / "llm_config" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (4, 64)

    def test_native_to_model_to_native_is_bit_identical(self, source):
        checkpoint = open_checkpoint(source)
        again = NativeNames(checkpoint.config).to_native(checkpoint.weights)
        saved = torch.load(source / "checkpoints" / "pico.pt", weights_only=True)["model"]
        flat = {f"model.{part}.{name}": tensor for part, tensors in saved.items() for name, tensor in tensors.items()}
        assert set(again) == set(flat)
        for name, tensor in flat.items():
            found = again[name].load()
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name

    def test_native_names_are_timms(self, source):
        """A few of them by hand: what CogACT's own code looks up in the file."""
        checkpoint = open_checkpoint(source)
        native, model = checkpoint.reader.tensors, checkpoint.weights

        def theirs(name):
            return native[f"model.vision_backbone.{name}"].load()

        def ours(name):
            return model[name].load()

        attention = "dino.encoder.layer.1.attention"
        joined = torch.cat([ours(f"{attention}.{name}_proj.weight") for name in "qkv"])
        assert torch.equal(theirs("dino_featurizer.blocks.1.attn.qkv.weight"), joined)
        assert torch.equal(
            theirs("dino_featurizer.blocks.2.ls2.gamma"), ours("dino.encoder.layer.2.layer_scale2.lambda1")
        )
        positions = ours("dino.embeddings.position_embeddings")
        assert torch.equal(theirs("dino_featurizer.pos_embed"), positions[:, 1:])
        assert not positions[:, 0].any()  # timm gives the class token no position
        joined = torch.cat([ours(f"siglip.encoder.layers.3.self_attn.{name}_proj.bias") for name in "qkv"])
        assert torch.equal(theirs("siglip_featurizer.blocks.3.attn.qkv.bias"), joined)
        pooling = ours("siglip.head.attention.in_proj_weight")
        assert torch.equal(theirs("siglip_featurizer.attn_pool.q.weight"), pooling[:48])
        assert torch.equal(theirs("siglip_featurizer.attn_pool.kv.weight"), pooling[48:])

    def test_the_model_gets_the_weights_that_were_saved(self, source, tmp_path):
        saved = pico.write_cogact(tmp_path / "run").state_dict()
        checkpoint = open_checkpoint(tmp_path / "run")
        loaded = load_model(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root).state_dict()
        assert set(loaded) == set(saved)
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)

    def test_sizes_are_read_off_the_tensors(self, source):
        config = open_checkpoint(source).config
        for part, sizes in pico.COGACT.items():
            assert {key: config[part].get(key, value) for key, value in sizes.items()} == sizes
        assert config["norm_stats"] == pico.STATS

    def test_averages_and_old_buffers_do_not_disturb(self, source, tmp_path):
        run = shutil.copytree(source, tmp_path / "run")
        saved = torch.load(run / "checkpoints" / "pico.pt", weights_only=True)
        saved["model"]["ema_diffusion"] = dict(saved["model"]["action_model"])
        saved["model"]["llm_backbone"]["llm.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        torch.save(saved, run / "checkpoints" / "pico.pt")
        assert torch.equal(self.run(self.load(run)), self.run(self.load(source)))

    @pytest.mark.parametrize("part", ["dino", "siglip", "action_model"])
    def test_unknown_head_counts_are_asked_for(self, source, tmp_path, part):
        run = shutil.copytree(source, tmp_path / "run")
        config = json.loads((run / "config.json").read_text())
        del config["evla"]["num_attention_heads"][part]
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(EvlaError, match=f'heads of {part} .* cannot be read off.*"{part}": <number>'):
            open_checkpoint(run)

    @pytest.mark.parametrize("heads", [0, 5, "2", 2.0])
    def test_impossible_head_counts_are_refused(self, source, tmp_path, heads):
        run = shutil.copytree(source, tmp_path / "run")
        config = json.loads((run / "config.json").read_text())
        config["evla"]["num_attention_heads"]["dino"] = heads
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(EvlaError, match=r"heads of dino|num_attention_heads\.dino"):
            open_checkpoint(run)

    def test_a_language_model_that_is_not_llama_2_needs_its_config(self, source, tmp_path):
        run = shutil.copytree(source, tmp_path / "run")
        shutil.rmtree(run / "llm_config")
        with pytest.raises(EvlaError, match=r"64 wide, not Llama-2-7B; add .*llm_config"):
            open_checkpoint(run)


class TestCogACTBundle(CogACTContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, cogact_run, tmp_path_factory):
        bundle = tmp_path_factory.mktemp("bundle") / "bundle"
        pipeline.export(cogact_run, bundle, InferenceSettings(), max_shard_size="200KB")
        return bundle

    def test_a_bundle_acts_as_the_run_that_it_was_made_from(self, source, cogact_run):
        assert len(list(source.glob("*.safetensors"))) > 1
        assert torch.equal(self.run(self.load(source)), self.run(self.load(cogact_run)))


class DecoderContract(FamilyContract):
    name: str

    @pytest.fixture
    def source(self, decoders):
        return decoders(self.name)

    def load(self, path):
        return AutoModelForCausalLM.from_pretrained(path).eval()

    def layers(self, model):
        return model.model.layers

    def run(self, model):
        """Logits over sequences four windows long."""
        ids = torch.from_numpy(np.random.default_rng(0).integers(4, 64, (3, 4 * pico.WINDOW)))
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits

    def test_the_pruned_model_generates_the_same_with_and_without_a_cache(self, source, tmp_path):
        """Caches index layers by position and by kind: renumbered layers and sliced kinds must agree."""
        self.prune(source, tmp_path / "pruned", drop_ids=DROPPED, mlp_prune_ratio=0.5)
        model = self.load(tmp_path / "pruned")
        ids = torch.from_numpy(np.random.default_rng(1).integers(4, 64, (1, 2 * pico.WINDOW)))
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        cached, plain = (model.generate(ids, use_cache=use, **options) for use in (True, False))
        assert cached.shape == (1, 2 * pico.WINDOW + 12)
        assert torch.equal(cached, plain)


class TestLlama(DecoderContract):
    name = "llama"


class TestMistral(DecoderContract):
    name = "mistral"


class TestQwen3(DecoderContract):
    name = "qwen3"


class KindsOfLayers(DecoderContract):
    """Layers that differ in kind: the kind must follow the layer, not the index."""

    lists: tuple[str, ...] = ("layer_types",)

    def test_kinds_follow_the_kept_layers(self, source, tmp_path):
        plan = self.prune(source, tmp_path / "pruned", drop_ids=DROPPED)
        before, after = (AutoConfig.from_pretrained(path) for path in (source, tmp_path / "pruned"))
        for name in self.lists:
            kinds = getattr(before, name)
            assert len(set(kinds)) == 2
            assert getattr(after, name) == [kinds[layer] for layer in plan.keep_layers]

    def test_kinds_follow_where_the_config_leaves_them_out(self, source, tmp_path):
        """Many published configs say only what the kinds follow from."""
        bare = shutil.copytree(source, tmp_path / "bare")
        config = json.loads((bare / "config.json").read_text())
        for name in self.lists:
            config.pop(name, None)
        (bare / "config.json").write_text(json.dumps(config))
        expected = self.run(self.load(source))
        assert torch.equal(self.run(self.load(bare)), expected)
        for path in (source, bare):
            self.prune(path, tmp_path / f"pruned-{path.name}", drop_ids=[0, 2, 3])
        pruned = [self.run(self.load(tmp_path / f"pruned-{path.name}")) for path in (source, bare)]
        assert torch.equal(pruned[0], pruned[1])


class TestQwen2(KindsOfLayers):
    name = "qwen2"


class TestGemma2(KindsOfLayers):
    name = "gemma2"


class TestSmolLM3(KindsOfLayers):
    name = "smollm3"
    lists = ("no_rope_layers",)


def test_one_model_is_built_to_check_the_weights_of_a_config_again_and_again(decoders, monkeypatch):
    checkpoint = open_checkpoint(decoders("qwen2"))  # whose embeddings are tied
    where = checkpoint.root
    skeleton.check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, where)
    monkeypatch.delattr(skeleton, "build_skeleton")
    skeleton.check_fits(checkpoint.family, checkpoint.config, checkpoint.weights, where)
    lacking = {name: lazy for name, lazy in checkpoint.weights.items() if name != "model.norm.weight"}
    with pytest.raises(EvlaError, match=r"model\.norm\.weight"):
        skeleton.check_fits(checkpoint.family, checkpoint.config, lacking, where)
    wider = checkpoint.config | {"intermediate_size": 64}
    monkeypatch.undo()
    with pytest.raises(EvlaError, match="the model needs"):
        skeleton.check_fits(checkpoint.family, wider, checkpoint.weights, where)


def test_tied_weights_of_a_skeleton_are_one(decoders):
    checkpoint = open_checkpoint(decoders("qwen2"))
    model = build_skeleton(checkpoint.family, checkpoint.config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
