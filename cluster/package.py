"""A folder as the archive that a submitted job unpacks on the head: which files, how large, under what name.

Which files are left out follows Ray's own rules (.gitignore and .rayignore of each folder, by Ray's own matcher), so that this command and
`ray job submit` take the same ones, but for .git, which may hold credentials of remotes, and compiled Python, which would make each
package another.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SubmitError

LIMIT_BYTES = 64 << 20  # Ray's job server refuses 100 MiB, after the upload, and keeps every package in the memory of the head
NEVER = (".git", "__pycache__")
TIME = (1980, 1, 1, 0, 0, 0)  # of every file, the first that a ZIP archive can tell: equal files make equal archives
LARGEST_SHOWN = 5
_QUIET = logging.getLogger("headrace.package")
_QUIET.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Package:
    """`files`: paths within `folder`, in order; `uri`: the name that Ray keeps the archive under."""

    folder: Path
    files: tuple[Path, ...]
    archive: bytes

    @property
    def uri(self) -> str:
        return f"gcs://_ray_pkg_{hashlib.sha256(self.archive).hexdigest()[:40]}.zip"


def pack(folder: Path, must_hold: Sequence[Path] = ()) -> Package:
    """The archive of `folder`. Raises SubmitError where it is too large, where a file cannot be read, or where it lacks one of
    `must_hold`."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise SubmitError(f"--working-dir {folder} is no folder. Name the one that holds your configuration, most often the current one.")
    files = tuple(_files(folder, (), (folder.resolve(),)))
    for needed in must_hold:
        _require_inside(folder, needed, files)
    _require_size(folder, files)
    return Package(folder, tuple(path.relative_to(folder) for path in files), _archive(folder, files))


def inside(folder: Path, path: Path) -> Path:
    """`path` within `folder`, by which the job on the head finds it. Raises SubmitError where it is elsewhere."""
    try:
        return path.resolve().relative_to(folder.resolve())
    except ValueError:
        raise SubmitError(
            f"{path} is not inside the working directory {folder.absolute()}, which is all that the job gets. Copy it there, or name a "
            "folder above both: --working-dir DIR."
        ) from None


def _files(folder: Path, excludes: Sequence[Callable[[Path], bool]], above: tuple[Path, ...]) -> Iterator[Path]:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    try:
        excludes = [*excludes, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_QUIET)]
        entries = sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise SubmitError(f"{folder} cannot be packed: {error}. Make it readable, or add it to .rayignore.") from None
    for path in entries:
        if path.name in NEVER or any(excluded(path) for excluded in excludes):
            continue
        if not _is_utf8(path.name):
            raise SubmitError(f"{str(path)!r} has a name that is not UTF-8, which no archive can hold. Rename it, or add it to .rayignore.")
        if path.is_dir():
            real = path.resolve()
            if real in above:
                raise SubmitError(f"{path} is a link to a folder that it is in. Remove it, or add it to .rayignore.")
            yield from _files(path, excludes, (*above, real))
        elif path.is_file():
            yield path


def _require_inside(folder: Path, needed: Path, files: Sequence[Path]) -> None:
    where = inside(folder, needed)
    if where not in {path.relative_to(folder) for path in files}:
        raise SubmitError(
            f"{needed} would not be uploaded: a .gitignore or .rayignore leaves it out (or a part of its path is a link). Except it there "
            f"(a line !{where.as_posix()} at its end), or move it."
        )


def _require_size(folder: Path, files: Sequence[Path]) -> None:
    sizes = {path.relative_to(folder): path.stat().st_size for path in files}
    total = sum(sizes.values())
    if total <= LIMIT_BYTES:
        return
    entries: Counter[str] = Counter()
    for path, size in sizes.items():
        entries[path.parts[0] + ("/" if len(path.parts) > 1 else "")] += size
    told = "\n".join(f"  {_mib(size):>11}  {name}" for name, size in entries.most_common(LARGEST_SHOWN))
    largest = max(sizes, key=lambda path: sizes[path])
    raise SubmitError(
        f"the working directory {folder} has {_mib(total)} in {len(files):,} files; at most {_mib(LIMIT_BYTES)} can go along with a job. "
        f"Its largest entries:\n{told}\n  {_mib(sizes[largest]):>11}  {largest} is the largest file\n"
        f"Add what the job does not need to {folder / '.rayignore'} (one pattern a line, as in .gitignore), and put data where every node "
        "reads it: a shared folder or s3://bucket/prefix. --working-dir names another folder."
    )


def _archive(folder: Path, files: Sequence[Path]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                entry.external_attr = (path.stat().st_mode & 0o777) << 16
                archive.writestr(entry, path.read_bytes())
            except OSError as error:
                raise SubmitError(f"{path} cannot be packed: {error.strerror}. Make it readable, or add it to .rayignore.") from None
    return buffer.getvalue()


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
