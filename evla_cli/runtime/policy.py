"""What a robot process imports: a bundle loaded as a policy that turns image and instruction into an action chunk.

    policy = evla_cli.load_policy("bundle/")
    actions = policy.predict_action(image, "open the drawer")      # (H, A), in the robot's units

Letters used here: B batch, H action horizon, A action dim, D language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from evla_cli.checkpoint.bundle import SETTINGS, open_bundle
from evla_cli.errors import EvlaError, suggest
from evla_cli.families import open_checkpoint
from evla_cli.families.base import Checkpoint
from evla_cli.methods.frame_reuse import TokenReuse
from evla_cli.methods.visual_tokens import TokenSelection, random_scores
from evla_cli.models.cogact import CogACTForActionPrediction, cognition_token
from evla_cli.models.processing import CogACTInputs, CogACTProcessor, to_image, unnormalize_actions
from evla_cli.models.skeleton import check_device, load_model
from evla_cli.runtime.actions import sample_actions
from evla_cli.runtime.decoder import run_decoder
from evla_cli.runtime.frame_cache import FrameCache
from evla_cli.settings import InferenceSettings


def load_policy(
    bundle: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> "Policy":
    """Load a bundle. Needs no network and runs no code from the bundle.

    Args:
        dtype: of weights and activations; None keeps what the bundle holds. CogACT's action head and sampler are in
            float32 in any case, as in CogACT's own code; in float64 if that is asked for.
        seed: of the diffusion noise, see `Policy.predict_action`.

    Errors: anything missing, misshapen, not finite, or settings that the model cannot obey.
    """
    root = Path(bundle)
    open_bundle(root)
    settings = InferenceSettings.load(root / SETTINGS)
    return policy_from_checkpoint(root, settings, device=device, dtype=dtype, seed=seed)


def policy_from_checkpoint(
    source: Path,
    settings: InferenceSettings | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> "Policy":
    """A policy from any checkpoint with an action head, bundle or not, with the given settings (default: neutral)."""
    check_device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise EvlaError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}.")
    return policy_from_weights(open_acting(source), settings, device=device, dtype=dtype, seed=seed)


def open_acting(source: Path) -> Checkpoint:
    """Open a checkpoint that a policy can be made from. Errors: it has no action head or no tokenizer."""
    checkpoint = open_checkpoint(source)
    if not checkpoint.family.has_action_head:
        raise EvlaError(f"{source} has no action head: only a vision-language-action model can act.")
    if checkpoint.tokenizer_dir is None:
        raise EvlaError(f"{checkpoint.root} has no tokenizer.json; copy the tokenizer's files there.")
    return checkpoint


def policy_from_weights(
    checkpoint: Checkpoint,
    settings: InferenceSettings | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> "Policy":
    """A policy from what `open_acting` opened, its weights and config perhaps changed since."""
    assert checkpoint.tokenizer_dir is not None
    model = load_model(checkpoint.family, checkpoint.config, checkpoint.weights, checkpoint.root, dtype, device)
    assert isinstance(model, CogACTForActionPrediction)
    processor = CogACTProcessor(model.config, checkpoint.tokenizer_dir)
    return Policy(model, processor, settings or InferenceSettings(), seed)


@dataclass(frozen=True)
class Prediction:
    """
    Attributes:
        actions: (B, H, A), float64, in the robot's units.
        normalized_actions: (B, H, A), in [-1, 1], gripper 0 or 1.
        denoised_actions: (B, H, A), the same as the action head gave them: not clipped, gripper not rounded.
        cognition: (B, 1, D), what the action head was given.
        selection: the visual tokens that were kept and why, None if all were; under `vla_cache` those that were taken
            over from the frame before.
    """

    actions: np.ndarray
    normalized_actions: np.ndarray
    denoised_actions: np.ndarray
    cognition: Tensor
    selection: TokenSelection | TokenReuse | None


class Policy:
    """A model, its preprocessing, and settings that hold for this object alone.

    Call `reset` where an episode starts: some methods of choosing visual tokens depend on the calls before.
    """

    def __init__(
        self, model: CogACTForActionPrediction, processor: CogACTProcessor, settings: InferenceSettings, seed: int = 0
    ):
        config = model.config
        settings.check(
            config.num_visual_tokens,
            config.text_config.num_hidden_layers,
            config.action_config.num_hidden_layers,
            config.action_config.num_train_steps,
        )
        self.model, self.processor, self.settings = model, processor, settings
        self._generator = torch.Generator().manual_seed(seed)
        self._frames = FrameCache(settings.visual_tokens)
        self.reset()

    def reset(self, episode: int = 0) -> None:
        """Forget the frames before. The stream of diffusion noise goes on.

        Args:
            episode: which random choices of visual tokens follow: those of a number are the same every time.
        """
        self._frames.reset()
        self._episode, self._calls = episode, 0

    def with_settings(self, settings: InferenceSettings, seed: int = 0) -> Self:
        """The same weights under other settings, run by the same code: a subclass stays what it is."""
        return type(self)(self.model, self.processor, settings, seed)

    def predict_action(
        self, image: Any, instruction: str, *, unnorm_key: str | None = None, seed: int | None = None
    ) -> np.ndarray:
        """One action chunk, (H, A), float64, in the robot's units.

        Args:
            image: PIL image or uint8 array (height, width, 3), RGB.
            unnorm_key: whose statistics un-normalise; may be left out where the model knows one dataset.
            seed: of this call's noise; None draws on the policy's own stream, so that two calls differ.
        """
        generator = self._generator if seed is None else torch.Generator().manual_seed(seed)
        return self.predict([image], [instruction], unnorm_key=unnorm_key, generator=generator).actions[0]

    @torch.inference_mode()
    def predict(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        unnorm_key: str | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """A batch.

        Args:
            noise: (B, H, A), what denoising starts from; drawn if left out.
            generator: what noise is drawn from, DDPM's at every step included; None is the policy's own stream.
        """
        stats = self.action_stats(unnorm_key)
        if len(images) != len(instructions) or not images:
            raise EvlaError(
                f"{len(images)} images and {len(instructions)} instructions; give as many of both, at least one."
            )
        inputs = self.prepare(images, instructions)
        generator = generator or self._generator
        noise = self.draw_noise(len(images), generator) if noise is None else noise
        cognition, selection = self.think(inputs, self.see(inputs))
        normalized = self.act(cognition, noise, generator)
        denoised = normalized.float().cpu().numpy()
        actions, clipped = unnormalize_actions(denoised, stats)
        if not np.isfinite(actions).all():
            raise EvlaError("The model computed an action that is not finite; its config or its dtype does not fit it.")
        return Prediction(actions, clipped, denoised, cognition, selection)

    # The stages of one prediction, in order.

    def prepare(self, images: Sequence[Any], instructions: Sequence[str]) -> CogACTInputs:
        inputs = self.processor([to_image(image) for image in images], list(instructions))
        return inputs.to(next(self.model.projector.parameters()))

    def see(self, inputs: CogACTInputs) -> Tensor:
        """Vision towers, projector and prompt: the decoder's input, (B, T, D)."""
        return self.model.embed_inputs(*inputs.arguments())

    def think(self, inputs: CogACTInputs, inputs_embeds: Tensor) -> tuple[Tensor, TokenSelection | TokenReuse | None]:
        """The cognition token, (B, 1, D). One call is one time step of an episode."""
        config, tokens = self.model.config, self.settings.visual_tokens
        arguments = (
            self.model.language_model.model,
            inputs_embeds,
            self.model.expand_mask(inputs.attention_mask, inputs.input_ids),
            self._context(inputs),
            config.num_visual_tokens,
        )
        selection: TokenSelection | TokenReuse | None
        if tokens.method == "vla_cache":
            prompt = torch.stack((inputs.input_ids, inputs.real_tokens), dim=1)
            hidden_states, mask, selection = self._frames.run_decoder(*arguments, prompt, inputs.picture)
        else:
            hidden_states, mask, selection = run_decoder(*arguments, tokens, self._random_scores(inputs_embeds))
        self._calls += 1
        return cognition_token(hidden_states, mask), selection

    def act(self, cognition: Tensor, noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Denoise an action chunk: (B, 1, D) and noise (B, H, A) -> normalised actions (B, H, A)."""
        return sample_actions(
            self.model.action_head,
            cognition,
            noise,
            self.settings.diffusion,
            self.settings.action_cache,
            generator or self._generator,
        )

    def draw_noise(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """(B, H, A), float32, drawn on the CPU: the same for every device and dtype."""
        config = self.model.config.action_config
        return torch.randn(batch_size, config.action_horizon, config.action_dim, generator=generator)

    def action_stats(self, unnorm_key: str | None) -> dict[str, Any]:
        stats = self.model.config.norm_stats
        if unnorm_key is None and len(stats) == 1:
            unnorm_key = next(iter(stats))
        if unnorm_key is None:
            raise EvlaError(
                f"The model knows {len(stats)} datasets; name one with unnorm_key: {', '.join(sorted(stats))}."
            )
        if unnorm_key not in stats:
            raise EvlaError(f"Unknown unnorm_key '{unnorm_key}'. {suggest(unnorm_key, stats)}")
        return stats[unnorm_key]["action"]

    def _random_scores(self, inputs_embeds: Tensor) -> Tensor | None:
        """(B, V), or None where visual tokens are not chosen at random."""
        tokens = self.settings.visual_tokens
        if tokens.method != "random":
            return None
        num_visual = self.model.config.num_visual_tokens
        scores = random_scores(len(inputs_embeds), num_visual, tokens.seed, self._episode, self._calls)
        return scores.to(inputs_embeds.device)

    def _context(self, inputs: CogACTInputs) -> Tensor:
        """(B, T - 1): the prompt rows after the image whose attention scores the visual tokens."""
        rows, real = self.settings.visual_tokens.score_rows, inputs.real_tokens
        if rows == "instruction":
            return inputs.instruction_mask[:, 1:]
        if rows == "cognition":
            return torch.nn.functional.one_hot(real.cumsum(dim=1).argmax(dim=1), real.shape[1])[:, 1:]
        return real[:, 1:]
