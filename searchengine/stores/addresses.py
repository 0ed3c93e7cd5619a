"""URLs as they are in keys, and nothing secret in them: they end up in the index, in messages and on pages."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from searchengine.errors import UsageError
from searchengine.text import printable

OTHER_NAMES = {"gcs": "gs", "s3a": "s3"}
# Where what comes after a : is a port; in the name of a bucket it may be anything.
WITH_PORTS = frozenset({"http", "https", "sftp"})
# Where a name before an @ tells whom to log in as, or is no login at all.
NAMED_LOGINS = frozenset({"sftp", "ftp", "smb", "abfs", "abfss"})
SECRET_PARAMETERS = frozenset(
    "x-amz-signature x-amz-credential x-amz-security-token x-goog-signature x-goog-credential signature sig "
    "access_token token api_key apikey".split()
)


def canonical(url: str) -> str:
    """A URL as it is in keys. Raises UsageError where it holds a password or the signature of a presigned one."""
    scheme, _, rest = url.partition("://")
    scheme = OTHER_NAMES.get(scheme.lower(), scheme.lower())
    login, _, host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    # A password with a / in it looks like a host whose port is no number.
    is_odd = scheme in WITH_PORTS and not re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    if is_odd or ":" in login or (login and scheme not in NAMED_LOGINS):
        raise UsageError(
            f"the address {scheme}://{'' if is_odd else printable(host) + '/'}... has a login in it, or a port that is "
            "no number. A login would end up in the index; take it out, and put it where "
            f"{scheme}:// looks for it (docs/stores.md)"
        )
    query = "".join(re.split(r"[?#]", rest, maxsplit=1)[1:])
    parameters = (parameter.partition("=") for parameter in re.split(r"[&;?#]", query))
    if any(value and unquote_plus(name).lower() in SECRET_PARAMETERS for name, _, value in parameters):
        raise UsageError(
            f"the address {scheme}://{printable(host)}/... is signed for a while, or has a token in it; "
            "neither belongs into an index. Give the place itself (s3://, gs://, az://) with credentials in their "
            "usual place"
        )
    return f"{scheme}://{rest}"
