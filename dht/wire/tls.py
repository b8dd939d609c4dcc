"""TLS of the links: a certificate of this start, a context for each end, and what binds a handshake to its channel.

Each daemon draws a key (ECDSA P-256, which every build of OpenSSL has, FIPS ones too) and signs a certificate for it
itself, at its start and in memory only: there is no authority, no file, and nothing that expires. TLS alone therefore
says nothing of who the other end is. That is proven by `dht.wire.handshake`, over the channel's binding: the SHA-256
fingerprint of the listener's certificate, as each end knows it (the listener has it, the dialer was shown it; RFC 5929
calls that tls-server-end-point; Python's ssl offers no exporter).

Why that suffices. In TLS 1.3 the listener signs the key exchange of each connection with its certificate's key, so who
was shown fingerprint F speaks with a holder of F's key, which has never left its process. The dialer's Proof says that
it was shown F, and names the listener's nonce; the listener accepts it for its own F only, and sends a nonce once, on
one connection. So the nonce was read on a channel that ends in this very process: on this one. The listener's Proof
says the same to the dialer. A man in the middle has a certificate of his own, without whose key he could not end TLS:
the two ends name two fingerprints, and neither Proof can be made to fit.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dht.errors import RemoteProtocolError, Unavailable

_NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lucd link")])
_VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_VALID_TO = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)
"""Nobody looks at the dates, so no clock matters."""


class LinkTls:
    """One start's certificate. Raises Unavailable where this host does not let it be made."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _self_signed(key)
        self.fingerprint = fingerprint_of(certificate.public_bytes(serialization.Encoding.DER))
        self.listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load(self.listening, key, certificate)
        # No link is resumed: a session ticket would cost two messages at each, and a key that outlives the handshake.
        self.listening.num_tickets = 0
        self.dialing = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.dialing.check_hostname = False
        self.dialing.verify_mode = ssl.CERT_NONE
        for context in (self.listening, self.dialing):
            context.minimum_version = ssl.TLSVersion.TLSv1_3

    def binding(self, channel: ssl.SSLObject | None, *, dialed: bool) -> bytes:
        """What both ends' proofs have to name of this channel. Raises RemoteProtocolError if it has no TLS."""
        shown = None if channel is None else channel.getpeercert(binary_form=True)
        if channel is None or (dialed and shown is None):
            raise RemoteProtocolError("the connection came to the handshake without TLS", reason="channel")
        return fingerprint_of(shown) if dialed and shown is not None else self.fingerprint


def fingerprint_of(certificate: bytes) -> bytes:
    """Of a certificate in DER."""
    return hashlib.sha256(certificate).digest()


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    builder = x509.CertificateBuilder(_NAME, _NAME, key.public_key(), x509.random_serial_number())
    return builder.not_valid_before(_VALID_FROM).not_valid_after(_VALID_TO).sign(key, hashes.SHA256())


def _load(context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Python's ssl takes a key from a file only; this one is in memory, and gone when it was read."""
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem)
    try:
        with open(os.memfd_create("lucd-link", os.MFD_CLOEXEC), "wb") as file:
            file.write(text)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    except OSError as error:
        what = f"cannot hand the links' key to OpenSSL: {error}"
        raise Unavailable(f"{what}; that takes memfd_create and /proc, let the service have both") from None
