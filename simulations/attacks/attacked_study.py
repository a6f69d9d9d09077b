"""The study as an attacker finds it: virtual sites alone, trained by the simulation itself, in a folder that is gone afterwards."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from server.run_folder import RunFolder
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.errors import ConfigurationError
from shared.models import Parameters
from shared.results import FederationClaim, PrivacyClaim
from shared.strategy_options import PERSONAL
from shared.study import Study
from shared.task import Task, architecture_hash
from simulations.federation import VirtualFederation
from simulations.setting import Setting
from simulations.simulate import execute, prepare, start_run
from simulations.site_files import site_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A study on its virtual sites, before anything is trained. It has one fold, and no intervals, which an attack has no use for."""

    study: Study
    task: Task
    federation: VirtualFederation

    @classmethod
    def of(cls, study: Study, data: Path | None) -> "Victim":
        """The study on its patients (from `data`, bundled, or synthetic), every default of the simulation resolved.

        Raises:
            ConfigurationError: the sites are real; nobody is attacked who was not asked. Or the study has faults, of which an attack is none.
            WardroundError: as `prepare`.
        """
        if site_files(data):
            raise ConfigurationError("attack: expected virtual sites, got site files of real ones", "attack a simulation of the same study")
        if study.faults is not None:
            raise ConfigurationError("attack: expected a study without faults, got one with some", "remove [faults]")
        if study.secure_aggregation is not None:
            raise ConfigurationError(
                "attack: expected a study that aggregates in the clear, got one with [secure_aggregation]",
                "attack the study without it: what it learns of a sum is no more than what it learns of an update",
            )
        if isinstance(study.strategy, PERSONAL):
            raise ConfigurationError(
                f"attack: expected a strategy with one model for all sites, got {study.strategy.name}", "attack the study under fedavg"
            )
        setting = prepare(study.replace(evaluation={"folds": 1, "bootstrap": 0}), data)
        assert setting.federation is not None
        return cls(study=setting.study, task=setting.task, federation=setting.federation)

    def setting(self, study: Study, cohorts: Mapping[str, Cohort]) -> Setting:
        """The same sites with these cohorts instead."""
        federation = VirtualFederation(cohorts=dict(cohorts), synthetic=self.federation.synthetic, notes={})
        return Setting(study=study, task=self.task, federation=federation, real={})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The final federated model, and what its run promises any one patient; None where it promises nothing."""

    parameters: Parameters
    claim: FederationClaim | None


def train(setting: Setting) -> TrainedModel:
    """Run the study as `wardround simulate` does; its folder goes away.

    Raises:
        WardroundError: what stopped the study.
    """
    with tempfile.TemporaryDirectory(prefix="wardround-attack-") as out:
        folder = start_run(setting, Path(out))
        execute(setting, folder, baselines=False)
        return read_trained(folder, setting.task)


def read_trained(folder: RunFolder, task: Task) -> TrainedModel:
    """The final model in a run's folder, and its claim."""
    claim = PrivacyClaim.model_validate_json((folder.path / "privacy.json").read_bytes())
    return TrainedModel(parameters=folder.read_model("final", architecture_hash(task.model())), claim=claim.federation)


def trained_part(cohort: Cohort) -> Cohort:
    """The patients of a virtual site that are trained on."""
    return cohort.select(~held_out_patients(cohort, SIMULATION_SPLIT_KEY))


def tested_part(cohort: Cohort) -> Cohort:
    """The patients of a virtual site that are tested on."""
    return cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY))
