"""Whether the hub answers, as what, and through what."""

import os
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, get_token

from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, ok

PATIENCE = 5.0
"""Seconds for the hub to answer."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
OFFLINE_REMEDY = "download on a machine with access: hf download MODEL; then set HF_HUB_OFFLINE=1"
UNREACHABLE = (
    "check the network and proxies (export HTTPS_PROXY=http://...), name a mirror (export HF_ENDPOINT=https://...), "
    "or use local paths and export HF_HUB_OFFLINE=1"
)


def hub() -> Iterator[Finding]:
    """Reachability, token, proxies; neither tokens nor passwords are ever printed."""
    yield from _proxies()
    if constants.is_offline_mode():
        yield note(
            "HF_HUB_OFFLINE is set: only models and data in the cache or on disk can be used",
            "unset HF_HUB_OFFLINE",
            feature="hub",
        )
        return
    token = get_token()
    status, seconds, trouble = ask("/api/whoami-v2", token)
    if status is None:
        yield note(f"{endpoint()} does not answer ({trouble})", UNREACHABLE, feature="hub")
        return
    yield ok(f"{endpoint()} answers ({1000 * seconds:.0f} ms)", feature="hub")
    if token is None:
        yield ok("no token: enough for public models and data; `hf auth login` for others")
    elif status in (401, 403):
        yield note(
            "there is a token, and the hub refuses it: downloads may fail, of public models too",
            "hf auth login, or unset HF_TOKEN",
            feature="hub",
        )
    else:
        yield ok("there is a token, and the hub takes it" if status == 200 else "there is a token")


def endpoint() -> str:
    """Where the hub is, without what might be secret in the address."""
    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def ask(path: str, token: str | None, method: str = "GET") -> tuple[int | None, float, str]:
    """(HTTP status, seconds, why there is none) of one request to the hub."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    begin = time.monotonic()
    try:
        with httpx2.Client(timeout=PATIENCE, headers=headers) as client:
            status = client.request(method, constants.ENDPOINT + path).status_code
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        return None, time.monotonic() - begin, in_brief(error, 120)
    return status, time.monotonic() - begin, ""


def _proxies() -> Iterator[Finding]:
    for name in PROXIES:
        if value := os.environ.get(name) or os.environ.get(name.lower()):
            parts = urlsplit(value)
            yield ok(f"{name} is set: requests go through {parts.hostname or 'it'}")
