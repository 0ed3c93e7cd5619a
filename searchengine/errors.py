"""Every error that searchengine raises on purpose.

    SearchEngineError                 exit 3
    ├── UsageError                    exit 2   the caller asked for something that makes no sense
    │   ├── QueryError                         an empty, over-long or ill-formed query
    │   │   └── PhotoNotFound                  the index has no photo with that id
    │   └── SettingError                       a setting with a wrong name, type or range
    ├── IndexUnusable                 exit 3
    │   ├── IndexNotFound                      no index at that path
    │   ├── IndexFormatError                   damaged
    │   │   └── IndexTooNew                    written by a newer version
    │   └── IndexLocked                        another process is writing
    ├── StoreUnusable                 exit 3   a photo store that cannot be listed or read
    ├── ModelUnusable                 exit 4
    │   ├── ModelNotFound                      no encoder of that name, or its weights are missing
    │   ├── WeightsError                       weights that are damaged or not the published ones
    │   └── ModelMismatch                      the index was made by another encoder
    ├── ServiceUnusable               exit 3   a service that cannot be reached, or does not answer as one
    │   ├── AccessError                        it wants a token, or another one
    │   └── OverloadError                      it has more to do than it can take; ask again later
    └── ImageError                             one photo that cannot be used; recorded, never fatal to a run

A message names the object, the value found and the remedy. The command line prints it as one line on
standard error and exits with the class's ``exit_code``.
"""

from __future__ import annotations


class SearchEngineError(Exception):
    exit_code = 3


class UsageError(SearchEngineError):
    exit_code = 2


class QueryError(UsageError):
    pass


class PhotoNotFound(QueryError):
    @classmethod
    def by_id(cls, photo_id: int) -> PhotoNotFound:
        return cls(f"the index has no photo with id {photo_id}; ids are in the results of a search")


class SettingError(UsageError):
    pass


class IndexUnusable(SearchEngineError):
    exit_code = 3


class IndexNotFound(IndexUnusable):
    pass


class IndexFormatError(IndexUnusable):
    pass


class IndexTooNew(IndexFormatError):
    pass


class IndexLocked(IndexUnusable):
    pass


class StoreUnusable(SearchEngineError):
    exit_code = 3


class ModelUnusable(SearchEngineError):
    exit_code = 4


class ModelNotFound(ModelUnusable):
    pass


class WeightsError(ModelUnusable):
    pass


class ModelMismatch(ModelUnusable):
    pass


class ServiceUnusable(SearchEngineError):
    exit_code = 3


class AccessError(ServiceUnusable):
    pass


class OverloadError(ServiceUnusable):
    """`retry_after_seconds`: when to ask again."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ImageError(SearchEngineError):
    """A photo that cannot be decoded; ``str(error)`` is the reason a person reads in `status --failures`."""
