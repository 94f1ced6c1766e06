"""Direct access to addresses of this machine, bypassing the proxy of the environment."""

from __future__ import annotations

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

HOSTS = ("localhost", "127.0.0.1", "::1")


def is_loopback(url: str) -> bool:
    """Return whether an address is on this machine."""
    host = urlsplit(url if "://" in url else f"//{url}").hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def bypass_proxies(url: str) -> None:
    """Let this process and its children reach a service of this machine directly; do nothing for other hosts.

    It adds to `NO_PROXY`, the only setting that requests (and so MLflow), urllib, Ray and their child processes share.
    """
    if not is_loopback(url):
        return
    hosts = dict.fromkeys([*HOSTS, urlsplit(url if "://" in url else f"//{url}").hostname or "localhost"])
    # The lower-case name takes precedence.
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    known = [host.strip() for host in before.split(",") if host.strip()]
    if "*" not in known:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*known, *hosts]))
