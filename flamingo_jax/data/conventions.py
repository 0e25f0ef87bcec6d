"""How each family writes images into ids, and which images a token attends.

Sources: arXiv 2204.14198 §2.3 (φ); open_flamingo, src/helpers.py `MaskedCrossAttention`; transformers,
models/idefics/processing_idefics.py. In all of them a generated token attends what the prompt's last token does.
Dimension letters: see `flamingo_jax/models/layers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clip_jax.errors import ConfigError
from flamingo_jax.data.tokenizer import TextTokenizer, check_vocabulary

# What special tokens are called in each family's tokenizer. To Flamingo the tag is plain text, and its one new token
# is beyond the tokenizer.
SPECIAL_TOKENS: Mapping[str, Mapping[str, str]] = {
    "flamingo": {"image": "<image>"},
    "open_flamingo": {"image": "<image>", "end": "<|endofchunk|>", "pad": "<PAD>"},
    "idefics": {"image": "<image>", "around": "<fake_token_around_image>", "end": "</s>", "turn": "<end_of_utterance>"},
}


@dataclass(frozen=True)
class Convention:
    """A family's rule, with the ids that its tokenizer gives the special tokens.

    `image` are the ids that mark one image: the tag's, plain text, in Flamingo; one special token in the others.
    `end_id`: the end of a chunk, or of a document in IDEFICS: what generation stops at. `around_id` stands on
    both sides of IDEFICS's `<image>`; `turn_id` ends a turn of its instructed models.
    """

    family: str
    image: tuple[int, ...]
    end_id: int
    bos_id: int | None = None
    pad_id: int = 0
    around_id: int | None = None
    turn_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in SPECIAL_TOKENS:
            raise ConfigError(f"family {self.family!r}: expected one of {', '.join(SPECIAL_TOKENS)}")

    def places(self, text_BxL: np.ndarray, mask_BxL: np.ndarray) -> np.ndarray:
        """Where an image's first id stands. [B, L] bool. `mask` tells tokens from padding."""
        L, width = text_BxL.shape[1], len(self.image)
        ahead = np.pad(np.where(mask_BxL, text_BxL, -1), ((0, 0), (0, width)), constant_values=-1)
        return np.all([ahead[:, i : i + L] == token for i, token in enumerate(self.image)], axis=0)

    def media_mask(self, text_BxL: np.ndarray, mask_BxL: np.ndarray, images: int) -> np.ndarray:
        """Which of so many images each token attends: the last one before it, its own tag's included. [B, L, T] bool.

        A token before the first image attends none, nor does padding, nor, in IDEFICS, what stands between the
        end of a document and the next one's first image. Images without a tag are padding.

        Raises ConfigError where a row has more tags than there are images.
        """
        mask_BxL = np.asarray(mask_BxL, bool)
        place_BxL = self.places(text_BxL, mask_BxL)
        count_BxL = place_BxL.cumsum(axis=1)
        most = count_BxL.max(axis=1, initial=0)
        if most.max(initial=0) > images:
            row = int(most.argmax())
            raise ConfigError(f"row {row}: {most[row]} image tags; {images} images given")
        attends = mask_BxL
        if self.family == "idefics":
            slot = np.arange(text_BxL.shape[1])
            image, end = (
                np.maximum.accumulate(np.where(there, slot, -1), axis=1)
                for there in (place_BxL, mask_BxL & (text_BxL == self.end_id))
            )
            attends = mask_BxL & (np.pad(end, ((0, 0), (1, 0)), constant_values=-1)[:, :-1] <= image)
        return attends[..., None] & (count_BxL[..., None] == np.arange(1, images + 1))


def open_convention(family: str, tokenizer: TextTokenizer, vocab_size: int, extra_tokens: int) -> Convention:
    """A family's convention for a model of `vocab_size` known tokens and `extra_tokens` trained ones after them.

    Raises ConfigError where the tokenizer lacks a special token, or does not have the ids that the model has.
    """
    if family == "flamingo":
        check_vocabulary(tokenizer, "the tokenizer", vocab_size)
        tag = tuple(tokenizer.encode(SPECIAL_TOKENS[family]["image"]))
        bos_id = next(iter(tokenizer.start_ids), None)
        return Convention(family, image=tag, end_id=vocab_size, bos_id=bos_id, pad_id=tokenizer.pad_id)
    ids = {role: tokenizer.special_id(token) for role, token in SPECIAL_TOKENS[family].items() if token in tokenizer}
    end = vocab_size + extra_tokens
    if tokenizer.vocab_size > end:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} ids; the model has {vocab_size} + {extra_tokens}")
    trained = {"open_flamingo": ("end", "image"), "idefics": ("around", "image")}[family]
    for role in (*trained, "end"):
        token = SPECIAL_TOKENS[family][role]
        if role not in ids:
            raise ConfigError(f"the tokenizer has no token {token}, which {family} needs")
        if role in trained and not vocab_size <= ids[role] < end:
            raise ConfigError(
                f"the tokenizer's {token} is {ids[role]}; the model's trained tokens are {vocab_size} to {end - 1}"
            )
    return Convention(
        family,
        image=(ids["image"],),
        end_id=ids["end"],
        bos_id=next(iter(tokenizer.start_ids), None),
        pad_id=tokenizer.pad_id,
        around_id=ids.get("around"),
        turn_id=ids.get("turn"),
    )
