"""Train the demo model from nothing: record demonstrations, train, evaluate, write `demo/` in CogACT's native layout.

    python scripts/train_demo.py --work out/train-demo --output demo

One command and a seed. An interrupted run goes on where it stopped: recorded shards and the last training state in the
work folder are kept. Needs `pip install -e .[demo]` and the system library libosmesa6.

Two processes with one thread each average their gradients after every batch, which is deterministic and keeps two
cores busy. Training has two stages. In the first, the towers, the projector and the lower half of the language model
learn to say where the hand and the object are (their positions, and which visual tokens show them). In the second, the
whole model learns the expert's action chunks with CogACT's diffusion loss; two further heads, discarded at the end, ask
for the positions and for the actions themselves, which shortens training. No layer and no token is ever left out.

Letters: B batch, V visual tokens, T prompt tokens, D language-model width, H action horizon, A action dim.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from demo_env import ACTION_DIM, HORIZON, record
from eval_demo import measure
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from evla_cli.checkpoint.files import write_json
from evla_cli.checkpoint.tensors import LazyTensor
from evla_cli.evaluation.suites.metaworld import IMAGE_SIZE, TASKS
from evla_cli.families.cogact import NativeNames, native_paths, write_llm_config
from evla_cli.models.cogact import CogACTConfig, CogACTForActionPrediction, cognition_token
from evla_cli.models.diffusion import NoiseSchedule

EPISODES = {"train": 140, "validation": 10, "samples": 8}  # per task
PATCH_SIZE = 14
VOCABULARY_SIZE = 64  # padded to a multiple of 64, as CogACT does
GRID = IMAGE_SIZE // PATCH_SIZE
LOCATING_LAYERS = 5  # lower language-model layers whose visual tokens must know where things are
MOVED_DIMS = [0, 1, 2, 6]  # the other three, rotations, are always zero
NULL_CONDITION_RATE = 0.1
NOISE_DRAWS = 4
AVERAGE_DECAY = 0.998
PROMPT_SUFFIX_IDS = [4, 2]  # "\u2581" and "</s>", as CogACT appends 29871 and 2
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    learning_rate: float
    tower_rate_factor: float = 1.0
    warmup_steps: int = 100
    decay_fraction: float = 0.3  # the last part of the stage, in which the rate falls to zero
    batch_size: int = 16  # per process, a multiple of the number of tasks


STAGES = (Stage("locate", 400, 1e-3), Stage("act", 3000, 1e-3, tower_rate_factor=0.5))


def model_config() -> CogACTConfig:
    tower = {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.05,
    }  # the last block of a tower is never run
    return CogACTConfig(
        dino_config=tower | {"mlp_ratio": 4, "num_register_tokens": 4},
        siglip_config=tower | {"intermediate_size": 384, "hidden_act": "gelu"},
        text_config={
            "hidden_size": 160,
            "num_hidden_layers": 10,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "intermediate_size": 512,
            "vocab_size": VOCABULARY_SIZE,
            "max_position_embeddings": 256,
            "initializer_range": 0.05,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        action_config={
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "condition_size": 160,
            "action_dim": ACTION_DIM,
            "action_horizon": HORIZON,
        },
    )


class AuxiliaryHeads(nn.Module):
    """What training asks of the model besides actions: where things are, and the actions by plain regression."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 2)  # per visual token: does it show the hand, the object?
        self.position = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5)) for _ in range(2)
        )
        self.actions = nn.Linear(width, HORIZON * len(MOVED_DIMS))

    def locating_loss(self, visual: Tensor, position: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """visual (B, V, D), position (B, 2, 3) in metres, pixel (B, 2, 2) in [0, 1] -> patch and position loss."""
        scores = self.score(F.layer_norm(visual, visual.shape[-1:])).transpose(1, 2)  # (B, 2, V)
        cell = (pixel * GRID).long().clamp(0, GRID - 1)
        patch_loss = F.cross_entropy(scores.flatten(0, 1), (cell[..., 1] * GRID + cell[..., 0]).flatten())
        pooled = scores.softmax(dim=-1) @ visual  # (B, 2, D)
        target = torch.cat((position * 10, pixel * GRID), dim=-1)  # (B, 2, 5): decimetres and patches
        found = torch.stack([head(pooled[:, i]) for i, head in enumerate(self.position)], dim=1)
        return patch_loss, F.smooth_l1_loss(found, target)

    def regression_loss(self, cognition: Tensor, actions: Tensor) -> Tensor:
        predicted = self.actions(cognition.squeeze(1)).view(-1, HORIZON, len(MOVED_DIMS))
        return F.smooth_l1_loss(predicted, actions[..., MOVED_DIMS], beta=0.1)


class Data:
    """Frames and labels of one split in memory-mapped arrays, so that processes share them."""

    def __init__(self, folder: Path, split: str):
        self.images = np.load(folder / f"{split}-image.npy", mmap_mode="r")  # (N, S, S, 3) uint8
        labels = np.load(folder / f"{split}-labels.npz")
        self.actions, self.position, self.pixel = labels["actions"], labels["position"], labels["pixel"]
        self.task, self.episode, self.step = labels["task"], labels["episode"], labels["step"]
        self.rows_of_task = [np.flatnonzero(self.task == i) for i in range(len(TASKS))]

    @staticmethod
    def pack(folder: Path, split: str) -> None:
        """Join the recorded shards of a split."""
        shards = [
            (i, path) for i, task in enumerate(TASKS) for path in sorted(folder.glob(f"{split}-{task}-[0-9]*.npz"))
        ]
        loaded = [dict(np.load(path)) | {"task": i} for i, path in shards]
        np.save(folder / f"{split}-image.npy", np.concatenate([shard["image"] for shard in loaded]))
        labels = {
            key: np.concatenate([s[key] for s in loaded]) for key in ("actions", "position", "pixel", "episode", "step")
        }
        labels["task"] = np.concatenate([np.full(len(shard["step"]), shard["task"]) for shard in loaded])
        np.savez(folder / f"{split}-labels.npz", allow_pickle=False, **labels)


@dataclass
class Batch:
    input_ids: Tensor  # (B, T) padded on the right
    attention_mask: Tensor  # (B, T)
    dino_pixels: Tensor
    siglip_pixels: Tensor
    actions: Tensor  # (B, H, A) normalised
    position: Tensor
    pixel: Tensor


class Batcher:
    def __init__(self, data: Data, statistics: dict, tokenizer):
        self.data = data
        self.low, self.high = np.array(statistics["q01"], np.float32), np.array(statistics["q99"], np.float32)
        self.mask = np.array(statistics["mask"])
        prompts = [[encode_prompt(tokenizer, text) for text in task.phrasings] for task in TASKS.values()]
        self.length = max(len(ids) for task in prompts for ids in task)
        self.prompts = prompts

    def sample(self, generator: np.random.Generator, size: int) -> Batch:
        """`size` frames, the tasks in equal shares."""
        tasks = np.arange(size) % len(TASKS)
        rows = np.array([generator.choice(self.data.rows_of_task[task]) for task in tasks])
        phrasings = [int(generator.integers(len(self.prompts[task]))) for task in tasks]
        return self.batch(rows, phrasings)

    def batch(self, rows: np.ndarray, phrasings: list[int]) -> Batch:
        ids = np.zeros((len(rows), self.length), np.int64)
        mask = np.zeros_like(ids)
        for i, (row, phrasing) in enumerate(zip(rows, phrasings, strict=True)):
            prompt = self.prompts[self.data.task[row]][phrasing]
            ids[i, : len(prompt)], mask[i, : len(prompt)] = prompt, 1
        images = torch.from_numpy(self.data.images[rows]).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (DINO_MEAN, DINO_STD))
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            (images - mean) / std,
            (images - 0.5) / 0.5,
            torch.from_numpy(normalise(self.data.actions[rows], self.low, self.high, self.mask)),
            torch.from_numpy(self.data.position[rows]),
            torch.from_numpy(self.data.pixel[rows]),
        )


def normalise(actions: np.ndarray, low: np.ndarray, high: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """To [-1, 1] where masked; what never varies becomes 0."""
    span = np.where(high > low, high - low, 1)
    scaled = np.where(high > low, np.clip(2 * (actions - low) / span - 1, -1, 1), 0)
    return np.where(mask, scaled, actions).astype(np.float32)


def action_statistics(data: Data) -> dict:
    """CogACT's `dataset_statistics.json` for the one data set there is."""
    flat = data.actions.reshape(-1, ACTION_DIM).astype(np.float64)
    columns = {
        "mean": flat.mean(0),
        "std": flat.std(0),
        "max": flat.max(0),
        "min": flat.min(0),
        "q01": np.quantile(flat, 0.01, axis=0),
        "q99": np.quantile(flat, 0.99, axis=0),
    }
    action: dict[str, Any] = {name: [round(float(value), 6) for value in values] for name, values in columns.items()}
    action["mask"] = [True] * (ACTION_DIM - 1) + [False]
    episodes = len(np.unique(data.task * 100_000 + data.episode))
    return {"metaworld": {"action": action, "num_transitions": len(data.step), "num_trajectories": episodes}}


def run_decoder(model: CogACTForActionPrediction, hidden_states: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """The first `num_layers` decoder layers: their output, normed, and the visual tokens after the locating ones.

    Prompts are padded on the right and attention is causal, so no mask is needed.
    """
    llama: Any = model.language_model.model
    positions = torch.arange(hidden_states.shape[1]).unsqueeze(0)
    rotary = llama.rotary_emb(hidden_states, positions)
    visual = hidden_states
    for index, layer in enumerate(llama.layers[:num_layers]):
        hidden_states = layer(hidden_states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        if index + 1 == LOCATING_LAYERS:
            visual = hidden_states[:, 1 : 1 + GRID * GRID]
    return llama.norm(hidden_states), visual


def losses(
    stage: Stage, model: CogACTForActionPrediction, heads: AuxiliaryHeads, batch: Batch, generator: torch.Generator
) -> dict[str, Tensor]:
    embedded = model.embed_inputs(batch.input_ids, batch.dino_pixels, batch.siglip_pixels)
    if stage.name == "locate":
        _, visual = run_decoder(model, embedded[:, : 1 + GRID * GRID], LOCATING_LAYERS)
        patch_loss, position_loss = heads.locating_loss(visual, batch.position, batch.pixel)
        return {"patch": patch_loss, "position": position_loss, "total": 0.3 * patch_loss + position_loss}
    final, visual = run_decoder(model, embedded, model.config.text_config.num_hidden_layers)
    patch_loss, position_loss = heads.locating_loss(visual, batch.position, batch.pixel)
    mask = model.expand_mask(batch.attention_mask, batch.input_ids)
    cognition = cognition_token(final, mask)  # (B, 1, D)
    diffusion_loss = denoising_loss(model, cognition, batch.actions, generator)
    regression_loss = heads.regression_loss(cognition, batch.actions)
    total = diffusion_loss + regression_loss + 0.3 * (0.3 * patch_loss + position_loss)
    return {
        "patch": patch_loss,
        "position": position_loss,
        "regression": regression_loss,
        "diffusion": diffusion_loss,
        "total": total,
    }


def denoising_loss(
    model: CogACTForActionPrediction, cognition: Tensor, actions: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise, over R noise draws per sample."""
    cognition, actions = cognition.repeat(NOISE_DRAWS, 1, 1), actions.repeat(NOISE_DRAWS, 1, 1)
    size = len(actions)
    noise = torch.randn(actions.shape, generator=generator)
    timesteps = torch.randint(0, model.config.action_config.num_train_steps, (size,), generator=generator)
    dropped = torch.rand(size, 1, 1, generator=generator) < NULL_CONDITION_RATE
    condition = torch.where(dropped, model.action_head.null_condition(size), cognition)
    noisy = NoiseSchedule.squared_cosine().add_noise(actions, noise, timesteps)
    return F.mse_loss(model.action_head(noisy, timesteps, condition), noise)


class Trainer:
    """One of the training processes. All hold the same weights; each draws its own samples."""

    def __init__(self, work: Path, seed: int, rank: int, processes: int):
        torch.manual_seed(seed)
        self.work, self.seed, self.rank, self.processes = work, seed, rank, processes
        self.model = CogACTForActionPrediction(model_config())
        self.heads = AuxiliaryHeads(self.model.config.text_config.hidden_size)
        tokenizer = build_tokenizer()
        train, held_out = Data(work / "data", "train"), Data(work / "data", "validation")
        statistics = action_statistics(train)["metaworld"]["action"]
        self.batcher, self.held_out = Batcher(train, statistics, tokenizer), Batcher(held_out, statistics, tokenizer)
        self.stage_index, self.step = 0, 0
        self.averaged: dict[str, Tensor] = {}
        if (work / "state.pt").exists():
            self.load()
        else:
            self.start_stage()

    def run(self) -> None:
        while self.stage_index < len(STAGES):
            stage = STAGES[self.stage_index]
            started = time.time()
            while self.step < stage.steps:
                self.train_step(stage)
                if self.rank == 0 and self.step % 100 == 0:
                    self.report(stage, time.time() - started)
                    started = time.time()
                if self.rank == 0 and self.step % 200 == 0:
                    self.save()
            self.stage_index, self.step = self.stage_index + 1, 0
            if self.stage_index < len(STAGES):
                self.start_stage()
            if self.rank == 0:
                self.save()

    def start_stage(self) -> None:
        """A new optimizer over the parameters that the stage moves."""
        stage = STAGES[self.stage_index]
        batch = self.held_out.sample(np.random.default_rng(0), len(TASKS))
        losses(stage, self.model, self.heads, batch, torch.Generator().manual_seed(0))["total"].backward()
        named = [*self.model.named_parameters(), *self.heads.named_parameters(prefix="auxiliary")]
        self.moved = [name for name, parameter in named if parameter.grad is not None]
        parameters = dict(named)
        towers = [parameters[name] for name in self.moved if name.startswith(("dino", "siglip"))]
        rest = [parameters[name] for name in self.moved if not name.startswith(("dino", "siglip"))]
        self.optimizer = torch.optim.AdamW(
            [{"params": towers, "factor": stage.tower_rate_factor}, {"params": rest, "factor": 1.0}],
            lr=stage.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        self.parameters = towers + rest
        self.optimizer.zero_grad()

    def train_step(self, stage: Stage) -> None:
        # The seeds depend on the step alone, so a resumed run sees what the uninterrupted one would have seen.
        seeds = (self.seed, self.stage_index, self.step, self.rank)
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
        )
        batch = self.batcher.sample(np.random.default_rng(seeds), stage.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(stage, self.step)
        self.latest = losses(stage, self.model, self.heads, batch, generator)
        self.optimizer.zero_grad()
        self.latest["total"].backward()
        self.average_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.rank == 0 and stage.name == "act":
            self.average_weights()

    def average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.processes
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def average_weights(self) -> None:
        """The exponential moving average that is shipped."""
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            kept = self.averaged.setdefault(name, value.clone())
            kept.lerp_(value, 1 - decay)

    @torch.no_grad()
    def report(self, stage: Stage, seconds: float) -> None:
        generator = torch.Generator().manual_seed(1)
        batch = self.held_out.sample(np.random.default_rng(1), 128)
        held_out = losses(stage, self.model, self.heads, batch, generator)
        rate = 100 * stage.batch_size * self.processes / seconds
        pairs = [
            f"{name} {float(self.latest[name].detach()):.4f}/{float(value):.4f}" for name, value in held_out.items()
        ]
        now = time.strftime("%H:%M:%S")
        print(f"{now} {stage.name} {self.step}/{stage.steps} {rate:.0f} samples/s train/held-out:", *pairs, flush=True)

    def save(self) -> None:
        state = {
            "stage_index": self.stage_index,
            "step": self.step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.work / "state.partial.pt")
        (self.work / "state.partial.pt").rename(self.work / "state.pt")

    def load(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.averaged, self.stage_index, self.step = state["averaged"], state["stage_index"], state["step"]
        if self.stage_index < len(STAGES):
            self.start_stage()
            self.optimizer.load_state_dict(state["optimizer"])


def learning_rate(stage: Stage, step: int) -> float:
    """Up in a line, flat, and down to zero in a line."""
    remaining = (stage.steps - step) / (stage.decay_fraction * stage.steps)
    return stage.learning_rate * min(1.0, (step + 1) / stage.warmup_steps, remaining)


def train_process(rank: int, work: Path, seed: int, processes: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    Trainer(work, seed, rank, processes).run()
    dist.destroy_process_group()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, whatever its case; ids 0 to 4 are the special ones."""
    prompt_words = ["in", "out", ":", "?", "what", "action", "should", "the", "robot", "take", "to"]
    words = {word for task in TASKS.values() for phrasing in task.phrasings for word in phrasing.split()}
    specials = ["<unk>", "<s>", "</s>", "<PAD>", "\u2581"]
    vocabulary = [*specials, *prompt_words, *sorted(words - set(prompt_words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        additional_special_tokens=["\u2581"],
        model_max_length=256,
        padding_side="right",
    )


def encode_prompt(tokenizer: PreTrainedTokenizerFast, instruction: str) -> list[int]:
    text = f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    return [*tokenizer(text).input_ids, *PROMPT_SUFFIX_IDS]


def write_run(output: Path, weights: dict[str, Tensor], statistics: dict[str, Any], seed: int) -> None:
    """CogACT's native layout in bfloat16: config, statistics, tokenizer, language-model config, nested checkpoint."""
    config = model_config().to_dict()
    # The native format gives the class token no position of its own: its share moves into the token itself.
    positions, class_token = "dino.embeddings.position_embeddings", "dino.embeddings.cls_token"
    weights = weights | {class_token: weights[class_token] + weights[positions][:, :1]}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    lazy = {name: LazyTensor(t.dtype, tuple(t.shape), partial(lambda t: t, t)) for name, t in rounded.items()}
    native = NativeNames(config).to_native(lazy)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, (_, part, rest) in native_paths(native).items():
        parts.setdefault(part, {})[rest] = native[name].load().contiguous()
    (output / "checkpoints").mkdir(parents=True)
    torch.save({"model": parts}, output / "checkpoints" / f"{output.name}.pt")
    action = config["action_config"]
    write_json(
        output / "config.json",
        {
            "vla": {"type": output.name, "vla_id": output.name, "base_vlm": "evla-demo-dinosiglip-112px"},
            "action_model_type": f"DiT-{action['num_hidden_layers']}x{action['hidden_size']}",
            "future_action_window_size": HORIZON - 1,
            "past_action_window_size": 0,
            "repeated_diffusion_steps": NOISE_DRAWS,
            "image_aug": False,
            "seed": seed,
            "evla": {
                "num_attention_heads": {
                    "dino": config["dino_config"]["num_attention_heads"],
                    "siglip": config["siglip_config"]["num_attention_heads"],
                    "action_model": action["num_attention_heads"],
                }
            },
        },
    )
    write_json(output / "dataset_statistics.json", statistics)
    text = config["text_config"]
    kept = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    kept += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id"]
    llama = {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": False}
    write_llm_config(output / "llm_config", llama | {key: text[key] for key in kept})
    build_tokenizer().save_pretrained(output)


def write_samples(output: Path, data: Data) -> None:
    """One frame an episode as PNG, the tasks in equal shares, each from first frame to last."""
    lines = []
    (output / "frames").mkdir(parents=True)
    for index, (task, description) in enumerate(TASKS.items()):
        rows = data.rows_of_task[index]
        episodes = np.unique(data.episode[rows])
        for i, episode in enumerate(episodes):
            frames = rows[data.episode[rows] == episode]
            name = f"frames/{task}-{i}.png"
            Image.fromarray(data.images[frames[len(frames) * i // len(episodes)]]).save(output / name)
            instruction = description.phrasings[i % len(description.phrasings)]
            lines.append(json.dumps({"image": name, "instruction": instruction, "episode": f"{task}-{i}"}))
    (output / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="recordings and training state (about 3 GB)")
    parser.add_argument("--output", type=Path, required=True, help="where cogact-metaworld/ and samples/ are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    for split, episodes in EPISODES.items():
        record(args.work / "data", split, episodes, args.processes)
        if not (args.work / "data" / f"{split}-labels.npz").exists():
            Data.pack(args.work / "data", split)
    store = args.work / f"rendezvous-{time.time_ns()}"
    torch.multiprocessing.spawn(
        train_process, (args.work, args.seed, args.processes, str(store)), nprocs=args.processes
    )
    weights = torch.load(args.work / "state.pt", weights_only=True)["averaged"]
    statistics = action_statistics(Data(args.work / "data", "train"))
    run = args.output / "cogact-metaworld"
    write_run(run, weights, statistics, args.seed)
    write_samples(args.output / "samples", Data(args.work / "data", "samples"))
    measure(run, args.output / "samples", args.work / "evaluation", 50, 15, args.processes)


if __name__ == "__main__":
    main()
