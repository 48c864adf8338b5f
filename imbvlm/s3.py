"""S3 by the usual AWS settings (endpoint, region, profile, keys or none): clients, and errors that say who asked.

Keys are taken as they are, spaces and percent signs included. boto3 is imported only where S3 is really used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from imbvlm.errors import StorageError

SCHEME = "s3://"
# Clients back off at 503 and slow answers this often; 403 and 404 aren't asked again by them.
_ATTEMPTS = 6
_CONNECTIONS = 64
_CONNECT_SECONDS = 5.0
_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN", "INVALID_TOKEN")
_SETTINGS = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URI; raises StorageError where there is no bucket."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not bucket:
        raise StorageError(f"{uri} has no bucket; it should look like s3://BUCKET/KEY")
    return bucket, key


def filesystem(bucket: str) -> pafs.S3FileSystem:
    """pyarrow's client for a bucket; one per process and settings, because making one may ask for the region."""
    return _filesystem(bucket, tuple(os.environ.get(name, "") for name in _SETTINGS))


@lru_cache(maxsize=32)
def _filesystem(bucket: str, settings: tuple[str, ...]) -> pafs.S3FileSystem:
    session, endpoint = _session(), urlsplit(client().meta.endpoint_url)
    own = not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    region = session.region_name or ("us-east-1" if own else pafs.resolve_s3_region(bucket))
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=endpoint.netloc if own else None,
        scheme=endpoint.scheme,
        anonymous=session.get_credentials() is None,
        connect_timeout=_CONNECT_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
    )


def client() -> Any:
    """boto3's client, for what pyarrow can't do in parallel; anonymous where the settings have no keys."""
    from botocore import UNSIGNED
    from botocore.config import Config

    session = _session()
    anonymous = session.get_credentials() is None
    config = Config(
        retries={"max_attempts": _ATTEMPTS, "mode": "standard"},
        max_pool_connections=_CONNECTIONS,
        connect_timeout=_CONNECT_SECONDS,
        signature_version=UNSIGNED if anonymous else None,
    )
    return session.client("s3", config=config)


def identity() -> str:
    """Who the AWS settings make us: the start of the key's id, never a secret."""
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
    """Whether a pyarrow error is the store's refusal rather than a failure to answer."""
    return isinstance(error, PermissionError) or any(code in str(error) for code in _DENIED)


def denied(uri: str, code: str = "") -> StorageError:
    """The error for a refusal: bucket, key and who asked."""
    bucket, key = split(uri)
    what = f"key {key!r} in bucket {bucket!r}" if key else f"bucket {bucket!r}"
    return StorageError(f"access to {what} is denied for {identity()}{f' ({code})' if code else ''}")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Inside, boto3's errors become a StorageError that names the place, and for a refusal who was asking."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 403:
            raise denied(uri, code) from None
        if status == 404:
            raise StorageError(f"{uri} is not there ({code})") from None
        raise StorageError(f"{uri}: the store answers {status} {code}") from None
    except BotoCoreError as error:
        raise StorageError(f"can't reach {uri}: {error}") from None
