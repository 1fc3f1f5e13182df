"""The live page, `dashboard.html`, and the headers that it is served with.

The file is in this package, which may be in a checkout, in site-packages or in a zipapp. It is read once, on the first
request. The Content-Security-Policy allows the page's script and style by their hashes, so a browser runs nothing else
on it. Any thread may call `load_page`.
"""

import base64
import functools
import hashlib
import logging
import pkgutil
import re
from typing import NamedTuple

log = logging.getLogger("ringoexp.http")

FILE = "dashboard.html"
HTML = "text/html; charset=utf-8"


class Page(NamedTuple):
    """The page's bytes and its headers, `ETag` among them."""

    content: bytes
    headers: dict[str, str]


def load_page() -> Page | None:
    """Return the page, or None if its file cannot be read. The next call tries again."""
    try:
        return _read()
    except OSError as error:
        log.warning("dashboard_missing", {"reason": f"{FILE} cannot be read from the package: {error}"})
        return None


@functools.cache
def _read() -> Page:
    """Read the page. Raises OSError, which is not cached."""
    content = pkgutil.get_data(__name__, FILE)
    if content is None:
        raise FileNotFoundError("the modules' loader cannot read files")
    headers = {
        "Content-Security-Policy": content_security_policy(content),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return Page(content, headers)


def content_security_policy(content: bytes) -> str:
    """Return the Content-Security-Policy that allows the page's own blocks and requests to this server only."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_block_hashes(content, b'script')}",
            f"style-src {_block_hashes(content, b'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _block_hashes(content: bytes, tag: bytes) -> str:
    blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks)
