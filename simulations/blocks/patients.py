"""The patients of all sites of a fold in one piece: a site is a view of it, and several processes share it as files that are mapped.

S: sites. N: records of all sites, site after site.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort, IntArray
from shared.plan import SitePlan, plan_site
from shared.study import Study

if TYPE_CHECKING:  # a worker has no sites, and imports no Opacus
    from client.site import Site

SITES = "sites.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The training or the test part of all sites.

    Attributes:
        inputs, labels: `(N, ...)` each.
        patient_of_record: `(N,)`, counted from 0 at each site.
        starts: `(S + 1,)`, where each site's records begin and the last one's end.
        num_patients: `(S,)`.
    """

    inputs: tuple[NDArray[np.generic], ...]
    labels: NDArray[np.generic]
    patient_of_record: IntArray
    starts: IntArray
    num_patients: IntArray

    @classmethod
    def joined(cls, cohorts: Sequence[Cohort]) -> Self:
        """Of these cohorts, one after another."""
        return cls(
            inputs=tuple(np.concatenate(arrays) for arrays in zip(*(cohort.inputs for cohort in cohorts), strict=True)),
            labels=np.concatenate([cohort.labels for cohort in cohorts]),
            patient_of_record=np.concatenate([cohort.patient_of_record for cohort in cohorts]),
            starts=np.cumsum([0, *[cohort.num_records for cohort in cohorts]]),
            num_patients=np.array([cohort.num_patients for cohort in cohorts]),
        )

    def num_records(self, site: int) -> int:
        """Of a site."""
        return int(self.starts[site + 1] - self.starts[site])

    def cohort(self, site: int) -> Cohort:
        """A site's part as a view, without its patients' names."""
        rows = slice(int(self.starts[site]), int(self.starts[site + 1]))
        return Cohort(
            inputs=tuple(values[rows] for values in self.inputs),
            labels=self.labels[rows],
            patient_of_record=self.patient_of_record[rows],
            patient_ids=("",) * int(self.num_patients[site]),
        )

    def save(self, folder: Path, name: str) -> None:
        """As files that `mapped` reads."""
        for key, values in self._arrays().items():
            np.save(folder / f"{name}-{key}.npy", values)

    def _arrays(self) -> dict[str, NDArray[np.generic]]:
        inputs = {f"input-{number:03d}": values for number, values in enumerate(self.inputs)}
        rest = {"labels": self.labels, "patients": self.patient_of_record, "starts": self.starts, "counts": self.num_patients}
        return {**inputs, **rest}

    @classmethod
    def mapped(cls, folder: Path, name: str) -> Self:
        """What `save` wrote, read as it is needed."""
        arrays = {path.stem.removeprefix(f"{name}-"): np.load(path, mmap_mode="c") for path in sorted(folder.glob(f"{name}-*.npy"))}
        return cls(
            inputs=tuple(values for key, values in arrays.items() if key.startswith("input-")),
            labels=arrays["labels"],
            patient_of_record=arrays["patients"],
            starts=arrays["starts"],
            num_patients=arrays["counts"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Patients:
    """All sites of one fold."""

    names: tuple[str, ...]
    plans: tuple[SitePlan, ...]
    training: Part
    test: Part

    @classmethod
    def of(cls, sites: "Mapping[str, Site]", study: Study, fold: int) -> Self:
        """The patients of these sites; the study's delta is set."""
        parts = [site.parts(study, fold) for site in sites.values()]
        training, test = Part.joined([training for training, _ in parts]), Part.joined([test for _, test in parts])
        for site in sites.values():
            site.forget_parts()
        plans = tuple(plan_site(study, site.settings.declared_size) for site in sites.values())
        return cls(names=tuple(sites), plans=plans, training=training, test=test)

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for part in (self.training, self.test) for array in part._arrays().values())

    def save(self, folder: Path) -> None:
        """As files that `mapped` reads."""
        self.training.save(folder, "training")
        self.test.save(folder, "test")
        table = {"names": self.names, "plans": [dataclasses.asdict(plan) for plan in self.plans]}
        (folder / SITES).write_text(json.dumps(table))

    @classmethod
    def mapped(cls, folder: Path) -> Self:
        """What `save` wrote."""
        table = json.loads((folder / SITES).read_text())
        plans = tuple(SitePlan(**plan) for plan in table["plans"])
        return cls(names=tuple(table["names"]), plans=plans, training=Part.mapped(folder, "training"), test=Part.mapped(folder, "test"))
