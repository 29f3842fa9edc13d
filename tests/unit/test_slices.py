"""How files are cut into slices."""

from __future__ import annotations

import pytest

from llm.data.slices import MIN_SLICES_PER_SOURCE, SourceFile, plan_slices, slice_bytes_for

MIB = 1 << 20


def plain(size_bytes: int, name: str = "a.txt") -> SourceFile:
    return SourceFile("docs", f"/{name}", f"/{name}", size_bytes, "1", "text")


def test_the_example_of_plan_slices():
    files = [plain(n * MIB, f"{i}.txt") for i, n in enumerate((10, 3, 4, 9))]
    plan = plan_slices("docs", files, 8 * MIB)
    cuts = [(len(s.files), s.start / MIB, s.stop / MIB) for s in plan if s.stripe == 0]
    assert cuts == [(1, 0, 5), (1, 5, 10), (2, 0, 0), (1, 0, 4.5), (1, 4.5, 9)]
    assert len(plan) == 10 and all(s.num_stripes == 2 for s in plan)
    assert plan[0].size_bytes == 5 * MIB // 2
    with pytest.raises(IndexError):
        plan[10]


def test_enough_slices_are_not_striped():
    plan = plan_slices("docs", [plain(MIB)], MIB // MIN_SLICES_PER_SOURCE)
    assert len(plan) == MIN_SLICES_PER_SOURCE and all(s.num_stripes == 1 for s in plan)


def test_row_groups_are_grouped_and_compressed_files_stay_whole():
    parquet = SourceFile("docs", "/p", "/p", 99, "1", "parquet", row_group_bytes=(10, 20, 100, 5, 5))
    packed = SourceFile("docs", "/z", "/z", 1000, "1", "jsonl", "zstd")
    plan = [s for s in plan_slices("docs", [parquet, packed], 30) if s.stripe == 0]
    assert [(s.start, s.stop) for s in plan] == [(0, 2), (2, 3), (3, 5), (0, 1000)]
    assert len(plan_slices("docs", [], 30)) == 0


def test_small_files_of_any_kind_are_read_together():
    small = [
        SourceFile("docs", "/a", "/a", 5, "1", "jsonl", "zstd"),
        SourceFile("docs", "/b", "/b", 5, "1", "parquet", row_group_bytes=(4, 4)),
        plain(6),
    ]
    plan = plan_slices("docs", small, 30)
    assert {len(s.files) for s in plan} == {3}


def test_a_large_compressed_file_is_cut_into_stripes_of_bounded_size():
    plan = plan_slices("docs", [SourceFile("docs", "/z", "/z", 200 * MIB, "1", "jsonl", "zstd")], MIB)
    assert len(plan) == 19 and plan[0].size_bytes <= 32 * MIB
    assert [s.stripe for s in plan] == list(range(19))


def test_slices_hold_a_few_hundred_rows_where_the_corpus_allows():
    assert slice_bytes_for(MIB, 256, 24_000_000) == 375_000
    assert slice_bytes_for(MIB, 256, 10**12) == MIB
    assert slice_bytes_for(MIB, 8191, 10**12) == 256 * 8192 * 4
    assert slice_bytes_for(MIB, 8191, MIB) == MIB // 8
    assert slice_bytes_for(MIB, 8191, 100) == 4096
