"""The order of training: keyed permutations that look random, without memory."""

import numpy as np
import pytest

from clip_jax.data.order import Order, generator, group_by, mix, permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@pytest.fixture(scope="module", params=[10**6, 10**9, 5 * 10**9], ids=["1e6", "1e9", "5e9"])
def drawn(request: pytest.FixtureRequest) -> tuple[int, np.ndarray]:
    """A source's size, and 20,000 consecutive indices of its order."""
    order = Order(request.param, seed=0)
    return request.param, np.array([order.index(p) for p in range(20_000)], np.float64)


def test_neighbours_are_uncorrelated(drawn: tuple[int, np.ndarray]) -> None:
    _, indices = drawn
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.03


def test_batch_means_scatter_as_at_random(drawn: tuple[int, np.ndarray]) -> None:
    n, indices = drawn
    means = indices.reshape(-1, 100).mean(axis=1)
    at_random = n / np.sqrt(12 * 100)
    assert 0.8 < means.std() / at_random < 1.2


def test_indices_beyond_32_bits_are_reached_and_do_not_repeat() -> None:
    order = Order(5 * 10**9, seed=0)
    drawn = [order.index(p) for p in range(2000)]
    assert len(set(drawn)) == 2000
    assert max(drawn) > 2**32


def test_every_epoch_holds_every_record_once() -> None:
    order = Order(50, seed=3)
    for epoch in range(4):
        assert sorted(order.index(50 * epoch + i) for i in range(50)) == list(range(50))


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return tuple(Order(100, seed).index(100 * number + i) for i in range(100))

    orders = [epoch(seed, number) for seed in range(4) for number in range(4)]
    assert len(set(orders)) == len(orders)


def test_groups_appear_once_an_epoch_and_members_change() -> None:
    groups = group_by(["a", "b", "a", "c", "a", "b", "d"])
    assert groups == [[0, 2, 4], [1, 5], [3], [6]]
    group_of = {i: g for g, members in enumerate(groups) for i in members}
    order = Order(7, seed=1, groups=groups)
    assert order.epoch_size == 4
    drawn = [order.index(p) for p in range(4 * 40)]
    for epoch in range(40):
        assert sorted(group_of[i] for i in drawn[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    assert set(drawn) == set(range(7))


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3, 4], [5, 6, 7, 8, 9]]])
def test_replacements_are_deterministic_and_in_range(groups: list[list[int]] | None) -> None:
    def draw() -> list[int]:
        order = Order(10, seed=7, groups=groups)
        return [order.index(position, attempt) for position in range(5) for attempt in range(20)]

    assert draw() == draw()
    assert set(draw()) <= set(range(10))
    assert len(set(draw()[:20])) > 3  # one bad record is not tried again and again


@pytest.mark.parametrize(("size", "groups"), [(0, None), (5, [])])
def test_empty_source_is_refused(size: int, groups: list[list[int]] | None) -> None:
    with pytest.raises(ValueError, match="empty source"):
        Order(size, seed=0, groups=groups)


def test_a_hash_may_be_begun_and_gone_on_with() -> None:
    """The permutation keeps what its rounds begin with; it is the one that hashes all anew."""
    assert mix(3, after=mix(1, 2)) == mix(1, 2, 3) != mix(1, 2, 4)

    def plainly(index: int, n: int, key: int) -> int:
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        low = (1 << half) - 1
        left, right = index >> half, index & low
        for r in range(8):
            left, right = right, left ^ (mix(key, r, right) & low)
        found = left << half | right
        return found if found < n else plainly(found, n, key)

    for n, key in ((1, 0), (7, 5), (1000, 2**63), (10**9, 3)):
        assert all(permute(i, n, key) == plainly(i, n, key) for i in range(0, n, max(1, n // 50)))


def test_generator_depends_on_its_whole_key() -> None:
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(*key).random() for key in [(1, 2, 3), (1, 2, 4), (2, 1, 3), (1, 2)]}) == 4
