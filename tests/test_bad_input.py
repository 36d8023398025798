"""Every wrong input gives one line on stderr that says what, where and what to do; exit code 2; nothing is changed."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from evla_cli import pipeline
from evla_cli.cli.main import cli

RECIPE = """\
schema_version: 1
source: run
output: out
analyze:
  samples: samples
prune:
  drop_layers: 2
  mlp_prune_ratio: 0.5
  mlp_method: magnitude
export:
  settings:
    visual_tokens: {num_keep: 8}
"""
Change = Callable[[Path], Any]


@pytest.fixture
def material(cogact_run, image_samples, text_samples, importance_file, bundle, decoders, tmp_path, monkeypatch):
    """A working directory, and a function that puts what a command names into it."""
    sources = {
        "run": cogact_run,
        "samples": image_samples,
        "texts.jsonl": text_samples,
        "importance.json": importance_file,
        "bundle": bundle,
        "llama": decoders("llama"),
    }

    def put(command: str) -> Path:
        for name, source in sources.items():
            if ("recipe.yaml" in command and name in ("run", "samples")) or name in command.replace("/", " ").split():
                (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return put


def snapshot(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in directory.rglob("*")
    }


def refuse(material, command: str, message: str, change: Change | None = None, code: int = 2) -> None:
    directory = material(command)
    if change is not None:
        change(directory)
    before = snapshot(directory)
    result = CliRunner().invoke(cli, command.split())
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert message in result.stderr
    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert snapshot(directory) == before


# Ways to damage a file


def write(path: str, content: str | bytes) -> Change:
    def change(directory: Path) -> None:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def remove(path: str) -> Change:
    return lambda directory: (directory / path).unlink()


def make_directory(path: str) -> Change:
    return lambda directory: (directory / path).mkdir(parents=True)


def cut(path: str, share: float) -> Change:
    def change(directory: Path) -> None:
        data = (directory / path).read_bytes()
        (directory / path).write_bytes(data[: int(len(data) * share)])

    return change


def edit(path: str, function: Callable[[dict[str, Any]], Any]) -> Change:
    """Change a JSON file in place."""

    def change(directory: Path) -> None:
        record = json.loads((directory / path).read_text())
        function(record)
        (directory / path).write_text(json.dumps(record))

    return change


def replace(path: str, old: str, new: str) -> Change:
    def change(directory: Path) -> None:
        text = (directory / path).read_text()
        assert old in text
        (directory / path).write_text(text.replace(old, new))

    return change


PT = "run/checkpoints/pico.pt"
UP = "llm.model.layers.3.mlp.up_proj.weight"


def edit_pt(function: Callable[[dict[str, Any]], Any]) -> Change:
    def change(directory: Path) -> None:
        record = torch.load(directory / PT, weights_only=True)
        function(record["model"])
        torch.save(record, directory / PT)

    return change


def set_value(part: str, name: str, value: float) -> Change:
    def function(model: dict[str, Any]) -> None:
        model[part][name].view(-1)[0] = value

    return edit_pt(function)


def set_tensor(part: str, name: str, tensor: torch.Tensor) -> Change:
    return edit_pt(lambda model: model[part].update({name: tensor}))


def set_vocabulary(word: str, number: int) -> Change:
    return edit("run/tokenizer.json", lambda record: record["model"]["vocab"].update({word: number}))


def signed(change: Change) -> Change:
    """A change of a bundle with the manifest brought up to date, as someone with write access could."""

    def both(directory: Path) -> None:
        change(directory)
        manifest = json.loads((directory / "bundle/manifest.json").read_text())
        for name, entry in manifest["files"].items():
            data = (directory / "bundle" / name).read_bytes()
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        (directory / "bundle/manifest.json").write_text(json.dumps(manifest))

    return both


def stats(**action: Any) -> Change:
    full = {"q01": [-1.0] * 7, "q99": [1.0] * 7, **action}
    return write("run/dataset_statistics.json", json.dumps({"kitchen": {"action": full}}))


def settings(text: str) -> Change:
    return write("settings.yaml", text)


ANALYZE = "analyze run --samples samples -o o.json"
PRUNE = "prune run out --importance importance.json"
DROP = "prune run out --drop-layer-ids 4"
EXPORT = "export run b"
PREDICT = "predict bundle --image samples/0.png --instruction open"
WITH_SETTINGS = "export run b --settings settings.yaml"
RUN = "run recipe.yaml"
V1 = "schema_version: 1\n"

CASES: dict[str, tuple[str, str] | tuple[str, str, Change]] = {
    # Sources
    "no such path": ("inspect nowhere", "nowhere does not exist"),
    "name on the hub": ("inspect CogACT/CogACT-Base", "first: hf download CogACT/CogACT-Base --local-dir"),
    "page on the hub": (
        "inspect https://huggingface.co/a/b",
        "local directories only. Download it first: hf download a/b",
    ),
    "URL": ("inspect https://example.com/a/b.zip", "evla reads local directories only. Download it first."),
    "hub name for a bundle": ("predict a/b --image samples/0.png --instruction open", "Download it first: hf download"),
    "not a checkpoint": ("inspect recipe.yaml", "not a checkpoint that evla knows"),
    "empty directory": ("inspect d", "not a checkpoint that evla knows", make_directory("d")),
    "unknown family": (
        "inspect llama",
        "not a checkpoint that evla knows",
        edit("llama/config.json", lambda c: c.update(model_type="gpt9")),
    ),
    "family that is no text": (
        "inspect llama",
        "not a checkpoint that evla knows",
        edit("llama/config.json", lambda c: c.update(model_type=["llama"])),
    ),
    "no weights": ("inspect llama", "llama holds no weights", remove("llama/model.safetensors")),
    "no .pt": ("inspect run", "run/checkpoints holds no .pt file", remove(PT)),
    "two .pt": ("inspect run", "2 .pt files; name the one", write("run/checkpoints/b.pt", b"")),
    ".pt outside checkpoints/": ("inspect a.pt", "<RUN>/checkpoints/<name>.pt", write("a.pt", b"")),
    "truncated .pt": ("inspect run", "may be truncated", cut(PT, 0.5)),
    "empty .pt": ("inspect run", "is not a checkpoint that can be read", write(PT, b"")),
    "truncated safetensors": ("inspect llama", "is truncated", cut("llama/model.safetensors", 0.9)),
    "safetensors of two bytes": ("inspect llama", "not a safetensors file", write("llama/model.safetensors", b"ab")),
    "no config.json": ("inspect run", "run lacks config.json", remove("run/config.json")),
    "no statistics": ("inspect run", "run lacks dataset_statistics.json", remove("run/dataset_statistics.json")),
    "config.json of something else": ("inspect run", "no 'vla' entry", write("run/config.json", "{}")),
    "broken JSON": ("inspect run", "config.json is not valid JSON", write("run/config.json", "{")),
    "JSON that is no object": ("inspect run", "must hold a JSON object", write("run/config.json", "[]")),
    "JSON that is not UTF-8": ("inspect run", "is not a UTF-8 text file", write("run/config.json", b"\xff")),
    "no tokenizer": (ANALYZE, "run has no tokenizer.json; copy", remove("run/tokenizer.json")),
    "no tokenizer to export": (EXPORT, "run has no tokenizer.json; copy", remove("run/tokenizer.json")),
    "broken tokenizer": (EXPORT, "tokenizer.json is not a tokenizer", write("run/tokenizer.json", "{}")),
    "tokenizer with too many tokens": (EXPORT, "has token 64, the model knows 64", set_vocabulary("fold", 64)),
    "tokenizer of another model": (
        ANALYZE,
        "no token '<s>'",
        edit("run/tokenizer.json", lambda t: t["model"]["vocab"].pop("<s>")),
    ),
    "decoder's tokenizer of another model": (
        "analyze llama --samples texts.jsonl -o o.json",
        "gives token 500, the model knows 64",
        edit("llama/tokenizer.json", lambda t: t["model"]["vocab"].update(dict.fromkeys(t["model"]["vocab"], 500))),
    ),
    "file name of 300 letters": (f"inspect {'x' * 300}", "is not a path that can be used"),
    # Weights
    "missing tensor": (DROP, f"first: model.llm_backbone.{UP}", edit_pt(lambda m: m["llm_backbone"].pop(UP))),
    "unknown tensor": (DROP, "first: model.llm_backbone.extra", set_tensor("llm_backbone", "extra", torch.zeros(1))),
    "missing part": (EXPORT, "lacks the weight model.action_model", edit_pt(lambda m: m.pop("action_model"))),
    "wrong shape, analyze": (ANALYZE, "has shape [5, 64]", set_tensor("llm_backbone", UP, torch.zeros(5, 64))),
    "wrong shape, prune": (DROP, "has shape [5, 64]", set_tensor("llm_backbone", UP, torch.zeros(5, 64))),
    "wrong shape, export": (EXPORT, "has shape [5, 64]", set_tensor("llm_backbone", UP, torch.zeros(5, 64))),
    "integer weights": (
        DROP,
        "quantised weights cannot be handled",
        set_tensor("llm_backbone", UP, torch.zeros(128, 64, dtype=torch.int32)),
    ),
    "a layer missing in the middle": (
        DROP,
        "not numbered 0, 1, 2, ... without a gap",
        edit_pt(lambda m: [m["llm_backbone"].pop(name) for name in list(m["llm_backbone"]) if ".layers.3." in name]),
    ),
    "towers that see different patches": (
        EXPORT,
        "25 and 16 patches",
        set_tensor("vision_backbone", "dino_featurizer.pos_embed", torch.zeros(1, 25, 32)),
    ),
    "NaN, analyze": (ANALYZE, "layers.3.mlp.up_proj.weight holds NaN", set_value("llm_backbone", UP, float("nan"))),
    "NaN, prune": (DROP, "layers.3.mlp.up_proj.weight holds NaN", set_value("llm_backbone", UP, float("nan"))),
    "infinity, export": (
        EXPORT,
        "action_head.blocks.0.attn.proj.bias holds NaN",
        set_value("action_model", "net.blocks.0.attn.proj.bias", float("inf")),
    ),
    # Configs
    "head count that does not divide": (
        "inspect run",
        "attention heads of dino (32 wide) cannot be read",
        edit("run/config.json", lambda c: c["evla"]["num_attention_heads"].update(dino=5)),
    ),
    "misspelt head count": (
        "inspect run",
        "unknown part 'dinno'. Did you mean 'dino'?",
        edit("run/config.json", lambda c: c["evla"]["num_attention_heads"].update(dinno=2)),
    ),
    "evla entry that is a text": (
        "inspect run",
        "evla must be a mapping",
        edit("run/config.json", lambda c: c.update(evla="2 heads")),
    ),
    "suffix ids beyond the vocabulary": (
        "inspect run",
        "two token ids below 64",
        edit("run/config.json", lambda c: c["evla"].update(prompt_suffix_ids=[1, 99])),
    ),
    "language model with 0 heads": (
        "inspect run",
        "num_attention_heads must be a positive",
        write("run/llm_config/config.json", '{"num_attention_heads": 0}'),
    ),
    "a billion layers": (
        "inspect llama",
        "num_hidden_layers must be between 1 and 1000",
        edit("llama/config.json", lambda c: c.update(num_hidden_layers=10**9)),
    ),
    "other depth than the weights": (
        "inspect llama",
        "config says 5 decoder layers, the weights hold 6",
        edit("llama/config.json", lambda c: c.update(num_hidden_layers=5)),
    ),
    "other width than the weights": (
        "prune llama out --drop-layer-ids 1",
        "has shape",
        edit("llama/config.json", lambda c: c.update(intermediate_size=64)),
    ),
    "negative width": (
        "inspect llama",
        "hidden_size must be a positive whole number",
        edit("llama/config.json", lambda c: c.update(hidden_size=-32)),
    ),
    "unknown activation": (
        "prune llama out --drop-layer-ids 1",
        "no model can be built from its config",
        edit("llama/config.json", lambda c: c.update(hidden_act="foo")),
    ),
    "size that is a text": (
        "inspect llama",
        "config.json is not a valid config",
        edit("llama/config.json", lambda c: c.update(hidden_size="32")),
    ),
    # Statistics
    "statistics without q01": (EXPORT, "no action statistics", write("run/dataset_statistics.json", '{"kitchen": {}}')),
    "no dataset": (EXPORT, "holds no dataset", write("run/dataset_statistics.json", "{}")),
    "statistics for 6 of 7 dimensions": (EXPORT, "must be lists of 7", stats(q01=[0.0] * 6)),
    "statistics that are texts": (EXPORT, "must be finite numbers", stats(q01=["0"] * 7)),
    "statistics that are null": (EXPORT, "must be lists of 7", stats(q99=None)),
    "statistics with NaN": (EXPORT, "must be finite numbers", stats(q99=[float("nan")] * 7)),
    "mask of numbers": (EXPORT, "mask true or false", stats(mask=[1] * 7)),
    "swapped statistics": (EXPORT, "q01 is above q99", stats(q01=[2.0] * 7)),
    # Samples
    "no samples": ("analyze run --samples nowhere -o o.json", "nowhere does not exist"),
    "folder without samples.jsonl": (ANALYZE, "samples has no samples.jsonl", remove("samples/samples.jsonl")),
    "an image as samples": (
        "analyze run --samples samples/0.png -o o.json",
        "samples/0.png must be a folder with samples.jsonl",
    ),
    "empty samples": (ANALYZE, "holds no samples", write("samples/samples.jsonl", "\n\n")),
    "0 samples": (f"{ANALYZE} --num-samples 0", "--num-samples must be at least 1"),
    "more samples than there are": (f"{ANALYZE} --num-samples 9", "holds 5 samples, --num-samples asks for 9"),
    "missing field": (
        ANALYZE,
        "samples.jsonl:3: missing field 'instruction'",
        write("samples/samples.jsonl", '{"image": "0.png", "instruction": "open"}\n\n{"image": "0.png"}\n'),
    ),
    "episode that is neither number nor text": (
        ANALYZE,
        "samples.jsonl:1: 'episode' must be a number or a text that is not empty, got 1.5",
        write("samples/samples.jsonl", '{"image": "0.png", "instruction": "open", "episode": 1.5}'),
    ),
    "line that is no JSON": (ANALYZE, "samples.jsonl:1 is not valid JSON", write("samples/samples.jsonl", "{")),
    "text with half a character": (
        ANALYZE,
        "samples.jsonl:1 is not valid JSON: a text in it is not valid Unicode",
        write("samples/samples.jsonl", '{"image": "0.png", "instruction": "open \\ud800"}'),
    ),
    "missing image": (ANALYZE, "samples.jsonl:2: image samples/1.png does not exist", remove("samples/1.png")),
    "image outside the folder": (
        ANALYZE,
        "is not a path inside samples",
        write("samples/samples.jsonl", '{"image": "../run/config.json", "instruction": "open"}'),
    ),
    "truncated image": (
        ANALYZE,
        "samples.jsonl:2: samples/1.png is not an image that can be read",
        cut("samples/1.png", 0.1),
    ),
    "text for an image": (ANALYZE, "not an image in a format", write("samples/1.png", "hello")),
    "image with too many pixels": (
        ANALYZE,
        "has 9000 x 9000 pixels",
        lambda directory: Image.new("1", (9000, 9000)).save(directory / "samples/1.png"),
    ),
    "texts for a model with images": ("analyze run --samples texts.jsonl -o o.json", "missing field 'image'"),
    "images for a plain decoder": ("analyze llama --samples samples -o o.json", "missing field 'text'"),
    "unknown device": (f"{ANALYZE} --device tpu9", "Unknown device 'tpu9'; use cpu, cuda or cuda:N."),
    "unknown dtype": (f"{ANALYZE} --dtype int8", "'int8' is not one of"),
    "batch of 0": (f"{ANALYZE} --batch-size 0", "is not in the range"),
    # Importance
    "importance of another checkpoint": (
        f"{PRUNE} --drop-layers 1",
        "was measured on another checkpoint",
        edit("importance.json", lambda i: i.update(checkpoint_sha256="0" * 64)),
    ),
    "importance of another depth": (
        f"{PRUNE} --drop-layers 1",
        "ranks 5 layers, run has 6",
        edit("importance.json", lambda i: i["layers"].pop()),
    ),
    "NaN importance": (
        f"{PRUNE} --drop-layers 1",
        "Layer 0 has the importance nan",
        edit("importance.json", lambda i: i["layers"][0].update(importance=float("nan"))),
    ),
    "importance of a later schema": (
        f"{PRUNE} --drop-layers 1",
        "importance.json: schema_version is 2; this evla reads 1.",
        edit("importance.json", lambda i: i.update(schema_version=2)),
    ),
    "importance that is a text": (
        f"{PRUNE} --drop-layers 1",
        "importance must be a number, found '0.5' (str)",
        edit("importance.json", lambda i: i["layers"][0].update(importance="0.5")),
    ),
    "importance without a field": (
        f"{PRUNE} --drop-layers 1",
        "missing key 'samples_sha256'",
        edit("importance.json", lambda i: i.pop("samples_sha256")),
    ),
    "ranking without importance": ("prune run out --drop-layers 2", "needs --importance; make it with evla analyze"),
    # What to drop
    "all layers": (f"{PRUNE} --drop-layers 6", "Cannot drop 6 of 6 layers"),
    "more layers than exist": (f"{PRUNE} --drop-layers 7", "Cannot drop 7 of 6 layers"),
    "more layers than are unprotected": (f"{PRUNE} --drop-layers 5", "2 are protected (0, 1)"),
    "protected layer": ("prune run out --drop-layer-ids 1", "Layer 1 is protected (--protect-first)"),
    "layer that does not exist": ("prune run out --drop-layer-ids 6", "has layers 0 to 5"),
    "layers that are no numbers": ("prune run out --drop-layer-ids a", "not a list of whole numbers such as 3,7,9"),
    "negative number of layers": (f"{PRUNE} --drop-layers -1", "must not be negative"),
    "keep no layer": (f"{PRUNE} --keep-layers 0", "--keep-layers must be between 1 and 6"),
    "keep and drop disagree": (f"{PRUNE} --keep-layers 3 --drop-layers 2", "disagree on 6 layers"),
    "ids and number disagree": (f"{PRUNE} --drop-layer-ids 3,4 --drop-layers 1", "only 1 are to go in all"),
    "nothing to remove": (PRUNE, "Nothing to remove"),
    "ratio of 1": ("prune run out --mlp-prune-ratio 1", "in [0, 1), got 1.0"),
    "negative ratio": ("prune run out --mlp-prune-ratio -0.1", "in [0, 1), got -0.1"),
    "NaN ratio": ("prune run out --mlp-prune-ratio nan", "in [0, 1), got nan"),
    "infinite ratio": ("prune run out --mlp-prune-ratio inf", "in [0, 1), got inf"),
    "ratio that rounds to nothing": (
        "prune run out --drop-layer-ids 4 --mlp-prune-ratio 0.1",
        "--mlp-prune-ratio 0.1 removes none of 128 channels",
    ),
    "importance for a plan": ("prune run out --plan importance.json", "has no keep_layers: not a prune_plan.yaml"),
    "unknown method": ("prune run out --mlp-prune-ratio 0.5 --mlp-method best", "'best' is not one of"),
    "refit without samples": (f"{PRUNE} --drop-layers 1 --refit", "give both, or neither"),
    "samples without refit": (f"{PRUNE} --drop-layers 1 --samples samples", "give both, or neither"),
    "refit with a weight of 0": (
        f"{PRUNE} --drop-layers 1 --refit --samples samples --refit-last-weight 0",
        "refit_last_weight must be a number above 0, got 0.0",
    ),
    "refit on one sample": (
        f"{PRUNE} --drop-layers 1 --refit --samples samples --num-samples 1",
        "at least 2 samples are needed",
    ),
    "refit on a device that is none": (
        f"{PRUNE} --drop-layers 1 --refit --samples samples --device abacus",
        "Unknown device 'abacus'",
    ),
    "activation without importance": (
        "prune run out --mlp-prune-ratio 0.5 --mlp-method activation",
        "needs --importance from evla analyze of this checkpoint",
    ),
    "prunenet without importance": (
        "prune run out --mlp-prune-ratio 0.5 --mlp-method prunenet",
        "needs --importance from evla analyze of this checkpoint",
    ),
    "the rows' default without importance": (
        "prune run out --mlp-prune-ratio 0.5",
        "needs --importance from evla analyze of this checkpoint",
    ),
    "activations, which are always measured": (f"{ANALYZE} --activations", "No such option '--activations'"),
    "negative seed": ("prune run out --mlp-prune-ratio 0.5 --seed -1", "is not in the range"),
    # Outputs
    "existing output": (DROP, "out already exists. Pass --overwrite", make_directory("out")),
    "existing file": (ANALYZE, "o.json already exists. Pass --overwrite", write("o.json", "mine")),
    "output that is someone else's": (f"{DROP} --overwrite", "not a directory that evla wrote", write("out/mine", "")),
    "file in the output's place": (f"{DROP} --overwrite", "not a directory that evla wrote", write("out", "mine")),
    "output is the source": ("prune run run --drop-layer-ids 4 --overwrite", "are the same or one lies inside"),
    "output inside the source": ("prune run run/out --drop-layer-ids 4", "are the same or one lies inside"),
    "output through a link into the source": (
        "prune run link/out --drop-layer-ids 4",
        "are the same or one lies inside",
        lambda directory: (directory / "link").symlink_to("run"),
    ),
    "output without a parent": ("prune run no/out --drop-layer-ids 4", "no does not exist or is not a directory"),
    "output under a file": (f"{EXPORT.replace(' b', ' run/config.json/b')}", "are the same or one lies inside"),
    "directory for a file": ("analyze run --samples samples -o samples", "samples is a directory; name a file"),
    "existing figures": (
        f"{ANALYZE} --figures figures",
        "layer_importance.png already exists",
        write("figures/layer_importance.png", ""),
    ),
    # Settings
    "more visual tokens than there are": (f"{EXPORT} --num-visual-tokens 17", "the model has 16 visual tokens"),
    "fewer visual tokens than key tokens": (f"{EXPORT} --num-visual-tokens 3", "fewer than the 4 key tokens"),
    "key tokens of no selection": (f"{EXPORT} --num-key-tokens 4", "--num-key-tokens does nothing while all"),
    "pruning after the last layer": (f"{EXPORT} --num-visual-tokens 8 --prune-layer 6", "it must be at most 5"),
    "task ratio above 1": (f"{EXPORT} --task-ratio 1.5", "task_ratio must be between 0 and 1"),
    "interval above the steps": (f"{EXPORT} --cache-interval 11", "more than the 10 denoising steps"),
    "interval of 0": (f"{EXPORT} --cache-interval 0", "interval must be at least 1"),
    "steps that are no stride": (f"{EXPORT} --num-denoise-steps 11", "possible: 1, 2, 3"),
    "guidance below 1": (f"{EXPORT} --cfg-scale 0.5", "cfg_scale must be at least 1"),
    "guidance that is NaN": (f"{EXPORT} --cfg-scale nan", "cfg_scale must be at least 1"),
    "shards of 5 bytes": (f"{EXPORT} --max-shard-size 5", "A size of 5 bytes? Give its unit, such as 5GB"),
    "budget of 2 bytes": (f"{ANALYZE} --memory-budget 2", "A size of 2 bytes? Give its unit, such as 2GB"),
    "shards of 0 bytes": (f"{EXPORT} --max-shard-size 0", "is not a size such as 500MB"),
    "decoder without a head": ("export llama b", "no action head"),
    "no settings file": (WITH_SETTINGS, "Cannot read settings.yaml"),
    "misspelt section": (WITH_SETTINGS, "Did you mean 'visual_tokens'?", settings(V1 + "visual_tokns: {}")),
    "misspelt key": (WITH_SETTINGS, "Did you mean 'interval'?", settings(V1 + "action_cache: {intervall: 5}")),
    "misspelt value": (
        WITH_SETTINGS,
        "Did you mean 'attention'?",
        settings(V1 + "action_cache: {modules: [atention]}"),
    ),
    "text for a number": (
        WITH_SETTINGS,
        "interval must be a whole number",
        settings(V1 + "action_cache: {interval: '5'}"),
    ),
    "true for a number": (
        WITH_SETTINGS,
        "interval must be a whole number",
        settings(V1 + "action_cache: {interval: yes}"),
    ),
    "list for a section": (WITH_SETTINGS, "visual_tokens must be a mapping", settings(V1 + "visual_tokens: [56]")),
    "settings without version": (WITH_SETTINGS, "missing key 'schema_version'", settings("visual_tokens: {}")),
    "settings of a later version": (WITH_SETTINGS, "schema_version is 2", settings("schema_version: 2")),
    "doubled key": (WITH_SETTINGS, "a key stands twice", settings(V1 + V1)),
    "broken YAML": (WITH_SETTINGS, "is not valid YAML", settings("a: [")),
    "YAML that builds objects": (
        WITH_SETTINGS,
        "is not valid YAML",
        settings("!!python/object/apply:os.system ['true']"),
    ),
    "block that does not exist": (WITH_SETTINGS, "has blocks 0 to 2", settings(V1 + "action_cache: {blocks: [3]}")),
    "misspelt method": (
        WITH_SETTINGS,
        "Did you mean 'fastv'?",
        settings(V1 + "visual_tokens: {method: fast_v}"),
    ),
    "key of another method": (
        WITH_SETTINGS,
        "num_key does nothing under method 'fastv'; leave it out, or choose 'evla'",
        settings(V1 + "visual_tokens: {method: fastv, num_keep: 8, num_key: 2}"),
    ),
    "option of another method": (
        f"{WITH_SETTINGS} --num-visual-tokens 8",
        "num_keep does nothing under method 'vla_cache'; leave it out, or choose 'evla' or 'fastv' or 'random'",
        settings(V1 + "visual_tokens: {method: vla_cache}"),
    ),
    "interval without a cache": (
        f"{WITH_SETTINGS} --cache-interval 5",
        "interval does nothing under method 'none'",
        settings(V1 + "action_cache: {method: none}"),
    ),
    "no token kept": (
        WITH_SETTINGS,
        "num_keep must be at least 1",
        settings(V1 + "visual_tokens: {method: random, num_keep: 0}"),
    ),
    "similarity above 1": (
        WITH_SETTINGS,
        "similarity_threshold must be between 0 and 1",
        settings(V1 + "visual_tokens: {method: vla_cache, similarity_threshold: 1.5}"),
    ),
    "entropy scale that is NaN": (
        WITH_SETTINGS,
        "write a number in decimal digits",
        settings(V1 + "visual_tokens: {method: vla_cache, entropy_scale: .nan}"),
    ),
    "more task tokens than there are": (
        WITH_SETTINGS,
        "num_task is 17; the model has 16",
        settings(V1 + "visual_tokens: {method: vla_cache, num_task: 17}"),
    ),
    # Predicting
    "decoder that cannot act": ("predict llama --image samples/0.png --instruction open", "llama has no action head"),
    "no image": ("predict bundle --image nothing.png --instruction open", "nothing.png does not exist"),
    "directory for an image": ("predict bundle --image samples --instruction open", "samples is not a file"),
    "image that is none": (
        "predict bundle --image samples/samples.jsonl --instruction open",
        "not an image in a format",
    ),
    "unknown dataset": (f"{PREDICT} --unnorm-key kitchn", "Did you mean 'kitchen'?"),
    "bundle with a file missing": (PREDICT, "bundle lacks tokenizer.json", remove("bundle/tokenizer.json")),
    "bundle with a file of another size": (PREDICT, "the manifest says", write("bundle/inference.yaml", V1)),
    "manifest with a path outside": (
        PREDICT,
        "'../a' is not a path inside bundle",
        edit("bundle/manifest.json", lambda m: m["files"].update({"../a": {"bytes": 1, "sha256": "0" * 64}})),
    ),
    "edited settings": (
        PREDICT,
        "num_keep is 99; the model has 16",
        signed(replace("bundle/inference.yaml", "num_keep: 8", "num_keep: 99")),
    ),
    "edited config": (
        PREDICT,
        "num_train_steps must be at most 10000",
        signed(edit("bundle/config.json", lambda c: c["action_config"].update(num_train_steps=10**9))),
    ),
    "config without statistics": (
        PREDICT,
        "no section 'norm_stats'",
        signed(edit("bundle/config.json", lambda c: c.pop("norm_stats"))),
    ),
    # Recipes
    "no recipe": ("run nothing.yaml", "Cannot read nothing.yaml"),
    "recipe without stages": (RUN, "names no stage", write("recipe.yaml", V1 + "source: run\noutput: out")),
    "recipe without source": (RUN, "missing key 'source'", replace("recipe.yaml", "source: run\n", "")),
    "recipe without version": (RUN, "missing key 'schema_version'", replace("recipe.yaml", "schema_version: 1\n", "")),
    "misspelt stage": (RUN, "Did you mean 'analyze'?", replace("recipe.yaml", "analyze", "analyse")),
    "misspelt option": (RUN, "prune: unknown key 'drop_layer'", replace("recipe.yaml", "drop_layers", "drop_layer")),
    "recipe with a ratio of 1": (RUN, "in [0, 1), got 1.5", replace("recipe.yaml", "0.5", "1.5")),
    "recipe with an unknown method": (
        RUN,
        "Did you mean 'magnitude'?",
        replace("recipe.yaml", "magnitude", "magnitud"),
    ),
    "recipe with an unknown dtype": (
        RUN,
        "dtype: unknown value 'f8'",
        replace("recipe.yaml", "samples: samples", "samples: samples\n  dtype: f8"),
    ),
    "recipe whose last stage cannot work": (
        RUN,
        "the model has 16 visual",
        replace("recipe.yaml", "num_keep: 8", "num_keep: 99"),
    ),
    "recipe that ranks without analyze": (
        RUN,
        "needs --importance",
        replace("recipe.yaml", "analyze:\n  samples: samples\n", ""),
    ),
    "recipe with its output in the source": (
        RUN,
        "one lies inside the other",
        replace("recipe.yaml", "output: out", "output: run/out"),
    ),
    "recipe with a file for output": (
        RUN,
        "samples/0.png",
        replace("recipe.yaml", "output: out", "output: samples/0.png"),
    ),
    "broken run.json": (RUN, "out/run.json is not valid JSON", write("out/run.json", "{")),
    "output that another recipe made": (RUN, "was not made by this recipe", write("out/importance.json", "{}")),
    # Usage
    "unknown command": ("prun run", "No such command 'prun'"),
    "unknown option": ("inspect run --wat", "No such option '--wat'"),
    "missing argument": ("prune run", "Missing argument 'DEST'. See"),
    "instruction without quotes": (f"{PREDICT} drawer now", "unexpected extra arguments (drawer now). See"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(material, name):
    refuse(material, *CASES[name])


def test_empty_instruction_is_refused(material):
    material(PREDICT)
    result = CliRunner().invoke(cli, [*PREDICT.split()[:-1], " "])
    assert (result.exit_code, result.stderr) == (2, "Error: The instruction is empty.\n")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.99, 0.99999])
@pytest.mark.parametrize(("source", "file"), [("run", PT), ("llama", "llama/model.safetensors")])
def test_truncation_at_any_length_is_refused(material, source, file, share):
    refuse(material, f"prune {source} out --drop-layer-ids 4", file.rsplit("/", 1)[1], cut(file, share))


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_never_gives_a_traceback_or_leaves_files(material, seed):
    """Headers, pickles and directories with a few wrong bytes; damage inside a weight may go unnoticed."""
    directory = material("run")
    data = bytearray((directory / PT).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for at in torch.randint(0, 30000, (3,), generator=generator).tolist():
        data[at if seed % 2 else len(data) - 1 - at] ^= 0x55
    (directory / PT).write_bytes(data)
    before = snapshot(directory)
    result = CliRunner().invoke(cli, DROP.split())
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == 0 or snapshot(directory) == before


class _Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("function", [os.system, eval], ids=["os.system", "eval"])
def test_foreign_code_in_a_pickle_is_named_and_not_run(material, function):
    code = "touch ran" if function is os.system else "open('ran', 'w')"

    def change(directory: Path) -> None:
        torch.save({"model": {"x": _Call(function, code)}}, directory / PT)

    refuse(material, "inspect run", "It was not executed", change)


def test_pickle_of_protocol_0_cannot_call_anything(material):
    def change(directory: Path) -> None:
        with zipfile.ZipFile(directory / PT, "w") as archive:
            archive.writestr("a/data.pkl", b"cos\nsystem\n(S'touch ran'\ntR.")
            archive.writestr("a/version", b"3\n")

    refuse(material, "inspect run", "os.system", change)


# Bundles: `evla verify` says 1 where something is wrong with a bundle, 2 where there is none.

WRONG_BUNDLES: dict[str, tuple[str, Change]] = {
    "changed byte": ("differ from the manifest (first: README.md)", replace("bundle/README.md", "Made by", "made by")),
    "edited hash": (
        "differ from the manifest (first: config.json)",
        edit("bundle/manifest.json", lambda m: m["files"]["config.json"].update(sha256="0" * 64)),
    ),
    "edited size": (
        "the manifest says 3",
        edit("bundle/manifest.json", lambda m: m["files"]["config.json"].update(bytes=3)),
    ),
    "file missing": ("bundle lacks dataset_statistics.json", remove("bundle/dataset_statistics.json")),
    "file not listed": (
        "does not list inference.yaml",
        edit("bundle/manifest.json", lambda m: m["files"].pop("inference.yaml")),
    ),
    "broken manifest": ("manifest.json is not valid JSON", write("bundle/manifest.json", "{")),
    "truncated weights": ("is truncated", signed(cut("bundle/model.safetensors", 0.5))),
    "settings that do not fit": (
        "fewer than the 4 key",
        signed(replace("bundle/inference.yaml", "keep: 8", "keep: 2")),
    ),
    "tower with a billion layers": (
        "num_hidden_layers must be between 1 and 1000",
        signed(edit("bundle/config.json", lambda c: c["dino_config"].update(num_hidden_layers=10**9))),
    ),
    "config of another width": (
        "the model needs",
        signed(edit("bundle/config.json", lambda c: c["text_config"].update(intermediate_size=64))),
    ),
    "broken tokenizer": ("is not a tokenizer", signed(write("bundle/tokenizer.json", "{}"))),
}


@pytest.mark.parametrize("name", WRONG_BUNDLES)
def test_verify_finds(material, name):
    message, change = WRONG_BUNDLES[name]
    refuse(material, "verify bundle", message, change, code=1)


def test_verify_names_a_weight_that_is_not_finite(material):
    def change(directory: Path) -> None:
        weights = load_file(directory / "bundle/model.safetensors")
        weights["language_model.model.norm.weight"][3] = float("nan")
        save_file(weights, directory / "bundle/model.safetensors")

    refuse(material, "verify bundle", "language_model.model.norm.weight holds NaN", signed(change), code=1)


def test_verify_without_a_bundle_is_bad_usage(material):
    refuse(material, "verify run", "is not a bundle")
    refuse(material, "verify nowhere", "nowhere does not exist")


@pytest.fixture(scope="module")
def sharded(cogact_run, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "bundle"
    pipeline.export(cogact_run, directory, pipeline.settings_with(None), max_shard_size="300KB")
    return directory


INDEX = "bundle/model.safetensors.index.json"


def second_shard(directory: Path) -> Path:
    return sorted((directory / "bundle").glob("model-*.safetensors"))[1]


def claim(name: str) -> Change:
    """The index says that the second shard holds tensor `name`."""
    return lambda directory: edit(
        INDEX, lambda index: index["weight_map"].update({name: second_shard(directory).name})
    )(directory)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        pytest.param("shards (first: model-00002", lambda directory: second_shard(directory).unlink(), id="missing"),
        pytest.param(
            "'../../secret' is not a path inside",
            edit(INDEX, lambda index: index["weight_map"].update(a="../../secret")),
            id="path outside",
        ),
        pytest.param("has no weight_map", write(INDEX, "{}"), id="empty index"),
        pytest.param("1 tensors that their shard does not hold (first: a)", claim("a"), id="tensor that is not there"),
    ],
)
def test_broken_shards_are_refused(sharded, material, message, change):
    directory = material("")
    shutil.copytree(sharded, directory / "bundle")
    refuse(lambda _: directory, "inspect bundle", message, change)
