"""What a simulation runs on: the resolved study, its task, and its sites."""

from dataclasses import dataclass

from client.site import Site
from shared.results import SiteSummary
from shared.study import Study
from shared.task import Task
from simulations.federation import VirtualFederation


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything a run needs but its folder."""

    study: Study
    task: Task
    federation: VirtualFederation | None  # None: real sites, from their site files
    real: dict[str, Site]

    @property
    def site_names(self) -> list[str]:
        """The sites, in the order in which they are asked."""
        return sorted(self.federation.cohorts) if self.federation is not None else sorted(self.real)

    def summaries(self) -> list[SiteSummary]:
        """The sites' sizes: exact where they are virtual, else as declared."""
        if self.federation is not None:
            return self.federation.summaries(self.task, self.study)
        declared = [self.real[name].settings for name in self.site_names]
        return [
            SiteSummary(name=site.name, num_patients=site.declared_num_patients, num_train=site.declared_size, num_test=site.declared_num_test)
            for site in declared
        ]
