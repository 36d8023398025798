"""Plain decoders in Hugging Face's layout (Llama, Mistral, Qwen2, Qwen3, Gemma2, SmolLM, ...): no vision, no action."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_cli.errors import EvlaError
from evla_cli.families.base import Checkpoint, ModelFamily
from evla_cli.families.huggingface import open_huggingface, read_config
from evla_cli.families.layer_entries import layer_entries

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from evla_cli.calibration import Sample

# Entries that say how somebody runs the model, not what it computes.
_OF_THE_CALLER = (
    *("attn_implementation", "_attn_implementation", "return_dict", "use_return_dict"),
    *("output_attentions", "output_hidden_states"),
)
_MAX_TOKENS = 2048  # of a text sample; what follows is left out


def open_checkpoint(path: Path) -> Checkpoint | None:
    if not (path / "config.json").is_file():
        return None
    raw = read_config(path / "config.json")
    if "model_type" not in raw:
        return None
    config = _load_config(path, raw)
    if config is None:
        return None
    full = config.to_dict()
    full.pop("_name_or_path", None)  # where it was read from is no part of the model
    checkpoint = open_huggingface(path, DECODER, full, layer_entries(full, config.num_hidden_layers))
    if not any(name.startswith("model.layers.0.") for name in checkpoint.weights):
        raise EvlaError(f"{path}: no weights named model.layers.0.*; only decoders with that layout can be handled.")
    return checkpoint


def _load_config(path: Path, raw: dict[str, Any]) -> "PretrainedConfig | None":
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if str(raw["model_type"]) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, all of them about this file
        raise EvlaError(f"{path / 'config.json'} is not a valid config: {' '.join(str(error).split())}") from error
    return config if hasattr(config, "num_hidden_layers") and hasattr(config, "intermediate_size") else None


def _build_config(config: dict[str, Any]) -> "PretrainedConfig":
    from transformers import CONFIG_MAPPING

    ours = {key: value for key, value in config.items() if key not in _OF_THE_CALLER}
    return CONFIG_MAPPING[config["model_type"]].from_dict(_with_plain_floats(ours))


def _with_plain_floats(value: Any) -> Any:
    """Transformers writes an infinity as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_plain_floats(entry) for key, entry in value.items()}
    return [_with_plain_floats(entry) for entry in value] if isinstance(value, list) else value


def _build_model(config: "PretrainedConfig") -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _embed(model: Any, samples: "list[Sample]", tokenizer_dir: Path, like: "torch.Tensor") -> "torch.Tensor | None":
    from evla_cli.models.processing import load_tokenizer, pad_right

    tokenizer = load_tokenizer(tokenizer_dir)
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    token_ids = [tokenizer.encode(sample.text).ids[: min(limit, _MAX_TOKENS)] for sample in samples]
    for sample, tokens in zip(samples, token_ids, strict=True):
        if not tokens:
            raise EvlaError(f"{sample.where}: the text has no tokens.")
        if max(tokens) >= model.config.vocab_size:
            raise EvlaError(
                f"{tokenizer_dir / 'tokenizer.json'} gives token {max(tokens)}, the model knows "
                f"{model.config.vocab_size} tokens: not the tokenizer that it was trained with."
            )
    ids, mask = pad_right(token_ids)
    ids, mask = ids.to(like.device), None if mask is None else mask.to(like.device)
    model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return mask


def _try_out(model: Any) -> "tuple[torch.Tensor, ...]":
    """The logits of eight tokens."""
    import torch

    ids = (3 + 5 * torch.arange(8)) % model.config.vocab_size
    return (model(input_ids=ids[None], use_cache=False).logits,)


DECODER = ModelFamily(
    name="decoder",
    decoder="model",
    config_path=(),
    parts={
        "embeddings": "model.embed_tokens",
        "decoder layers": "model.layers",
        "final norm": "model.norm",
        "lm_head": "lm_head",
    },
    build_config=_build_config,
    build_model=_build_model,
    embed=_embed,
    try_out=_try_out,
    sample_kind="text",
)
