"""Bytes from http and https URLs, never from addresses that are not public. Knows no images."""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urljoin, urlsplit

import httpcore

from ..errors import MediaError, MediaRefused
from .limits import BYTE_LIMITS, Deadline, Limits

PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = [
    ("User-Agent", "llava-interleave"),
    ("Accept", "image/*,video/*"),
    ("Accept-Encoding", "identity"),
]
IN_MEMORY = 32_000_000
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_.])?")
NUMERIC_END = re.compile(r"(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$")
NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relays
        "::/96",  # IPv4-compatible
        "::ffff:0:0/96",  # IPv4-mapped
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # NAT64, local use
        "2001::/32",  # Teredo
        "2002::/16",  # 6to4
        "fec0::/10",  # site-local
    )
)
"""Ranges refused in addition to those that `ipaddress` calls not global: IPv4 in disguise."""


@dataclass(frozen=True, slots=True)
class Address:
    """A URL after the one and only time it is parsed: what is checked here is what is dialled."""

    text: str
    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises MediaRefused for anything but a plain http or https URL."""
        text = quote(url, safe="".join(map(chr, range(33, 127))) + " \t\r\n\x00\x7f")
        if any(ord(c) <= 32 or c in "\\\x7f" for c in text):
            raise MediaRefused("the URL holds a space, a backslash or a control character")
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname or ""
            if ":" in host:
                host = str(ipaddress.IPv6Address(host.replace("%", "?")))  # no zones
            elif NUMERIC_END.search(host):
                host = str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise MediaRefused(
                "the URL's address or port is not written in the one plain way"
            ) from error
        if parts.scheme not in PORTS:
            raise MediaRefused("only http and https URLs are fetched")
        if "@" in parts.netloc:
            raise MediaRefused("the URL holds a user name or password")
        if ":" not in host and not HOST.fullmatch(host):
            raise MediaRefused(
                "the URL's host name is not plain ASCII (write international names in punycode)"
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(text, parts.scheme, host, PORTS[parts.scheme] if port is None else port, target)

    def redirected(self, location: str) -> Address:
        """Where a redirect leads.

        Raises MediaRefused for a step from https down to http, or to another port.
        """
        to = Address.parse(urljoin(self.text, location))
        upgrade = (self.scheme, self.port, to.scheme, to.port) == ("http", 80, "https", 443)
        if not upgrade and (to.scheme, to.port) != (self.scheme, self.port):
            raise MediaRefused("the server redirects to another scheme or port")
        return to

    def check(self, hosts: tuple[str, ...] | None) -> None:
        """Raises MediaRefused unless one of `hosts` (see `Limits.remote_hosts`) allows it."""
        if hosts is not None and not any(self._under(pattern) for pattern in hosts):
            raise MediaRefused(
                f"media may not be fetched from {self.host}:{self.port} here; send the file itself"
            )

    def _under(self, pattern: str) -> bool:
        name, _, port = pattern.lower().partition(":")
        host = self.host.rstrip(".")
        known = name == "*" or host == name or (name.startswith("*.") and host.endswith(name[1:]))
        return known and self.port == (int(port) if port else PORTS[self.scheme])


def fetch(url: str, max_bytes: int, limits: Limits) -> BinaryIO:
    """Download at most `max_bytes` into a temporary file, at its start.

    Raises MediaRefused or MediaError.
    """
    address = Address.parse(url)
    deadline = Deadline(limits.download_seconds, "the download", "download_seconds")
    backend = CheckedBackend(limits.allow_private, deadline)
    try:
        for _ in range(limits.redirects + 1):
            address.check(limits.remote_hosts)
            answer = _get(address, backend, max_bytes)
            if not isinstance(answer, str):
                return answer
            address = address.redirected(answer)
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
        raise MediaError("the server cannot be reached, or broke off") from error
    raise MediaError(f"the server redirects more than {limits.redirects} times (Limits.redirects)")


def _get(address: Address, backend: httpcore.NetworkBackend, max_bytes: int) -> BinaryIO | str:
    """The body, or where a redirect leads."""
    url = httpcore.URL(
        scheme=address.scheme.encode(),
        host=address.host.encode(),
        port=address.port,
        target=address.target.encode(),
    )
    with (
        httpcore.ConnectionPool(network_backend=backend, max_connections=1) as pool,
        pool.stream("GET", url, headers=HEADERS) as response,
    ):
        fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if response.status in REDIRECTS and b"location" in fields:
            return fields[b"location"]
        if response.status != 200:
            raise MediaError(f"the server answered with status {response.status}")
        if fields.get(b"content-encoding", "identity") != "identity":
            raise MediaError("the server sent a compressed body although the request accepts none")
        length = fields.get(b"content-length", "0")
        if length.isdigit() and int(length) > max_bytes:
            raise MediaError(
                f"{int(length):,} bytes are more than the limit of {max_bytes:,} bytes "
                f"({BYTE_LIMITS})"
            )
        body = cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY))  # noqa: SIM115  the caller closes it
        size = 0
        for chunk in response.iter_stream():
            size += len(chunk)
            if size > max_bytes:
                body.close()
                raise MediaError(
                    f"the download is more than the limit of {max_bytes:,} bytes ({BYTE_LIMITS})"
                )
            body.write(chunk)
        body.seek(0)
        return body


class CheckedBackend(httpcore.NetworkBackend):
    """Resolves a name once, checks that all its addresses are public, and dials those."""

    def __init__(self, allow_private: bool, deadline: Deadline) -> None:
        self._allow_private = allow_private
        self._deadline = deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = resolve(host, port, self._deadline)
        if not self._allow_private and not all(is_public(a) for a in addresses):
            raise MediaRefused("the URL leads to an address that is not public")
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                stream = httpcore.SyncBackend().connect_tcp(
                    address, port, self._deadline.left(), local_address, socket_options
                )
                return TimedStream(stream, self._deadline)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class TimedStream(httpcore.NetworkStream):
    """A connection whose reads and writes end with the download's deadline, against slow drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        return TimedStream(
            self._stream.start_tls(ssl_context, server_hostname, self._deadline.left()),
            self._deadline,
        )

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def resolve(host: str, port: int, deadline: Deadline) -> list[str]:
    """All addresses of a name. The resolver has no time limit, so it gets a thread of its own."""
    addresses: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            addresses.extend(
                str(entry[4][0])
                for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline.left())
    deadline.left()
    if not addresses:
        raise MediaError("the URL's host name is not known")
    return list(dict.fromkeys(addresses))


def is_public(address: str) -> bool:
    """Whether an address lies in the public internet, in no disguise."""
    ip = ipaddress.ip_address(address)
    return (
        ip.is_global
        and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)
        and not any(ip in network for network in NOT_PUBLIC if network.version == ip.version)
    )
