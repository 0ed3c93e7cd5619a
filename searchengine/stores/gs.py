"""Buckets of Google Cloud Storage, by its JSON API (https://cloud.google.com/storage/docs/json_api/v1/objects).

A login comes from where Google's tools look for it (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default
login`, the machine's account), and from fsspec's settings (FSSPEC_GS_TOKEN=anon: a public bucket).
"""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from searchengine.stores import StoredPhoto
from searchengine.stores.background import wait_for
from searchengine.stores.transfer import Missing, Page, Refused, check_before_body, check_length, network_failure
from searchengine.stores.web_client import RANGE_BEYOND, WebClient, body, extent

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

ENDPOINT = "https://storage.googleapis.com"
SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
PAGE_KEYS = 1000
FIELDS = "name,size,generation,timeCreated"
MAX_ANSWER_BYTES = 64 * 2**20
LOGIN_REMEDY = "log in with: gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon"


class GsFiles:
    reads_at_once = 16
    lists_exactly = True

    def __init__(self) -> None:
        self._web = WebClient(remedy=LOGIN_REMEDY)
        self._endpoint = os.environ.get("STORAGE_EMULATOR_HOST") or ENDPOINT
        if "://" not in self._endpoint:
            self._endpoint = f"http://{self._endpoint}"
        self._lock = threading.Lock()
        self._credentials: Credentials | None = None

    def list_page(self, prefix: str, token: str | None) -> Page:
        """PAGE_KEYS at a time, folders and all: the server goes on from a token, so nothing is kept here."""
        answer = self._list(prefix, PAGE_KEYS, token)
        bucket, _ = _split(prefix)
        photos = [_stored(f"gs://{bucket}/{item['name']}", item) for item in answer.get("items", ())]
        return Page(
            photos=[photo for photo in photos if not photo.key.endswith("/")], next_token=answer.get("nextPageToken")
        )

    def has_any(self, prefix: str) -> bool:
        return bool(self._list(prefix, 1, None).get("items"))

    def stat(self, key: str) -> StoredPhoto:
        try:
            return _stored(key, self._ask(f"{self._url(key)}?fields={FIELDS}"))
        except Missing:
            self._list(key, 1, None)  # which raises Refused where there is no such bucket
            raise

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        """Of one generation, which is of one content for good."""
        photo = expected or self.stat(key)
        check_before_body(photo, max_bytes=max_bytes, expected=expected)
        return photo, wait_for(self._get(photo, start, stop, self._login()))

    async def _get(self, photo: StoredPhoto, start: int, stop: int, login: dict[str, str]) -> bytes:
        url = f"{self._url(photo.key)}?alt=media&generation={photo.etag}"
        async with self._web.answer("GET", url, {**login, "Range": f"bytes={start}-{stop - 1}"}) as answer:
            begins_at, _ = extent(answer)
            data = b"" if answer.status == RANGE_BEYOND else await body(answer, start - begins_at, stop - begins_at)
        check_length(data, size_bytes=photo.size_bytes, start=start, stop=stop)
        return data

    def _list(self, prefix: str, count: int, token: str | None) -> dict[str, Any]:
        bucket, folder = _split(prefix)
        asked = {"prefix": folder, "maxResults": count, "fields": f"items({FIELDS}),nextPageToken"}
        query = urlencode({**asked, **({"pageToken": token} if token else {})})
        try:
            return self._ask(f"{self._endpoint}/storage/v1/b/{quote(bucket, safe='')}/o?{query}")
        except Missing:
            raise Refused(f"there is no bucket {bucket}; check its name") from None

    def _ask(self, url: str) -> dict[str, Any]:
        return wait_for(self._json(url, self._login()))

    async def _json(self, url: str, login: dict[str, str]) -> dict[str, Any]:
        async with self._web.answer("GET", url, login) as answer:
            try:
                told: dict[str, Any] = json.loads(await body(answer, 0, MAX_ANSWER_BYTES))
            except ValueError as error:
                raise network_failure(error) from None
            return told

    def _login(self) -> dict[str, str]:
        """The header that tells who asks, with a token that is still good."""
        import fsspec.config
        import google.auth
        import google.auth.exceptions
        import google.auth.transport.requests

        if any(fsspec.config.conf.get(name, {}).get("token") == "anon" for name in ("gs", "gcs")):
            return {}
        headers: dict[str, str] = {}
        try:
            with self._lock:
                if self._credentials is None:
                    self._credentials, _ = google.auth.default(scopes=[SCOPE])
                request = google.auth.transport.requests.Request()
                self._credentials.before_request(request, "GET", ENDPOINT, headers)  # type: ignore[no-untyped-call]
        except google.auth.exceptions.TransportError as error:
            raise network_failure(error) from None
        except google.auth.exceptions.GoogleAuthError as error:
            raise Refused(f"there is no login for it ({type(error).__name__}); {LOGIN_REMEDY}") from None
        return headers

    def _url(self, key: str) -> str:
        bucket, name = _split(key)
        return f"{self._endpoint}/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def _split(url: str) -> tuple[str, str]:
    bucket, _, name = url.partition("://")[2].partition("/")
    return bucket, name


def _stored(key: str, item: dict[str, Any]) -> StoredPhoto:
    created = datetime.fromisoformat(item["timeCreated"])
    return StoredPhoto(key, int(item.get("size", 0)), int(created.timestamp()) * 10**9, str(item["generation"]))
