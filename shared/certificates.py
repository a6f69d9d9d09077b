"""Keys and certificates as they lie in files: in which format, and how they are read back.

A *node key* (EC P-384) is what Flower's SuperNode authenticates with: private in OpenSSH's PEM, public as one OpenSSH line, because those are the
formats that `flower-supernode` and `flwr supernode register` read. A *signing key* (Ed25519, PKCS #8 PEM) signs what a site or the coordinator says.
The consortium's CA signs with ECDSA over P-384 and SHA-384.
"""

import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.errors import KitError
from shared.files import storage_errors, write_secret

CURVE = ec.SECP384R1
MAX_BYTES = 1_000_000  # of any file of a kit; what is larger is not one of ours


def new_node_key() -> ec.EllipticCurvePrivateKey:
    """A fresh EC P-384 key."""
    return ec.generate_private_key(CURVE())


def node_key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A node key's private file: OpenSSH PEM, not encrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())


def node_key_text(key: ec.EllipticCurvePublicKey) -> str:
    """A node key's public line, `ecdsa-sha2-nistp384 AAAA...`."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def parse_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """The key in the line that `node_key_text` wrote.

    Raises:
        ValueError: it is not exactly such a line.
    """
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVE) or node_key_text(key) != text:
        raise ValueError("expected an EC P-384 public key in OpenSSH's format, without a comment")
    return key


def node_key_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """The public key as Flower's SuperLink keeps it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The node key in the file at `path`.

    Raises:
        KitError: it is missing or no such key.
    """
    try:
        key = serialization.load_ssh_private_key(read_bytes(path), None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, CURVE):
        raise KitError(
            f"{path}: expected an EC P-384 private key in OpenSSH's format, got something else", "restore it from backup, or make new keys"
        )
    return key


def signing_key_bytes(key: Ed25519PrivateKey) -> bytes:
    """A signing key's private file: PKCS #8 PEM, not encrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """The signing key in the file at `path`.

    Raises:
        KitError: it is missing or no such key.
    """
    try:
        key = serialization.load_pem_private_key(read_bytes(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise KitError(f"{path}: expected an Ed25519 private key (PEM), got something else", "restore it from backup, or make new keys")
    return key


def signing_key_text(key: Ed25519PrivateKey) -> str:
    """The public half of a signing key (64 hex digits)."""
    return key.public_key().public_bytes_raw().hex()


def certificate_bytes(certificate: x509.Certificate) -> bytes:
    """A certificate's file (PEM)."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(path: Path) -> x509.Certificate:
    """The one certificate in the file at `path`.

    Raises:
        KitError: it is missing or none.
    """
    try:
        return x509.load_pem_x509_certificate(read_bytes(path))
    except ValueError:
        raise KitError(f"{path}: expected a certificate (PEM), got something else", "ask the coordinator for the kit again") from None


def authority_key(certificate: x509.Certificate, path: Path) -> ec.EllipticCurvePublicKey:
    """The key of a consortium's CA certificate, which was read from `path`.

    Raises:
        KitError: it is no self-signed CA certificate with a P-384 key.
    """
    try:
        key = certificate.public_key()
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(certificate)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        key, constraints = None, None
    if constraints is None or not constraints.ca or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVE):
        raise KitError(f"{path}: expected a consortium's own CA certificate, got another certificate", "ask the coordinator for the kit again")
    return key


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 (hex) of the certificate's DER, as `openssl x509 -fingerprint -sha256` shows it."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def grouped(fingerprint: str) -> str:
    """A fingerprint in groups of four, to read over the phone.

    >>> grouped("00112233")
    '0011 2233'
    """
    return " ".join(fingerprint[start : start + 4] for start in range(0, len(fingerprint), 4))


def sign(key: ec.EllipticCurvePrivateKey, statement: bytes) -> bytes:
    """ECDSA over P-384 and SHA-384 (DER)."""
    return key.sign(statement, ec.ECDSA(hashes.SHA384()))


def is_signed(key: ec.EllipticCurvePublicKey, signature: bytes, statement: bytes) -> bool:
    """Whether `sign` made `signature` over `statement` with this key's private half."""
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def read_bytes(path: Path) -> bytes:
    """The content of a file of a kit.

    Raises:
        KitError: it is missing, no plain file, unreadable, or larger than any of ours.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise KitError(f"{path}: expected a plain file, got a link or a folder", "unpack the kit again")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise KitError(f"{path}: expected a file, found none", "check the path; a kit is used whole, as it was unpacked") from None
    except OSError as error:
        raise KitError(f"{path}: could not be read: {error.strerror}", "check its permissions") from None
    if len(content) > MAX_BYTES:
        raise KitError(f"{path}: expected at most {MAX_BYTES} bytes, got more", "check that it is the file you meant")
    return content


def make_folder(path: Path, *, secret: bool = False) -> None:
    """`path` is a folder that others cannot write to, and where `secret`, not read either.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors(path, "make the folder"):
        for folder in reversed((path, *path.parents)):  # mkdir's own parents get the umask's mode, which may let others write
            if not folder.exists():
                folder.mkdir(mode=0o700 if secret else 0o755, exist_ok=True)
        if secret:
            path.chmod(0o700)


def replace_secret(path: Path, data: bytes) -> None:
    """`path` holds either all of `data`, mode 0600, or what it held before.

    Raises:
        StorageError: the folder cannot be written to.
    """
    with storage_errors(path, "write"):
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        try:
            write_secret(fresh, data)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
