"""An index in Milvus: the same searches as in a folder, for libraries that outgrow one machine."""

from __future__ import annotations

import os
import re

_PLACE = re.compile(r"milvus(\+tls)?:", re.IGNORECASE)


def is_milvus(place: str | os.PathLike[str]) -> bool:
    """Whether the place of an index means one in Milvus."""
    return isinstance(place, str) and _PLACE.match(place) is not None
