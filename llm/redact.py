"""What must not be told: credentials in URIs, and the values of environment variables that hold secrets. The one place that knows both.

A configuration with credentials in it is refused (`credential_in`): it is recorded, read back and shown by the job server. What libraries
say, in errors and log records, is cleaned where it is written (`without_secrets`).
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 8  # a shorter value is a word, and would be blanked all over
# PGPASSWORD, HF_TOKEN, AWS_ACCESS_KEY_ID, DB_PASS, GITHUB_PAT, SIGNING_KEY_V2; not PWD, which is a folder.
SECRET_VARIABLE = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY|CONNECTION_STRING"
    r"|(?:^|_)(?:KEY|KEY_ID|SAS|COOKIE|SIGNATURE|JWT)|_(?:PASS|PWD|PAT|AUTH|AUTH_CONFIG))(?:_?V?\d+)?$",
    re.I,
)
# Of a URI's query: AWS's and Google's signed URLs, Azure's SAS (sig), and what others call it.
SECRET_PARAMETER = re.compile(
    r"(?:token|secret|password|passwd|passphrase|credentials?|signature|(?:access|secret|api|private)[-_]?key(?:[-_]?id)?"
    r"|(?:^|[-_.])(?:pwd|pass|sig|key|auth|code))$",
    re.I,
)
# A password may hold @ and /: where there is one (a colon, and no port behind it), up to the last @ of the word; else up to the last before
# the path. One that begins with digits and a slash cannot be told from a port and a path.
_USER_AND_PASSWORD = re.compile(r"(?<=://)(?:[^/\s@:'\"]{0,256}:(?!\d{0,5}(?:[/?#\s'\"]|$))[^\s'\"]{0,1024}@|[^/\s?#'\"]{0,1024}@)")
_PARAMETER = re.compile(r"(?<=[?&;])([\w.%-]+)=([^&;#\s'\"<>]*)")
# After "Bearer" and the like one word; after these two the rest of the line.
_AUTHORIZATION = re.compile(
    r"(?i)(\b(?:x-ray-)?authorization\b(?:['\"]\s*,|['\"]?\s*[:=])\s*[\[(]?\s*(?:b?['\"])?"
    r"(?:(?P<line>(?:digest|aws4-hmac-sha256)\s+)|(?:bearer|basic|token|apikey)\s+)?+)((?!\*\*\*)(?(line)[^\n]+|[^\s'\",;]+))"
)
# password=..., "api_key": "...", secret: ...; a value of SHORTEST characters or more, to the quote that ends it or the next space. After a
# colon, words that go on as a sentence does are none: "the secret: patience and time". One part has one way to match: linear time.
_ASSIGNED = re.compile(
    r"(?i)((?:password|passwd|passphrase|(?:client[-_]?)?secret|(?:access|secret|api|private)[-_]?key(?:[-_]?id)?"
    r"|(?:access|auth|refresh|api|session|security)[-_]?token)(?:_?v?\d{1,3})?(?:\\{0,8}['\"])?[ \t]{0,8}"
    r"(?::?=>?|:(?![ \t]{0,8}[^\W\d_]++(?:[-’][^\W\d_]++)*+(?:[.,;:!?)]*+[ \t]+\S|[.!?]++\s*+(?:\n|\Z))))[ \t]{0,8}b?)"
    rf"(?:(\")(?!\*\*\*)(?:[^\"\\\n]|\\.){{{SHORTEST},}}+|(')(?!\*\*\*)(?:[^'\\\n]|\\.){{{SHORTEST},}}+"
    rf"|(\\{{1,8}}['\"])(?!\*\*\*)(?:[^'\"\\\n]|\\++(?!['\"])){{{SHORTEST},}}+|(?!\*\*\*|~/)(?:[^\s'\"\\]|\\(?!['\"])){{{SHORTEST},}}+)"
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)(?!\*\*\*).*?(?=-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL)
# A line of an environment, of this process or another: HF_TOKEN=..., export DB_PASSWORD="...".
_VARIABLE = re.compile(rf"\b([A-Z][A-Z0-9_]{{2,63}})=(['\"]?)(?!\*\*\*)[^\s'\"]{{{SHORTEST},}}")


def without_secrets(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with *** in place of every secret: the values of secret variables of `environment` (this process's), also as they look inside
    a URL, JSON, HTML or a Python literal or in base64; user and password of a URI; secret parameters of its query; what is assigned to a
    variable named as secrets are, to a password and the like; authorization headers."""
    for value in _values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _USER_AND_PASSWORD.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(_hidden_parameter, text)
    text = _PRIVATE_KEY.sub(rf"\g<1>{HIDDEN}", text)
    text = _VARIABLE.sub(lambda found: f"{found[1]}={found[2]}{HIDDEN}" if SECRET_VARIABLE.search(found[1]) else found[0], text)
    text = _ASSIGNED.sub(lambda found: f"{found[1]}{found[2] or found[3] or found[4] or ''}{HIDDEN}", text)
    return _AUTHORIZATION.sub(rf"\g<1>{HIDDEN}", text)


def _hidden_parameter(found: re.Match[str]) -> str:
    """What is hidden already stays as it is: what follows it may have been put there since."""
    name, value = found[1], found[2]
    if value.startswith(HIDDEN) or not SECRET_PARAMETER.search(unquote(name)):
        return found[0]
    return f"{name}={HIDDEN}"


def cleaned(value: Any) -> Any:
    """`value`, a text or lists and mappings of texts, without secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: cleaned(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        make = getattr(value, "_make", list if isinstance(value, list) else tuple)  # a named tuple's own
        return make(cleaned(each) for each in value)
    return value


def credential_in(uri: str) -> str | None:
    """What in `uri` is a credential, without telling it: "a user name or password", "the parameter X-Amz-Signature"; None where nothing
    is, as in every local path."""
    if "://" not in uri:
        return None
    try:
        parts = urlsplit(uri)
        host, query = parts.netloc, f"{parts.query}&{parts.fragment}"
    except ValueError:
        host, query = "", uri.partition("?")[2]
    if "@" in host or _USER_AND_PASSWORD.search(uri):
        return "a user name or password"
    names = (part.partition("=")[0] for part in re.split("[&;]", query) if "=" in part)
    found = next((name for name in names if SECRET_PARAMETER.search(unquote(name))), None)
    return None if found is None else f"the parameter {found}"


@contextmanager
def clean_records() -> Iterator[None]:
    """Log records that are made inside are without secrets, tracebacks included, whoever has put a handler where: Ray does, too."""
    before = logging.getLogRecordFactory()
    if not isinstance(before, _CleanRecords):  # a worker's own logging and what Ray runs in it both ask for it
        logging.setLogRecordFactory(_CleanRecords(before))
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


@dataclass(frozen=True)
class _CleanRecords:
    make: Callable[..., logging.LogRecord]

    def __call__(self, *told: Any, **more: Any) -> logging.LogRecord:
        return _clean_record(self.make(*told, **more))


def _clean_record(record: logging.LogRecord) -> logging.LogRecord:
    try:
        text = record.getMessage()
    except Exception:  # a text that does not fit its values: the handlers say so, and show both
        record.msg, record.args = cleaned(record.msg), cleaned(record.args)
    else:
        if (clean := without_secrets(text)) != text:
            record.msg, record.args = clean, ()
    if isinstance(record.exc_info, tuple) and record.exc_info[0]:
        record.exc_text = without_secrets(logging.Formatter().formatException(record.exc_info))
    return record


@contextmanager
def scrubbed() -> Iterator[None]:
    """For what Ray runs in processes of its own: Ray writes into its logs, which the dashboard shows, the errors that come out and what
    libraries log."""
    try:
        with clean_records():
            yield
    except Exception as error:
        if (clean := scrub(error)) is error:
            raise
        raise clean from None


def scrub(error: BaseException) -> BaseException:
    """`error` to be raised on: the same one, its texts and those of what caused it without secrets; another where that cannot be done."""
    if not _was_cleaned(error):
        told, *_ = _texts(error) or ["its text cannot be had"]
        return RuntimeError(f"{type(error).__name__}: {without_secrets(told)}")
    one, seen = error, {id(error)}
    while (cause := one.__cause__ or (None if one.__suppress_context__ else one.__context__)) is not None and id(cause) not in seen:
        if not _was_cleaned(cause):  # what it caused is still told as what it is
            one.__cause__ = one.__context__ = None
            break
        seen.add(id(cause))
        one = cause
    return error


def _was_cleaned(error: BaseException) -> bool:
    """Whether its texts have no secrets, from now on."""
    if _tells(error):
        with suppress(Exception):  # an error may forbid changes
            error.args = cleaned(error.args)
            for name in ("filename", "filename2", "strerror", "msg", "text", *vars(error)):
                if type(value := getattr(error, name, None)) in (str, list, tuple, dict):  # of others, cleaned() would change the class
                    setattr(error, name, cleaned(value))
    return not _tells(error)


def _tells(error: BaseException) -> bool:
    """Whether it has a secret among its texts, or one that cannot be had, so that nobody knows."""
    texts = _texts(error)
    return texts is None or any(without_secrets(text) != text for text in texts)


def _texts(error: BaseException) -> list[str] | None:
    """What a traceback may show of it, its message first; None where its class cannot tell."""
    try:
        notes = getattr(error, "__notes__", ())
        group = traceback.format_exception(error) if isinstance(error, BaseExceptionGroup) else []  # with the causes of its errors
        return [str(error), repr(error), *(map(str, notes) if isinstance(notes, list | tuple) else [str(notes)]), "".join(group)]
    except Exception:
        return None


def _is_path(value: str) -> bool:
    """Of a file with the secret (GOOGLE_APPLICATION_CREDENTIALS): not one itself."""
    with suppress(OSError, ValueError):
        return value.startswith("/") and Path(value).exists()
    return False


def _values(environment: Mapping[str, str]) -> list[str]:
    """The secret values and their other looks, the longest first: one may be a part of another."""
    found: set[str] = set()
    for name, value in environment.items():
        value = value.strip()
        if len(value) >= SHORTEST and SECRET_VARIABLE.search(name) and not _is_path(value):
            raw = value.encode(errors="surrogateescape")
            found |= {value, quote(raw, safe=""), quote_plus(raw), quote(raw), html.escape(value)}
            found |= {repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            encoded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
            found |= encoded | {each.rstrip("=") for each in encoded}
    return sorted(found, key=len, reverse=True)
