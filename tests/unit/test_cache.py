"""The token cache gives what packing gives, survives damage, and stays within its limit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llm.config import S3Section
from llm.config_file import load_run
from llm.data import cache as module
from llm.data.cache import TokenCache, require_room, slice_key, token_cache
from llm.data.window import Packed, Recipe, make_slice, make_window
from llm.errors import ConfigError
from llm.train.prepare import prepare
from tests.small_run import write_small_run


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = write_small_run(tmp_path)
    return prepare(load_run(str(path), ["data.slice_bytes=8192", "eval.rows=0"]), "/none", 0.0).recipe


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(str(tmp_path / "tokens"), S3Section(), 1 << 30)


def never(recipe, piece):
    raise AssertionError("a slice that is in the cache was packed again")


def same(one: Packed, other: Packed) -> None:
    np.testing.assert_array_equal(one.rows.ids, other.rows.ids)
    np.testing.assert_array_equal(one.rows.segments(), other.rows.segments())
    assert one.counts == other.counts and one.bad == other.bad
    assert [one.documents.of(i) for i in range(len(one.documents))] == [other.documents.of(i) for i in range(len(other.documents))]


def test_a_window_from_the_cache_is_the_window(recipe: Recipe, cache: TokenCache, monkeypatch) -> None:
    expected = [make_window(recipe, 0, i) for i in range(3)]
    assert any(packed.bad for packed in expected)
    for i in range(3):
        same(make_window(recipe, 0, i, (), cache.slice), expected[i])
    monkeypatch.setattr(module, "make_slice", never)
    for i in range(3):
        same(make_window(recipe, 0, i, (), cache.slice), expected[i])


def test_epochs_seeds_and_weights_share_it(recipe: Recipe, cache: TokenCache, monkeypatch) -> None:
    for number in range(sum(recipe.plan.num_training)):
        cache.slice(recipe, recipe.plan.training_slice(number))
    monkeypatch.setattr(module, "make_slice", never)
    other_seed = replace(recipe, plan=replace(recipe.plan, seed=7))
    assert len(make_window(recipe, 5, 0, (), cache.slice).rows) and len(make_window(other_seed, 0, 1, (), cache.slice).rows)


def test_the_key_names_everything_that_determines_the_rows(recipe: Recipe) -> None:
    piece = recipe.plan.training_slice(0)
    changed = [
        (replace(recipe, seq_len=64), piece),
        (replace(recipe, clean=recipe.clean.model_copy(update={"lowercase": True})), piece),
        (replace(recipe, text_fields={"made": "body"}), piece),
        (replace(recipe, tokenizer=replace(recipe.tokenizer, fingerprint="0" * 64)), piece),
        (recipe, replace(piece, stripe=piece.stripe + 1)),
        (recipe, replace(piece, files=tuple(replace(file, version="1") for file in piece.files))),
        (recipe, recipe.plan.training_slice(1)),
    ]
    assert len({slice_key(recipe, piece), *(slice_key(*each) for each in changed)}) == len(changed) + 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_made_anew(recipe: Recipe, cache: TokenCache, damage: str) -> None:
    piece = recipe.plan.training_slice(0)
    expected = cache.slice(recipe, piece)
    path = Path(cache.file_of(recipe, piece))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        at = data.find(expected.rows.ids.tobytes())
        assert at > 0
        data[at + 100] ^= 1
    path.write_bytes(data[: {"truncated": len(data) // 2, "empty": 0}.get(damage, len(data))])
    same(cache.slice(recipe, piece), make_slice(recipe, piece))
    assert path.stat().st_size > len(data) // 2


def test_what_was_not_used_for_the_longest_time_goes_first(recipe: Recipe, cache: TokenCache) -> None:
    pieces = [recipe.plan.training_slice(i) for i in range(6)]
    paths = [Path(cache.file_of(recipe, piece)) for piece in pieces]
    for age, (piece, path) in enumerate(zip(pieces, paths, strict=True)):
        cache.slice(recipe, piece)
        os.utime(path, (age, age))
    cache.slice(recipe, pieces[0])  # read again: now the newest
    sizes = sum(path.stat().st_size for path in paths)
    small = TokenCache(cache.uri, cache.s3, sizes * 0.6)
    assert small.evict() <= sizes * 0.6
    assert [path.exists() for path in paths] == [True, False, False, False, True, True]


def test_a_writer_keeps_it_within_its_limit(recipe: Recipe, tmp_path: Path) -> None:
    one = TokenCache(str(tmp_path / "one"), S3Section(), 1 << 30)
    one.slice(recipe, recipe.plan.training_slice(0))
    size = next(Path(one.uri).rglob("*.arrow")).stat().st_size
    small = TokenCache(str(tmp_path / "small"), S3Section(), 3 * size)
    for i in range(8):
        small.slice(recipe, recipe.plan.training_slice(i))
    assert sum(path.stat().st_size for path in Path(small.uri).rglob("*.arrow")) <= 3 * size


def test_a_corpus_that_cannot_fit_is_refused_with_the_size_that_can(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache\.max_gib=1e-06.*Nearest legal value: 1"):
        require_room(TokenCache(str(tmp_path), S3Section(), 1e-6 * (1 << 30)), recipe)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    path = write_small_run(tmp_path)
    assert token_cache(load_run(str(path), ["data.cache.enabled=false"])) is None
    cache = token_cache(load_run(str(path), [f"data.cache.uri={tmp_path}/here"]))
    assert cache is not None and cache.uri == f"{tmp_path}/here"


def test_files_are_small(recipe: Recipe, cache: TokenCache) -> None:
    packed = cache.slice(recipe, recipe.plan.training_slice(0))
    size = Path(cache.file_of(recipe, recipe.plan.training_slice(0))).stat().st_size
    assert packed.rows.ids.dtype == np.uint16
    assert size < packed.rows.ids.nbytes + packed.rows.pieces.nbytes + 24 * len(packed.documents) + 6000
    assert json.dumps(packed.counts)
