"""From camera image and instruction to CogACT's input tensors: prompt, special tokens, image transforms.

Letters used here: B batch, T prompt tokens, S image size.
"""

import logging
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from evla_cli.calibration import upright
from evla_cli.errors import EvlaError

LOG = logging.getLogger(__name__)

_PROMPT = "In: What action should the robot take to {}?\nOut:"
# Appended to every prompt: the empty token and EOS, whose hidden state after the final norm is the cognition token.
# CogACT writes their ids in Llama-2's vocabulary; a smaller vocabulary names them by their text.
_SUFFIX_IDS, _SUFFIX_TOKENS = (29871, 2), ("▁", "</s>")
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIGLIP_MEAN, _SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class CogACTInputs:
    """
    Attributes:
        input_ids: (B, T), padded on the right.
        dino_pixels, siglip_pixels: (B, 3, S, S).
        attention_mask: (B, T), or None where nothing is padding.
        instruction_mask: (B, T), 1 for the tokens of the instruction itself, without the words around it.
    """

    input_ids: Tensor
    dino_pixels: Tensor
    siglip_pixels: Tensor
    attention_mask: Tensor | None
    instruction_mask: Tensor

    def to(self, like: Tensor) -> "CogACTInputs":
        """On the device of `like`, pixels in its dtype."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(like.device),
            dino_pixels=self.dino_pixels.to(like),
            siglip_pixels=self.siglip_pixels.to(like),
            attention_mask=None if mask is None else mask.to(like.device),
            instruction_mask=self.instruction_mask.to(like.device),
        )

    @property
    def picture(self) -> Tensor:
        """(B, 3, S, S), in [0, 1]: what the camera saw, at the towers' resolution."""
        return self.siglip_pixels * _SIGLIP_STD[0] + _SIGLIP_MEAN[0]

    @property
    def real_tokens(self) -> Tensor:
        """(B, T), 1 where a token is not padding."""
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.dino_pixels, self.siglip_pixels


class CogACTProcessor:
    """Images and instructions in, `CogACTInputs` out. Errors: a tokenizer that does not fit the model."""

    def __init__(self, config: Any, tokenizer_dir: Path):
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self._unknown_id = self.tokenizer.token_to_id(getattr(self.tokenizer.model, "unk_token", None) or "<unk>")
        self.dino_size = config.dino_config.image_size
        self.siglip_size = config.siglip_config.image_size
        self.bos_id = self._token_id("<s>", tokenizer_dir)
        if config.prompt_suffix_ids is not None:
            self.suffix_ids = list(config.prompt_suffix_ids)
        elif config.text_config.vocab_size > max(_SUFFIX_IDS):
            self.suffix_ids = list(_SUFFIX_IDS)
        else:
            self.suffix_ids = [self._token_id(token, tokenizer_dir) for token in _SUFFIX_TOKENS]
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= config.text_config.vocab_size:
            raise EvlaError(
                f"{tokenizer_dir / 'tokenizer.json'} has token {largest}, the model knows "
                f"{config.text_config.vocab_size} tokens: not the tokenizer that it was trained with."
            )

    def __call__(self, images: list[Image.Image], instructions: list[str]) -> CogACTInputs:
        prompts = [self.prompt(instruction) for instruction in instructions]
        input_ids, mask = pad_right([ids for ids, _ in prompts])
        instruction_mask, _ = pad_right([marks for _, marks in prompts])
        dino = torch.stack([image_tensor(image, self.dino_size, _IMAGENET_MEAN, _IMAGENET_STD) for image in images])
        siglip = torch.stack([image_tensor(image, self.siglip_size, _SIGLIP_MEAN, _SIGLIP_STD) for image in images])
        return CogACTInputs(input_ids, dino, siglip, mask, instruction_mask)

    def prompt(self, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids (BOS, the prompt, the two suffix tokens), and a 1 for each that belongs to the instruction."""
        if not isinstance(instruction, str):
            raise EvlaError(f"An instruction must be a text, got {type(instruction).__name__}.")
        if not instruction.strip():
            raise EvlaError("The instruction is empty.")
        text = _PROMPT.format(instruction.lower())
        begin = _PROMPT.index("{}")
        end = begin + len(instruction.lower())
        try:
            encoding = self.tokenizer.encode(text)
        except TypeError as error:  # from a command line in another encoding
            raise EvlaError("The instruction is not valid Unicode text.") from error
        except Exception as error:  # the library raises plain Exception where it has no token for unknown words
            raise EvlaError(f"The tokenizer cannot read the instruction '{instruction[:80]}': {error}.") from error
        ids = encoding.ids
        _warn_of_unknown(self._unknown_words(text, encoding, begin, end))
        marks = [int(first < end and last > begin and last > first) for first, last in encoding.offsets]
        if ids[:1] != [self.bos_id]:
            ids, marks = [self.bos_id, *ids], [0, *marks]
        return ids + self.suffix_ids, marks + [0] * len(self.suffix_ids)

    def _unknown_words(self, text: str, encoding: Encoding, begin: int, end: int) -> tuple[str, ...]:
        """The pieces of `text[begin:end]` that became the unknown token. Where letters become bytes, there are none."""
        spans = [
            text[max(first, begin) : min(last, end)]
            for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id == self._unknown_id
        ]
        return tuple(dict.fromkeys(span for span in spans if span.strip()))

    def _token_id(self, token: str, where: Path) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise EvlaError(f"{where / 'tokenizer.json'} has no token '{token}', which CogACT's prompt needs.")
        return token_id


@cache  # once for the same words, not once a time step
def _warn_of_unknown(words: tuple[str, ...]) -> None:
    if words:
        named = ", ".join(map(repr, words))
        LOG.warning("The tokenizer has no token for %s: the model cannot read that in the instruction.", named)


def load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise EvlaError(f"{directory} has no tokenizer.json; copy the tokenizer's files there.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise EvlaError(f"{path} is not a tokenizer: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def pad_right(sequences: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Token ids (B, T) and their mask, which is None where all sequences have one length."""
    length = max(map(len, sequences))
    input_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in sequences])
    if all(len(ids) == length for ids in sequences):
        return input_ids, None
    return input_ids, torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences])


def image_tensor(image: Image.Image, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(3, S, S) in the tower's own normalisation. "resize-naive": squeezed to a square, bicubic."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def to_image(image: Any) -> Image.Image:
    """A PIL image, or a uint8 array (height, width, 3), as a PIL image.

    One that is still what `Image.open` returned is turned as its EXIF data say, so that a file gives the same however
    it is opened; any other is what its pixels are.
    """
    if isinstance(image, ImageFile.ImageFile):
        return upright(image)
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        found = f"{array.dtype} {array.shape}" if array.ndim else type(image).__name__
        raise EvlaError(f"An image must be a PIL image or a uint8 array (height, width, 3), got {found}.")
    return Image.fromarray(array)


GRIPPER = 6  # CogACT's seventh action dimension is open or closed, whatever its statistics say


def unnormalize_actions(normalized: np.ndarray, stats: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The robot's units, and the normalised actions as clipped: (B, H, A) float -> two (B, H, A) float64.

    CogACT's rule: clip to [-1, 1]; gripper 0 below 0.5, else 1; q01 and q99 are what -1 and 1 stand for where the
    mask is true; the others stay as they are.
    """
    clipped = np.clip(normalized.astype(np.float64), -1.0, 1.0)
    if clipped.shape[-1] > GRIPPER:
        clipped[..., GRIPPER] = np.where(clipped[..., GRIPPER] < 0.5, 0.0, 1.0)
    low, high = np.asarray(stats["q01"], dtype=np.float64), np.asarray(stats["q99"], dtype=np.float64)
    scaled = 0.5 * (clipped + 1) * (high - low) + low
    return np.where(np.asarray(stats["mask"]), scaled, clipped), clipped
