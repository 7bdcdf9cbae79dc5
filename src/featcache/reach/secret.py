"""The cluster key, the addresses of hosts, and the TLS contexts: what a user says of a cluster."""

import logging
import os
import re
import ssl
import stat
from os import PathLike
from pathlib import Path
from typing import Final, NamedTuple

from featcache.errors import SettingsError, explain
from featcache.ref import MAX_ADDRESS_BYTES
from featcache.settings import Settings

KEY_VARIABLE: Final = "FEATCACHE_CLUSTER_KEY"
SHORT_KEY_BYTES: Final = 16
MAX_KEY_BYTES: Final = 4096
_log: Final = logging.getLogger("featcache")
WILDCARDS: Final = frozenset(("0.0.0.0", "::"))  # noqa: S104 - compared with, not bound to
_MAX_PORT: Final = 65535
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]+")


class Address(NamedTuple):
    """A TCP address; its text is ``host:port``, with an IPv6 host in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return it as a ref carries it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_address(text: object, name: str = "listen") -> Address:
    """Return the address that a text such as ``"10.0.0.7:7400"`` or ``"[fd00::7]:7400"`` means.

    Raises:
        SettingsError: it is none, or longer than a ref can carry.

    """
    wanted = f"{name}={text!r} is not HOST:PORT"
    if not isinstance(text, str):
        raise SettingsError(wanted)
    host, colon, port_text = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not _HOST.fullmatch(host) or (":" in host) is not bracketed:
        raise SettingsError(f"{wanted} (an IPv6 host is written in brackets)")
    if not port_text.isascii() or not port_text.isdigit() or int(port_text[:6]) > _MAX_PORT:
        raise SettingsError(f"{wanted}: the port is a number up to {_MAX_PORT}")
    if len(text) > MAX_ADDRESS_BYTES:
        raise SettingsError(f"{name} is longer than {MAX_ADDRESS_BYTES} bytes")
    return Address(host, int(port_text))


def parse_key(value: object, where: str = "cluster_key") -> bytes:
    """Return the bytes of a key, of a file's if it is a path, without the whitespace around it.

    The key is never shown in an error.

    One that is shorter than 16 bytes is warned of: whoever hears a handshake could try all of them.

    Raises:
        SettingsError: it is empty, or neither a text nor bytes.

    """
    if isinstance(value, PathLike):
        return read_key(value)
    if isinstance(value, str):
        value = value.encode()
    if not isinstance(value, bytes):
        raise SettingsError(f"{where} is to be a str, bytes, or the path of a file")
    key = value.strip()
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise SettingsError(
            f"{where} has {len(key)} bytes: 1 to {MAX_KEY_BYTES} are possible, and random ones best, such "
            "as those of: openssl rand -hex 32"
        )
    if len(key) < SHORT_KEY_BYTES:
        _log.warning("%s has only %d bytes: make one with openssl rand -hex 32", where, len(key))
    return key


def read_key(path: str | PathLike[str]) -> bytes:
    """Return the key that a file has, a text or any bytes, or raise SettingsError.

    A file that all can read is warned of.
    """
    try:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                _log.warning("all users can read the cluster key in %s: chmod 600 %s", path, path)
            return parse_key(file.read(MAX_KEY_BYTES + 1), f"the key in {path}")
    except OSError as error:
        raise SettingsError(f"the cluster key can't be read: {explain(error)}") from error


def key_from_environment() -> bytes | None:
    """Return the key in ``FEATCACHE_CLUSTER_KEY``, or None if it is not set."""
    text = os.environ.get(KEY_VARIABLE)
    return parse_key(text, f"{KEY_VARIABLE} in the environment") if text else None


class TlsContexts(NamedTuple):
    """The contexts of a host's two sides; None without TLS."""

    listening: ssl.SSLContext | None = None
    dialing: ssl.SSLContext | None = None


def tls_contexts(settings: Settings) -> TlsContexts:
    """Return the contexts that ``tls_cert``, ``tls_key`` and ``tls_ca`` of the settings mean.

    With a `tls_ca` both sides show a certificate that it has signed; without, only the listener does, and
    the system's authorities are trusted.

    Raises:
        SettingsError: only some of them are given, or a file is not what it should be.

    """
    cert, key, authority = settings.tls_cert, settings.tls_key, settings.tls_ca
    if cert is None and key is None and authority is None:
        return TlsContexts()
    if cert is None or key is None:
        raise SettingsError("TLS between hosts needs both tls_cert and tls_key")
    try:
        listening = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
        dialing = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority)
        for context in (listening, dialing):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(cert, key)
        if authority is not None:
            listening.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"tls_cert, tls_key or tls_ca: {explain(error)}") from error
    return TlsContexts(listening, dialing)
