"""federation.toml: which sites a consortium has, where its coordinator is, and how long its certificates last. The coordinator's file."""

import contextlib
import ipaddress
import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from shared.config import Settings, read_toml, validate
from shared.study import NAME_PATTERN
from shared.study_tables import toml_text

_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


def check_host(text: str) -> str:
    """`text`, when it is a DNS name or an IP address that a certificate can be made for.

    >>> check_host("coordinator.example.org")
    'coordinator.example.org'

    Raises:
        ValueError: it is neither.
    """
    with contextlib.suppress(ValueError):
        if "%" not in text:  # a scope, as in fe80::1%eth0, is of one machine only
            return str(ipaddress.ip_address(text))
    labels = text.split(".")
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise ValueError(f"expected DNS names or IP addresses, without scheme, port or '*', got {text!r}")
    return text.lower()


class CoordinatorTable(Settings):
    """Where the coordinator is."""

    hosts: tuple[str, ...] = Field(min_length=1, strict=False, description="names and addresses; the first is what sites dial")
    port: int = Field(default=8443, ge=1, le=65535, description="the one port that sites reach")
    listen: str = Field(
        default="0.0.0.0", description="address on which that port is opened; '::' for IPv6 and IPv4, 127.0.0.1 for this machine alone"
    )
    page_port: int = Field(default=8480, ge=1, le=65535, description="page and status, on loopback only")

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(check_host(host) for host in hosts))

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, text: str) -> str:
        return str(ipaddress.ip_address(text))

    @model_validator(mode="after")
    def _check_ports(self) -> "CoordinatorTable":
        if self.port == self.page_port:
            raise ValueError(f"expected two ports, got {self.port} as port and as page_port")
        return self


class Certificates(Settings):
    """How long what is signed lasts, in days."""

    ca_days: int = Field(default=3650, ge=1, le=36500)
    server_days: int = Field(default=365, ge=1, le=36500)
    site_days: int = Field(default=365, ge=1, le=36500)
    warn_days: int = Field(default=30, ge=0, le=36500, description="warn when something ends within so many days")


class FederationFile(Settings):
    """A coordinator's federation.toml."""

    name: str = Field(pattern=NAME_PATTERN)
    quorum: int = Field(default=1, ge=1, description="fewest sites that a study may go on with")
    sites: tuple[str, ...] = Field(min_length=1, strict=False)
    coordinator: CoordinatorTable
    certificates: Certificates = Certificates()

    @field_validator("sites")
    @classmethod
    def _check_sites(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        for site in sites:
            if not re.fullmatch(NAME_PATTERN, site) or site.lower().endswith(".zip"):
                raise ValueError(f"expected names of letters, digits, '.', '_' and '-' that do not end in .zip, got {site!r}")
        if len({site.casefold() for site in sites}) < len(sites):
            raise ValueError("expected every site once, whatever its case, got one twice")
        return sites

    @model_validator(mode="after")
    def _check_quorum(self) -> "FederationFile":
        if self.quorum > len(self.sites):
            raise ValueError(f"quorum: expected at most {len(self.sites)}, the number of sites, got {self.quorum}")
        return self

    @classmethod
    def load(cls, path: Path) -> "FederationFile":
        """The federation file at `path`.

        Raises:
            ConfigurationError: it is missing or does not fit; it names file, key, expected and got.
        """
        return validate(cls, read_toml(path), str(path))

    def to_toml(self) -> str:
        """The file with every default written out."""
        return toml_text(self.model_dump(mode="json"))
