"""Small checkpoints on disk, made as the real ones are: random weights in which nothing is zero, one or symmetric."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors
from evla_cli.families.cogact import NativeNames
from evla_cli.models.cogact import CogACTConfig, CogACTForActionPrediction

WORDS = ["<unk>", "<s>", "</s>", "<PAD>", "▁", "In", ":", "What", "action", "should", "the", "robot", "take", "to", "?"]
WORDS += ["Out", "open", "close", "drawer", "pick", "up", "red", "block"]
INSTRUCTIONS = ["open drawer", "close the drawer", "pick up the red block", "open", "take the block to the red drawer"]
STATS = {
    "kitchen": {
        "action": {
            "q01": [-1.0, -0.5, -0.02, -3.0, 0.1, -2.0, 0.0],
            "q99": [1.0, 0.25, 0.04, 3.0, 0.9, 2.0, 1.0],
            "mask": [True, True, True, True, True, True, False],
        }
    }
}
NUM_VISUAL = 16

# Not all of a kind: 2 of 4 heads share keys (grouped queries), each tower has a width and a depth of its own.
COGACT: dict[str, Any] = {
    "text_config": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
    },
    "dino_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    "siglip_config": {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 100,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "action_config": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "condition_size": 64,
    },
}

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
WINDOW = 6  # shorter than every text sample, so that a layer with the wrong kind of attention shows
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW},
    "smollm3": {"no_rope_layer_interval": 3},
}


def write_cogact(run: Path, **text_config: Any) -> CogACTForActionPrediction:
    """A native run directory, and the model whose weights it holds."""
    torch.manual_seed(0)
    sizes = COGACT | {"text_config": COGACT["text_config"] | text_config}
    config = CogACTConfig(**sizes, norm_stats=STATS)
    model = randomize(CogACTForActionPrediction(config).eval())
    with torch.no_grad():  # what no CogACT file holds
        model.dino.embeddings.position_embeddings[:, 0].zero_()
        model.dino.embeddings.mask_token.zero_()
    native = NativeNames(config.to_dict()).to_native(lazy_tensors(model.state_dict()))
    nested: dict[str, Any] = {}
    for name, lazy in native.items():
        _, part, key = name.split(".", 2)
        nested.setdefault(part, {})[key] = lazy.load().clone()
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"model": nested}, run / "checkpoints" / "pico.pt")
    heads = {part: COGACT[f"{part}_config"]["num_attention_heads"] for part in ("dino", "siglip")}
    heads["action_model"] = COGACT["action_config"]["num_attention_heads"]
    _write_json(
        run / "config.json",
        {"vla": {"base_vlm": "prism-dinosiglip-224px+7b"}, "evla": {"num_attention_heads": heads}},
    )
    (run / "llm_config").mkdir()
    _write_json(run / "llm_config" / "config.json", {"num_attention_heads": 4, "rms_norm_eps": 1e-5})
    _write_json(run / "dataset_statistics.json", STATS)
    write_tokenizer(run)
    return model


def cast_run(run: Path, dest: Path, dtype: torch.dtype) -> Path:
    """A copy of a native CogACT run with all its weights in `dtype`."""
    shutil.copytree(run, dest)
    (file,) = (dest / "checkpoints").glob("*.pt")
    parts = torch.load(file, weights_only=True)["model"]
    torch.save({"model": {name: {k: t.to(dtype) for k, t in part.items()} for name, part in parts.items()}}, file)
    return dest


def write_decoder(directory: Path, model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**_SMALL, **DECODERS[model_type]})
    randomize(AutoModelForCausalLM.from_config(config)).save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_image_samples(directory: Path) -> None:
    directory.mkdir()
    lines = []
    for number, (image, instruction) in enumerate(zip(images(len(INSTRUCTIONS)), INSTRUCTIONS, strict=True)):
        image.save(directory / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "instruction": instruction}))
    (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")


def write_text_samples(file: Path) -> None:
    words = np.random.default_rng(1).choice(WORDS[5:], size=(5, 24))
    lines = [" ".join(row[: 12 + 3 * number]) for number, row in enumerate(words)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def images(count: int, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(count)]


def randomize(model: Any, seed: int = 0) -> Any:
    """Trained-like scales: no norm, bias or layer scale is neutral, no layer like the next."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.3 * noise)  # around 1, or around 0 where the model adds the 1 itself
            elif "lambda1" in name:
                parameter.copy_(0.2 + 0.8 * noise.abs())
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim > 1 and "embed" not in name and "uncondition" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.5 * noise)
        for owner in model.modules():
            layers = getattr(owner, "layers", None)
            if isinstance(layers, nn.ModuleList):
                for number, layer in enumerate(layers):  # how much a layer changes is no function of its index
                    for name, parameter in layer.named_parameters():
                        if name.endswith(("o_proj.weight", "down_proj.weight")):
                            parameter.mul_((1.0, 0.2, 1.5, 0.4, 0.1, 0.8)[number % 6])
    return model


def lazy_tensors(state: dict[str, torch.Tensor]) -> LazyTensors:
    return {
        name: LazyTensor(tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in state.items()
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
