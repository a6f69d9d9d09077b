"""The consortium's certificate authority: a P-384 key under a passphrase, its self-signed certificate, and the server certificates it issues.

Its key is needed only to provision, renew and revoke, never to run: `ca/` may lie on another machine in between.
"""

import ipaddress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.certificates import CURVE, authority_key, certificate_bytes, fingerprint_of, make_folder, read_bytes, read_certificate, sign
from shared.errors import ConfigurationError, KitError
from shared.files import storage_errors, write_atomic, write_secret

KEY, CERTIFICATE = "ca.key", "ca.crt"
MIN_PASSPHRASE = 12  # characters
CLOCK_SLACK = timedelta(hours=1)  # certificates begin this much earlier, for clocks that are behind
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """An opened CA."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the certificate."""
        return fingerprint_of(self.certificate)

    def sign(self, statement: bytes) -> bytes:
        """The CA's signature over `statement`."""
        return sign(self.key, statement)


def open_authority(folder: Path, *, federation: str, passphrase: str, days: int, now: datetime) -> Authority:
    """The CA in `folder`, made where there is none; a key without its certificate (a crash between the two) gets one.

    Raises:
        ConfigurationError: the passphrase does not open it or is too short for a new one, it is another federation's, or its key is elsewhere.
        StorageError: it cannot be written.
    """
    if (folder / CERTIFICATE).exists() and not (folder / KEY).exists():
        raise ConfigurationError(f"{folder / KEY}: expected the CA's key beside its certificate, found none", "bring it back from where it is kept")
    make_folder(folder, secret=True)
    if not (folder / KEY).exists():
        _write_new_key(folder / KEY, passphrase)
    key = _open_key(folder / KEY, passphrase)
    if not (folder / CERTIFICATE).exists():
        write_atomic(folder / CERTIFICATE, certificate_bytes(self_signed(key, federation=federation, days=days, now=now)))
    certificate = read_certificate(folder / CERTIFICATE)
    if authority_key(certificate, folder / CERTIFICATE) != key.public_key():
        raise KitError(f"{folder / CERTIFICATE}: expected the certificate of {KEY}, got another key's", "restore both from one backup")
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if names != [federation]:
        raise ConfigurationError(
            f"{folder}: expected the CA of {federation}, got that of {names}", "correct 'name' in the federation file, or give another --out"
        )
    return Authority(certificate=certificate, key=key)


def _write_new_key(path: Path, passphrase: str) -> None:
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigurationError(
            f"the CA's passphrase: expected at least {MIN_PASSPHRASE} characters, got {len(passphrase)}", "choose a longer one: it guards every site"
        )
    encryption = serialization.BestAvailableEncryption(passphrase.encode())
    with storage_errors(path, "write"):
        write_secret(path, ec.generate_private_key(CURVE()).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def _open_key(path: Path, passphrase: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_bytes(path), passphrase.encode())
    except (ValueError, TypeError):  # TypeError: not encrypted, or an empty passphrase
        raise ConfigurationError(
            f"{path}: the passphrase does not open the CA's key",
            "give the one that was set when the CA was made; if it is right, the file is damaged",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{path}: expected an EC P-384 key, got another", "restore it from backup")
    return key


def self_signed(key: ec.EllipticCurvePrivateKey, *, federation: str, days: int, now: datetime) -> x509.Certificate:
    """The CA's certificate, for `days` from `now`: it may issue server certificates, and no further CA."""
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, "Wardround consortium CA")])
    builder = _begin(name, name, key.public_key(), start=now, end=now + timedelta(days=days))
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def issue_server_certificate(
    authority: Authority, key: ec.EllipticCurvePublicKey, hosts: tuple[str, ...], *, days: int, now: datetime
) -> x509.Certificate:
    """A TLS server's certificate for `hosts` and loopback, for `days` from `now`, and no longer than the CA's own."""
    [organization] = authority.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    name = x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
    end = min(now + timedelta(days=days), authority.certificate.not_valid_after_utc)
    issuer_key = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _begin(name, authority.certificate.subject, key, start=now, end=end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in certified_hosts(hosts)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        .sign(authority.key, hashes.SHA384())
    )


def certified_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """The names and addresses in a server's certificate: those asked for, and loopback."""
    return tuple(dict.fromkeys((*hosts, *LOOPBACK)))


def serves(certificate: x509.Certificate, hosts: tuple[str, ...]) -> bool:
    """Whether a server's certificate holds exactly what one for `hosts` would."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names) == {_general_name(host) for host in certified_hosts(hosts)}


def _begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, start: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - CLOCK_SLACK)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,  # the CA's signs kits and rosters
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
