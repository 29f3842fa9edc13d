"""A folder as the archive that a submitted job unpacks on the head: which files, how large, under what name.

Which files are left out follows Ray's own rules (.gitignore and .rayignore of each folder, by Ray's own matcher), so that this command and
`ray job submit` take the same ones, but for .git, which may hold credentials of remotes, compiled Python, which would make each package
another, and what is named as files with secrets are: everybody with the cluster's token can read a package.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import SubmitError

LIMIT_BYTES = 64 << 20  # Ray's job server refuses 100 MiB, after the upload, and keeps every package in the memory of the head
NEVER = (".git", "__pycache__")
TIME = (1980, 1, 1, 0, 0, 0)  # of every file, the first that a ZIP archive can tell: equal files make equal archives
LARGEST_SHOWN = 5
# Of files, in lower case: environments, private keys, what tools log in with.
_SECRET_FILE = re.compile(
    "|".join(
        fnmatch.translate(pattern)
        for pattern in (
            *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk"),
            *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".htpasswd", ".npmrc", ".pypirc"),
            *(".git-credentials", ".dockercfg", ".dockerconfigjson", ".s3cfg", ".boto", ".vault-token", "kubeconfig", "*.kubeconfig"),
            *("*.tfstate", "*.tfstate.*", "token", "*_token", "*credentials", "*credentials.[jyticx]*", "secrets.[jytic]*"),
            *("secret.[jytic]*", "*[-_.]secret.[jytic]*", "*[-_.]secrets.[jytic]*", "client_secret*.json", "service[-_]account*.json"),
            *("*_accesskeys.csv", "rootkey.csv", "kaggle.json", ".databrickscfg", "rclone.conf", ".vault_pass", ".*_history"),
        )
    )
)
_SECRET_FOLDERS = (
    *(".aws", ".ssh", ".gnupg", ".azure", ".kube", ".docker", ".oci", ".ray", ".headrace", "gcloud"),
    *(".env", ".envs", "secrets", ".secrets"),  # .env may be a virtual environment: the job has the cluster's
)
_QUIET = logging.getLogger("headrace.package")
_QUIET.setLevel(logging.ERROR)


@dataclass(frozen=True)
class Package:
    """`files`: paths within `folder`, in order; `left_out`: those that may hold secrets, by their names; `uri`: the name that Ray keeps the
    archive under."""

    folder: Path
    files: tuple[Path, ...]
    left_out: tuple[Path, ...]
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
    found = tuple(_files(folder, (), (folder.resolve(),)))
    left_out = {path for path in found if may_hold_secrets(path)}
    files = tuple(path for path in found if path not in left_out)
    for needed in must_hold:
        _require_inside(folder, needed, files, left_out)
    _require_size(folder, files)
    sent, kept = (tuple(path.relative_to(folder) for path in paths) for paths in (files, sorted(left_out)))
    return Package(folder, sent, kept, _archive(folder, files))


def may_hold_secrets(path: Path) -> bool:
    """Whether the name says so; of a link also that of what it leads to."""
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    if any(part.lower() in _SECRET_FOLDERS for part in (path.name, *(real.parts if path.is_symlink() else ()))):
        return True
    return not path.is_dir() and any(_SECRET_FILE.match(each.name.lower()) and each.suffix != ".pub" for each in (path, real))


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
    """Folders are among them only where they may hold secrets."""
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
        if may_hold_secrets(path):
            yield path
        elif path.is_dir():
            real = path.resolve()
            if real in above:
                raise SubmitError(f"{path} is a link to a folder that it is in. Remove it, or add it to .rayignore.")
            yield from _files(path, excludes, (*above, real))
        elif path.is_file():
            yield path


def _require_inside(folder: Path, needed: Path, files: Sequence[Path], left_out: Collection[Path]) -> None:
    where = inside(folder, needed)
    if any(path in left_out for path in (folder / where, *(folder / where).parents)):
        raise SubmitError(f"{needed} would not be uploaded: its name is that of files with secrets. Give it, or its folder, another one.")
    if where not in {path.relative_to(folder) for path in files}:
        raise SubmitError(
            f"{needed} would not be uploaded: a .gitignore or .rayignore leaves it out (or a part of its path is a link). Except it there "
            f"(a line !{where.as_posix()} at its end), or move it."
        )


def _require_size(folder: Path, files: Sequence[Path]) -> None:
    try:
        sizes = {path.relative_to(folder): path.stat().st_size for path in files}
    except OSError as error:
        raise SubmitError(f"{error.filename} cannot be packed: {error.strerror}. If a job writes there, add it to .rayignore.") from None
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
