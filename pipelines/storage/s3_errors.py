"""Classification of S3 responses and boto3 errors: not found, worth another try, credentials, or final.

The error code is read from the response only: error messages contain keys, and a key may contain "403".
"""

from __future__ import annotations

import http.client
import time
from email.utils import parsedate_to_datetime
from typing import Any

from pipelines.storage.errors import StorageError, TransientStorageError, cut_short, is_network_error, not_found

ABSENT = {"404", "NoSuchKey", "NotFound"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
_THROTTLED = {
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}
_TRANSIENT = {
    *_THROTTLED,
    "BadDigest",
    "ConditionalRequestConflict",
    "IDPCommunicationError",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUS = {408, 425, 429}
_BUSY_STATUS = {429, 503}
_NOT_OFFERED = {501, 505}
_MAY_NOT = "the credentials may not do this: grant read, write and list on the bucket"
_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is unknown to this server: check the credentials file or AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials file or AWS_SECRET_ACCESS_KEY",
    "AccessDenied": _MAY_NOT,
    "403": _MAY_NOT,
    "401": _MAY_NOT,
}
_FINAL = {
    "NoSuchBucket": "the bucket does not exist: create it, or name another with storage.root=s3://BUCKET",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set storage.region",
    "IllegalLocationConstraintException": "the bucket is in another region: set storage.region",
    "PermanentRedirect": "the bucket is in another region: set storage.region",
    "301": "the bucket is in another region: set storage.region",
}
MAX_SKEW_S = 900.0
"""Largest difference in seconds between the time of a signed request and that of the server."""


class ExpiredCredentialsError(TransientStorageError):
    """The credentials have expired: they are read again, because a mounted file may have newer ones."""


class CredentialsRefusedError(StorageError):
    """The server rejects the credentials, or there are none: final unless they have changed meanwhile."""


def sort_error(uri: str, error: Exception, *, temporary_credentials: bool = False) -> StorageError | None:
    """Return the error of this project for an exception of boto3; None if it came from elsewhere.

    Args:
        temporary_credentials: whether the call was signed with credentials that expire.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ChecksumError,
        ClientError,
        ConnectionError,
        CredentialRetrievalError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        MetadataRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
    from urllib3.exceptions import HTTPError

    # The transfer manager wraps the error that ended it.
    cause = error
    if isinstance(error, Boto3Error | RetriesExceededError | S3DownloadFailedError):
        inner = getattr(error, "last_exception", None) or error.__cause__ or error.__context__
        if not isinstance(inner, ClientError | BotoCoreError):
            return TransientStorageError(f"{uri}: {inner or error}")
        cause = inner

    if isinstance(cause, ClientError):
        return _sort_answer(uri, cause, temporary_credentials)
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        return CredentialsRefusedError(
            f"{uri}: no complete AWS credentials: set AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE or "
            f"storage.credentials_file ({cause})"
        )
    interrupted = (
        HTTPClientError  # these two: no connection, a timeout, TLS, a proxy, a body that broke off
        | ConnectionError
        | IncompleteReadError
        | ChecksumError
        | FlexibleChecksumError
        | CredentialRetrievalError
        | MetadataRetrievalError
        | ResponseParserError  # the answer of something in front of the store
        | HTTPError
        | http.client.HTTPException
    )
    if isinstance(cause, interrupted) or is_network_error(cause):
        return TransientStorageError(f"{uri}: {cause or type(cause).__name__}")
    if isinstance(cause, BotoCoreError):
        return StorageError(f"{uri}: {cause}")
    return None


def is_throttled(answer: dict[str, Any]) -> bool:
    """Return whether an answer of S3, as boto3 parses it, says that there are too many requests."""
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _BUSY_STATUS or answer.get("Error", {}).get("Code") in _THROTTLED


def _sort_answer(uri: str, error: Any, temporary_credentials: bool) -> StorageError:
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    skew_s = _skew_s(answer)
    if code in ABSENT:
        return not_found(uri)
    if code == "InvalidRange" or status == 416:
        return cut_short(uri)
    if code == "RequestTimeTooSkewed" or (status == 403 and abs(skew_s) > MAX_SKEW_S):
        ahead = (
            f" (it is {abs(skew_s) / 60:.0f} minutes {'ahead' if skew_s > 0 else 'behind'})" if abs(skew_s) > 60 else ""
        )
        return TransientStorageError(
            f"{uri}: the clock of this machine is wrong{ahead}, so the server refuses its signatures: "
            "set it with `timedatectl set-ntp true`, or start chronyd"
        )
    # The answer to a HEAD request has no body that could say "ExpiredToken".
    if code in _EXPIRED or (code == "400" and error.operation_name == "HeadObject" and temporary_credentials):
        return ExpiredCredentialsError(f"{uri}: the credentials have expired: renew them, or their file ({error})")
    if code in _CREDENTIALS:
        return CredentialsRefusedError(f"{uri}: {_CREDENTIALS[code]}")
    busy = status in _TRANSIENT_STATUS or (status >= 500 and status not in _NOT_OFFERED)
    kind = TransientStorageError if busy or code in _TRANSIENT else StorageError
    return kind(f"{uri}: {_FINAL.get(code, error)}")


def _skew_s(answer: dict[str, Any]) -> float:
    """Return the seconds by which this machine's clock is ahead of the server's; 0 if the server does not say."""
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        return time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0
    except ValueError:
        return 0.0
