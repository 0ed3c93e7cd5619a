"""Buckets of Amazon S3, and of what speaks its language (API version 2006-03-01).

Credentials, region and endpoint come from where the AWS tools look for them: AWS_* in the environment (AWS_PROFILE,
AWS_ENDPOINT_URL, ...), ~/.aws, the machine's role; and from fsspec's settings (FSSPEC_S3_ANON=true: a public bucket).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from searchengine.stores import StoredPhoto
from searchengine.stores.background import wait_for
from searchengine.stores.retry import retry_after_seconds
from searchengine.stores.transfer import (
    CONNECTIONS,
    TIMEOUT_SECONDS,
    Busy,
    Missing,
    Page,
    Refused,
    TransferFailure,
    check_before_body,
    check_length,
    network_failure,
    status_failure,
)

SETTINGS = {
    "connect_timeout": TIMEOUT_SECONDS,
    "read_timeout": TIMEOUT_SECONDS,
    "max_pool_connections": CONNECTIONS,
    "retries": {"mode": "standard", "total_max_attempts": 1},  # retry.py asks again, and no one else
    # Checksums that newer clients want by default, and older servers do not know.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
ACCESS_REMEDY = (
    "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws) and what they allow; "
    "for a public bucket set FSSPEC_S3_ANON=true"
)
PAGE_KEYS = 1000  # the most that a server gives
BUSY_CODES = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"})
EMPTY_FILE = "InvalidRange"


class S3Files:
    reads_at_once = 16
    lists_exactly = True

    def __init__(self) -> None:
        import s3fs

        self._connection = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, cache_regions=False, config_kwargs=SETTINGS
        )

    def list_page(self, prefix: str, token: str | None) -> Page:
        """PAGE_KEYS at a time, folders and all: the server goes on from a token, so nothing is kept here."""
        answer = self._list(prefix, MaxKeys=PAGE_KEYS, **({"ContinuationToken": token} if token else {}))
        bucket, _ = _split(prefix)
        photos = [
            _stored(f"s3://{bucket}/{item['Key']}", item["Size"], item["LastModified"], item.get("ETag"))
            for item in answer.get("Contents", ())
            if not item["Key"].endswith("/")
        ]
        next_token = answer.get("NextContinuationToken")
        if answer.get("IsTruncated") and next_token in (None, "", token):
            raise Refused("the listing is cut off, and the server does not tell how it goes on")
        return Page(photos=photos, next_token=next_token)

    def has_any(self, prefix: str) -> bool:
        return bool(self._list(prefix, MaxKeys=1).get("Contents"))

    def stat(self, key: str) -> StoredPhoto:
        bucket, name = _split(key)
        try:
            answer = wait_for(self._request("head_object", Bucket=bucket, Key=name))
        except Missing:
            self._list(key, MaxKeys=1)  # to a HEAD, a server says the same where there is no such bucket
            raise
        return _stored(key, answer["ContentLength"], answer["LastModified"], answer.get("ETag"))

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        return wait_for(self._get(key, start, stop, max_bytes=max_bytes, expected=expected))

    async def _get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        bucket, name = _split(key)
        condition = {"IfMatch": f'"{expected.etag}"'} if expected and expected.etag else {}
        try:
            answer = await self._request(
                "get_object", Bucket=bucket, Key=name, Range=f"bytes={start}-{stop - 1}", **condition
            )
        except _EmptyRange:
            # Of an empty file no range can be had.
            answer = await self._request("get_object", Bucket=bucket, Key=name, **condition)
        total = answer.get("ContentRange", "").rpartition("/")[2] or answer["ContentLength"]
        photo = _stored(key, int(total), answer["LastModified"], answer.get("ETag"))
        try:
            check_before_body(photo, max_bytes=max_bytes, expected=expected)
            data: bytes = await answer["Body"].read()
        except TransferFailure:
            raise
        except Exception as error:
            raise network_failure(error) from None
        finally:
            answer["Body"].close()
        if "ContentRange" not in answer:
            data = data[start:stop]
        check_length(data, size_bytes=photo.size_bytes, start=start, stop=stop)
        return photo, data

    def _list(self, prefix: str, **parameters: Any) -> dict[str, Any]:
        bucket, folder = _split(prefix)
        return wait_for(self._request("list_objects_v2", Bucket=bucket, Prefix=folder, **parameters))

    async def _request(self, method: str, **parameters: Any) -> dict[str, Any]:
        import botocore.exceptions as errors

        try:
            client = await self._connection.set_session()
            answer: dict[str, Any] = await getattr(client, method)(**parameters)
            return answer
        except errors.ClientError as error:
            raise _failure(error.response, parameters["Bucket"]) from None
        except (errors.HTTPClientError, errors.ConnectionError) as error:
            raise network_failure(error) from None
        except (errors.NoCredentialsError, errors.PartialCredentialsError):
            raise Refused(f"there are no credentials for it; {ACCESS_REMEDY}") from None
        except errors.BotoCoreError as error:  # a profile that does not exist, a name that no bucket can have
            raise Refused(f"{str(error).rstrip('.')}; {ACCESS_REMEDY}") from None
        except Exception as error:
            raise network_failure(error) from None


class _EmptyRange(TransferFailure):
    def __init__(self) -> None:
        super().__init__("the file ends before that range")


def _failure(answer: dict[str, Any], bucket: str) -> TransferFailure:
    """What an error of the server means (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html)."""
    code = str(answer.get("Error", {}).get("Code", ""))
    told = answer.get("ResponseMetadata", {})
    status = int(told.get("HTTPStatusCode", 0)) or 500
    wait_seconds = retry_after_seconds(told.get("HTTPHeaders", {}).get("retry-after"))
    if code == EMPTY_FILE or status == 416:
        return _EmptyRange()
    if code == "NoSuchBucket":
        return Refused(f"there is no bucket {bucket}; check its name")
    if code in BUSY_CODES:
        return Busy(f"the answer is {status} {code}", wait_seconds=wait_seconds)
    if code == "NoSuchKey":
        return Missing()
    # In the answer to a HEAD there is no room for a code, and the library puts the status there.
    return status_failure(status, "" if code.isdecimal() else code, wait_seconds=wait_seconds, remedy=ACCESS_REMEDY)


def _split(url: str) -> tuple[str, str]:
    """Bucket and key; a key may hold all characters, so it is no URL's path."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _stored(key: str, size_bytes: int, modified: datetime, etag: str | None) -> StoredPhoto:
    """In whole seconds: listings of some servers know more of them than the answers with the file do."""
    return StoredPhoto(key, size_bytes, int(modified.timestamp()) * 10**9, etag.strip('"') if etag else None)
