"""The question to a server why it stores nothing at present: `GET /v1.0/ready`."""

import json
from typing import TYPE_CHECKING

from ringolib.client.url import Target
from ringolib.net.addresses import Endpoint
from ringolib.net.http_client import HTTPError, get
from ringolib.timing import deadline_after
from ringolib.wire import INGEST_PATH, READY_PATH

if TYPE_CHECKING:
    import ssl

ANSWER_TIMEOUT_SECONDS = 5.0
"""How long the server may take. It asks its own database or consumer, which may take 2 s."""


def ask_why_not_ready(target: Target, token: str | None, context: "ssl.SSLContext | None") -> str:
    """Return why the server is not ready, or that it does not answer in time; "" if it is ready, or cannot be asked.

    A proxy may serve it under a longer path: both requests have the same prefix.
    """
    prefix, found, rest = target.path.rpartition(INGEST_PATH)
    if not found or rest:
        return ""
    endpoint = Endpoint(target.host, target.port, target.host)
    deadline = deadline_after(ANSWER_TIMEOUT_SECONDS)
    try:
        _, body = get(endpoint, context, token, prefix + READY_PATH, deadline, accept="application/json")
        reasons = json.loads(body)["reasons"]
        return "; ".join(f"{reason['code'].replace('_', ' ')}: {reason['detail']}" for reason in reasons)
    except TimeoutError:
        return "the server does not answer"
    except (OSError, HTTPError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
