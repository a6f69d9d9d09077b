"""`wardround data check`: all that is wrong or odd about a cohort, at once, before a study asks for it.

A table is looked at as the file has it (`client.table_check`); every cohort as the loader made it. A finding holds counts and names of columns,
and what is found is the hospital's own: nothing of it leaves.

Legend: N records, P patients.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.findings import Check, Finding, NotLookedAtError, failed, passed, run_checks, warned
from client.measure_units import likely_conversion
from client.policy import SiteFile
from client.table_check import FEWEST_NAMED, TableView, counted, plain_name, table_checks, table_of
from shared.cohort import SIMULATION_SPLIT_KEY, TEST_FRACTION, BoolArray, Cohort, held_out_patients
from shared.errors import DataAccessError, DataError
from shared.schema import MISSING_MARKS, OUT_OF_RANGE_TOLERANCE, Column, TableSchema, TensorSchema, canonical
from shared.task import Task

DATA_CHECK = 5  # exit code
FEWEST_TRAINING, FEWEST_OF_CLASS, SMALL_CLASS_SHARE = 50, 10, 0.05
MUCH_DROPPED = 0.05  # share of records
MOST_CLASSES = 50
MOST_COMPARED = 200  # features that tell whether two records are alike by chance
FEW = "more patients, or a larger epsilon"
SPLIT_NAMES = ("split", "set", "subset", "fold", "partition")


# What is looked at ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where a cohort is; `file` and `state` are the site's, where a site.toml names it."""

    path: Path | None
    options: Mapping[str, object] = field(default_factory=dict)
    file: SiteFile | None = None
    state: Path | None = None

    @classmethod
    def of(cls, path: Path | None, options: Mapping[str, object]) -> "DataSource":
        """The cohort at `path`, or the one that the site.toml at `path` names, with its options below those given.

        Raises:
            ConfigurationError: the site file does not fit.
        """
        if path is None or path.suffix != ".toml":
            return cls(path=path, options=options)
        file = SiteFile.load(path)
        return cls(path=path.parent / file.cohort.path, options={**file.cohort.options, **options}, file=file, state=path.parent / file.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """All that is known of the data: the cohort or why there is none, and the table where it is one."""

    task: Task
    source: DataSource
    cohort: Cohort | None
    error: Exception | None
    view: TableView | None

    @property
    def loaded(self) -> Cohort:
        """The cohort.

        Raises:
            NotLookedAtError: there is none.
        """
        if self.cohort is None:
            raise NotLookedAtError("the cohort could not be read")
        return self.cohort


def look_at(task: Task, source: DataSource) -> Subject:
    """The cohort as a site would read it, and the file behind it as it is.

    Raises:
        WardroundError: other than about data: an option that the loader does not know, a library that is not installed.
    """
    cohort: Cohort | None = None
    error: Exception | None = None
    try:
        cohort = task.load_cohort(source.path, dict(source.options))
    except DataError as problem:
        error = problem
    except PermissionError as problem:
        error = DataAccessError(f"{problem.filename or source.path}: this user may not read it", "change its permissions")
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        OSError,
        EOFError,
        AssertionError,
    ) as problem:  # of a loader that does not foresee it
        error = problem
    return Subject(task=task, source=source, cohort=cohort, error=error, view=table_of(task, source.path, cohort, error))


# What is found -------------------------------------------------------------------------------------------------------------------


def check_data(subject: Subject) -> Iterator[Finding]:
    """Every finding, in the order in which one would mend them. A FAIL is what keeps a study from running; a WARN is to be looked at."""
    checks = [] if subject.view is None else table_checks(subject.view)
    found = [_as_data_check(finding) for finding in run_checks(checks)]
    yield from found
    rest: list[tuple[str, Check]] = [("cohort", lambda: _loading(subject, found))]
    if subject.cohort is not None and not isinstance(subject.task.schema, TableSchema):
        rest.append(("tensors", lambda: _tensors(subject.loaded, subject.task.schema)))  # type: ignore[arg-type]  # no table
    if (subject.cohort is not None and subject.cohort.num_patients) or (subject.view is not None and len(subject.view.frame)):
        rest += [
            ("duplicates", lambda: _duplicates(subject)),
            ("labels", lambda: _labels(subject)),
            ("patients", lambda: _patients(subject)),
            ("size", lambda: _size(subject)),
        ]
    yield from map(_as_data_check, run_checks(rest))


def _as_data_check(finding: Finding) -> Finding:
    """What goes wrong here is a failed data check, and the command's exit code says so."""
    return dataclasses.replace(finding, exit_code=DATA_CHECK) if finding.level == "FAIL" else finding


def _loading(subject: Subject, found: Sequence[Finding]) -> Iterator[Finding]:
    """What the loader came to; not said again where the columns have said it."""
    match subject.error:
        case None:
            yield from _loaded(subject.loaded, subject.task)
        case DataError() as error:
            failures = [finding.what for finding in found if finding.level == "FAIL"]
            names = [] if subject.view is None else [*subject.view.schema.needed_columns, subject.view.schema.site]
            if any(repr(name) in error.what and any(repr(name) in what for what in failures) for name in names):
                raise NotLookedAtError("the cohort as a whole; a study would stop at what is said above")
            yield failed(error.what, error.remedy)
        case error:
            unforeseen = failed(
                f"the task's loader stopped with {type(error).__name__}, which it did not foresee",
                "check that this is the task's data; --debug shows where it stopped",
            )
            yield dataclasses.replace(unforeseen, cause=error)


def _loaded(cohort: Cohort, task: Task) -> Iterator[Finding]:
    what = f"{counted(cohort.num_patients, 'patient')}, {counted(cohort.num_records, 'record')} as read for task {task.name}"
    if not cohort.num_patients or not cohort.num_records:
        yield failed(f"{what}: nobody", "check that this is the right file or folder")
        return
    yield passed(what)
    notes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in cohort.notes.items() if count)
    lost = sum(count for name, count in cohort.notes.items() if re.search("dropped|skipped", name))
    if lost > MUCH_DROPPED * (lost + cohort.num_records):
        share = lost / (lost + cohort.num_records)
        yield warned(f"{share:.0%} of the records are left out by the schema's rules: {notes}", "see what they lack")
    elif notes:
        yield passed(f"done by the schema's rules: {notes}")


# Tensors -------------------------------------------------------------------------------------------------------------------------


def _tensors(cohort: Cohort, schema: Sequence[TensorSchema]) -> Iterator[Finding]:
    """Inputs have the declared shapes, types and ranges, and no NaN."""
    if len(cohort.inputs) != len(schema):
        yield failed(f"{len(cohort.inputs)} inputs, but the schema has {len(schema)}", "the task's loader and its schema must agree")
        return
    for values, part in zip(cohort.inputs, schema, strict=True):
        found = list(_tensor(values, part))
        yield from found
        if not any(finding.level == "FAIL" for finding in found):
            yield passed(f"{part.name}: {len(values)} records of shape {_shape(part.shape)}, {part.dtype}, within {part.low:g} to {part.high:g}")


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _tensor(values: NDArray[np.generic], part: TensorSchema) -> Iterator[Finding]:
    fix = "correct the file or the loader"
    if len(values.shape) - 1 != len(part.shape) or any(want > 0 and want != got for want, got in zip(part.shape, values.shape[1:], strict=True)):
        yield failed(f"{part.name}: records of shape {_shape(values.shape[1:])}, expected {_shape(part.shape)}", fix)
    if values.dtype != np.dtype(part.dtype):
        yield failed(f"{part.name}: values of type {values.dtype}, expected {part.dtype}", fix)
    if values.dtype.kind not in "fiub":
        return
    rows = values.reshape(len(values), -1)
    if not rows.size:
        return
    bad = ~np.isfinite(rows)
    if bad.any():
        yield failed(
            f"{part.name}: NaN or infinite in {int(bad.any(axis=1).sum())} of {len(rows)} records", "leave them out, or fill them by a public rule"
        )
    yield from _tensor_range(rows[~bad].astype(np.float64), part)
    flat = int((rows.max(axis=1) == rows.min(axis=1)).sum()) if rows.shape[1] > 1 else 0
    if flat:
        yield warned(f"{part.name}: {flat} of {len(rows)} records are one value throughout", "see whether they were recorded at all")


def _tensor_range(known: NDArray[np.float64], part: TensorSchema) -> Iterator[Finding]:
    outside = (known < part.low) | (known > part.high)
    if outside.any():
        what = f"{part.name}: {outside.mean():.2%} of the values are out of {part.low:g} to {part.high:g}{f' {part.unit}' if part.unit else ''}"
        other = likely_conversion(known[outside], known[~outside], low=part.low, high=part.high, unit=part.unit, name=part.name)
        fix = f"{other} to have {part.unit or 'the declared scale'}" if other else "check unit and scaling"
        yield (failed if outside.mean() > OUT_OF_RANGE_TOLERANCE else warned)(what, fix)
    elif len(known) and np.ptp(known) < 0.01 * (part.high - part.low):
        yield warned(f"{part.name}: all values lie in a hundredth of the range {part.low:g} to {part.high:g}", "check unit and scaling")


# Records and patients ------------------------------------------------------------------------------------------------------------


def _duplicates(subject: Subject) -> Iterator[Finding]:
    """Records that are there twice: of a patient, or of two."""
    if subject.cohort is None and subject.view is not None and subject.view.of_file:
        twice = int(subject.view.frame.duplicated().sum())
        yield (
            warned(f"{counted(twice, 'row')} the same as an earlier one", "see whether an export was joined twice")
            if twice
            else passed("no row is there twice")
        )
        return
    cohort = subject.loaded
    same = identical_records(cohort)
    patient = cohort.patient_of_record
    _, first_of_pair = np.unique(np.stack([same, patient], axis=1), axis=0, return_index=True)
    again = cohort.num_records - len(first_of_pair)  # records that repeat one of the same patient
    if again:
        yield warned(
            f"{counted(again, 'repeat')} of an earlier record of the same patient",
            "see whether an export was joined twice; a patient's records are sampled alike",
        )
    shared = _shared_by_patients(same, patient)
    if shared.any() and _too_many_to_be_chance(cohort, same[first_of_pair]):
        what = f"{int(shared.sum())} records are the same as another patient's, label included"
        yield warned(f"{what}{_across(cohort, subject, same, shared)}", "see whether one patient has two identifiers")
    elif not again:
        yield passed("no record is there twice" if not shared.any() else f"{int(shared.sum())} records are alike, as chance would have it")


def identical_records(cohort: Cohort) -> NDArray[np.int64]:
    """`(N,)`: the number of the first record with the same inputs and label."""
    first: dict[bytes, int] = {}
    arrays = [np.ascontiguousarray(values) for values in (*cohort.inputs, cohort.labels)]
    digests = [
        hashlib.blake2b(b"".join(values[index].tobytes() for values in arrays), digest_size=16).digest() for index in range(cohort.num_records)
    ]
    return np.array([first.setdefault(digest, index) for index, digest in enumerate(digests)], dtype=np.int64)


def _shared_by_patients(same: NDArray[np.int64], patient: NDArray[np.int64]) -> BoolArray:
    """`(N,)`, True for records that stand under two patients."""
    pairs = np.unique(np.stack([same, patient], axis=1), axis=0)
    groups, counts = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(same, groups[counts > 1])


def _too_many_to_be_chance(cohort: Cohort, same: NDArray[np.int64]) -> bool:
    """Ten times as many pairs of alike records as there would be if columns were independent: few coded columns make many alike."""
    _, counts = np.unique(same, return_counts=True)
    pairs = float((counts * (counts - 1) / 2).sum())
    rows = np.concatenate([values.reshape(len(values), -1)[:, :MOST_COMPARED] for values in (*cohort.inputs, cohort.labels)], axis=1)
    log_alike = 0.0
    for column in rows[:, :: max(1, rows.shape[1] // MOST_COMPARED)].T:
        _, num = np.unique(column, return_counts=True)
        log_alike += float(np.log(((num / num.sum()) ** 2).sum()))
    expected = len(same) * (len(same) - 1) / 2 * float(np.exp(log_alike))
    return pairs > 10 * expected


def _across(cohort: Cohort, subject: Subject, same: NDArray[np.int64], shared: BoolArray) -> str:
    """Whether alike records stand on both sides of the split, or at several sites."""
    test, found = _held_out(subject)[cohort.patient_of_record], []
    leak = np.intersect1d(same[shared & test], same[shared & ~test])
    if len(leak):
        found.append(f"{int(np.isin(same, leak).sum())} of them stand in training and test")
    if "site" in cohort.attributes:
        sites = np.unique(cohort.attributes["site"], return_inverse=True)[1][cohort.patient_of_record]
        moved = _shared_by_patients(same, sites)
        if moved.any():
            found.append(f"{int(moved.sum())} at several sites")
    return f"; {', '.join(found)}" if found else ""


def _held_out(subject: Subject) -> BoolArray:
    """`(P,)`: who is tested on, as the site's key decides where there is one, else as a simulation would."""
    state = subject.source.state
    if state is not None and (state / "patient-hash.key").exists():
        from client.keys import site_key

        return held_out_patients(subject.loaded, site_key(state), published=False)
    return held_out_patients(subject.loaded, SIMULATION_SPLIT_KEY, published=state is None)


def _labels(subject: Subject) -> Iterator[Finding]:
    """Every class has enough patients, at every site."""
    if subject.cohort is None and subject.view is not None and subject.view.of_file:
        yield from _labels_of_table(subject.view)
        return
    cohort, schema = subject.loaded, subject.task.schema
    found = classes_of(cohort, schema.label if isinstance(schema, TableSchema) else None)
    if found is None:
        yield from _other_labels(cohort)
        return
    names, of_patient = found
    counts = np.bincount(of_patient, minlength=len(names))
    yield from _balance(names, counts)
    if "site" in cohort.attributes:
        yield from _one_class_sites(cohort.attributes["site"], of_patient)
    lacking = [name for index, name in enumerate(names) if counts[index] and not (_held_out(subject) & (of_patient == index)).any()]
    if lacking:
        yield warned(f"no test patient has {', '.join(lacking)}: nothing can be measured there", "more patients, or folds in [evaluation]")


def _labels_of_table(table: TableView) -> Iterator[Finding]:
    """Of a file that the loader refuses: of its rows, those that have a label of the schema."""
    label = table.schema.label
    if label.type == "number" or label.name not in table.frame.columns:
        return  # the columns have told of it
    text = table.text(label).map(canonical)
    counts = np.array([table.num_patients((text == canonical(value)).to_numpy()) for value in label.values])
    if counts.any():
        yield from _balance(label.values, counts)


def classes_of(cohort: Cohort, label: Column | None) -> tuple[tuple[str, ...], NDArray[np.int64]] | None:
    """Names of the classes and each patient's `(P,)`, by its first record; None where labels are no single class."""
    labels = cohort.label_of_patient() if cohort.num_patients else cohort.labels
    if label is not None:
        return None if label.type == "number" else (label.values, labels.astype(np.int64))
    if labels.ndim != 1 or labels.dtype.kind not in "fiub" or not np.isfinite(labels.astype(np.float64)).all():
        return None
    values = np.unique(labels)
    if len(values) > MOST_CLASSES or values.min() < 0 or (values != np.round(values)).any():
        return None
    if labels.dtype.kind == "f" and not set(values.tolist()) <= {0.0, 1.0}:
        return None
    num = max(int(values.max()) + 1, 2)
    return tuple(f"class {index}" for index in range(num)), labels.astype(np.int64)


def _balance(names: Sequence[str], counts: NDArray[np.int64]) -> Iterator[Finding]:
    told = ", ".join(f"{name} {count} ({count / counts.sum():.1%})" for name, count in zip(names, counts.tolist(), strict=True))
    small = [name for name, count in zip(names, counts.tolist(), strict=True) if count < max(FEWEST_OF_CLASS, SMALL_CLASS_SHARE * counts.sum())]
    if (counts > 0).sum() < 2:
        yield failed(f"all patients have one label: {told}", "check the label column and how patients were chosen")
    elif small:
        yield warned(
            f"few patients have {', '.join(small)} (under {SMALL_CLASS_SHARE:.0%}, or under {FEWEST_OF_CLASS}): {told}",
            "more patients; accuracy will mislead",
        )
    else:
        yield passed(told)


def _one_class_sites(sites: NDArray[np.str_], of_patient: NDArray[np.int64]) -> Iterator[Finding]:
    alone = [site for site in np.unique(sites).tolist() if len(np.unique(of_patient[sites == site])) == 1]
    large = [site for site in alone if (sites == site).sum() >= FEWEST_NAMED]
    if alone and len(np.unique(sites)) > 1:
        named = f": {', '.join(large)}" + (f" and {len(alone) - len(large)} small ones" if len(large) < len(alone) else "") if large else ""
        yield warned(f"{len(alone)} of {len(np.unique(sites))} sites have patients of one label only{named}", "their AUROC is not defined")


def _other_labels(cohort: Cohort) -> Iterator[Finding]:
    """Labels that are numbers, several at once, or maps."""
    labels = cohort.labels.reshape(cohort.num_records, -1)
    if labels.dtype.kind not in "fiub" or not labels.size:
        yield failed(f"labels of type {cohort.labels.dtype}", "expected numbers")
        return
    numbers = labels.astype(np.float64)
    infinite = int(np.isinf(numbers).any(axis=1).sum())
    if infinite:
        yield failed(f"infinite labels in {infinite} records", "correct them")
    unknown = np.isnan(numbers).all(axis=1)
    if unknown.any():
        yield warned(f"{int(unknown.sum())} of {len(labels)} records have no label at all", "ask why")
    constant = [index for index in range(labels.shape[1]) if len(np.unique(numbers[~np.isnan(numbers[:, index]), index])) < 2]
    if len(constant) == labels.shape[1]:
        yield failed("all records have one label", "check the labels and how patients were chosen")
    elif constant and cohort.labels.ndim == 2:
        yield warned(
            f"{len(constant)} of {labels.shape[1]} labels have one value throughout: number {', '.join(map(str, constant[:20]))}",
            "nothing can be learned of them",
        )
    else:
        yield passed(f"{len(labels)} records with labels of {_shape(cohort.labels.shape[1:])}")


def _patients(subject: Subject) -> Iterator[Finding]:
    """Nobody is on both sides of the split, at two sites, or there under two spellings of one identifier."""
    found = [*(_patients_of_table(subject.view) if subject.view is not None else []), *_spellings(subject)]
    yield from found
    if not found:
        yield passed("no patient is at two sites or on both sides of the split")


def _patients_of_table(table: TableView) -> Iterator[Finding]:
    patients, sites = table.patients, table.sites
    if patients is None:
        return
    if sites is not None:
        several = int((sites.groupby(patients).nunique() > 1).sum())
        if several:
            yield warned(
                f"{counted(several, 'patient')} at several sites; the first row decides",
                "see whether sites share identifiers by chance, or patients moved",
            )
    label = table.schema.label.name
    for name in [name for name in table.frame.columns if plain_name(name) in SPLIT_NAMES and name != label]:
        both = int((table.frame[name].groupby(patients).nunique() > 1).sum())
        if both:
            yield warned(
                f"{counted(both, 'patient')} in several parts of column {name!r}",
                "it is not read: Wardround splits by patient; mend it if you use it elsewhere",
            )


def _spellings(subject: Subject) -> Iterator[Finding]:
    """Identifiers that differ in case, spaces, punctuation or leading zeros alone."""
    patients = None if subject.view is None else subject.view.patients
    names = set(patients) - set(MISSING_MARKS) if patients is not None else set(subject.cohort.patient_ids if subject.cohort is not None else ())
    meant: dict[str, int] = {}
    for name in names:
        plain = re.sub(r"(?<!\d)0+(?=\d)", "", plain_name(re.sub(r"\.0+$", "", name)))
        meant[plain or name] = meant.get(plain or name, 0) + 1
    twice = sum(count > 1 for count in meant.values())
    if twice:
        yield warned(
            f"{counted(twice, 'patient')} with identifiers that differ in case, spaces, punctuation or leading zeros alone",
            "write each one way: else one patient counts as two, perhaps on both sides of the split",
        )


def _size(subject: Subject) -> Iterator[Finding]:
    """There are enough patients, also for the site's own policy."""
    if subject.cohort is None and subject.view is not None and subject.view.of_file:
        patients = subject.view.num_patients(np.ones(len(subject.view.frame), dtype=np.bool_))
        training = round((1 - TEST_FRACTION) * patients)
        what = f"{counted(patients, 'patient')} in the file, of whom some {training} would train"
        yield warned(f"{what}: under {FEWEST_TRAINING}", FEW) if training < FEWEST_TRAINING else passed(what)
        return
    test = _held_out(subject)
    num_test, num_training = int(test.sum()), int((~test).sum())
    what, found = f"{num_training} patients to train on, {num_test} to test on", []
    if num_training < FEWEST_TRAINING:
        found.append(warned(f"{what}: under {FEWEST_TRAINING}, noise outweighs what they teach", FEW))
    if subject.source.file is not None:
        found += _against_policy(subject.task, subject.source.file, num_training, num_test)
    yield from found or [passed(what)]


def _against_policy(task: Task, file: SiteFile, num_training: int, num_test: int) -> Iterable[Finding]:
    policy, declared = file.policy, file.cohort.declared_size
    if task.name not in policy.allowed_tasks:
        yield warned(f"policy.allowed_tasks does not name {task.name}", "add it, or name the task that is meant")
    for number, what in ((num_training, "patients to train on"), (declared, "declared in declared_size")):
        if number < policy.min_patients:
            yield failed(f"{number} {what}, but policy.min_patients = {policy.min_patients}: every study is refused", "more patients, or lower it")
    if num_test < policy.min_metric_patients and policy.allowed_metrics:
        yield warned(
            f"{num_test} patients to test on, but policy.min_metric_patients = {policy.min_metric_patients}: no metric leaves", "more patients"
        )
    if not 0.75 * num_training <= declared <= 1.25 * num_training:
        yield warned(f"{num_training} patients to train on, but declared_size = {declared}", "correct it: noise and weight use it")
