"""The key/value cache, as rows come and go."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.decoding.kv_cache import KVCache


@pytest.fixture
def make(tiny_config: Callable[..., Any]) -> Callable[[dict[int, int]], KVCache]:
    """A cache of rows, by the number that they are full of, with how many tokens each."""
    config = tiny_config("llama", n_layer=3)

    def made(rows: dict[int, int]) -> KVCache:
        cache = KVCache(config, len(rows), like=torch.zeros(1))
        size = (config.n_layer, 2, config.n_kv_head, max(rows.values()), config.head_size)
        cache.begin([torch.full(size, float(number))[:, :, :, :n] for number, n in rows.items()])
        return cache

    return made


Make = Callable[[dict[int, int]], KVCache]


def numbers(cache: KVCache) -> list[float]:
    """What rows are full of at their first token, in every layer, head and of keys and values."""
    firsts = [cache.text(row, 1) for row in range(cache.n_rows)]
    assert all(bool((first == first.flatten()[0]).all()) for first in firsts)
    assert torch.equal(torch.stack([keys for _, keys, _ in cache.layers]), live(cache)[:, 0])
    assert torch.equal(torch.stack([values for *_, values in cache.layers]), live(cache)[:, 1])
    return [float(first.flatten()[0]) for first in firsts]


def live(cache: KVCache) -> torch.Tensor:
    return cache.store[:, :, : cache.n_rows]


def size(cache: KVCache) -> tuple[int, int]:
    """Rows and tokens that there is memory for."""
    return cache.store.shape[2], cache.store.shape[4]


def test_the_last_row_fills_a_gap(make: Make) -> None:
    cache = make({1: 3, 2: 3, 3: 3, 4: 3})
    address = cache.store.data_ptr()
    cache.drop(1)
    assert numbers(cache) == [1, 4, 3]
    cache.drop(2)
    assert numbers(cache) == [1, 4]
    assert cache.store.data_ptr() == address, "nothing was moved but a row"


def test_room_is_given_up(make: Make) -> None:
    cache = make({1: 3, 2: 3, 3: 3, 4: 100, 5: 3})
    cache.drop(3)
    assert size(cache) == (5, 128)
    cache.fit(3)
    assert size(cache) == (4, 64)
    assert numbers(cache) == [1, 2, 3, 5]
    cache.drop(0)
    cache.fit(64)
    assert size(cache) == (4, 64)
    cache.drop(0)
    cache.fit(3)
    assert size(cache) == (2, 64)
    assert numbers(cache) == [3, 2]


@pytest.mark.parametrize("n_tokens", [3, 70])
def test_rows_join_where_there_is_a_place(make: Make, n_tokens: int) -> None:
    cache = make({1: 5, 2: 5, 3: 5})
    cache.drop(0)
    address = cache.store.data_ptr()
    cache.append(make({7: n_tokens}))
    assert numbers(cache) == [3, 2, 7]
    assert size(cache) == (3, 64 if n_tokens == 3 else 128)
    assert (cache.store.data_ptr() == address) == (n_tokens == 3)
    assert bool((cache.text(2, n_tokens) == 7).all())
    cache.append(make({8: 3, 9: 1}))
    assert numbers(cache) == [3, 2, 7, 8, 9]


def test_nothing_is_left_of_who_was_there_before(make: Make) -> None:
    """0 times what is not finite is not 0: it would be seen through any mask."""
    cache = make({1: 5, 2: 100})
    cache.store[:, :, 1] = torch.nan
    cache.drop(1)
    cache.append(make({3: 2}))
    assert bool(live(cache).isfinite().all())
    assert numbers(cache) == [1, 3]
