"""Write tests/golden/: what CogACT's own code and timm compute from seeded weights at small width.

    python3.11 -m venv out/golden
    out/golden/bin/pip install -r scripts/golden/requirements.txt
    out/golden/bin/python scripts/make_golden_files.py --cogact CogACT --openvla openvla

in an environment of its own. CogACT is a checkout of github.com/microsoft/CogACT, whose `action_model/` is run, openvla
one of github.com/arnoldland/openvla, which CogACT depends on, and whose `dinosiglip_vit.py` builds both towers with
timm. Their code is run as it is, at other sizes; none of it is kept, and nothing is downloaded. `tests/test_golden.py`
makes the same weights, loads them into evla as a native checkpoint, and compares.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from golden import seeded
from PIL import Image

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")

BATCH, HORIZON, ACTION_DIM, CONDITION = 2, 16, 7, 64  # CogACT's but for the condition's width
HEAD = {"depth": 3, "hidden_size": 32, "num_heads": 2}
SAMPLERS: dict[str, tuple[int | None, float]] = {  # steps of DDIM, or None for DDPM; scale of guidance
    "ddim_10": (10, 1.5),
    "ddim_5": (5, 1.5),
    "ddim_1": (1, 1.5),
    "ddim_10_unguided": (10, 1.0),
    "ddpm": (None, 1.5),
}
TIMESTEPS = (37, 90)  # of the noise predicted once, a row each

TOWERS = {  # at which timm's models are built; whatever is not named is theirs
    "vit_large_patch14_reg4_dinov2.lvd142m": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "vit_so400m_patch14_siglip_224": {"embed_dim": 48, "depth": 4, "num_heads": 3},
}
PRUNED = {  # what LOADING.md of a pruned checkpoint tells CogACT's users to give timm: 64 rows an MLP
    "vit_large_patch14_reg4_dinov2.lvd142m": {"depth": 3, "mlp_ratio": 64 / 32},
    "vit_so400m_patch14_siglip_224": {"depth": 4, "mlp_ratio": 64 / 48},
}
IMAGE_SIZE, FULL_SIZE = 56, 224
# Width and height; one is enlarged, one reduced. Not upright: Pillow 13 resizes some of those otherwise than Pillow 10.
IMAGES = ((80, 60), (640, 480))
STRIDE = 16  # of the pixels at full size that are kept

SEEDS = {"head": 1, "head_inputs": 2, "towers": 3, "images": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cogact", type=Path, metavar="DIR", required=True)
    parser.add_argument("--openvla", type=Path, metavar="DIR", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(arguments.cogact.resolve()))
    head, head_facts = run_head()
    towers, tower_facts = run_towers(arguments.openvla.resolve())
    facts = {
        "made_by": {
            "command": "python scripts/make_golden_files.py --cogact CogACT --openvla openvla",
            "commits": {
                "microsoft/CogACT": commit(arguments.cogact),
                "arnoldland/openvla": commit(arguments.openvla),
            },
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
        },
        "seeds": SEEDS,
        "head": head_facts,
        "towers": tower_facts,
    }
    GOLDEN.mkdir(exist_ok=True)
    arrays: dict[str, Any] = head | towers
    np.savez_compressed(GOLDEN / "cogact.npz", **arrays)
    (GOLDEN / "cogact.json").write_text(one_line_a_list(json.dumps(facts, indent=1)) + "\n")


def one_line_a_list(text: str) -> str:
    return re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)


def commit(checkout: Path) -> str:
    """Errors: it is no checkout, or it was changed."""
    command = ["git", "-C", str(checkout)]
    if subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout:
        sys.exit(f"{checkout} differs from its commit; give a clean checkout.")
    return subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


# The action head


def run_head() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What CogACT's action model predicts and samples, and what a test needs to know of it."""
    from action_model import action_model
    from action_model.models import DiT

    published = {name: head_sizes(action_model, name) for name in action_model.DiT_models}
    action_model.DiT_models["golden"] = lambda **options: DiT(**HEAD, **options)
    model = action_model.ActionModel(
        token_size=CONDITION,
        model_type="golden",
        in_channels=ACTION_DIM,
        future_action_window_size=HORIZON - 1,
        past_action_window_size=0,
    ).eval()
    # Its width is 4096 whatever `token_size` is (action_model/models.py, LabelEmbedder).
    model.net.z_embedder.uncondition = torch.nn.Parameter(torch.empty(1, CONDITION))
    weights = load_seeded(model, SEEDS["head"])
    input_shapes = {
        "cognition": (BATCH, 1, CONDITION),
        "noise": (BATCH, HORIZON, ACTION_DIM),
        "fresh": (model.diffusion_steps, BATCH, HORIZON, ACTION_DIM),  # what DDPM adds, first step first
    }
    inputs = seeded.inputs(input_shapes, SEEDS["head_inputs"])
    cognition, noise, fresh = (torch.from_numpy(inputs[name]) for name in ("cognition", "noise", "fresh"))
    results = {f"actions_{name}": sample(model, cognition, noise, fresh, *how) for name, how in SAMPLERS.items()}
    with torch.inference_mode():
        results["predicted_noise"] = model.net(noise, torch.tensor(TIMESTEPS), cognition)
    facts = {
        "sizes": HEAD,
        "published_sizes": published,
        "samplers": SAMPLERS,
        "timesteps": TIMESTEPS,
        "input_shapes": input_shapes,
        "inputs_sha256": seeded.digest(inputs),
    }
    return {name: result.numpy() for name, result in results.items()}, facts | described(weights)


def head_sizes(action_model: ModuleType, name: str) -> dict[str, int]:
    with torch.device("meta"):
        net = action_model.DiT_models[name](token_size=CONDITION)
    return {"hidden_size": net.positional_embedding.shape[1], "depth": len(net.blocks), "num_heads": net.num_heads}


@torch.inference_mode()
def sample(
    model: Any, cognition: torch.Tensor, noise: torch.Tensor, fresh: torch.Tensor, steps: int | None, scale: float
) -> torch.Tensor:
    """(B, H, A), with the arguments that CogACT's `predict_action` calls its samplers with (vla/cogactvla.py)."""
    net, guided = model.net, scale > 1.0
    options: dict[str, Any] = {"z": cognition}
    if guided:
        null = net.z_embedder.uncondition.unsqueeze(0).expand(len(cognition), 1, -1)
        options = {"z": torch.cat([cognition, null], 0), "cfg_scale": scale}
        noise, fresh = torch.cat([noise, noise], 0), torch.cat([fresh, fresh], 1)
    denoise = net.forward_with_cfg if guided else net.forward
    common = {"clip_denoised": False, "model_kwargs": options, "progress": False, "device": noise.device}
    if steps is None:
        with drawn(fresh):
            samples = model.diffusion.p_sample_loop(denoise, noise.shape, noise, **common)
    else:
        samples = model.create_ddim(ddim_step=steps).ddim_sample_loop(denoise, noise.shape, noise, eta=0.0, **common)
    return samples.chunk(2, dim=0)[0] if guided else samples


@contextmanager
def drawn(values: torch.Tensor) -> Iterator[None]:
    """Within it, `torch.randn_like` gives these, one after the other."""
    left, own = iter(values), torch.randn_like
    torch.randn_like = lambda *_: next(left)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn_like = own


# The vision towers


def run_towers(openvla: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Pixels and features of both towers, and what a test needs to know of them."""
    vision = import_alone(openvla, "prismatic.models.backbones.vision.dinosiglip_vit")
    published = {name: tower_sizes(name) for name in TOWERS}
    create_model = timm.create_model
    timm.create_model = lambda name, **options: create_model(name, **{**TOWERS[name], **options, "pretrained": False})
    backbone, at_full_size = (
        vision.DinoSigLIPViTBackbone("dinosiglip-vit-so-224px", "resize-naive", default_image_size=size).eval()
        for size in (IMAGE_SIZE, FULL_SIZE)
    )
    pruned = {
        name: {"given": given, "shapes": shapes(timm.create_model(name, num_classes=0, img_size=IMAGE_SIZE, **given))}
        for name, given in PRUNED.items()
    }
    timm.create_model = create_model
    weights = load_seeded(backbone, SEEDS["towers"])
    images = [Image.fromarray(seeded.image(*size, seed=SEEDS["images"])) for size in IMAGES]
    pixels, full = pixels_of(backbone, images), pixels_of(at_full_size, images)
    with torch.inference_mode():
        features = backbone(pixels)
    results = {"features": features.numpy()}
    for name in ("dino", "siglip"):
        results[f"{name}_pixels"] = full[name][:, :, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].numpy()
    facts = {
        "sizes": TOWERS,
        "published_sizes": published,
        "pruned": pruned,
        "image_size": IMAGE_SIZE,
        "full_size": FULL_SIZE,
        "stride": STRIDE,
        "images": IMAGES,
    }
    return results, facts | described(weights)


def import_alone(checkout: Path, name: str) -> Any:
    """A module without what its packages import: no language model, no data loader."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        package = ModuleType(".".join(parts[:length]))
        package.__path__ = [str(checkout.joinpath(*parts[:length]))]
        sys.modules[package.__name__] = package
    return __import__(name, fromlist=["*"])


def tower_sizes(name: str) -> dict[str, int]:
    tower: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=FULL_SIZE)
    return {
        "embed_dim": tower.embed_dim,
        "depth": len(tower.blocks),
        "num_heads": tower.blocks[0].attn.num_heads,
        "num_tokens": tower.patch_embed.num_patches,
    }


def pixels_of(backbone: Any, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """(B, 3, S, S) for each tower."""
    pixels = [backbone.image_transform(image) for image in images]
    return {name: torch.stack([one[name] for one in pixels]) for name in ("dino", "siglip")}


# Both


def load_seeded(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    weights = seeded.weights(shapes(model), seed)
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, strict=True)
    return weights


def described(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "weights_sha256": seeded.digest(weights),
        "weight_shapes": {name: weight.shape for name, weight in weights.items()},
    }


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
