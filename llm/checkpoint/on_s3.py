"""Checkpoints on S3, where nothing can be renamed: files go under the attempt's own prefix, and a create-only PUT of the manifest, which
names that prefix, is the one act that publishes.

<checkpoints>/step-00000096/MANIFEST.json                        the commit object: {"folder": "9f3c...", ...}
<checkpoints>/step-00000096/9f3c.../rank-00003.safetensors       an attempt's files; other attempts' are beside it until they are cleared
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from llm.checkpoint.layout import step_folder, step_of
from llm.checkpoint.manifest import MANIFEST, EntryHasher, FileEntry, Manifest
from llm.config import S3Section
from llm.errors import CheckpointError, DamagedCheckpointError
from llm.retry import ShortReadError, patiently
from llm.s3 import s3_once
from llm.storage import split_s3

PART_BYTES = 32 << 20  # of a multipart upload, which may have 10,000: files of up to 312 GiB
PARTS_AT_ONCE = 3  # so many parts and one more are in memory
ATTEMPTS = 10  # a save is worth more patience than a read of text: up to two minutes
DAMAGED = "MANIFEST.damaged.json"

T = TypeVar("T")


class S3Checkpoints:
    """A run's checkpoints under `uri`. `folder` in the methods: an attempt's prefix, "step-00000096/9f3c...".

    Every request is tried ATTEMPTS times, here and not by boto3, so that a body that is cut short counts as a failure too.
    """

    def __init__(self, uri: str, s3: S3Section) -> None:
        self.uri = uri
        self._bucket, key = split_s3(uri)
        self._prefix = key.strip("/") + "/"
        self._client = s3_once(s3)

    def steps(self) -> list[int]:
        found = [step for name in self._folders("") if (step := step_of(name)) is not None]
        with ThreadPoolExecutor(8) as pool:
            published = pool.map(lambda step: self._size(f"{step_folder(step)}/{MANIFEST}") is not None, found)
            return sorted((step for step, there in zip(found, published, strict=True) if there), reverse=True)

    def begin(self, step: int, attempt: str) -> str:
        """The attempt's prefix. Removes what attempts left that ended or were overtaken, begun uploads included."""
        published = {step_folder(each) for each in self.steps()}
        for name in self._folders(""):
            if step_of(name) is not None and name not in published and self._size(f"{name}/{DAMAGED}") is None:
                self._delete_all(f"{name}/")
        self._abort_uploads()
        return f"{step_folder(step)}/{attempt}"

    def write(self, folder: str, name: str, chunks: Iterable[Any]) -> FileEntry:
        key, hasher, part = f"{folder}/{name}", EntryHasher(), bytearray()
        upload: _Upload | None = None
        try:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                hasher.update(view)
                while len(view):
                    taken = view[: PART_BYTES - len(part)]
                    part += taken
                    view = view[len(taken) :]
                    if len(part) == PART_BYTES:
                        upload = upload or _Upload(self, key)
                        upload.add(bytes(part))
                        part.clear()
            if upload is None:
                self._call(self._client.put_object, Key=key, Body=bytes(part))
            else:
                if part:
                    upload.add(bytes(part))
                upload.complete(hasher.entry().size_bytes)
        except BaseException:
            if upload is not None:
                upload.abort()
            raise
        return hasher.entry()

    def require_written(self, folder: str, entries: dict[str, FileEntry]) -> None:
        found = {item["Key"].rpartition("/")[2]: item["Size"] for item in self._list(f"{folder}/")}
        for name, entry in entries.items():
            if found.get(name) != entry.size_bytes:
                raise CheckpointError(
                    f"{self.uri}/{folder}/{name}: {entry.size_bytes} bytes were written, and {found.get(name, 'none')} are there. "
                    "Did another driver take the run over?"
                )

    def publish(self, step: int, folder: str, manifest: bytes, fence: Callable[[], None]) -> None:
        key = f"{step_folder(step)}/{MANIFEST}"
        fence()
        try:
            self._call(self._client.put_object, Key=key, Body=manifest, IfNoneMatch="*")
        except Exception as error:
            if _code(error) not in ("PreconditionFailed", "412"):
                raise
            # It may be our own, whose answer was lost: no two attempts' manifests are equal.
            if self._get(key, None) != manifest:
                raise CheckpointError(
                    f"{self.uri}/{step_folder(step)} was published by another driver in the meantime. This one gives up."
                ) from None

    def abandon(self, folder: str) -> None:
        """Nothing where the manifest names this attempt: it was published by a request of which no answer came."""
        step, _, attempt = folder.partition("/")
        with suppress(DamagedCheckpointError):  # there is none, or none that anybody could read
            key = f"{step}/{MANIFEST}"
            if Manifest.from_bytes(self._get(key, None), int(step_of(step) or 0), key).folder == attempt:
                return
        self._delete_all(f"{folder}/")
        self._abort_uploads(f"{folder}/")

    def remove(self, step: int, attempt: str) -> None:
        self._delete(f"{step_folder(step)}/{MANIFEST}")
        self._delete_all(f"{step_folder(step)}/")

    def set_aside(self, step: int, attempt: str) -> str:
        """The manifest gets a name that no reader looks at; the files stay."""
        key, aside = (f"{step_folder(step)}/{name}" for name in (MANIFEST, DAMAGED))
        self._call(self._client.put_object, Key=aside, Body=self._get(key, None))
        self._delete(key)
        return f"{self.uri}/{aside}"

    def signature(self, step: int, folder: str, names: Iterable[str]) -> object:
        wanted = set(names)
        prefix = f"{step_folder(step)}/{folder}/" if folder else f"{step_folder(step)}/"
        return [(i["Key"], i["Size"], i.get("ETag")) for i in self._list(prefix) if i["Key"].rpartition("/")[2] in wanted]

    def read_manifest(self, step: int, limit: int) -> bytes:
        key = f"{step_folder(step)}/{MANIFEST}"
        size = self._size(key)
        if size is None:
            raise DamagedCheckpointError(f"{self.uri}/{key} is missing.")
        return self._get(key, (0, min(size, limit + 1)))

    def sizes(self, step: int, folder: str) -> dict[str, int]:
        prefix = self._file(step, folder, "")
        return {item["Key"].removeprefix(self._prefix + prefix): item["Size"] for item in self._list(prefix)}

    def read_into(self, step: int, folder: str, name: str, start: int, view: memoryview) -> None:
        if len(view):
            view[:] = self._get(self._file(step, folder, name), (start, start + len(view)))

    def _file(self, step: int, folder: str, name: str) -> str:
        return f"{step_folder(step)}/{folder}/{name}" if folder else f"{step_folder(step)}/{name}"

    def _get(self, key: str, span: tuple[int, int] | None) -> bytes:
        """The bytes [start, stop) of an object, or all; DamagedCheckpointError where it has none there."""
        if span is not None and span[0] == span[1]:
            return b""

        def attempt() -> bytes:
            given = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **given)
            wanted = answer["ContentLength"] if span is None else span[1] - span[0]
            with answer["Body"] as body:
                data = body.read(wanted + 1)
            if len(data) != wanted:
                raise ShortReadError(f"{len(data)} of {wanted} bytes came")
            return data

        try:
            return patiently(attempt, ATTEMPTS)
        except ShortReadError as error:
            raise DamagedCheckpointError(f"{self.uri}/{key} is damaged, or its server is: {error}.") from None
        except Exception as error:
            if _code(error) in ("NoSuchKey", "404"):
                raise DamagedCheckpointError(f"{self.uri}/{key} is missing.") from None
            if _code(error) in ("InvalidRange", "416"):
                raise DamagedCheckpointError(f"{self.uri}/{key} is damaged: it ends before byte {span and span[0]}.") from None
            raise

    def _size(self, key: str) -> int | None:
        try:
            return self._call(self._client.head_object, Key=key)["ContentLength"]
        except Exception as error:
            if _code(error) in ("404", "NoSuchKey"):
                return None
            raise

    def _call(self, method: Callable[..., T], **given: Any) -> T:
        if "Key" in given:
            given["Key"] = self._prefix + given["Key"]
        return patiently(partial(method, Bucket=self._bucket, **given), ATTEMPTS)

    def _list(self, prefix: str, **given: Any) -> Iterator[dict[str, Any]]:
        for page in self._pages(prefix, **given):
            yield from page.get("Contents", [])

    def _pages(self, prefix: str, **given: Any) -> Iterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            page = self._call(self._client.list_objects_v2, Prefix=self._prefix + prefix, **given, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _folders(self, prefix: str) -> list[str]:
        found = [each["Prefix"] for page in self._pages(prefix, Delimiter="/") for each in page.get("CommonPrefixes", [])]
        return [each.removeprefix(self._prefix + prefix).rstrip("/") for each in found]

    def _delete(self, key: str) -> None:
        self._call(self._client.delete_object, Key=key)

    def _delete_all(self, prefix: str) -> None:
        for item in list(self._list(prefix)):
            self._delete(item["Key"].removeprefix(self._prefix))

    def _abort_uploads(self, prefix: str = "") -> None:
        """Uploads that were begun and not ended cost money and show nowhere. Not every key may list or end them: then they stay."""
        with suppress(Exception):
            for upload in self._call(self._client.list_multipart_uploads, Prefix=self._prefix + prefix).get("Uploads", []):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])


class _Upload:
    """A multipart upload, PARTS_AT_ONCE at once."""

    def __init__(self, store: S3Checkpoints, key: str) -> None:
        self._store, self._key = store, key
        self._id = store._call(store._client.create_multipart_upload, Key=key)["UploadId"]
        self._pool = ThreadPoolExecutor(PARTS_AT_ONCE)
        self._parts: list[Future[dict[str, Any]]] = []

    def add(self, data: bytes) -> None:
        if len(self._parts) >= PARTS_AT_ONCE:
            self._parts[-PARTS_AT_ONCE].result()
        number = len(self._parts) + 1
        if number > 10_000:
            raise CheckpointError(
                f"{self._store.uri}/{self._key} is larger than S3's 10,000 parts of {PART_BYTES >> 20} MiB. Use more workers."
            )
        self._parts.append(self._pool.submit(self._send, number, data))

    def _send(self, number: int, data: bytes) -> dict[str, Any]:
        client = self._store._client
        answer = self._store._call(client.upload_part, Key=self._key, UploadId=self._id, PartNumber=number, Body=data)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def complete(self, size_bytes: int) -> None:
        parts = [part.result() for part in self._parts]
        try:
            self._store._call(
                self._store._client.complete_multipart_upload, Key=self._key, UploadId=self._id, MultipartUpload={"Parts": parts}
            )
        except Exception as error:
            # Ended already, by a request whose answer was lost. Nobody else writes this key.
            if _code(error) not in ("NoSuchUpload", "404") or self._store._size(self._key) != size_bytes:
                raise
        self._pool.shutdown()

    def abort(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        with suppress(Exception):
            self._store._call(self._store._client.abort_multipart_upload, Key=self._key, UploadId=self._id)


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
