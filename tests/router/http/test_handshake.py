"""TLS at the port of clients: who is served, and who is not waited for."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Coroutine
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import NoEncryption

from tests.router.link.rig import CHAT_PATH, KEY, Rig, until
from tests.support.certificates import ask_at_once, self_signed
from tests.support.http_client import request_bytes
from tests.support.programs import PATIENCE_S
from xim_router import app
from xim_router.listening import tls_context

HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}", "connection": "close"}
BODY = b'{"model": "chat", "messages": []}'
REQUEST = request_bytes("POST", CHAT_PATH, HEADERS, BODY)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return self_signed(tmp_path_factory.mktemp("tls"), "one", NoEncryption())


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """The router's side."""
    return tls_context(*certificate)


@pytest.fixture
def trust(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    """A client's side."""
    context = ssl.create_default_context(cafile=str(certificate[0]))
    context.check_hostname = False
    return context


def ask(rig: Rig, trust: ssl.SSLContext) -> Coroutine[None, None, bytes]:
    """All of the answer to one request, which leaves together with the last word of the handshake."""
    return ask_at_once(rig.http_port, trust, REQUEST)


async def silent(rig: Rig, stack: contextlib.ExitStack) -> asyncio.StreamReader:
    """A connection that says nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
    stack.callback(lambda: writer.transport.abort())
    return reader


async def ended(reader: asyncio.StreamReader) -> None:
    """The connection's end, with whatever alert comes before it."""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(PATIENCE_S):
            await reader.read()


async def test_what_comes_with_the_end_of_the_handshake_is_not_lost(tls: ssl.SSLContext, trust: ssl.SSLContext) -> None:
    async with Rig("a", tls=tls) as rig, rig.agent("a", capacity=20):
        for answer in await asyncio.gather(*(ask(rig, trust) for _ in range(20))):
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(BODY)
        await until(lambda: not rig.connections)


async def test_a_connection_that_brings_no_handshake_is_closed_in_time(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HANDSHAKE_S", 0.2)
    async with Rig(tls=tls) as rig:
        with contextlib.ExitStack() as stack:
            await ended(await silent(rig, stack))


@pytest.mark.parametrize("sent", [REQUEST, b"\x16\x03\x01", b""], ids=["plain HTTP", "half a word", "nothing"])
async def test_who_does_not_speak_tls_leaves_nothing_and_is_no_news(
    tls: ssl.SSLContext, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    with caplog.at_level(logging.WARNING):
        async with Rig(tls=tls) as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.http_port)
            with contextlib.closing(writer):
                writer.write(sent)
                writer.write_eof()
                await ended(reader)
            assert not rig.connections
    assert not caplog.records
