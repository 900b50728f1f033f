"""Certificates of a test's own, for a router that serves HTTPS, and a client that loses no time with it."""

import asyncio
import contextlib
import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.programs import PATIENCE_S


def self_signed(folder: Path, name: str, algorithm: BestAvailableEncryption | NoEncryption) -> tuple[Path, Path]:
    """PEM files of a new key and of a certificate for it: certificate, key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router.example")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    cert_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    cert_path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, algorithm))
    return cert_path, key_path


async def ask_at_once(port: int, trust: ssl.SSLContext, request: bytes) -> bytes:
    """All that is answered to `request`, which leaves in one piece with the last word of the client's handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    secure = trust.wrap_bio(incoming, outgoing)
    answer = bytearray()

    def go_on(shaken: bool) -> bool:
        if not shaken:
            secure.do_handshake()
            secure.write(request)
        while piece := secure.read(65_536):
            answer.extend(piece)
        return True

    async def exchange() -> bytes:
        shaken = False
        while True:
            try:
                if go_on(shaken):
                    return bytes(answer)
            except ssl.SSLWantReadError:
                shaken = secure.version() is not None
            except ssl.SSLZeroReturnError:
                return bytes(answer)
            writer.write(outgoing.read())
            came = await reader.read(65_536)
            incoming.write(came) if came else incoming.write_eof()

    with contextlib.closing(writer):
        async with asyncio.timeout(PATIENCE_S):
            return await exchange()
