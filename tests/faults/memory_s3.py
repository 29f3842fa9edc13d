"""S3 in memory, for counting requests: the calls of boto3's client that checkpoints use, and a death before the nth of them."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from botocore.exceptions import ClientError


class Death(BaseException):
    """The process ends here; nothing may catch it and go on."""


class MemoryS3:
    """`objects` is what the server holds. `die_at=n`: the nth request that changes something, and all after it, never reach it."""

    def __init__(self, die_at: int | None = None) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, tuple[str, dict[int, bytes]]] = {}
        self.changes = 0
        self.die_at = die_at

    def _change(self) -> None:
        if self.die_at is not None and self.changes >= self.die_at:
            raise Death
        self.changes += 1

    def put_object(self, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str | None = None) -> dict[str, Any]:
        self._change()
        if IfNoneMatch and Key in self.objects:
            raise _error("PreconditionFailed", 412)
        self.objects[Key] = Body
        return {"ETag": _tag(Body)}

    def create_multipart_upload(self, Bucket: str, Key: str) -> dict[str, Any]:
        self._change()
        self.uploads[f"upload-{self.changes}"] = (Key, {})
        return {"UploadId": f"upload-{self.changes}"}

    def upload_part(self, Bucket: str, Key: str, UploadId: str, PartNumber: int, Body: bytes) -> dict[str, Any]:
        self._change()
        self.uploads[UploadId][1][PartNumber] = Body
        return {"ETag": _tag(Body)}

    def complete_multipart_upload(self, Bucket: str, Key: str, UploadId: str, MultipartUpload: dict[str, Any]) -> dict[str, Any]:
        self._change()
        if UploadId not in self.uploads:
            raise _error("NoSuchUpload", 404)
        _, parts = self.uploads.pop(UploadId)
        wanted = [part["PartNumber"] for part in MultipartUpload["Parts"]]
        assert wanted == sorted(parts)
        self.objects[Key] = b"".join(parts[number] for number in wanted)
        return {}

    def abort_multipart_upload(self, Bucket: str, Key: str, UploadId: str) -> dict[str, Any]:
        self._change()
        self.uploads.pop(UploadId, None)
        return {}

    def list_multipart_uploads(self, Bucket: str, Prefix: str) -> dict[str, Any]:
        return {"Uploads": [{"Key": key, "UploadId": name} for name, (key, _) in self.uploads.items() if key.startswith(Prefix)]}

    def delete_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        self._change()
        self.objects.pop(Key, None)
        return {}

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        if Key not in self.objects:
            raise _error("404", 404)
        return {"ContentLength": len(self.objects[Key])}

    def get_object(self, Bucket: str, Key: str, Range: str | None = None) -> dict[str, Any]:
        if Key not in self.objects:
            raise _error("NoSuchKey", 404)
        data = self.objects[Key]
        if Range is not None:
            first, last = map(int, Range.removeprefix("bytes=").split("-"))
            if first >= len(data):
                raise _error("InvalidRange", 416)
            data = data[first : last + 1]
        return {"ContentLength": len(data), "Body": io.BytesIO(data)}

    def list_objects_v2(self, Bucket: str, Prefix: str, Delimiter: str | None = None) -> dict[str, Any]:
        found = {key: data for key, data in sorted(self.objects.items()) if key.startswith(Prefix)}
        if Delimiter is None:
            return {"Contents": [{"Key": key, "Size": len(data), "ETag": _tag(data)} for key, data in found.items()]}
        inside = dict.fromkeys(f"{Prefix}{rest.split('/')[0]}/" for key in found if "/" in (rest := key.removeprefix(Prefix)))
        return {"CommonPrefixes": [{"Prefix": each} for each in inside]}


def _tag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "made up")  # pyright: ignore
