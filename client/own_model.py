"""A site's own model, as a strategy with personal models left it there: made of what the site kept and the final shared model, for the hospital to use."""

from pathlib import Path

from client.kept_state import KeptState
from client.strategies.choice import local_rule
from client.strategies.fine_tuning import FineTuning
from shared.errors import ConfigurationError, DataMissingError
from shared.models import Parameters
from shared.personal import personal_names
from shared.study import Study
from shared.task import Task

FOLD = 1


def own_model(study: Study, task: Task, *, run: str, releases: Path, final: Parameters) -> Parameters:
    """The whole model by which the site was judged after the last round.

    Args:
        run: its name.
        releases: the folder in which the site keeps what it made.
        final: the shared parameters that the run ended with.

    Raises:
        DataMissingError: this site kept none in this run.
        StorageError: what it kept is damaged.
    """
    kept = KeptState(releases, run).last(FOLD)
    if not kept:
        raise DataMissingError(
            f"{releases}: expected what this site kept in run {run}, found nothing",
            "name the site that took part in this very run, where it took part",
        )
    rule, stayed = local_rule(study, task), personal_names(study.strategy, task.model())
    if isinstance(rule, FineTuning):
        return kept["personal"]
    return rule.judged(kept, {name: value for name, value in final.items() if name not in stayed})  # of those the file has the first values


def require_own_models(study: Study) -> None:
    """Return where each site is left one model of its own.

    Raises:
        ConfigurationError: the strategy leaves none, or there is more than one fold, and so several.
    """
    if not study.own_models:
        raise ConfigurationError(
            f"strategy {study.strategy.name}: expected one with models of the sites' own, got one without",
            "use the run's model, which is everybody's",
        )
    if study.evaluation.folds > 1:
        raise ConfigurationError(
            f"evaluation.folds: expected 1, got {study.evaluation.folds}: a site has a model of each fold", "run the study without folds"
        )
