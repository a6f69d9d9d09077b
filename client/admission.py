"""What a site is, without its patients, and a study that it has agreed to."""

from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.ledger import PlannedStudy
from client.memory_chain import Journal
from client.policy import Policy
from client.secure_updates import SecureUpdates
from client.strategies.local_rule import LocalRule
from shared.models import Template
from shared.plan import Limit, SitePlan, check_delta, within_filter
from shared.privacy import SOLVE_MARGIN, PrivacyEvent, evaluation_noise_multiplier
from shared.study import Study
from shared.view import View

NOTHING = PrivacyEvent(noise_multiplier=1.0, sample_rate=1.0, steps=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """What a site is, without its patients.

    Attributes:
        declared_size: training patients, as declared; a simulation declares exact numbers.
        policy: None only for a virtual site, which has nobody to protect.
        ledger_path: file of the ledger of this cohort.
        releases_path: folder of what was released last; only where noise comes from the operating system.
        split_key: keys the hash that fixes each patient's split.
        signer: signs the ledger's rows; None for a virtual site.
        roster_key: what the daemon signs with, as the federation's roster knows it; None outside a deployment.
        journal: of a simulation whose ledgers are in memory until they are closed.
        noise_seed: for tests that compare two runs bit for bit, and settable from Python alone: noise drawn from a seed protects nobody.
    """

    name: str
    declared_size: int
    declared_num_patients: int
    declared_num_test: int
    ledger_path: Path
    releases_path: Path
    split_key: bytes = field(repr=False)
    signer: Ed25519PrivateKey | None = field(default=None, repr=False)
    roster_key: Ed25519PrivateKey | None = field(default=None, repr=False)
    policy: Policy | None = None
    cohort_id: str = "virtual"
    noise_seed: int | None = field(default=None, repr=False)
    journal: Journal | None = field(default=None, repr=False)

    @property
    def virtual(self) -> bool:
        """True for a site of a simulation without a site file: its noise may be seeded, its counts are exact."""
        return self.policy is None

    @property
    def limit(self) -> Limit | None:
        """What the cohort may spend over all studies; a virtual site, whose ledger is born and ends with its run, has none."""
        return None if self.policy is None else self.policy.limit

    def seed_of(self, study: Study) -> int | None:
        """The seed of a simulation's noise; None where it comes from the operating system."""
        return study.seed if self.virtual and study.privacy.noise_source == "seeded" else self.noise_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """A study that this site has agreed to."""

    run: str
    study: Study
    study_hash: str
    plan: SitePlan
    evaluation: PrivacyEvent | None  # of the closing evaluation's noise
    rule: LocalRule
    template: Template  # of the parameters that are shared
    control: Template  # of what the strategy sends beside them
    secure: SecureUpdates | None  # where updates are aggregated securely
    coordinator_key: str | None

    def planned(self) -> PlannedStudy:
        """What it asks of the ledger."""
        return PlannedStudy(
            run=self.run, study=self.study.name, study_hash=self.study_hash, training=self.plan.study_event(), evaluation=self.evaluation,
            cross_validated=self.study.evaluation.folds > 1, coordinator_key=self.coordinator_key,
            shares=View.of(self.study).honest if self.study.distributed_noise else None,
        )  # fmt: skip


def evaluation_event(study: Study, settings: SiteSettings) -> PrivacyEvent | None:
    """The charge of the closing evaluation's noise; None where it carries none."""
    epsilon, delta = study.privacy.evaluation_epsilon, study.privacy.delta
    if epsilon is None:
        return None
    assert delta is not None
    check_delta(delta, settings.declared_num_test)
    noise_multiplier = evaluation_noise_multiplier(epsilon * SOLVE_MARGIN, delta, releases=1)
    return within_filter(PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=1.0, steps=1), settings.limit)
