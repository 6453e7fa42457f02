"""The certificate of the console where none is configured: signed by itself, so that a browser asks once."""

import contextlib
import datetime
import ipaddress
import socket
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mirrorfs.errors import MirrorfsError
from mirrorfs.files import write_durably

_DAYS: Final = 397  # browsers take no longer ones
_RENEW_DAYS: Final = 60


def own_certificate(file: Path, address: str) -> Path:
    """`file` with a key and a certificate (PEM, mode 0600) for this machine's names and `address`, made anew if it ends soon or
    is for other names. Raises MirrorfsError if it cannot be made."""
    names = _names(address)
    now = datetime.datetime.now(datetime.UTC)
    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        found = x509.load_pem_x509_certificate(file.read_bytes())
        theirs = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if set(theirs) == set(names) and (found.not_valid_after_utc - now).days > _RENEW_DAYS:
            return file
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"mirrorfs console on {socket.gethostname()}"[:64])])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS - 2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(file, content, 0o600)
    except OSError as error:
        raise MirrorfsError(f"{file}: the certificate of the console cannot be made ({error.strerror})") from None
    return file


def _names(address: str) -> list[x509.GeneralName]:
    host = socket.gethostname()
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    if host.isascii() and host != "localhost":
        names.append(x509.DNSName(host))
    literal = ipaddress.ip_address(address)
    if not literal.is_unspecified and x509.IPAddress(literal) not in names:
        names.append(x509.IPAddress(literal))
    return names
