"""No secret gets through: not out of the environment, a URI, a header or an error, however a library writes it."""

from __future__ import annotations

import base64
import html
import json
import logging
import pickle
import string
import time
import traceback
from pathlib import Path
from subprocess import CalledProcessError
from typing import NamedTuple
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.exit_code import exit_code_of
from llm.config_file import dump_run, load_run, parse_run
from llm.errors import ConfigError, StorageError
from llm.metrics import event_row
from llm.observe.quiet import redirect_noise
from llm.redact import HIDDEN, SECRET_VARIABLE, clean_records, cleaned, credential_in, scrub, without_secrets
from llm.train.causes import failure_of
from tests.small_run import RECIPE

CANARY = "canary-7f/3a+9c=secret"
secrets = st.text(string.ascii_letters + string.digits + "/+=_-.!$'\"\\<&>{}[]()*^~`|,;:%@#? äß\n\t", min_size=8, max_size=40).filter(
    lambda value: len(value.strip()) >= 8 and "*" not in value
)
words = st.text(string.ascii_lowercase, min_size=1, max_size=12)
NAMES = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "HF_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_CONNECTION_STRING", "GITHUB_TOKEN", "REDIS_PASSWORD"),
    *("AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "OPENAI_API_KEY", "DB_PASSWD", "SOME_CREDENTIALS", "TOKEN", "TOKEN_2"),
)


def test_which_variables_are_secret() -> None:
    assert [name for name in NAMES if not SECRET_VARIABLE.search(name)] == []
    open_ones = ("RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "TOKENIZERS_PARALLELISM", "PATH", "HOME", "MONKEY", "AWS_REGION", "KEY_NAME")
    assert [name for name in open_ones if SECRET_VARIABLE.search(name)] == []


@given(secrets, st.sampled_from(NAMES), st.text("öü", min_size=1), st.text("öü", min_size=1))
def test_the_value_of_a_secret_variable_is_never_told(secret: str, name: str, before: str, after: str) -> None:
    value = secret.strip()
    looks = [value, quote(value, safe=""), quote(value), html.escape(value), json.dumps(value), json.dumps(value, ensure_ascii=False)]
    looks += [repr(value), urlencode({"a": value}), f"https://host/{value}"]
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        looks += [(encoded := encode(value.encode()).decode()), encoded.rstrip("=")]
    for look in looks:
        told = without_secrets(f"{before} {look} {after}", {name: secret, "PATH": before + after})
        assert told.startswith(f"{before} ") and told.endswith(f" {after}")
        assert value not in told and look not in told


in_a_url = st.text(string.ascii_letters + string.digits + "-._~!$&()+,;=:@", min_size=8, max_size=30)


@given(in_a_url, words, st.sampled_from(("http", "https", "s3", "postgresql", "ftp")), st.sampled_from(("", "/a/b?c=d", ":80/@x", "/")))
def test_user_and_password_of_a_uri_are_never_told(password: str, user: str, scheme: str, rest: str) -> None:
    for who in (f"{user}:{password}", password, f":{password}"):
        uri = f"{scheme}://{who}@host{rest}"
        told = without_secrets(f"cannot read {uri}: refused", {})
        assert password not in told.replace(rest, "") and told.endswith(": refused") and "***@" in told
        assert credential_in(uri) == "a user name or password"


@pytest.mark.parametrize("password", ["pa/ss", "p@ss/wo@rd", "a?b#c", "a1/2", "8080x/y"])
def test_passwords_that_break_a_uri_are_hidden_too(password: str) -> None:
    assert without_secrets(f"at http://user:{password}@host:80/x.", {}) == "at http://***@host:80/x."
    assert credential_in(f"http://user:{password}@host/x") == "a user name or password"


@pytest.mark.parametrize(
    "name",
    [
        *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "Signature", "AWSAccessKeyId", "sig", "token"),
        *("access_token", "api_key", "apikey", "key", "password", "client_secret", "auth", "accessKey", "X%2DAmz%2DSignature"),
    ],
)
def test_secret_parameters_are_never_told(name: str) -> None:
    uri = f"https://bucket.s3.amazonaws.com/a.jsonl?versionId=3&{name}={quote(CANARY, safe='')}&part=1"
    told = without_secrets(f"403 for '{uri}'", {})
    assert told == f"403 for 'https://bucket.s3.amazonaws.com/a.jsonl?versionId=3&{name}=***&part=1'"
    assert credential_in(uri) == f"the parameter {name}"


@given(st.text(string.ascii_letters + string.digits + "!#$%&()+,-./:;<=>?@[]^_`{|}~\\", min_size=8, max_size=40), st.data())
def test_what_is_assigned_to_a_password_is_never_told(secret: str, data: st.DataObject) -> None:
    names = (
        "password",
        "passwd",
        "passphrase",
        "secret",
        "api_key",
        "apikey",
        "api-key",
        "secret_access_key",
        "access_token",
        "DB_PASSWORD2",
    )
    name = data.draw(st.sampled_from((*names, "clientSecret", "X-Api-Key", "aws_access_key_id", "SESSION_TOKEN")))
    if secret.startswith("~/"):
        return  # a path
    for text in ("{}={}", "{} = {}", "{}: {}1", "{} := {}", "{}='{}'", '{}: "{}"', "'{}': '{}'", "{} = b'{}'"):
        quoted = json.dumps(secret)[1:-1] if text[-1] in "'\"" else secret
        told = without_secrets("before " + text.format(name, quoted) + "\nafter", {})
        assert told.startswith(f"before {text[:1].strip('{')}{name}") and HIDDEN in told and told.endswith("\nafter")
        assert quoted[2:] not in told, "but for what may be a part of the => or b'' before it"
    plain = secret.replace("\\", "/")  # told twice, a backslash at its end hides where that is
    for text in ({name: plain}, {"told": json.dumps({name: plain})}):
        assert plain not in without_secrets(json.dumps(text), {})


def test_what_a_regular_expression_could_choke_on_takes_no_time() -> None:
    parts = (
        "password",
        "secret:",
        "secret: ",
        "password='",
        'password="a',
        "password=\\",
        'api_key\\\\"',
        "://",
        "a:",
        "authorization ",
        "?a=",
        "a-",
    )
    began_s = time.process_time()
    for part in parts:
        without_secrets(part * (400_000 // len(part)), {})
        without_secrets("secret: " + part * (400_000 // len(part)), {})
    assert time.process_time() - began_s < 20  # a quadratic one takes minutes


def test_what_is_hidden_stays_as_it_is() -> None:
    """Ray asks nobody before it writes more behind an error's text."""
    for more in ("", r"\nFailed again", "/x@y", " and more"):
        for text in (f"http://***@host/x?sig=***{more}", f"Authorization: Bearer ***{more}"):
            assert without_secrets(text, {"HF_TOKEN": CANARY}) == text


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/a/b-?.jsonl", "s3://bucket/x@y/z", "/home/me@work/a?b=1.txt", "http://localhost:8080/x@y", "file:///a@b"),
        *("https://host/a?versionId=3&max_tokens=5", "train.lr=3e-4 of 5 tokens", "http://h/@x", "runs/a/checkpoints", "key: value"),
        *(
            "tokens=123456789",
            "tokenizer_path: runs/cache/tokenizer",
            "pad_token: <|endoftext|>",
            "eos_token_id=1234567890",
            "token: 12345678",
        ),
        *(
            "The secret: patience and time",
            "our secret: well-known tricks",
            "Its secret: Geduld, Größenordnungen.",
            "password: incorrect, or old",
        ),
        *(
            "secretary: somebody1",
            "passwords are long: 12345678",
            "secret:\n  name: abcdefgh",
            "ssh_private_key: ~/.ssh/headrace",
            "password=no",
        ),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text, {"HF_TOKEN": "short", "HOME": "/home/me@work"}) == text
    assert credential_in(text) is None


def test_authorization_headers_are_hidden() -> None:
    for header in ("Authorization: Bearer {}", "{{'Authorization': 'Basic {}'}}", '"authorization": "token {}"', "X-Ray-Authorization={}"):
        assert "abc123" not in without_secrets(header.format("abc123"), {})


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    return CANARY


def test_our_errors_hold_none_in_any_form(canary: str) -> None:
    error = pickle.loads(pickle.dumps(StorageError(f"s3://b: {canary}", 3)))  # noqa: S301 - our own
    assert str(error.args) == "('s3://b: ***', 3)" and canary not in repr(error)
    told = failure_of({0: RuntimeError(f"refused: {canary}"), 1: OSError(5, canary)}).told
    assert canary not in told and "***" in told
    assert canary not in json.dumps(event_row("restart", elapsed_s=1.0, step=3, reason=canary, phases={"a": 1.0}, more=[canary]))


class Stubborn(Exception):
    def __str__(self) -> str:
        return f"always {CANARY}"


@pytest.mark.parametrize("error", [ValueError(CANARY, 3), OSError(2, "gone", f"/a/{CANARY}"), KeyError(CANARY), Stubborn()])
def test_errors_of_libraries_are_raised_on_without_secrets(error: Exception, canary: str) -> None:
    try:
        try:
            raise RuntimeError(f"inside: {canary}")
        except RuntimeError:
            raise error  # noqa: B904 - its context is to be cleaned too
    except Exception as caught:
        found = scrub(caught)
    told = "".join(traceback.format_exception(found))
    assert canary not in told and canary not in repr(found) and "***" in told
    assert type(found) is (RuntimeError if isinstance(error, Stubborn) else type(error))


class FrozenError(Exception):
    """One that forbids changes, and tells what it must not."""

    def __init__(self, told: str) -> None:
        super().__init__()
        self.__dict__["told"] = told

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("__traceback__", "__cause__", "__context__", "__suppress_context__"):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __str__(self) -> str:
        return self.__dict__["told"]


def test_a_cause_that_cannot_be_cleaned_is_left_out_and_the_error_stays_what_it_is(canary: str) -> None:
    error = StorageError("the row could not be written")
    error.__cause__ = FrozenError(f"signed with {canary}")
    assert scrub(error) is error and error.__cause__ is error.__context__ is None
    other = scrub(FrozenError(f"signed with {canary}"))
    assert isinstance(other, RuntimeError) and str(other) == "FrozenError: signed with ***"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it has no text")


class NotText(Exception):
    def __repr__(self) -> str:
        return 5  # pyright: ignore[reportReturnType]


def noted(note: object) -> ValueError:
    error = ValueError("noted")
    error.__notes__ = note  # pyright: ignore[reportAttributeAccessIssue]
    return error


@pytest.mark.parametrize(
    "error",
    [
        *(Mute(CANARY), NotText(CANARY), noted(CANARY), noted([CANARY.encode(), 5]), noted(5)),
        *(SyntaxError("no", ("file", 1, 1, CANARY)), CalledProcessError(1, ["curl", CANARY], CANARY)),
        ExceptionGroup("several", [ValueError("first")]),
    ],
)
def test_errors_of_odd_classes_are_cleaned_too(error: Exception, canary: str) -> None:
    if isinstance(error, ExceptionGroup):
        error.exceptions[0].__cause__ = KeyError(canary)
    outer = StorageError("the row could not be written")
    outer.__cause__ = error
    assert scrub(outer) is outer and canary not in "".join(traceback.format_exception(outer))
    assert canary not in "".join(traceback.format_exception(scrub(error)))


def test_a_record_whose_text_does_not_fit_its_values_shows_no_secret(canary: str) -> None:
    with clean_records():
        record = logging.getLogRecordFactory()("name", logging.ERROR, "file", 1, f"{canary} %d", (canary,), None)
    assert (record.msg, record.args) == ("*** %d", ("***",))


def test_records_are_cleaned_once(canary: str) -> None:
    before = logging.getLogRecordFactory()
    with clean_records():
        outer = logging.getLogRecordFactory()
        with clean_records():
            assert logging.getLogRecordFactory() is outer
        assert logging.getLogRecordFactory() is outer is not before
    assert logging.getLogRecordFactory() is before


def test_a_job_that_fails_prints_none(canary: str, capsys: pytest.CaptureFixture[str]) -> None:
    def bug() -> int:
        raise KeyError(f"a bug near {canary}")

    def refused() -> int:
        raise ConfigError(f"refused: {canary}")

    assert [exit_code_of(bug, ""), exit_code_of(refused, "")] == [1, 2]
    told = capsys.readouterr().err
    assert canary not in told and "a bug near ***" in told and "error: refused: ***" in told


def test_log_files_hold_none(canary: str, tmp_path: Path) -> None:
    with redirect_noise(tmp_path / "driver.log"):
        try:
            raise ValueError(f"in a traceback: {canary}")
        except ValueError:
            logging.getLogger("botocore").warning("signing with %s", canary, exc_info=True)
    told = (tmp_path / "driver.log").read_text()
    assert canary not in told and "signing with ***" in told and "in a traceback: ***" in told


@pytest.mark.parametrize(
    ("key", "uri", "told"),
    [
        ("data.sources.0.uri", f"https://me:{CANARY}@host/x.jsonl", "holds a user name or password"),
        ("data.sources.0.uri", f"s3://bucket/x.jsonl?X-Amz-Signature={CANARY}", "holds the parameter X-Amz-Signature"),
        ("run.storage", f"s3://{CANARY.replace('/', '')}@bucket/x", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY where the job runs"),
        ("s3.endpoint_url", f"http://me:{CANARY}@host", "holds a user name or password"),
        ("s3.endpoint_url", f"ftp://me:{CANARY}@host", "holds a user name or password"),
        ("log.mlflow_uri", f"http://me:{CANARY}@host", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("model.config", f'{{"url": "http://x/?token={CANARY}"}}', "model.config.url holds the parameter token"),
    ],
)
def test_a_configuration_with_a_credential_is_refused_without_telling_it(key: str, uri: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(RECIPE.format(folder=tmp_path))
    with pytest.raises(ConfigError) as caught:
        load_run(str(tmp_path / "run.yaml"), [f"{key}={uri}" if uri.startswith("{") else f"{key}='{uri}'"])
    assert told in str(caught.value) and CANARY not in str(caught.value)
    assert CANARY.partition("/")[0] not in str(caught.value)


def test_a_configuration_without_one_is_recorded_as_it_is(tmp_path: Path, canary: str) -> None:
    (tmp_path / "run.yaml").write_text(RECIPE.format(folder=tmp_path))
    config = load_run(str(tmp_path / "run.yaml"), ["s3.endpoint_url=http://127.0.0.1:8333"])
    assert parse_run(dump_run(config), "recorded") == config


class Pair(NamedTuple):
    first: str
    second: str


def test_shapes_that_an_attacker_found() -> None:
    for header in (
        "Authorization: AWS4-HMAC-SHA256 Credential=abc123/x, SignedHeaders=host, Signature=abc123",
        'Authorization: Digest username="me", response="abc123"',
        "Authorization: ApiKey abc123",
        "('Authorization', 'Bearer abc123')",
        "{b'Authorization': b'Bearer abc123'}",
        '{"authorization": ["Bearer abc123"]}',
    ):
        assert "abc123" not in without_secrets(header, {}), header
    for name in ("PGPASSWORD", "DB_PASS", "MYSQL_PWD", "GITHUB_PAT", "DOCKER_AUTH_CONFIG", "PASSWORD2", "SIGNING_KEY_V2", "APITOKEN"):
        assert without_secrets(CANARY, {name: CANARY}) == HIDDEN, name
    for name in ("PWD", "OLDPWD", "MONKEY", "KEYBOARD", "PATH"):
        assert without_secrets(CANARY, {name: CANARY}) == CANARY, name
    assert without_secrets("abcdefgh\udcff", {"TOKEN": "abcdefgh\udcff"}) == HIDDEN, "bytes that are not UTF-8"
    assert without_secrets("/tmp", {"GOOGLE_APPLICATION_CREDENTIALS": "/tmp"}) == "/tmp"
    for uri in ("https://u:pa'ss@h/", "https://u:pa ss@h/", 'https://u:pa"ss@h/', "https://h/#access_token=abc"):
        assert credential_in(uri), uri
    assert cleaned(Pair("a", "http://u:p4ss@h")) == Pair("a", "http://***@h")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("HF_TOKEN=hf_0123456789 next", "HF_TOKEN=*** next"),
        ('export AWS_SECRET_ACCESS_KEY="abc/def+0123"', 'export AWS_SECRET_ACCESS_KEY="***"'),
        ("env: PATH=/usr/local/bin WANDB_API_KEY=0123456789abcdef\n", "env: PATH=/usr/local/bin WANDB_API_KEY=***\n"),
        (
            "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\n",
            "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\n",
        ),
        ("cut: -----BEGIN PRIVATE KEY-----\\nMIIE", "cut: -----BEGIN PRIVATE KEY-----***"),
        ("OMP_NUM_THREADS=12345678 RAY_ADDRESS=10.0.0.1:6379", None),
        ("EOS_TOKEN=</s> PAD_TOKEN=<pad>", None),
    ],
)
def test_variables_of_another_process_and_private_keys_are_hidden_by_their_form(text: str, told: str | None) -> None:
    assert without_secrets(text, {}) == (text if told is None else told)
