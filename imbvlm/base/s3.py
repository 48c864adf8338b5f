"""S3 clients with the usual AWS settings (endpoint, region, profile, keys or none), and errors that name the account.

Keys are used literally, spaces and percent signs included. boto3 is imported only where S3 is used.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow.fs as pafs

from imbvlm.base.errors import StorageError

T = TypeVar("T")

SCHEME = "s3://"
# Attempts of a client at 503 and slow answers; clients don't retry 403 and 404.
_ATTEMPTS = 6
_CONNECTIONS = 64
# Timeouts of a connection and of the next bytes of an answer. With all attempts a missing answer takes two minutes.
_CONNECT_SECONDS, _READ_SECONDS = 5.0, 20.0
_ATTEMPTS_DENIED = 3
_FIRST_WAIT_SECONDS = 0.1
# Denied accesses that a retry can't change.
_LASTING = (b"SignatureDoesNotMatch", b"InvalidAccessKeyId", b"ExpiredToken", b"InvalidToken", b"AccountProblem")
_DENIED = (
    "AccessDenied",
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "EXPIRED_TOKEN",
    "INVALID_TOKEN",
)
_SETTINGS = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI; raises StorageError without a bucket."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise StorageError(f"{uri} names no bucket; it should look like s3://BUCKET/KEY")
    return bucket, key


def settings() -> tuple[str, ...]:
    """The environment's present AWS settings, by which clients differ."""
    return tuple(os.environ.get(name, "") for name in _SETTINGS)


def filesystem(bucket: str) -> pafs.S3FileSystem:
    """pyarrow's client for a bucket; one per process and settings, because creating one may request the region."""
    return _filesystem(bucket, settings())


@lru_cache(maxsize=32)
def _filesystem(bucket: str, settings: tuple[str, ...]) -> pafs.S3FileSystem:
    endpoint, region = _endpoint_and_region(bucket)
    parts = urlsplit(endpoint or "https:")
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=parts.netloc or None,
        scheme=parts.scheme,
        anonymous=_session().get_credentials() is None,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_READ_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def _endpoint_and_region(bucket: str) -> tuple[str | None, str]:
    """The endpoint of another server than Amazon's, and the region of a bucket."""
    endpoint = str(client().meta.endpoint_url)
    is_amazon = (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    region = _session().region_name or (pafs.resolve_s3_region(bucket) if is_amazon else "us-east-1")
    return None if is_amazon else endpoint, str(region)


def get(uri: str, offset: int = 0, num_bytes: int | None = None) -> bytes:
    """An object, or a part of it, by one request: pyarrow makes two for each object, and boto3 takes twice the CPU.

    Retries bad answers and denied accesses a few times, because a store under load sometimes denies what it allows.
    Raises FileNotFoundError, PermissionError, StorageError, and ConnectionError where the store doesn't answer.
    """
    bucket, key = split(uri)
    reader = _reader(bucket, settings())
    headers = {} if num_bytes is None else {"Range": f"bytes={offset}-{offset + num_bytes - 1}"}
    problem = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * (0.5 + random.random()))
        status, content = reader.request(key, headers)
        if status in (200, 206):
            return content
        if status == 404:
            raise FileNotFoundError(uri)
        code = re.search(rb"<Code>(\w+)</Code>", content)
        text = code[1].decode() if code else content[:200].decode("utf-8", "replace")
        problem = f"doesn't answer ({text})" if status is None else f"answers {status} {text}".strip()
        if status == 403 and code is not None and code[1] in _LASTING:
            # The credentials are wrong, so that no other object can be read either.
            raise denied(uri, code[1].decode())
        if status == 403 and attempt + 1 >= _ATTEMPTS_DENIED:
            raise PermissionError(uri)
        if (status is not None and 400 <= status < 500 and status not in (403, 408, 429)) or status in (301, 307):
            raise StorageError(f"can't read {uri}: the store {problem}; check the address and the AWS settings")
    raise ConnectionError(f"the store {problem}")


@dataclass(frozen=True)
class _Reader:
    """Signed GET requests for the objects of a bucket, over connections that stay open."""

    base: str
    auth: Any
    session: Any

    def request(self, key: str, headers: Mapping[str, str]) -> tuple[int | None, bytes]:
        """Status and content of the answer; without an answer None and the reason."""
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError

        request = AWSRequest("GET", self.base + quote(key, safe="/~"), headers=dict(headers))
        if self.auth is not None:
            self.auth.add_auth(request)
        try:
            response = self.session.send(request.prepare())
        except BotoCoreError as error:
            return None, str(error).encode()
        return int(response.status_code), bytes(response.content)


@lru_cache(maxsize=32)
def _reader(bucket: str, settings: tuple[str, ...]) -> _Reader:
    from botocore.auth import S3SigV4Auth
    from botocore.httpsession import URLLib3Session
    from botocore.utils import get_environ_proxies

    endpoint, region = _endpoint_and_region(bucket)
    base = f"{endpoint or f'https://s3.{region}.amazonaws.com'}/{bucket}/"
    credentials = _session().get_credentials()
    auth = None if credentials is None else S3SigV4Auth(credentials, "s3", region)
    options: dict[str, Any] = {
        "verify": os.environ.get("AWS_CA_BUNDLE") or True,
        "timeout": (_CONNECT_SECONDS, _READ_SECONDS),
    }
    session = URLLib3Session(proxies=get_environ_proxies(base), max_pool_connections=_CONNECTIONS, **options)
    return _Reader(base, auth, session)


class NoConditionsError(StorageError):
    """The store doesn't support conditional writes."""


def put(uri: str, data: bytes, **condition: str) -> str | None:
    """Write an object and return its ETag; None where the condition (`IfNoneMatch`, `IfMatch`) doesn't hold.

    Raises NoConditionsError, StorageError.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with translate_errors(uri):
        try:
            written = retry_denied(
                uri, lambda: _client(settings()).put_object(Bucket=bucket, Key=key, Body=data, **condition)
            )
        except ClientError as error:
            status, code = _answer(error)
            if condition and status in (404, 409, 412) and code != "NoSuchBucket":
                return None
            if condition and status in (400, 501) and code in ("NotImplemented", "InvalidArgument", "501"):
                raise NoConditionsError(f"{uri}: the store answers {status} {code} to a conditional write") from None
            raise
    return str(written["ETag"])


def get_version(uri: str) -> tuple[bytes, str] | None:
    """An object with its ETag; None for a missing object. Raises StorageError."""
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    with translate_errors(uri):
        try:
            answer = retry_denied(uri, lambda: _client(settings()).get_object(Bucket=bucket, Key=key))
            return answer["Body"].read(), str(answer["ETag"])
        except ClientError as error:
            if _answer(error) == (404, "NoSuchKey"):
                return None
            raise


def _answer(error: Any) -> tuple[int | None, str]:
    """Status and code of a store's answer, from boto3's ClientError."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status, str(error.response.get("Error", {}).get("Code", ""))


@lru_cache(maxsize=4)
def _client(settings: tuple[str, ...]) -> Any:
    """One client per process and settings: creating one takes longer than most requests."""
    return client()


def client() -> Any:
    """boto3's client, for requests that pyarrow can't make in parallel; anonymous without keys."""
    from botocore import UNSIGNED
    from botocore.config import Config

    session = _session()
    is_anonymous = session.get_credentials() is None
    config = Config(
        retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
        max_pool_connections=_CONNECTIONS,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        signature_version=UNSIGNED if is_anonymous else None,
    )
    return session.client("s3", config=config)


def identity() -> str:
    """The account of the AWS settings: the start of the key's id, never a secret."""
    session = _session()
    credentials = session.get_credentials()
    if credentials is None:
        return "anonymous access"
    profile = f" of profile {session.profile_name}" if session.profile_name != "default" else ""
    return f"access key {credentials.access_key[:4]}...{profile}"


def _session() -> Any:
    import boto3

    return boto3.session.Session()


def is_denied(error: BaseException) -> bool:
    """Whether an error of pyarrow or boto3 means a denied access."""
    return isinstance(error, PermissionError) or any(code in str(error) for code in _DENIED)


def retry_denied(uri: str, call: Callable[[], T]) -> T:
    """The result of `call`, retried a few times while S3 denies access: under load a store denies what it allows.

    pyarrow and boto3 don't retry a 403. Lasting refusals and all other errors are raised at once.
    """
    if not uri.startswith(SCHEME):
        return call()
    from botocore.exceptions import ClientError

    for attempt in range(_ATTEMPTS_DENIED - 1):
        try:
            return call()
        except (OSError, ClientError) as error:
            if not is_denied(error) or any(code.decode() in str(error) for code in _LASTING):
                raise
        time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
    return call()


def denied(uri: str, code: str = "") -> StorageError:
    """The error for a denied access: bucket, key and account."""
    bucket, key = split(uri)
    target = f"key {key!r} in bucket {bucket!r}" if key else f"bucket {bucket!r}"
    reason = f" ({code})" if code else ""
    return StorageError(
        f"access to {target} is denied for {identity()}{reason}; check the keys and the bucket's policy"
    )


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Within, boto3's errors become a StorageError that names the location, and for a denied access the account."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        status, code = _answer(error)
        if status == 403:
            raise denied(uri, code) from None
        if status == 404:
            raise StorageError(f"{uri} is not there ({code}); check bucket and key") from None
        raise StorageError(f"{uri}: the store answers {status} {code}; try again later") from None
    except BotoCoreError as error:
        raise StorageError(f"can't reach {uri}: {error}; check the network and AWS_ENDPOINT_URL") from None
