"""The file of API keys: their names and weights, read again on SIGHUP."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError
from .api_errors import log

MIN_KEY_LENGTH = 16
MIN_WEIGHT, MAX_WEIGHT = 0.01, 100.0
NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Client:
    """Whom a key belongs to. Keys of one name are one client: its caches, files and shares.

    weight: its part of the engine next to other clients.
    """

    name: str
    weight: float = 1.0


class ApiKeys:
    """Hashes of the API keys with their clients, from lines of `KEY [NAME] [weight=N]`.

    A key without a name is called by a prefix of its hash. Empty lines and comments (#) are
    skipped.
    """

    def __init__(self, lines: list[str], path: Path | None = None) -> None:
        self.path = path
        self._clients = _parse(lines)

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a file. Raises OptionError, and warns of one that other users can read."""
        try:
            lines = path.read_text("utf-8").splitlines()
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise OptionError(f"cannot read the API keys in {path}: {error}") from error
        if os.name == "posix" and mode & 0o077:
            log.warning(
                "%s has mode %o, so that other users can use its API keys: chmod 600 %s",
                path,
                mode & 0o777,
                path,
            )
        return cls(lines, path)

    def reload(self) -> None:
        """Read the file again. Raises OptionError, and the keys stay what they were."""
        assert self.path is not None
        self._clients = ApiKeys.read(self.path)._clients

    @property
    def names(self) -> set[str]:
        """Of the clients."""
        return {client.name for client in self._clients.values()}

    def client(self, authorization: str) -> Client | None:
        """The client of an Authorization header, None if unknown. Constant time."""
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [known for known in self._clients if hmac.compare_digest(known, digest)]
        return self._clients[matches[0]] if matches and scheme.lower() == "bearer" else None


def _parse(lines: list[str]) -> dict[bytes, Client]:
    clients: dict[bytes, Client] = {}
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        key, *words = line.split() or ["#"]
        if key.startswith("#"):
            continue
        if len(key) < MIN_KEY_LENGTH or not key.isascii():
            raise OptionError(
                f"line {number}: an API key has {len(key)} characters; it needs {MIN_KEY_LENGTH} "
                "of ASCII"
            )
        digest = hashlib.sha256(key.encode()).digest()
        if digest in clients:
            raise OptionError(f"line {number}: this API key is there twice")
        clients[digest] = client = _client(digest.hex()[:16], words, number)
        if weights.setdefault(client.name, client.weight) != client.weight:
            raise OptionError(f"line {number}: {client.name} has two weights")
    if not clients:
        raise OptionError(
            "the file of API keys has none: write one a line, "
            "for example the output of `openssl rand -hex 24`"
        )
    return clients


def _client(name: str, words: list[str], number: int) -> Client:
    if words and not words[0].startswith("weight="):
        name = words.pop(0)
    if not NAME.fullmatch(name) or len(words) > 1 or (words and not words[0].startswith("weight=")):
        raise OptionError(
            f"line {number}: after the API key comes a name (letters, digits, ._@-) and weight=N"
        )
    try:
        weight = float(words[0].removeprefix("weight=")) if words else 1.0
    except ValueError:
        weight = 0.0
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise OptionError(
            f"line {number}: a weight is a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return Client(name, weight)
