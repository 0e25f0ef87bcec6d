"""Which images a token attends, by each family's rule: hand-made rows, and the rules said as loops."""

import numpy as np
import pytest

from clip_jax.errors import ConfigError
from flamingo_jax.data.conventions import Convention, open_convention
from flamingo_jax.data.documents import phi
from flamingo_jax.data.tokenizer import open_tokenizer

FLAMINGO = Convention("flamingo", image=(7, 8), end_id=50)
OPEN_FLAMINGO = Convention("open_flamingo", image=(9,), end_id=50)
IDEFICS = Convention("idefics", image=(9,), end_id=2, around_id=8)
PAD = 0


def seen(convention: Convention, row: list[int], images: int = 3) -> list[int]:
    """The number of the image that each token attends, from 1; 0: none."""
    text = np.array([row])
    mask = convention.media_mask(text, text != PAD, images)[0]
    assert mask.sum(axis=1).max() <= 1
    return [int(token.argmax()) + 1 if token.any() else 0 for token in mask]


def test_hand_made_rows() -> None:
    assert seen(FLAMINGO, [PAD, 1, 7, 8, 3, 50, 7, 8, 4]) == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert seen(FLAMINGO, [1, 7, 3, 8, 7]) == [0, 0, 0, 0, 0]  # no whole tag
    assert seen(OPEN_FLAMINGO, [PAD, 1, 9, 3, 50, 9, 4, PAD]) == [0, 0, 1, 1, 1, 2, 2, 0]
    # The end belongs to its document; the next one's beginning sees none of its images.
    assert seen(IDEFICS, [PAD, 1, 8, 9, 8, 3, 2, 1, 8, 9, 8, 2, 2, 4]) == [0, 0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0]


def their_loop(row: list[int], image: int, end: int | None) -> list[int]:
    count, ended, found = 0, False, []
    for token in row:
        if token == image:
            count, ended = count + 1, False
        found.append(0 if ended else count)
        ended = ended or token == end
    return found


def test_random_rows_equal_the_rules_said_as_loops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = rng.integers(1, 10, 30).tolist()
        assert seen(OPEN_FLAMINGO, row, 30) == their_loop(row, 9, None)
        assert seen(IDEFICS, row, 30) == their_loop(row, 9, 2)
        places = [i for i in range(29) if row[i : i + 2] == [7, 8]]
        mask = FLAMINGO.media_mask(np.array([row]), np.ones((1, 30), bool), len(places))
        np.testing.assert_array_equal(mask[0], phi(places, 30, "previous"))


def test_more_tags_than_images_are_named() -> None:
    text = np.array([[1, 9, 3], [9, 9, 3]])
    with pytest.raises(ConfigError, match="row 1: 2 image tags; 1 images given"):
        OPEN_FLAMINGO.media_mask(text, text != PAD, 1)
    with pytest.raises(ConfigError, match="family 'kosmos': expected one of flamingo, open_flamingo, idefics"):
        Convention("kosmos", image=(1,), end_id=2)


def test_the_first_id_beyond_a_padded_table_of_embeddings_is_the_new_token() -> None:
    tokenizer = open_tokenizer("wordnet/tokenizer.json")  # 4096 ids
    assert open_convention("flamingo", tokenizer, 4224, 1).end_id == 4224
    for size in (4095, 4096 + 512):
        with pytest.raises(ConfigError, match=f"the tokenizer has 4096 ids; the language model expects {size}"):
            open_convention("flamingo", tokenizer, size, 1)
