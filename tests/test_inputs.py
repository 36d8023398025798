"""What users have at hand: checkpoints with more in them than a model, of other makers, quantised; samples and pictures
as other tools write them; options of 0 or an empty text. It is taken for what it is, or one line says what it is."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoConfig, AutoModelForCausalLM

from evla_cli.calibration import load_samples
from evla_cli.checkpoint import files, read_ahead
from evla_cli.checkpoint.reader import open_huggingface_checkpoint
from evla_cli.cli.main import cli
from evla_cli.errors import EvlaError
from evla_cli.families import open_checkpoint
from evla_cli.models import processing
from evla_cli.models.processing import CogACTProcessor, load_tokenizer, to_image
from evla_cli.plan import PrunePlan
from evla_cli.runtime.policy import policy_from_checkpoint
from evla_cli.runtime.simpler import SimplerPolicy
from evla_cli.settings import Recipe

DROP = ("--drop-layer-ids", "4,5", "--quiet")


def evla(*arguments: Any) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(*arguments: Any) -> str:
    """The one line of a refusal."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    return result.stderr


@pytest.fixture
def llama(decoders, tmp_path: Path) -> Path:
    return shutil.copytree(decoders("llama"), tmp_path / "llama")


def edit_config(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entries))


def shard(directory: Path, keep_single: bool) -> None:
    """`model.safetensors` as two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not keep_single:
        (directory / "model.safetensors").unlink()


class TestWhichWeights:
    def test_one_file_beside_shards_is_refused(self, llama):
        shard(llama, keep_single=True)
        message = refused("inspect", llama)
        assert "two sets of weights, model.safetensors and the shards of" in message
        assert "model.safetensors.index.json" in message

    def test_an_index_of_the_one_file_is_no_second_set(self, llama):
        names = load_file(llama / "model.safetensors")
        index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
        (llama / "model.safetensors.index.json").write_text(json.dumps(index))
        assert set(open_huggingface_checkpoint(llama).tensors) == set(names)

    @pytest.mark.parametrize("sharded", [False, True])
    def test_safetensors_beside_bin_is_what_transformers_takes(self, sharded, llama):
        if sharded:
            shard(llama, keep_single=False)
        zeros = {
            name: torch.zeros_like(tensor)
            for name, tensor in AutoModelForCausalLM.from_pretrained(llama).state_dict().items()
        }
        torch.save(zeros, llama / "pytorch_model.bin")
        ours = open_huggingface_checkpoint(llama).tensors
        for name, theirs in AutoModelForCausalLM.from_pretrained(llama).state_dict().items():
            assert torch.equal(ours[name].load(), theirs)

    def test_others_beside_them_are_not_read_ahead(self, llama):
        shutil.copy(llama / "model.safetensors", llama / "consolidated.safetensors")
        read_ahead.start_early(llama)
        assert read_ahead.started_early(open_huggingface_checkpoint(llama).stamps) is not None

    def test_weights_named_by_the_config_are_refused(self, llama):
        edit_config(llama, transformers_weights="other.safetensors")
        assert "transformers_weights names 'other.safetensors'" in refused("inspect", llama)

    def test_weights_that_stand_elsewhere_are_named(self, llama):
        (llama / "model.safetensors").rename(llama / "model.fp16.safetensors")
        assert "model.fp16.safetensors is not read; save the model" in refused("inspect", llama)


class TestWhatIsCopied:
    def test_all_that_fits_the_pruned_model_and_a_word_about_the_rest(self, llama, tmp_path, caplog):
        (llama / "additional_chat_templates").mkdir()
        (llama / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
        for name in ("adapter_config.json", "adapter_model.safetensors", "tf_model.h5", ".gitattributes", "merges.txt"):
            (llama / name).write_text("{}")
        (llama / "onnx").mkdir()
        evla("prune", llama, tmp_path / "out", *DROP)
        (said,) = caplog.messages
        assert said.endswith(": adapter_config.json, adapter_model.safetensors, onnx/, tf_model.h5.")
        found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
        assert {"additional_chat_templates/tool_use.jinja", "merges.txt", "tokenizer.json"} <= found
        assert not found & {"adapter_config.json", "adapter_model.safetensors", "onnx", "tf_model.h5"}
        assert "additional_chat_templates/tool_use.jinja" in (tmp_path / "out/manifest.json").read_text()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_nothing_is_said_where_nothing_is_left_behind(self, decoders, cogact_run, tmp_path, caplog):
        for source in (decoders("llama"), cogact_run):
            evla("prune", source, tmp_path / f"{source.name}-1", *DROP)
        evla("prune", tmp_path / "llama-1", tmp_path / "llama-2", "--drop-layer-ids", 3)
        assert caplog.messages == []

    def test_a_recipe_is_followed_anew_where_a_chat_template_changed(self, llama):
        (llama / "chat_template.jinja").write_text("{{ messages }}")
        before = open_checkpoint(llama).small_files_sha256()
        (llama / "chat_template.jinja").write_text("{{ messages[0] }}")
        assert open_checkpoint(llama).small_files_sha256() != before

    @pytest.mark.parametrize("infinity", [float("inf"), {"__float__": "Infinity"}], ids=["JSON", "transformers 5"])
    def test_an_infinite_number_stays_what_it_is(self, infinity, llama, tmp_path):
        """As the time_step_limit of Mamba-2 and its kin."""
        edit_config(llama, time_step_limit=[0.0, infinity])
        evla("prune", llama, tmp_path / "out", *DROP)
        written = json.loads((tmp_path / "out/config.json").read_text())
        assert written["time_step_limit"] == [0.0, infinity]
        assert AutoConfig.from_pretrained(tmp_path / "out").time_step_limit == [0.0, float("inf")]
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def test_a_size_must_be_finite(self, llama):
        edit_config(llama, rms_norm_eps=float("inf"))
        assert "rms_norm_eps is inf; it must be a finite number" in refused("inspect", llama)

    @pytest.mark.parametrize("kind", ["cache", "unicode", "read-only", "CRLF"])
    def test_wherever_and_however_the_files_stand(self, kind, llama, tmp_path):
        source = llama
        if kind == "cache":  # as in Hugging Face's cache: every file is a link to a blob without a suffix
            shard(llama, keep_single=False)
            source = tmp_path / "models--a--b/snapshots/1234"
            source.mkdir(parents=True)
            (tmp_path / "models--a--b/blobs").mkdir()
            for number, path in enumerate(sorted(llama.iterdir())):
                path.rename(tmp_path / f"models--a--b/blobs/{number}")
                (source / path.name).symlink_to(f"../../blobs/{number}")
        elif kind == "unicode":
            source = llama.rename(tmp_path / "modèle 模型 (1)")
        elif kind == "CRLF":
            text = (llama / "config.json").read_text().replace("\n", "\r\n")
            (llama / "config.json").write_bytes(text.encode())
        else:
            for path in llama.iterdir():
                path.chmod(0o444)
            llama.chmod(0o555)
        evla("prune", f"{source}/", tmp_path / "out", *DROP)
        written = list((tmp_path / "out").iterdir())
        assert not any(path.is_symlink() for path in written)
        assert all(os.stat(path).st_mode & 0o200 for path in written)  # the next one can replace them
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


class TestQuantized:
    @pytest.mark.parametrize(
        ("entry", "found"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
            ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
            ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
            ({"quant_method": "mxfp4"}, "mxfp4"),
        ],
    )
    def test_by_its_config(self, entry, found, llama, text_samples, tmp_path):
        edit_config(llama, quantization_config=entry)
        facts = json.loads(evla("inspect", llama, "--json"))
        assert (facts["quantization"], facts["commands"]) == (found, [])
        assert f"quantised   {found}: evla needs the model as it was before" in evla("inspect", llama)
        for command in (
            ("prune", llama, tmp_path / "out", *DROP),
            ("analyze", llama, "--samples", text_samples, "-o", tmp_path / "i"),
        ):
            assert f"llama is quantised ({found}): evla needs the model as it was before" in refused(*command)

    @pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "weight_packed"])
    def test_by_its_names(self, suffix, llama, tmp_path):
        tensors = load_file(llama / "model.safetensors")
        name = "model.layers.0.mlp.up_proj."
        tensors[name + suffix] = torch.zeros(4, 4, dtype=torch.int32)
        save_file(tensors, llama / "model.safetensors")
        assert f"by the name of {name}{suffix}" in refused("prune", llama, tmp_path / "out", *DROP)

    def test_plain_weights_are_not(self, decoders, cogact_run):
        for source in (decoders("llama"), cogact_run):
            assert json.loads(evla("inspect", source, "--json"))["quantization"] is None


class TestForeign:
    """What is no checkpoint of ours is named for what it is."""

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"adapter_config.json": {}, "adapter_model.safetensors": ""}, "It holds an adapter (adapter_config.json)"),
            ({"model_index.json": {}}, "It is a pipeline of diffusers"),
            ({"config.json": {"type": "smolvla"}, "model.safetensors": ""}, "policy of LeRobot, of type 'smolvla'"),
            ({"checkpoints/last/pretrained_model/config.json": {"type": "act"}}, "It is a policy of LeRobot"),
            (
                {"config.json": {"model_type": "openvla", "auto_map": {}}},
                "says model_type 'openvla', a model with code",
            ),
            ({"config.json": {"model_type": "clip"}}, "says model_type 'clip', a model that evla cannot handle"),
            ({"m.gguf": ""}, "It holds GGUF files"),
            ({"params.json": {}, "consolidated.00.pth": ""}, "in Meta's or Mistral's own layout"),
            (
                {"refs/main": "", "snapshots/abc/config.json": {}},
                "entry of Hugging Face's cache: name d/snapshots/abc.",
            ),
            ({"checkpoint-500/config.json": {}}, "name one of them, such as d/checkpoint-500."),
            ({"bundle/manifest.json": {}}, "It is what evla run wrote: name d/bundle."),
            ({"model.safetensors": ""}, "It lacks config.json"),
            ({"notes.txt": ""}, "evla knows. Expected a CogACT run"),
        ],
    )
    def test_directories(self, files, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, content in files.items():
            path = tmp_path / "d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        said = refused("inspect", "d")
        assert "d is not a checkpoint that evla knows. " in said
        assert "model.safetensors or pytorch_model.bin" in said
        assert message in said

    @pytest.mark.parametrize(("name", "message"), [("m.GGUF", "a GGUF file"), ("m/a.safetensors", "it stands in, m.")])
    def test_files(self, name, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "m").mkdir()
        (tmp_path / name).write_text("")
        assert message in refused("inspect", name)

    def test_an_adapter_with_the_config_of_its_base(self, llama):
        (llama / "model.safetensors").rename(llama / "adapter_model.safetensors")
        (llama / "adapter_config.json").write_text("{}")
        assert "merge it into its base model with peft's merge_and_unload()" in refused("inspect", llama)

    def test_a_folder_of_checkpoints_does_not_make_a_cogact(self, llama, bundle, tmp_path):
        (llama / "checkpoints").mkdir()
        (llama / "checkpoints/optimizer.pt").write_text("")
        assert json.loads(evla("inspect", llama, "--json"))["family"] == "decoder"
        copy = shutil.copytree(bundle, tmp_path / "bundle")
        (copy / "checkpoints").mkdir()
        assert json.loads(evla("inspect", copy, "--json"))["layout"] == "bundle"

    def test_a_cogact_run_that_is_not_whole_is_still_one(self, tmp_path):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/a.pt").write_text("")
        assert "lacks config.json, which every CogACT run has" in refused("inspect", tmp_path)


class TestSamples:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("calib.json", "jq -c '.[]' calib.json > samples.jsonl"),
            ("calib.CSV", "pandas.read_csv('calib.CSV')"),
            ("calib.parquet", "pandas.read_parquet"),
            ("calib.txt.gz", "unpack it first"),
            ("calib.yaml", "convert it"),
        ],
    )
    def test_what_has_no_line_a_sample_is_refused(self, name, message, decoders, tmp_path):
        (tmp_path / name).write_text('[{"text": "open the drawer"}]')
        said = refused("analyze", decoders("llama"), "--samples", tmp_path / name, "-o", tmp_path / "i.json")
        assert "is not read as texts: expected JSON lines (.jsonl" in said
        assert message in said

    @pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n{"text": "a"}\n]', '{"text": "a"}\n{"text": "b"}'])
    def test_json_that_is_called_a_text_is_refused(self, text, tmp_path):
        (tmp_path / "a.txt").write_text(f"\n{text}")
        with pytest.raises(EvlaError, match=r"it holds JSON; .* name the file \.jsonl"):
            load_samples(tmp_path / "a.txt", "text")

    def test_texts_about_brackets_are_texts(self, tmp_path):
        lines = ["[1] a footnote", "{", '{"drawer": 1}', "[", "5"]
        (tmp_path / "a").write_text("\n".join(lines))
        assert [sample.text for sample in load_samples(tmp_path / "a", "text")] == lines

    def test_an_episode_is_a_number_or_a_text(self, image_samples, tmp_path):
        shutil.copy(image_samples / "0.png", tmp_path)
        lines = [{"image": "0.png", "instruction": "open", **more} for more in ({}, {"episode": 7}, {"episode": "b"})]
        (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert [sample.episode for sample in load_samples(tmp_path, "image")] == [None, "7", "b"]

    @pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
    def test_json_lines_by_another_name(self, name, tmp_path):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
        assert [sample.text for sample in load_samples(tmp_path / name, "text")] == ["a", "b"]

    @pytest.mark.parametrize(("name", "line"), [("a.txt", b"open\n"), ("a.jsonl", b'{"text": "open"}\n')])
    def test_no_more_is_read_than_is_asked_for(self, name, line, tmp_path):
        """The rest of the file is a hole of 100 GB, and no text."""
        with open(tmp_path / name, "wb") as file:
            file.write(4 * line + b"\xff\n")
            file.truncate(10**11)
        assert len(load_samples(tmp_path / name, "text", 4)) == 4
        with pytest.raises(EvlaError, match=r"is not a UTF-8 text file \(line 5\)"):
            load_samples(tmp_path / name, "text", 5)

    def test_a_line_without_end_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "_MAX_LINE_BYTES", 5000)
        with open(tmp_path / "a.txt", "wb") as file:
            file.write(b"open\n")
            file.truncate(10**11)
        with pytest.raises(EvlaError, match=r"a\.txt:2 has more than 5,000 bytes"):
            load_samples(tmp_path / "a.txt", "text")


def write_turned(path: Path, orientation: int) -> np.ndarray:
    """A picture that is stored turned; as it is to be seen."""
    seen = np.asarray(pico.images(1)[0])
    turn_back = {3: 2, 6: 1, 8: 3}[orientation]  # quarter turns to the left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(seen, turn_back)).save(path, exif=exif)
    return seen


class TestPictures:
    @pytest.mark.parametrize("orientation", [3, 6, 8])
    @pytest.mark.parametrize("name", ["0.png", "0.tiff"])
    def test_a_turned_picture_is_seen_upright(self, name, orientation, tmp_path):
        seen = write_turned(tmp_path / name, orientation)
        (tmp_path / "samples.jsonl").write_text(json.dumps({"image": name, "instruction": "open"}))
        (sample,) = load_samples(tmp_path, "image")
        assert np.array_equal(np.asarray(sample.image), seen)
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(np.asarray(to_image(image)), seen)
            again = image.rotate(0)  # pixels that a program has had in hand may have been turned by it
            assert to_image(again) is again

    def test_predict_and_the_policy_see_the_same(self, bundle, policy, tmp_path):
        seen = write_turned(tmp_path / "turned.png", 6)
        Image.fromarray(seen).save(tmp_path / "upright.png")
        actions = [
            evla("predict", bundle, "--image", tmp_path / f"{name}.png", "--instruction", "open", "--json")
            for name in ("turned", "upright")
        ]
        assert actions[0] == actions[1]
        with Image.open(tmp_path / "turned.png") as image:
            ours = policy.predict_action(image, "open", seed=0)
        assert np.array_equal(ours, policy.predict_action(seen, "open", seed=0))

    def test_orientation_that_means_nothing_is_ignored(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 99
        image = pico.images(1)[0]
        image.save(tmp_path / "0.png", exif=exif)
        (tmp_path / "samples.jsonl").write_text('{"image": "0.png", "instruction": "open"}')
        assert np.array_equal(np.asarray(load_samples(tmp_path, "image")[0].image), np.asarray(image))


class TestActing:
    def test_a_native_run_predicts_with_neutral_settings(self, cogact_run, policy, image_samples):
        arguments = ("--image", image_samples / "0.png", "--instruction", "open drawer", "--seed", 3, "--json")
        found = json.loads(evla("predict", cogact_run, *arguments))["actions"]
        with Image.open(image_samples / "0.png") as image:
            assert found == policy.predict_action(image, "open drawer", seed=3).tolist()

    def test_other_settings_can_be_named(self, cogact_run, bundle, image_samples):
        arguments = ("--image", image_samples / "0.png", "--instruction", "open drawer", "--seed", 3, "--json")
        assert evla("predict", f"{cogact_run}@{bundle}/inference.yaml", *arguments) == evla(
            "predict", bundle, *arguments
        )

    def test_a_list_of_several_is_refused(self, cogact_run, image_samples, tmp_path):
        entries = [{"name": name, "checkpoint": str(cogact_run)} for name in "ab"]
        (tmp_path / "two.yaml").write_text(json.dumps({"schema_version": 1, "candidates": entries}))
        message = refused("predict", tmp_path / "two.yaml", "--image", image_samples / "0.png", "--instruction", "open")
        assert "two.yaml lists 2 candidates; name the one" in message

    def test_inspect_knows_what_needs_the_tokenizer(self, cogact_run, tmp_path):
        run = shutil.copytree(cogact_run, tmp_path / "run")
        (run / "tokenizer.json").unlink()
        assert json.loads(evla("inspect", run, "--json"))["commands"] == ["prune"]


class TestUnknownWords:
    @pytest.fixture(autouse=True)
    def nothing_said_yet(self):
        processing._warn_of_unknown.cache_clear()

    def test_they_are_named_once(self, cogact_run, caplog):
        policy = policy_from_checkpoint(cogact_run)
        image = pico.images(1)[0]
        for _ in range(3):
            policy.predict_action(image, "pick up the zebra, zebra")
        assert caplog.messages == [
            "The tokenizer has no token for 'zebra', ',': the model cannot read that in the instruction."
        ]
        policy.predict_action(image, "open the drawer")
        assert len(caplog.messages) == 1

    @pytest.mark.parametrize("byte_fallback", [False, True])
    def test_letters_of_a_byte_pair_tokenizer(self, byte_fallback, policy, caplog, tmp_path):
        letters = sorted(set("In: What action should the robot take to open?\nOut:abcdefghijklmnopqrstuvwxyz▁") - {" "})
        tokens = ["<unk>", "<s>", "</s>", *letters, *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = AutoConfig.for_model("llama", vocab_size=1000)
        whole = policy.model.config.to_dict() | {"text_config": config.to_dict(), "prompt_suffix_ids": [1, 2]}
        processor = CogACTProcessor(type(policy.model.config)(**whole), tmp_path)
        processor.prompt("open 机器")
        assert ["机器" in message for message in caplog.messages] == [True] * (not byte_fallback)

    def test_no_token_even_for_the_unknown(self, policy, tmp_path):
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(pico.WORDS[1:])}, "<unk>"))
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        processor = CogACTProcessor(policy.model.config, tmp_path)
        with pytest.raises(EvlaError, match="The tokenizer cannot read the instruction 'open': WordLevel error"):
            processor.prompt("open")

    def test_the_demos_instructions_are_all_known(self, caplog):
        demo = Path(__file__).resolve().parent.parent / "demo"
        processor = CogACTProcessor.__new__(CogACTProcessor)
        processor.tokenizer = load_tokenizer(demo / "cogact-metaworld")
        processor._unknown_id, processor.bos_id, processor.suffix_ids = 0, 1, [2, 2]
        for line in (demo / "samples/samples.jsonl").read_text().splitlines():
            processor.prompt(json.loads(line)["instruction"])
        assert caplog.messages == []


class TestGivenIsGiven:
    """0 and "" are values, not what is left out."""

    def test_simpler(self, policy):
        with pytest.raises(EvlaError, match="Unknown unnorm_key ''"):
            SimplerPolicy(policy, unnorm_key="")
        with pytest.raises(EvlaError, match="ensemble_horizon must be at least 1, got 0"):
            SimplerPolicy(policy, unnorm_key="kitchen", ensemble_horizon=0)

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ("prune: {drop_layers: 0, drop_layer_ids: [4]}", "names 1 layers, but only 0 are to go in all"),
            ("prune:", "prune is empty; leave it out, or write {}"),
            ("export:", "export is empty; leave it out, or write {}"),
            ("analyze: {samples: ''}", "samples is empty; give a path"),
        ],
    )
    def test_recipes(self, section, message, cogact_run, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"schema_version: 1\nsource: {cogact_run}\noutput: out\n{section}\n")
        assert message in refused("run", recipe)

    def test_a_recipe_without_a_number_of_layers_drops_those_it_names(self, cogact_run, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"schema_version: 1\nsource: {cogact_run}\noutput: out\nprune: {{drop_layer_ids: [4, 5]}}\n")
        assert Recipe.load(recipe).prune.drop_layers is None
        evla("run", recipe)
        assert PrunePlan.load(tmp_path / "out/pruned/prune_plan.yaml").keep_layers == (0, 1, 2, 3)

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("eval {run} --suite pico_suite:PicoSuite --tasks= -o log.jsonl", "Unknown task ''"),
            ("bench {run} --memory-budget=", "'' is not a size"),
            ("compare {run} {run} --samples {samples} --unnorm-key=", "Unknown --unnorm-key ''"),
            ("predict {run} --image {samples}/0.png --instruction open --unnorm-key=", "Unknown unnorm_key ''"),
            ("analyze {run} --samples {samples} -o i.json --memory-budget=", "'' is not a size"),
            ("export {run} b --max-shard-size=", "'' is not a size"),
        ],
    )
    def test_options(self, command, message, cogact_run, image_samples, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert message in refused(*command.format(run=cogact_run, samples=image_samples).split())
