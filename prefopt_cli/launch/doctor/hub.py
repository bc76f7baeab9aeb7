"""Whether the hub answers, as what, and through what."""

import os
import time
from collections.abc import Iterator
from importlib import metadata

import httpx2
from huggingface_hub import constants, get_token

from prefopt_cli.launch.doctor.finding import Finding, in_brief, note, ok, problem

PATIENCE = 5.0
"""Seconds for the hub to answer."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
PORTS = 65536
SCHEMES, PROXY_SCHEMES = ("http", "https"), ("http", "https", "socks5", "socks5h")
OFFLINE_REMEDY = "download on a machine with access: hf download MODEL; then set HF_HUB_OFFLINE=1"
UNREACHABLE = (
    "check the network and proxies (export HTTPS_PROXY=http://...), name a mirror (export HF_ENDPOINT=https://...), "
    "or use local paths and export HF_HUB_OFFLINE=1"
)


def hub() -> Iterator[Finding]:
    """Reachability, token, proxies; neither tokens nor passwords are ever printed."""
    yield from _proxies()
    wrong = list(faults())
    if constants.is_offline_mode():
        yield note(
            "HF_HUB_OFFLINE is set: only models and data in the cache or on disk can be used",
            "unset HF_HUB_OFFLINE",
            feature="hub",
        )
        return
    if wrong:
        yield from wrong
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
    scheme, mark, rest = constants.ENDPOINT.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2].partition('?')[0]}"


def faults() -> Iterator[Finding]:
    """Variables that no request can be made with. What is in them is not shown: a password may be."""
    if not _is_address(constants.ENDPOINT, SCHEMES):
        yield problem(
            "HF_ENDPOINT is no address of a hub (https://HOST)",
            "export HF_ENDPOINT=https://..., or unset HF_ENDPOINT",
            feature="hub",
        )
    for name, value in _set_proxies():
        if (wrong := _fault_of(name, value)) is not None:
            yield wrong


def _fault_of(name: str, value: str) -> Finding | None:
    remedy = f"export {name}=http://HOST:PORT, or unset {name}"
    if not _is_address(_with_scheme(value), PROXY_SCHEMES):
        schemes = ", ".join(PROXY_SCHEMES)
        text = f"{name} is no address of a proxy (SCHEME://HOST:PORT, with one of {schemes})"
        return problem(text, remedy, feature="hub")
    if value.lower().startswith("socks") and not _installed("socksio"):
        text = f"{name} names a SOCKS proxy, for which a package is not installed"
        return problem(text, f"pip install socksio, or {remedy}", feature="hub")
    return None


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        found = httpx2.URL(text)
    except (httpx2.InvalidURL, ValueError, UnicodeError):
        return False
    host_is_one = bool(found.host) and not any(each.isspace() for each in found.host)
    return found.scheme in schemes and host_is_one and (found.port or 1) < PORTS


def _with_scheme(proxy: str) -> str:
    """As the client reads it: HOST:PORT alone is an HTTP proxy."""
    return proxy if "://" in proxy else f"http://{proxy}"


def ask(path: str, token: str | None, method: str = "GET") -> tuple[int | None, float, str]:
    """(HTTP status, seconds, why there is none) of one request to the hub."""
    for wrong in faults():
        return None, 0.0, wrong.text
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    begin = time.monotonic()
    try:
        with httpx2.Client(timeout=PATIENCE, headers=headers) as client:
            status = client.request(method, constants.ENDPOINT + path).status_code
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError) as error:
        return None, time.monotonic() - begin, _without_secrets(error, token)
    return status, time.monotonic() - begin, ""


def _proxies() -> Iterator[Finding]:
    for name, value in _set_proxies():
        if _fault_of(name, value) is None:
            host = httpx2.URL(_with_scheme(value)).host
            yield ok(f"{name} is set: requests go through {host}")


def _set_proxies() -> Iterator[tuple[str, str]]:
    """Names and values; where a name is set in both cases, the client takes the lower one."""
    for name in PROXIES:
        for each in (name.lower(), name):
            if value := os.environ.get(each):
                yield each, value
                break


def _without_secrets(error: Exception, token: str | None) -> str:
    """What a client says, without what it may have quoted; cut only then, or a part of a secret might stay."""
    text = in_brief(error, 10_000)
    addresses = [constants.ENDPOINT, *(value for _, value in _set_proxies())]
    logins = [each.rpartition("@")[0].rpartition("://")[2] for each in addresses]
    for secret in filter(None, (token, *logins, *(each.partition(":")[2] for each in logins))):
        text = text.replace(secret, "***")
    return text[:120]
