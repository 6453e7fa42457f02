"""Who this node is and whom it trusts: its keys and certificates, and TLS contexts made of them.

A node has an *identity*: a key that never leaves it, and a certificate that it has signed with it itself. The other node
keeps that certificate (`peer.pem`) and trusts nothing else: no authority, no name. With its identity a node signs certificates
for the link, each with a key of its own and good for `LINK_DAYS`, and makes the next one when a third of that has passed:
nobody has to be told.

    identity.key   0600
    identity.pem
    link.pem       0600: the key and the certificate of the link
    peer.pem       the identity of the other node
"""

import contextlib
import datetime
import logging
import ssl
import stat
import threading
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mirrorfs.errors import ConfigError, MirrorfsError
from mirrorfs.files import Version, version, write_durably

log = logging.getLogger(__name__)

LINK_DAYS: Final = 90
#: From so few days on before the end of a certificate it is told: its renewal has failed for long.
WARN_DAYS: Final = 30
_IDENTITY_DAYS: Final = 40 * 365
_SLACK: Final = datetime.timedelta(days=2)  # clocks differ, and one that is behind must not keep a pair apart
_OWNER_ONLY: Final = 0o600
#: TLS 1.3 has no suite without encryption. This one keeps the authentication of every record.
_CLEAR_SUITE: Final = "ECDHE-ECDSA-NULL-SHA:@SECLEVEL=0"


class Trust:
    """The keys of one node in its `trust` directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._renewing = threading.Lock()  # a connection and the daily look may come together
        #: Made of files that may be replaced. Strangers who knock have nothing made for each of them.
        self._made: dict[tuple[bool, bool], tuple[Version, ssl.SSLContext]] = {}

    @property
    def identity(self) -> Path:
        """The certificate that the other node keeps."""
        return self.directory / "identity.pem"

    @property
    def peer(self) -> Path:
        """The identity of the other node."""
        return self.directory / "peer.pem"

    @property
    def shared_key_files(self) -> tuple[Path, Path]:
        """What shared keys are made of."""
        return self._key, self.peer

    @property
    def _key(self) -> Path:
        return self.directory / "identity.key"

    @property
    def _link(self) -> Path:
        return self.directory / "link.pem"

    # ---- making

    def make(self, node: str) -> None:
        """Make this node's identity, unless it has one; MirrorfsError if that cannot be."""
        if self.identity.exists():
            return
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(node)
        certificate = (
            _builder(name, name, key.public_key(), _IDENTITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(self._key, _private(key), _OWNER_ONLY)
            write_durably(self.identity, _public(certificate), 0o644)  # last: what counts is there with all that it needs
        except OSError as error:
            raise MirrorfsError(f"{self.directory}: keys cannot be made ({error.strerror}), are you root?") from None

    def pin(self, certificate: bytes) -> None:
        """Trust the node with this identity (PEM), and no other; MirrorfsError if it is none."""
        try:
            found = x509.load_pem_x509_certificate(certificate)
            found.verify_directly_issued_by(found)
            if not isinstance(found.public_key(), ec.EllipticCurvePublicKey):
                raise ValueError("its key is of another kind")
        except Exception as error:
            raise MirrorfsError(f"this is no identity of a node: {error}") from None
        write_durably(self.peer, _public(found), 0o644)

    def renew(self, *, now: datetime.datetime | None = None) -> bool:
        """Make a new certificate for the link if there is none or a third of its time has passed; False if not.

        Raises MirrorfsError if it cannot be made.
        """
        try:
            with self._renewing:
                return self._renew(now or datetime.datetime.now(datetime.UTC))
        except (OSError, ValueError) as error:
            raise MirrorfsError(f"{self._link}: cannot be made ({error})") from None

    def _renew(self, now: datetime.datetime) -> bool:
        with contextlib.suppress(OSError, ValueError):
            if (self.link_until() - now).days >= LINK_DAYS * 2 // 3:
                return False
        issuer = self._certificate(self.identity)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name("link"), issuer.subject, key.public_key(), LINK_DAYS, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            )
            .sign(self._identity_key(), hashes.SHA256())
        )
        write_durably(self._link, _private(key) + _public(certificate), _OWNER_ONLY)
        return True

    # ---- using

    def check(self) -> None:
        """ConfigError, with what to do, unless this node can prove who it is and knows whom it trusts."""
        for path, what in ((self.identity, "no identity of this node"), (self.peer, "no identity of the other node")):
            if not path.exists():
                raise ConfigError(
                    f"{path}: there is {what}: let the nodes know each other, with `mirrorfs init` on one "
                    "and `mirrorfs join` on the other"
                )
        self._identity_key()

    def context(self, *, server_side: bool, encrypted: bool = True) -> ssl.SSLContext:
        """What both ends of a link use: TLS 1.3, certificates asked of both. Raises MirrorfsError if the keys will not do."""
        try:
            self.renew()
        except MirrorfsError:
            if not self._link.exists():
                raise
            # The present one may be good for weeks: `Daemon` tells what is wrong.
        files = version(self._link, self.peer)  # first: what is replaced in between is looked at again
        known = self._made.get((server_side, encrypted))
        if known is not None and known[0] == files:
            return known[1]
        try:
            made = self._context(server_side=server_side, encrypted=encrypted)
        except OSError as error:  # ssl.SSLError is one
            raise MirrorfsError(f"the keys in {self.directory} cannot be used: {error}") from None
        self._made[server_side, encrypted] = files, made
        return made

    def _context(self, *, server_side: bool, encrypted: bool) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the identity is the name
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._link)
        context.load_verify_locations(self.peer)
        if encrypted:
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            if server_side:
                context.num_tickets = 0  # a link is not resumed
        else:
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(_CLEAR_SUITE)
        return context

    def introducing(self) -> ssl.SSLContext:
        """For a node that waits to be joined: it shows its identity itself, and asks for none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(self.identity, self._key)
        return context

    def shared_key(self, purpose: str) -> bytes:
        """32 bytes that only this node and the other one can know; ConfigError if they do not know each other yet."""
        self.check()
        public = self._certificate(self.peer).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        secret = self._identity_key().exchange(ec.ECDH(), public)
        return HKDF(hashes.SHA256(), 32, salt=None, info=f"mirrorfs {purpose}".encode()).derive(secret)

    def link_until(self) -> datetime.datetime:
        """When the certificate of the link ends. Raises OSError or ValueError if there is none."""
        return self._certificate(self._link).not_valid_after_utc

    def peer_fingerprint(self) -> str:
        """The SHA-256 of the other node's identity, in hexadecimal."""
        return fingerprint(self.peer.read_bytes())

    def warning(self, *, now: datetime.datetime | None = None) -> str:
        """What ends soon, empty if nothing does."""
        now = now or datetime.datetime.now(datetime.UTC)
        for path in (self._link, self.identity, self.peer):
            try:
                left = (self._certificate(path).not_valid_after_utc - now).days
            except (OSError, ValueError) as error:
                return f"{path}: cannot be read ({error})"
            if left < WARN_DAYS:
                return f"{path}: the certificate ends in {max(left, 0)} days"
        return ""

    def _certificate(self, path: Path) -> x509.Certificate:
        return x509.load_pem_x509_certificate(path.read_bytes())

    def _identity_key(self) -> ec.EllipticCurvePrivateKey:
        try:
            status = self._key.stat()
            content = self._key.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self._key}: the key of this node cannot be read ({error.strerror}), are you root?") from None
        if (mode := stat.S_IMODE(status.st_mode)) & ~_OWNER_ONLY:
            raise ConfigError(f"{self._key}: the mode {mode:04o} lets others read the key, make it 0600: chmod 600 {self._key}")
        try:
            key = serialization.load_pem_private_key(content, None)
        except ValueError:
            raise ConfigError(f"{self._key}: is no key: remove {self.directory} and join the nodes again") from None
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate (PEM) in hexadecimal."""
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def _name(node: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mirrorfs"), x509.NameAttribute(NameOID.COMMON_NAME, node)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: datetime.datetime | None = None
) -> x509.CertificateBuilder:
    now = now or datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _public(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
