"""Batches from what users of each family pass: pictures or pixels, and ids; the masks follow from the ids.

Dimension letters: see `flamingo_jax/models/layers.py`; S pixels a side.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import ConfigError
from flamingo_jax.data.conventions import Convention


def make_batch(
    images: Any, text_ids: Any, text_mask: Any, convention: Convention, preprocess: Preprocess, vocab_size: int
) -> dict[str, np.ndarray]:
    """A batch as the model takes it.

    Args:
      images: for every row its images, as lists or as one array, or None where there are none at all.
        In lists an image is a path, encoded bytes, a PIL image or uint8 [H, W, 3]; a clip is a list of its frames or
        uint8 [F, H, W, 3]. Rows may hold different numbers of them.
        An array is float, normalised: [B, T, S, S, 3] or [B, T, F, S, S, 3], or with the channels before the pixels,
        as OpenFlamingo's `vision_x` and IDEFICS's `pixel_values` have them; or the same in uint8, of any size.
        An array's rows may hold more images than they have tags, if another row has as many.
      text_ids: [B, L], or lists of different lengths, which are padded on the left.
      text_mask: [B, L], which of them are no padding; all where it is None.
      vocab_size: of the model, with its trained tokens.

    Returns:
      media float32 [B, T, F, S, S, 3], frame_mask bool [B, T, F], text int32 [B, L], text_mask bool [B, L],
      media_mask bool [B, L, T].

    Raises:
      ConfigError: shapes that do not fit, ids that the model does not have, more or fewer images in a row than
        image tags.
      RecordError: an image that can't be read.
    """
    text, mask = _texts(text_ids, text_mask, convention.pad_id, vocab_size)
    if images is None:
        images = [[]] * len(text)
    media, frame_mask, counts = _array(images, preprocess) if hasattr(images, "shape") else _lists(images, preprocess)
    if len(media) != len(text):
        raise ConfigError(f"images of {len(media)} rows for {len(text)} rows of text")
    media_mask = convention.media_mask(text, mask, media.shape[1])
    tags = convention.places(text, mask).sum(axis=1)
    if hasattr(images, "shape"):  # of all rows the one with most tags has a use for every image
        counts = np.where(np.arange(len(tags)) == tags.argmax(), np.maximum(counts.max(), tags), tags)
    for row, (count, expected) in enumerate(zip(tags, counts, strict=True)):
        if count != expected:
            raise ConfigError(f"row {row}: {count} image tags for {expected} images")
    return dict(media=media, frame_mask=frame_mask, text=text, text_mask=mask, media_mask=media_mask)


def _texts(ids: Any, mask: Any, pad_id: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    if not hasattr(ids, "shape") and mask is None and len({len(row) for row in ids}) > 1:
        length = max(len(row) for row in ids)
        mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in ids])
        ids = [[pad_id] * (length - len(row)) + list(row) for row in ids]
    text = np.asarray(ids)
    if text.ndim != 2 or text.dtype.kind not in "iu" or not text.size:
        raise ConfigError(f"text_ids of shape {list(text.shape)} and type {text.dtype}; whole numbers [B, L] expected")
    kept = np.ones(text.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if kept.shape != text.shape:
        raise ConfigError(f"text_mask of shape {list(kept.shape)} for text_ids of shape {list(text.shape)}")
    if not kept.any(axis=1).all():
        raise ConfigError(f"row {int(kept.any(axis=1).argmin())}: no tokens, only padding")
    for row, place in np.argwhere(kept & ((text < 0) | (text >= vocab_size))):
        raise ConfigError(f"row {row}: the id {text[row, place]}; this model has 0 to {vocab_size - 1}")
    return np.where(kept, text, pad_id).astype(np.int32), kept


def _array(images: Any, preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    media, S = np.asarray(images), preprocess.image_size
    shape = media.shape
    media = media[:, :, None] if media.ndim == 5 else media
    if media.ndim == 6 and media.shape[-1] != 3 and media.shape[3] == 3:
        media = np.moveaxis(media, 3, -1)
    pixels = media.dtype == np.uint8
    if media.ndim != 6 or media.shape[-1] != 3 or not media.size or not (pixels or media.shape[3:5] == (S, S)):
        raise ConfigError(
            f"images of shape {list(shape)}; [B, T, {S}, {S}, 3] or [B, T, F, {S}, {S}, 3], or channels first, expected"
        )
    seen = media.any(axis=(2, 3, 4, 5))
    counts = np.where(seen, np.arange(1, media.shape[1] + 1), 0).max(axis=1)
    if pixels:
        B, T, F = media.shape[:3]
        flat = [preprocess(Image.fromarray(frame)) for frame in media.reshape(B * T * F, *media.shape[3:])]
        media = np.stack(flat).reshape(B, T, F, S, S, 3)
    elif media.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise ConfigError(f"images of type {media.dtype}; uint8, or normalised floats expected")
    return media.astype(np.float32), np.ones(media.shape[:3], bool), counts


def _lists(rows: Sequence[Any], preprocess: Preprocess) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    read = [
        [_frames(one, preprocess, f"row {b}, image {t}") for t, one in enumerate(row)] for b, row in enumerate(rows)
    ]
    T = max([1, *(len(row) for row in read)])
    F = max([1, *(len(frames) for row in read for frames in row)])
    S = preprocess.image_size
    media, frame_mask = np.zeros((len(read), T, F, S, S, 3), np.float32), np.zeros((len(read), T, F), bool)
    for b, row in enumerate(read):
        for t, frames in enumerate(row):
            media[b, t, : len(frames)], frame_mask[b, t, : len(frames)] = frames, True
    return media, frame_mask, np.array([len(row) for row in read])


def _frames(media: Any, preprocess: Preprocess, where: str) -> np.ndarray:
    """An image or a clip, normalised: [F, S, S, 3]."""
    if isinstance(media, np.ndarray) and media.ndim == 3:
        media = [media]
    frames = list(media) if isinstance(media, list | tuple | np.ndarray) else [media]
    if not frames:
        raise ConfigError(f"{where}: a clip without frames")
    return np.stack([_frame(frame, preprocess, where) for frame in frames])


def _frame(frame: Any, preprocess: Preprocess, where: str) -> np.ndarray:
    if isinstance(frame, np.ndarray):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ConfigError(f"{where}: {frame.dtype} {list(frame.shape)}; uint8 [H, W, 3] expected")
        frame = Image.fromarray(frame)
    return preprocess(frame)
