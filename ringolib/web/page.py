"""The live page, `dashboard.html`, and the headers it is served with.

The file lies beside the modules, wherever they are: in a checkout, in site-packages or in a zipapp. It is
read once, when it is first asked for. Its script and its style are admitted by their hashes, so that nothing
else runs on it, whatever gets into it.
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
    """The page's bytes, and its headers, `ETag` among them."""

    content: bytes
    headers: dict[str, str]


def page() -> Page | None:
    """The page; None when it cannot be read."""
    try:
        return _read()
    except OSError as error:
        log.warning("dashboard_missing", {"reason": f"{FILE} cannot be read from beside the modules: {error}"})
        return None


@functools.cache
def _read() -> Page:
    """The page, read once. Raises OSError, and then it is tried again."""
    content = pkgutil.get_data(__name__, FILE)
    if content is None:
        raise FileNotFoundError("the modules' loader cannot read files")
    headers = {
        "Content-Security-Policy": policy(content),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return Page(content, headers)


def policy(content: bytes) -> str:
    """The Content-Security-Policy that admits the file's own blocks and this server, and nothing else."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(content, b'script')}",
            f"style-src {_hashes(content, b'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hashes(content: bytes, tag: bytes) -> str:
    blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), content, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks)
