from __future__ import annotations

import gc
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.config import S3Section, SourceSection
from llm.data import records as reading
from llm.data import unpack
from llm.data.records import BadRecord, Document, read_slice
from llm.data.slices import Slice, plan_slices
from llm.data.sources import list_files
from llm.errors import DataError, StorageError

S3 = S3Section()
MIB = 1 << 20


def source(uri: object, **keys: str) -> SourceSection:
    return SourceSection(name="docs", uri=str(uri), **keys)  # pyright: ignore[reportArgumentType]


def records(uri: object, slice_bytes: int = MIB, **keys: str) -> list[Document | BadRecord]:
    """All records of a source in order of file and position, read slice by slice and stripe by stripe."""
    section = source(uri, **keys)
    pieces = plan_slices("docs", list_files(section, S3), slice_bytes)
    found = [record for piece in pieces for record in read_slice(piece, section.text_field, S3)]
    return sorted(found, key=lambda record: (record.uri, record.position))


def texts(uri: object, slice_bytes: int = MIB, **keys: str) -> list[str]:
    found = records(uri, slice_bytes, **keys)
    assert all(isinstance(record, Document) for record in found), found
    return [record.text for record in found if isinstance(record, Document)]


def bad(found: list[Document | BadRecord]) -> list[str]:
    return [record.reason for record in found if isinstance(record, BadRecord)]


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


# Listing


def test_a_folder_lists_known_visible_nonempty_files_sorted(tmp_path: Path) -> None:
    for name in (
        "b.txt",
        "a/z.md",
        "a/y.jsonl.zst",
        "x.JSONL",
        "c.py.gz",
        "no.bin",
        ".hidden.txt",
        ".git/x.txt",
        "noext",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty.txt").touch()
    files = list_files(source(tmp_path), S3)
    assert [Path(file.uri).relative_to(tmp_path).as_posix() for file in files] == [
        "a/y.jsonl.zst",
        "a/z.md",
        "b.txt",
        "c.py.gz",
        "x.JSONL",
    ]
    assert [(file.format, file.compression) for file in files] == [
        ("jsonl", "zstd"),
        ("text", None),
        ("text", None),
        ("text", "gzip"),
        ("jsonl", None),
    ]
    assert files[2].version == str((tmp_path / "b.txt").stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.txt", ["a.txt", "s/b.txt", "s/t/c.txt"]),
        ("s/**", ["s/b.txt", "s/d.md", "s/t/c.txt"]),
        ("*/[bd].*", ["s/b.txt", "s/d.md"]),
        ("s/?.md", ["s/d.md"]),
        ("s", ["s/b.txt", "s/d.md", "s/t/c.txt"]),
        ("a.txt", ["a.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for name in ("a.txt", "s/b.txt", "s/d.md", "s/t/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = list_files(source(tmp_path / pattern), S3)
    assert [Path(file.uri).relative_to(tmp_path).as_posix() for file in files] == expected


def test_a_name_with_glob_characters_that_exists_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert len(list_files(source(tmp_path / "a[1].txt"), S3)) == 1


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("x")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "dead.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    assert len(list_files(source(tmp_path / "root"), S3)) == 1


def test_a_missing_name_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("{}\n")
    with pytest.raises(DataError) as error:
        list_files(source(tmp_path / "corpsu.jsonl"), S3)
    message = str(error.value)
    assert "'docs'" in message and str(tmp_path / "corpsu.jsonl") in message
    assert f"Nearest existing name: {tmp_path / 'corpus.jsonl'}" in message and ".parquet" in message


def test_a_folder_without_known_files_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "b.txt").touch()
    with pytest.raises(DataError, match=r"2 files \(a.docx, b.txt\)(.|\n)*\.jsonl"):
        list_files(source(tmp_path), S3)


def test_parquet_needs_the_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'text' is not in it. Its columns: content, id(.|\n)*: content$"):
        list_files(source(tmp_path), S3)
    with pytest.raises(DataError, match="'id' is int64, not text"):
        list_files(source(tmp_path, text_field="id"), S3)
    assert texts(tmp_path, text_field="content") == ["a"]


def test_a_corrupt_parquet_footer_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list_files(source(tmp_path), S3)


def test_a_folder_that_may_not_be_listed_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    if os.access(tmp_path / "shut", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(StorageError, match="Permission denied"):
        list_files(source(tmp_path), S3)


# Reading


def test_positions(tmp_path: Path) -> None:
    data = b'{"text": "a"}\n\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "c.parquet", row_group_size=1)
    found = records(tmp_path, slice_bytes=64)
    assert [(Path(r.uri).name[0], r.position) for r in found] == [
        ("a", 0),
        ("a", 15),
        ("b", 1),
        ("b", 3),
        ("c", 0),
        ("c", 1),
        ("c", 2),
    ]


def test_bad_json_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "after a byte order mark"}',
        b"{broken",
        b'["text"]',
        b'{"other": 1}',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b"[" * 200_000,
        b'{"text": 1' + b"0" * 10_000 + b"}",
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = records(tmp_path)
    assert [r.text for r in found if isinstance(r, Document)] == ["after a byte order mark", "last"]
    for reason, part in zip(
        bad(found),
        ["not JSON", "list, not an object", "no field 'text'", "is null", "is int", "not UTF-8", "nested", "not JSON"],
        strict=True,
    ):
        assert part in reason


def test_text_that_is_not_utf8_is_one_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_text("good")
    found = records(tmp_path)
    assert len(found) == 2 and "not UTF-8" in bad(found)[0]


def test_null_and_undecodable_parquet_rows(tmp_path: Path) -> None:
    raw = pa.array([b"a", None, b"\xff", b"d"], pa.binary())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    found = records(tmp_path)
    assert [r.text for r in found if isinstance(r, Document)] == ["a", "d"]
    assert ["null" in reason or "UTF-8" in reason for reason in bad(found)] == [True, True]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).cast(kind)}), tmp_path / "a.parquet")
    assert texts(tmp_path) == ["x", "y", "x"]


def test_a_damaged_parquet_page_is_one_bad_record(tmp_path: Path) -> None:
    rows = [os.urandom(50).hex() for _ in range(400)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=100, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    third = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    data[third + 100 : third + 2000] = os.urandom(1900)
    path.write_bytes(data)
    found = list(read_slice(Slice("docs", tuple(list_files(source(path), S3)), 0, 4, 1), "text", S3))
    assert [r.text for r in found if isinstance(r, Document)] == rows[: len(found) - 1]
    assert "damaged Parquet" in bad(found)[0]


def compress(data: bytes, suffix: str) -> bytes:
    half = len(data) // 2
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    return pack(data[:half]) + pack(data[half:])


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_jsonl_of_several_frames(tmp_path: Path, suffix: str) -> None:
    wanted = [f"document {i} é" for i in range(3000)]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(jsonl(wanted), suffix) + b"\0" * 600)
    assert texts(tmp_path) == wanted


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_truncated_stream_yields_what_stands_before(tmp_path: Path, suffix: str) -> None:
    wanted = [os.urandom(500).hex() for _ in range(2000)]
    packed = compress(jsonl(wanted), suffix)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: len(packed) * 3 // 4])
    found = records(tmp_path)
    good = [r.text for r in found if isinstance(r, Document)]
    assert len(good) > 1000 and good == wanted[: len(good)]
    assert bad(found) == [f"truncated {'gzip' if suffix == 'gz' else 'zstd'} stream"]
    assert found[-1].position == len(good) + 1


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_stream_yields_what_stands_before(tmp_path: Path, suffix: str) -> None:
    wanted = [os.urandom(500).hex() for _ in range(2000)]
    packed = bytearray(compress(jsonl(wanted), suffix))
    at = len(packed) * 3 // 4
    packed[at : at + 3000] = bytes(3000)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed)
    found = records(tmp_path)
    good = [r for r in found if isinstance(r, Document)]
    assert len(good) > 900 and [r.text for r in good[:900]] == wanted[:900]
    assert "damaged" in bad(found)[-1]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_file_that_is_not_compressed_at_all(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt.{suffix}").write_bytes(b"plain text")
    assert len(bad(records(tmp_path))) == 1


def test_long_compressed_text_is_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "COMPRESSED_TEXT_BYTES", 1000)
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = texts(tmp_path)
    assert "".join(found) == text and len(found) > 5 and all(piece.endswith("\n") for piece in found)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
def test_a_line_too_long_is_skipped(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 512)
    monkeypatch.setattr(reading, "_TAIL_BYTES", 512)
    data = jsonl(["first", "x" * 10_000, "last"])
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    found = records(tmp_path, slice_bytes=1500)
    assert [r.text for r in found if isinstance(r, Document)] == ["first", "last"]
    assert len(bad(found)) == 1 and "MiB" in bad(found)[0]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_value_too_long_is_skipped(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_VALUE_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_WHOLE_BYTES", 500)
    pq.write_table(pa.table({"text": pa.array(["a", None, "x" * 2000, "b"]).cast(kind)}), tmp_path / "a.parquet")
    found = records(tmp_path)
    assert [r.text for r in found if isinstance(r, Document)] == ["a", "b"]
    assert ["null" in bad(found)[0], "a value of more than" in bad(found)[1]] == [True, True]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_is_given_up(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_UNPACK_EXCESS_BYTES", 1 << 20)
    before = [os.urandom(500).hex() for _ in range(2000)]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(jsonl(before), suffix) + compress(jsonl(["x" * 99] * 100_000), suffix))
    found = records(tmp_path)
    assert [r.text for r in found[:2000] if isinstance(r, Document)] == before and len(found) < 50_000
    assert len(bad(found)) == 1 and "a bomb" in bad(found)[0] and isinstance(found[-1], BadRecord)


def test_json_of_nothing_but_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_JSON_NODES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "x": [' + "[]," * 99 + '[]]}\n{"text": "b", "x": [' + "[]," * 90 + "[]]}\n")
    found = records(tmp_path)
    assert [r.text for r in found if isinstance(r, Document)] == ["b"] and bad(found) == ["JSON of more than 100 lists and objects"]


def test_a_file_that_changed_since_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    piece = plan_slices("docs", list_files(source(path), S3), MIB)[0]
    path.write_text("longer")
    with pytest.raises(DataError, match="3 bytes when listed, 6 now"):
        list(read_slice(piece, "text", S3))
    path.unlink()
    with pytest.raises(StorageError, match="No such file"):
        list(read_slice(piece, "text", S3))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zst", "a.parquet"])
def test_a_file_rewritten_at_equal_size(tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, [f"document {i}" for i in range(400)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": rows}), path)
    else:
        path.write_bytes(zstandard.compress(jsonl(rows)) if name.endswith("zst") else "\n".join(rows).encode())
    piece = plan_slices("docs", list_files(source(path), S3), MIB)[0]
    info, old = path.stat(), path.read_bytes()
    expected = list(read_slice(piece, "text", S3))
    path.write_bytes(old[:-9] + bytes(9))
    with pytest.raises(DataError, match=rf"{name}: changed since the run listed it: its modification time is another"):
        list(read_slice(piece, "text", S3))
    path.write_bytes(old)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert list(read_slice(piece, "text", S3)) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_rewritten_while_it_is_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_CHUNK_BYTES", 512)
    path, rows = tmp_path / name, [f"document {i}" for i in range(4000)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": rows}), path)
    else:
        path.write_bytes(jsonl(rows))
    piece = plan_slices("docs", list_files(source(path), S3), MIB)[0]
    reader = read_slice(piece, "text", S3)
    assert isinstance(next(reader), Document)
    with path.open("r+b") as stream:
        stream.seek(-3000, os.SEEK_END)
        stream.write(b"other")
    with pytest.raises(DataError, match="changed since the run listed it"):
        list(reader)


def test_damaged_files_hold_no_memory(tmp_path: Path) -> None:
    """An error that holds its frame, and is held by it, would keep all that was unpacked until the garbage collector's next long round."""
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(["x" * 99] * 1000))[:-20])
    gc.collect()
    gc.disable()
    try:
        assert len(bad(records(tmp_path))) == 1
        assert not [held for held in gc.get_objects() if type(held) is unpack.DamagedStreamError]
    finally:
        gc.enable()


# Nothing lost, nothing twice

lines = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=30)
cuts = st.integers(1, 400)
on_disk = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@on_disk
@given(lines, cuts, st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), st.booleans(), st.integers(1, 50))
def test_jsonl_slices_hold_every_line_once(
    tmp_path: Path, texts_in: list[str], slice_bytes: int, newline: str, end: bool, chunk: int
) -> None:
    data = newline.join(json.dumps({"text": t}, ensure_ascii=False) for t in texts_in) + (newline if end else "")
    if not data:
        return
    (tmp_path / "a.jsonl").write_bytes(data.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_CHUNK_BYTES", chunk)
        patch.setattr(reading, "_TAIL_BYTES", chunk)
        if texts_in:
            assert texts(tmp_path, slice_bytes) == texts_in


@on_disk
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.just("\n"), min_size=1), cuts)
def test_text_slices_join_to_the_file(tmp_path: Path, text: str, slice_bytes: int) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(texts(tmp_path, slice_bytes)) == text


@on_disk
@given(lines, cuts, st.integers(1, 7))
def test_parquet_slices_hold_every_row_once(tmp_path: Path, rows: list[str], slice_bytes: int, group: int) -> None:
    pq.write_table(pa.table({"text": ["first", *rows]}), tmp_path / "a.parquet", row_group_size=group)
    assert texts(tmp_path, slice_bytes) == ["first", *rows]


def test_a_slice_with_nothing_of_its_own_does_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000)
    found = records(tmp_path, slice_bytes=10_000)
    assert [(record.position, len(getattr(record, "text", ""))) for record in found] == [(0, 100_000)]
