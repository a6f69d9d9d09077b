"""Virtual sites: one cohort divided among them, or the real sites of a folder of site files, and the study resolved for them."""

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.admission import SiteSettings
from client.memory_chain import Journal
from client.policy import SiteFile
from client.real_site import open_site
from client.site import Site
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.errors import ConfigurationError, DataMissingError, PartitionError
from shared.privacy import default_delta_of_sites
from shared.results import SiteSummary
from shared.schema import TableSchema
from shared.site_level import resolve_site_delta
from shared.study import Study
from shared.task import Task
from simulations.partitioners import partition_cohort

DEFAULT_SYNTHETIC_PATIENTS = 800
LEDGERS = "ledgers"  # in a simulated run's folder
MOST_PLANS = 16  # different declared sizes in one simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualFederation:
    """The virtual sites of one simulation and their patients, before any study runs on them."""

    cohorts: dict[str, Cohort]
    synthetic: bool
    notes: Mapping[str, int]  # what the loader did to all of them, in counts
    _summaries: dict[int, list[SiteSummary]] = field(default_factory=dict, init=False, repr=False)  # by number of folds

    def summaries(self, task: Task, study: Study) -> list[SiteSummary]:
        """Exact sizes and classes of every site; with cross-validation, those of the first fold. Computed once a study."""
        if study.evaluation.folds not in self._summaries:
            self._summaries[study.evaluation.folds] = [_summary(name, cohort, task, study) for name, cohort in self.cohorts.items()]
        return self._summaries[study.evaluation.folds]

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every site's patients and records, so that a resumed run can tell that they are the same."""
        digest = hashlib.sha256()
        for name, cohort in sorted(self.cohorts.items()):
            digest.update("\n".join([name, *cohort.patient_ids]).encode())
            for values in (*cohort.inputs, cohort.labels, cohort.patient_of_record):
                digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


def virtual_federation(task: Task, study: Study, data: Path | None) -> VirtualFederation:
    """The task's patients (from `data`, bundled, or synthetic) divided as the study's [federation] says.

    Raises:
        DataError: the data are missing or do not fit; a study of named hospitals has no data.
        PartitionError: they cannot be divided so.
    """
    cohort = load_patients(task, study, data)
    if cohort.num_patients == 0:
        raise DataMissingError("expected patients, got none", "check the data given with --data")
    partition = partition_cohort(cohort, study.federation, seed=study.seed)
    cohorts = cohort.divide(partition)
    for name, part in cohorts.items():
        _check_training_patients(name, part, study)
    return VirtualFederation(cohorts=cohorts, synthetic=cohort.synthetic, notes=cohort.notes)


def load_patients(task: Task, study: Study, data: Path | None) -> Cohort:
    """The cohort at `data`; without it the bundled one, or a synthetic one.

    Raises:
        DataMissingError: the study's sites are real hospitals, which synthetic patients cannot stand for.
    """
    if data is not None or task.bundled:
        return task.load_cohort(data, {})
    if study.federation.partition == "natural" and task.sites:
        try:
            return task.load_cohort(None, {})
        except DataMissingError as error:  # whose loader knows where they are to be had
            raise DataMissingError(
                f"study {study.name}: its sites are real hospitals ({', '.join(task.sites)}), and no data were given",
                f"{error.remedy}; or name another [federation] partition in a study file, for synthetic patients",
            ) from None
    return task.synthetic_cohort(study.federation.num_patients or DEFAULT_SYNTHETIC_PATIENTS, study.seed)


def resolve_delta(study: Study, declared_sizes: list[int]) -> Study:
    """The study with its deltas filled in from declared sizes and the number of sites, where it asks for privacy and leaves them out.

    Raises:
        ConfigurationError: the delta of a promise to whole sites is too large for so many.
    """
    study = resolve_site_delta(study, len(declared_sizes))
    if not study.private or study.privacy.delta is not None:
        return study
    return study.replace(privacy={"delta": default_delta_of_sites(declared_sizes)})


def virtual_sites(federation: VirtualFederation, task: Task, study: Study, ledgers: Path) -> dict[str, Site]:
    """A site for each virtual hospital, with a ledger of its own in `ledgers`."""
    sites = {}
    model = task.model()  # they answer one after another, and every message brings its own parameters
    summaries = federation.summaries(task, study)
    journal = Journal(ledgers) if study.private and study.privacy.noise_source == "seeded" else None
    for summary, declared_size in zip(summaries, declared_sizes([summary.num_train for summary in summaries]), strict=True):
        settings = SiteSettings(
            name=summary.name,
            declared_size=declared_size,
            declared_num_patients=summary.num_patients,
            declared_num_test=summary.num_test,
            ledger_path=ledgers / f"{ledger_file_name(summary.name)}.sqlite",
            releases_path=releases_folder(ledgers, summary.name),
            split_key=SIMULATION_SPLIT_KEY,
            journal=journal,
        )
        sites[summary.name] = Site(settings, task, functools.partial(federation.cohorts.__getitem__, summary.name), model=model)
    return sites


def declared_sizes(sizes: Sequence[int]) -> list[int]:
    """What virtual sites declare: their exact sizes, or, where these are of many kinds, to as many digits as leave at most `MOST_PLANS`.

    Sample rate, noise and weight of a site come from what it declares, and noise is solved, composed and checked once for each kind.

    >>> declared_sizes([199, 172, 30]), declared_sizes(range(195, 215))[:6]
    ([199, 172, 30], [200, 200, 200, 200, 200, 200])
    """
    digits = len(str(max(sizes)))
    rounded = list(sizes)
    while len(set(rounded)) > MOST_PLANS and digits > 1:
        digits -= 1
        rounded = [_to_digits(size, digits) for size in sizes]
    return rounded


def _to_digits(size: int, digits: int) -> int:
    unit = 10 ** max(0, len(str(size)) - digits)
    return max(1, int((size + unit // 2) // unit * unit))


def real_sites(files: list[Path], task: Task) -> dict[str, Site]:
    """The hospitals of these site files, each with its own policy, durable ledger and noise from the operating system.

    Raises:
        ConfigurationError: a file does not fit, or two have one name.
    """
    sites: dict[str, Site] = {}
    for path in files:
        file = SiteFile.load(path)
        if file.name in sites:
            raise ConfigurationError(f"{path}: name: expected a name of its own, got {file.name!r} again", "rename one of the sites")
        sites[file.name] = open_site(path, file, task)
    return sites


def _summary(name: str, cohort: Cohort, task: Task, study: Study) -> SiteSummary:
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY, fold=1, folds=study.evaluation.folds)
    return SiteSummary(
        name=name,
        num_patients=cohort.num_patients,
        num_train=int((~test).sum()),
        num_test=int(test.sum()),
        classes=_class_counts(cohort, task),
    )


def _class_counts(cohort: Cohort, task: Task) -> dict[str, int] | None:
    labels = cohort.label_of_patient()
    if not isinstance(task.schema, TableSchema) or task.schema.label.type == "number" or labels.ndim != 1:
        if labels.ndim != 1 or len(np.unique(labels)) > 20 or not np.issubdtype(labels.dtype, np.integer):
            return None
        return {str(value): count for value, count in sorted(Counter(labels.tolist()).items())}
    counts = np.bincount(labels.astype(np.int64), minlength=len(task.schema.label.values))
    return {value: int(count) for value, count in zip(task.schema.label.values, counts, strict=True)}


def _check_training_patients(name: str, cohort: Cohort, study: Study) -> None:
    for fold in range(1, study.evaluation.folds + 1):
        test = held_out_patients(cohort, SIMULATION_SPLIT_KEY, fold=fold, folds=study.evaluation.folds)
        if test.all():
            raise PartitionError(
                f"site {name}: expected a patient to train on, got none in fold {fold}", "use fewer sites, or raise federation.min_patients"
            )


def releases_folder(ledgers: Path, site: str) -> Path:
    """Where a virtual site keeps what it made."""
    return ledgers / f"{ledger_file_name(site)}.releases"


def ledger_file_name(site: str) -> str:
    """The stem of a virtual site's ledger: its name, made safe for a file."""
    plain = "".join(character if character.isalnum() or character in "-_" else "_" for character in site)
    return plain if plain == site else f"{plain}-{hashlib.sha256(site.encode()).hexdigest()[:8]}"
