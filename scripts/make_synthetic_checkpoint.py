"""Write a checkpoint with the names, shapes, layout and sidecar files of a released model, and random weights.

    python scripts/make_synthetic_checkpoint.py --family cogact --size base --dtype bfloat16 out/cogact-base
    python scripts/make_synthetic_checkpoint.py --family llama --size 1b out/llama-1b

For measuring time and memory at real size where the real weights cannot be had. One tensor is in memory at a time;
every tensor has a seed of its own, so the same command gives the same bytes. Weights are scaled so that a forward pass
stays finite, and the layers' contributions differ, so that their importance does.
"""

import argparse
import hashlib
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from evla_cli.checkpoint.files import write_json
from evla_cli.checkpoint.outputs import new_directory
from evla_cli.checkpoint.tensors import LazyTensor, LazyTensors, total_bytes
from evla_cli.checkpoint.torch_format import write_torch
from evla_cli.checkpoint.writer import parse_size, write_huggingface_weights
from evla_cli.families.cogact import COGACT, NativeNames, native_paths
from evla_cli.families.decoder import DECODER
from evla_cli.models.skeleton import build_skeleton, expected_shapes
from evla_cli.progress import progress_bar

# size -> width, blocks and heads of the action head
COGACT_HEADS = {"small": (384, 6, 4), "base": (768, 12, 12), "large": (1024, 24, 16)}
# size -> hidden size, layers, heads, key-value heads, MLP width
LLAMAS = {
    "135m": (576, 30, 9, 3, 1536),
    "1b": (2048, 16, 32, 8, 8192),
    "7b": (4096, 32, 32, 32, 11008),
    "70b": (8192, 80, 64, 8, 28672),
}
VOCABULARY = 32064  # Llama-2's 32000 and <PAD>, padded to a multiple of 64
WORDS = ["in", ":", "what", "action", "should", "the", "robot", "take", "to", "?", "out"]
WORDS += ["pick", "up", "place", "open", "close", "drawer", "can", "move", "near"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=("cogact", "llama"), default="cogact")
    sizes_help = f"cogact: {', '.join(COGACT_HEADS)}; llama: {', '.join(LLAMAS)}, or five numbers such as "
    sizes_help += "2048x16x32x8x8192: hidden size, layers, heads, key-value heads, MLP width"
    parser.add_argument("--size", help=sizes_help)
    parser.add_argument("--max-shard-size", default="5GB", help="of a llama's safetensors files")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    default = "base" if arguments.family == "cogact" else "1b"
    size = default if arguments.size is None else arguments.size
    llama = LLAMAS.get(size) or tuple(int(part) for part in size.split("x") if part.isdecimal())
    if size not in COGACT_HEADS if arguments.family == "cogact" else len(llama) != 5:
        parser.error(f"--size {size} is none of {sizes_help}.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(arguments.out, overwrite=False) as staging:
        if arguments.family == "cogact":
            write_cogact(staging, size, dtype, arguments.seed)
        else:
            write_llama(staging, llama, dtype, arguments.seed, parse_size(arguments.max_shard_size))
    print(arguments.out)


def write_cogact(run: Path, size: str, dtype: torch.dtype, seed: int) -> None:
    config = cogact_config(size)
    shapes = expected_shapes(build_skeleton(COGACT, config))
    native = NativeNames(config).to_native(random_tensors(shapes, dtype, seed))
    (run / "checkpoints").mkdir()
    with progress_bar("writing", total_bytes(native), "B") as bar:
        write_torch(
            run / "checkpoints" / f"CogACT-{size.title()}.pt", native, native_paths(native), on_bytes=bar.update
        )
    write_json(
        run / "config.json",
        {
            "vla": {"type": "prism-dinosiglip-224px+oxe+diffusion", "base_vlm": "prism-dinosiglip-224px+7b"},
            "action_model_type": f"DiT-{size[0].upper()}",
            "future_action_window_size": 15,
            "past_action_window_size": 0,
            "repeated_diffusion_steps": 8,
            "image_aug": True,
        },
    )
    action = {"q01": [-0.03] * 6 + [0.0], "q99": [0.03] * 6 + [1.0], "mask": [True] * 6 + [False]}
    statistics = {name: {"action": action, "num_transitions": 1} for name in ("bridge_orig", "fractal20220817_data")}
    write_json(run / "dataset_statistics.json", statistics)
    tokenizer().save(str(run / "tokenizer.json"))


def write_llama(directory: Path, size: tuple[int, ...], dtype: torch.dtype, seed: int, max_shard_bytes: int) -> None:
    hidden_size, layers, heads, kv_heads, intermediate_size = size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tensors = random_tensors(expected_shapes(build_skeleton(DECODER, config)), dtype, seed)
    with progress_bar("writing", total_bytes(tensors), "B") as bar:
        write_huggingface_weights(directory, tensors, max_shard_bytes, bar.update)
    write_json(directory / "config.json", config)
    tokenizer().save(str(directory / "tokenizer.json"))


def cogact_config(size: str) -> dict[str, Any]:
    """As `evla_cli.families.cogact.infer_config` finds it in a released checkpoint."""
    width, blocks, heads = COGACT_HEADS[size]
    tower = {"patch_size": 14, "image_size": 224, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    return {
        "model_type": "cogact",
        "dino_config": tower | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "siglip_config": tower
        | {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
        | {"vision_use_head": True},
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
        "action_config": {
            "hidden_size": width,
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "condition_size": 4096,
        },
    }


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> LazyTensors:
    return {
        name: LazyTensor(dtype, shape, partial(random_tensor, name, shape, dtype, seed))
        for name, shape in shapes.items()
    }


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Norms near 1, biases small, matrices scaled to keep an input's size; what enters the residual stream is small and
    differs from layer to layer."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(shape, dtype=dtype).normal_(generator=generator)
    if len(shape) == 1:
        is_scale = name.endswith("weight") or name.endswith("lambda1")
        return values.mul_(0.02).add_(1.0) if is_scale else values.mul_(0.02)
    scale = 1 / math.sqrt(math.prod(shape[1:]))
    layer = re.search(r"\.(?:layers|layer|blocks)\.(\d+)\.", name)
    if layer and re.search(r"(o_proj|out_proj|attn\.proj|down_proj|fc2)\.weight$", name):
        scale *= 0.05 + 0.3 * ((int(layer[1]) * 7) % 11) / 11  # a fixed shuffle: neighbouring layers differ
    if "embed" in name or "token" in name or "probe" in name:
        scale = 0.5 if "embed_tokens" in name else 0.02
    return values.mul_(scale)


def tokenizer() -> Tokenizer:
    """Llama-2's special ids (<s> 1, </s> 2, the empty token 29871) around a few words; everything else is filler."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 29871}
    for word in WORDS:
        vocabulary[word] = 3 + len(vocabulary)
    taken = set(vocabulary.values())
    vocabulary |= {f"<filler-{i}>": i for i in range(32000) if i not in taken}
    result = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    result.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    result.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return result


if __name__ == "__main__":
    main()
