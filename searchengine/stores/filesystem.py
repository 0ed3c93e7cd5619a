"""What else fsspec opens: gs:// (extra gcs), az:// (extra azure), and every scheme whose package is installed.

Logins come from where each of these packages looks for them, and from fsspec's own settings (FSSPEC_GS_TOKEN, ...).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from searchengine.errors import StoreUnusable, UsageError
from searchengine.stores import StoredPhoto
from searchengine.stores.background import wait_for
from searchengine.stores.local import MAX_INTEGER
from searchengine.stores.transfer import (
    Missing,
    Page,
    Refused,
    TransferFailure,
    check_before_body,
    check_length,
    network_failure,
    status_failure,
)
from searchengine.text import printable

# As the packages call what changes with the content; a generation is of one content for good, as in GCS.
TAGS = ("generation", "version_id", "etag", "ETag", "md5Hash", "content_md5", "checksum")
TIMES = ("mtime", "last_modified", "LastModified", "updated", "modified", "created")
ASKED_AGAIN = frozenset(
    {"ServiceRequestError", "ServiceResponseError"}
)  # of Azure's package, which did so for a minute
STATUSES = ("status_code", "status", "code")


class FilesystemFiles:
    reads_at_once = 16
    lists_exactly = True

    def __init__(self, prefix: str) -> None:
        import fsspec.core

        scheme = prefix.partition("://")[0]
        try:
            fsspec.get_filesystem_class(scheme)
        except ValueError:
            raise UsageError(f"{scheme}:// is no kind of store that can be read") from None
        except ImportError as error:
            raise UsageError(f"{scheme}:// needs a package that is not installed: {printable(str(error))}") from None
        try:
            self._filesystem, root = fsspec.core.url_to_fs(prefix, use_listings_cache=False, skip_instance_cache=True)
        except Exception as error:
            raise StoreUnusable(f"{printable(prefix)} cannot be opened: {_failure(error)}") from None
        self._prefix = prefix
        self._root: str = root.rstrip("/") + "/"

    def list_page(self, prefix: str, token: str | None) -> Page:
        """One folder."""
        entries = self._ask("ls", self._path(prefix), detail=True)
        photos = [_stored(self._key(entry["name"]), entry) for entry in entries if entry["type"] == "file"]
        folders = [self._key(entry["name"].rstrip("/")) + "/" for entry in entries if entry["type"] == "directory"]
        # Some list the marker of the folder itself, too.
        return Page(
            photos=[photo for photo in photos if not photo.key.endswith("/")],
            folders=[folder for folder in folders if folder != prefix],
        )

    def has_any(self, prefix: str) -> bool:
        return bool(self._ask("ls", self._path(prefix), detail=False))

    def stat(self, key: str) -> StoredPhoto:
        return _stored(key, self._info(key))

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        photo = self.stat(key)
        check_before_body(photo, max_bytes=max_bytes, expected=expected)
        end = min(stop, photo.size_bytes)
        data = bytes(self._ask("cat_file", self._path(key), start=start, end=end)) if end > start else b""
        check_before_body(self.stat(key), max_bytes=max_bytes, expected=photo)
        check_length(data, size_bytes=photo.size_bytes, start=start, stop=stop)
        return photo, data

    def _info(self, key: str) -> dict[str, Any]:
        info: dict[str, Any] = self._ask("info", self._path(key))
        if info["type"] != "file":
            raise Missing
        return info

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        try:
            if self._filesystem.async_impl:
                return wait_for(getattr(self._filesystem, f"_{method}")(path, **options))
            return getattr(self._filesystem, method)(path, **options)
        except TransferFailure:
            raise
        except Exception as error:
            raise _failure(error) from None

    def _path(self, key: str) -> str:
        return self._root + key.removeprefix(self._prefix)

    def _key(self, path: str) -> str:
        return self._prefix + path.removeprefix(self._root)


def _failure(error: Exception) -> TransferFailure:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return Missing()
    if isinstance(error, PermissionError):
        return Refused("permission denied; check the credentials")
    for name in STATUSES:
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return status_failure(status, "", remedy="check the credentials")
    if isinstance(error, OSError) or "Connection" in type(error).__name__ or "Timeout" in type(error).__name__:
        return network_failure(error)
    if type(error).__name__ in ASKED_AGAIN:
        return Refused(str(network_failure(error)))
    # What the package itself says may hold addresses with secrets in them.
    return Refused(f"it fails with {type(error).__name__}; check the credentials and the name")


def _stored(key: str, info: dict[str, Any]) -> StoredPhoto:
    tag = next((str(info[name]) for name in TAGS if info.get(name)), None)
    time = next((info[name] for name in TIMES if info.get(name)), 0)
    return StoredPhoto(key, int(info.get("size") or 0), _nanoseconds(time), tag.strip('"') if tag else None)


def _nanoseconds(time: object) -> int:
    """Of a moment in any of the forms that packages give; in whole seconds, for some know fewer at another time."""
    match time:
        case datetime():
            seconds = (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        case int() | float():
            seconds = float(time)
        case str():
            try:
                return _nanoseconds(datetime.fromisoformat(time))
            except ValueError:
                return 0
        case _:
            return 0
    return max(0, min(int(seconds) * 10**9, MAX_INTEGER))
