"""boto3 by the usual AWS settings, for what pyarrow can't do in parallel; errors that name bucket, key and identity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from imbvlm.storage import StorageError

# Adaptive mode backs off at 503 (SlowDown); 403 and 404 are never retried.
_ATTEMPTS = 8
_CONNECTIONS = 64


def client() -> Any:
    """An S3 client; endpoint, region, profile and keys come from the AWS settings, and without keys it is anonymous."""
    session = boto3.session.Session()
    anonymous = session.get_credentials() is None
    config = Config(
        retries={"max_attempts": _ATTEMPTS, "mode": "adaptive"},
        max_pool_connections=_CONNECTIONS,
        signature_version=UNSIGNED if anonymous else None,
    )
    return session.client("s3", config=config)


def identity() -> str:
    """Who the AWS settings make us, by the key's id alone; secrets are never shown."""
    session = boto3.session.Session()
    credentials = session.get_credentials()
    if credentials is None:
        return "anonymous"
    profile = f", profile {session.profile_name}" if session.profile_name != "default" else ""
    return f"access key {credentials.access_key[:4]}...{profile}"


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Inside, errors of S3 become a StorageError that names the place and who was asking."""
    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 403:
            raise StorageError(f"access to {uri} is denied for {identity()} ({code})") from None
        if status == 404:
            raise StorageError(f"{uri} is not there ({code})") from None
        raise StorageError(f"{uri}: the store answers {status} {code}") from None
    except BotoCoreError as error:
        raise StorageError(f"can't reach {uri}: {error}") from None
