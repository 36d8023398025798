"""Small random checkpoints of every plain decoder of transformers, and what evla makes of them.

The check is independent of evla: the source itself, with transformers' own classes, in which the removed layers are
identities and the columns of the removed MLP channels are zero.

    python tests/decoder_types.py              # the table of all types
    python tests/decoder_types.py phi bamba    # of some
"""

import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pico
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor, nn

from evla_cli.checkpoint.safetensors_format import read_safetensors
from evla_cli.cli.main import cli
from evla_cli.methods.row_selection import NEED_ACTIVATIONS
from evla_cli.plan import activations_file

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What a type that has such a thing gets, so that it is small.
SMALL: dict[str, Any] = {
    "head_dim": 24,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}
# What a type needs besides to be small, or to be at all.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {
        "attn_layer_indices": [2, 5],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "dots1": {"head_dim": 16, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "vocab_size_per_layer_input": 256,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5] * 4 + [0.0] * 4,
    },
    "gemma4_text": {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "minicpm3": {"head_dim": 8, "num_key_value_heads": 4},
    "ministral": {"head_dim": 16},
    "modernbert-decoder": {"local_attention": 8},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1},
    "recurrent_gemma": {"lru_width": 64},
    "youtu": {"head_dim": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
# Whose text models stand here under a name of their own; built small they would still have billions of parameters.
MULTIMODAL = ("emu3", "llama4", "mllama", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "blt", "gemma3", "gemma4")
DROPPED = (1, 4)
ROW_METHODS = ("magnitude", "random", "activation", "prunenet")
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order


def make_config(kind: str, **given: Any) -> Any:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(config_class)}
    small = {key: value for key, value in SMALL.items() if key in known}
    return config_class(**SIZES | small | SPECIAL.get(kind, {}) | given)


def make_checkpoint(directory: Path, kind: str, seed: int = 0, **given: Any) -> Path:
    """Saved by transformers itself; weights so large that every layer does something."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, **given), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
        elif "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(directory)
    pico.write_tokenizer(directory)
    return directory


def token_ids() -> Tensor:
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))


class Identity(nn.Module):
    """In the place of a layer: gives what it is given, in the layer's form; answers what the decoder asks of layers."""

    def __init__(self, layer: nn.Module, output: Any):
        super().__init__()
        self.__dict__.update(layer=layer, rest=output[1:] if isinstance(output, tuple) else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        rest = self.__dict__["rest"]
        return hidden_states if rest is None else (hidden_states, *rest)


@torch.inference_mode()
def logits_without(
    source: Path, dropped: Sequence[int], ids: Tensor, channels: dict[int, list[int]] | None = None
) -> Tensor:
    """The source's logits (B, T, V) when layers are skipped and MLP channels, by layer, give nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for layer, gone in (channels or {}).items():
        model.model.layers[layer].mlp.down_proj.weight.data[:, gone] = 0
    outputs: dict[int, Any] = {}
    for layer in dropped:
        model.model.layers[layer].register_forward_hook(lambda _m, _i, output, at=layer: outputs.update({at: output}))
    model(ids, use_cache=False)
    for layer in dropped:
        model.model.layers[layer] = Identity(model.model.layers[layer], outputs[layer])
    return model(ids, use_cache=False).logits


@torch.inference_mode()
def importance_of(source: Path, texts: Path) -> list[float]:
    """1 - mean cosine of every layer's input and output, in float64, by hooks on the model as transformers runs it."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    cosines: list[list[float]] = [[] for _ in model.model.layers]

    def note(at: int, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        pair = before.double(), after.double()
        cosines[at].append(float(nn.functional.cosine_similarity(*pair, dim=-1).mean()))

    for at, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _layer, args, kwargs, output, at=at: note(at, args, kwargs, output), with_kwargs=True
        )
    for line in texts.read_text().splitlines():
        model(torch.tensor([tokenizer.encode(json.loads(line)["text"]).ids]), use_cache=False)
    return [1 - sum(values) / len(values) for values in cosines]


def evla(*arguments: object) -> str | None:
    """Run a command; its one line of error, None where it ended well. Anything else it may raise goes on up."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    if result.exit_code == 0:
        return None
    assert result.exit_code in (1, 2)
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    return line


def outcome(kind: str, directory: Path, row_methods: Sequence[str] = ROW_METHODS, **given: Any) -> dict[str, str]:
    """What evla does with a type, by feature: "right", "refused: ...", or "wrong: ...".

    Features: "inspect", "analyze", "layers" (dropped), and every method of rows.
    """
    directory.mkdir(exist_ok=True)
    source, texts = make_checkpoint(directory / "source", kind, **given), directory / "texts.jsonl"
    pico.write_text_samples(texts)
    found: dict[str, str] = {}

    def note(feature: str, error: str | None, difference: Any) -> None:
        if error is not None:
            left = [path.name for path in directory.iterdir() if path.name not in ("source", "texts.jsonl")]
            clean = feature not in left
            found[feature] = f"refused: {error}" if clean else f"wrong: refused, but left {feature}"
        else:
            value = difference()
            found[feature] = "right" if value <= TOLERANCE else f"wrong: off by {value:.1e}"

    note("inspect", evla("inspect", source), lambda: 0.0)
    importance = directory / "importance.json"
    analyze = ("analyze", source, "--samples", texts, "-o", importance, "--batch-size", "2")
    error = evla(*analyze)
    if error is None and not has_channels(importance):
        row_methods = row_methods[:1]
    note("analyze", error, lambda: _importance_difference(importance, source, texts))
    layers = ["--drop-layer-ids", ",".join(map(str, DROPPED))]
    note(
        "layers",
        evla("prune", source, directory / "layers", *layers),
        lambda: difference(source, directory / "layers"),
    )
    for method in row_methods:
        options = ["--mlp-prune-ratio", "0.25", "--mlp-method", method]
        if method in NEED_ACTIVATIONS:
            options += ["--importance", importance]
        error = evla("prune", source, directory / method, *options)
        note(method, error, lambda method=method: difference(source, directory / method))
    return found


def has_channels(importance: Path) -> bool:
    """Whether the MLPs were found to be such that they can be narrowed, and so measured."""
    return bool(read_safetensors(activations_file(importance)))


def _importance_difference(importance: Path, source: Path, texts: Path) -> float:
    wanted = importance_of(source, texts)
    layers = json.loads(importance.read_text())["layers"]
    return max(abs(layer["importance"] - value) for layer, value in zip(layers, wanted, strict=True))


def difference(source: Path, pruned: Path) -> float:
    """Of the logits, relative to the largest; infinite where the pruned model does not load whole, or where it writes
    other tokens with its cache than without."""
    from transformers import AutoModelForCausalLM

    plan = yaml.safe_load((pruned / "prune_plan.yaml").read_text())
    channels = {
        int(layer): _absent(mask, plan["intermediate_size"]) for layer, mask in (plan["mlp_keep"] or {}).items()
    }
    model, loading = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32, output_loading_info=True)
    if any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return float("inf")
    ids = token_ids()
    with torch.inference_mode():
        logits = model.eval()(ids, use_cache=False).logits
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        written = [model.generate(ids[:, :6], use_cache=cached, **options) for cached in (True, False)]
    if not torch.equal(*written):
        return float("inf")
    wanted = logits_without(source, plan["dropped_layers"], ids, channels)
    return float((logits - wanted).abs().max() / wanted.abs().max())


def _absent(mask: str, width: int) -> list[int]:
    bits = "".join(f"{int(digit, 16):04b}" for digit in mask)
    return [channel for channel in range(width) if bits[channel] == "0"]


def causal_types() -> list[str]:
    """The types of transformers whose blocks stand under `model.layers` and that can be built small."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if kind in MULTIMODAL:
            continue
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(make_config(kind))
        except Exception:
            continue  # needs other sizes, or another package
        if hasattr(getattr(model, "model", None), "layers"):
            found.append(kind)
    return found


def main(kinds: Sequence[str]) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    for kind in kinds or causal_types():
        with tempfile.TemporaryDirectory() as directory:
            try:
                found = outcome(kind, Path(directory))
            except Exception as error:
                found = {"crash": f"wrong: {type(error).__name__}: {error}"}
        counts.update((feature, text.partition(":")[0]) for feature, text in found.items())
        short = {feature: text.replace(directory, "") for feature, text in found.items()}
        print(f"{kind:24}", json.dumps(short), flush=True)
    for (feature, verdict), count in sorted(counts.items()):
        print(f"{feature:12} {verdict:10} {count}")


if __name__ == "__main__":
    main(sys.argv[1:])
