"""What the metrics of a run are of, in words: one model on all sites' test patients, or a model of each site's own on that site's."""

import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shared.strategy_options import PERSONAL, FedBuff
from shared.study import Study
from wardround.report.wording import SOURCE_TITLES, source_title

EACH_POINT = "Each point is the model after that many rounds, on test patients."
EACH_POINT_OWN = "Each point is the sites’ own models after that many rounds, each on its own site’s test patients."
BUFFERED = " With fedbuff a round’s model is judged by the sites that answered it in that round, and not at all where there is none; the last point is the final model, judged by all."
ASKED = " Each round is judged by the sites that were asked in it; the last point is the final model, judged by all."
TOGETHER = " “All sites together” is computed from all sites’ patients at once; it is not a mean of the sites’ values. The band is its 95 % interval."
OF_FOLDS = "Each line is one fold of the cross-validation, over all sites’ test patients of that fold."


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Captions and clauses of a report.

    Attributes:
        titles: of what was trained, where they are not the usual ones.
        made: what the sites trained, after that word.
        chief: what the baselines are compared with, as a subject; `sites`, `overall`: captions of the table of sites and of one of
            all `tested` patients; `by_site` how sites are judged, in a sentence.
        alone, compared: in the headline and below the table of baselines.
        gained: what at some of the sites is better, up to the metric's name; `gains` its table, `together` the head of that column.
        at_risk: whose predictions the risk table is of, on what; `subgroups` those of groups of patients.
    """

    titles: Mapping[str, str]
    made: str
    chief: str
    sites: str
    overall: str
    by_site: str
    alone: str
    compared: str
    gained: str
    gains: str
    together: str
    at_risk: str
    subgroups: str

    def title(self, source: str) -> str:
        """What was trained, in words."""
        return self.titles.get(source) or source_title(source)


_POOLED = (
    "“All data in one place” trains one model on the patients of all sites, which a federation avoids. “Private” means with the study’s privacy."
)
ONE_MODEL = Judged(
    titles={},
    made="one model together",
    chief="The federated model",
    sites="The final model on each site’s own test patients, with 95 % intervals",
    overall="The final model on all {tested} test patients, with 95 % intervals",
    by_site="The model is judged at each site on the site’s own test patients, with intervals",
    alone="a single site’s own model, on average over the sites,",
    compared=f"“One site alone” is the mean over the sites’ own models, each tested on the test patients of all sites. {_POOLED}",
    gained="the federated model does better than the site’s own",
    gains="of each site’s own model and of the federated one",
    together="Federated",
    at_risk="The federated model on the test patients of all sites",
    subgroups="the final model on test patients of all sites",
)
OWN_MODELS = Judged(
    titles={
        **SOURCE_TITLES,
        "federated": "Each site’s own, federated",
        "local_only": "Each site’s own, alone",
        "local_only_private": "Each site’s own, alone, private",
    },
    made="together, each a model of its own",
    chief="The sites’ own models",
    sites="Each site’s own final model on its own test patients, with 95 % intervals",
    overall="Each site’s own final model on that site’s test patients, {tested} in all, with 95 % intervals",
    by_site="Each site’s own model is judged on that site’s test patients, with intervals",
    alone="models that each site trained alone, judged likewise,",
    compared="“Each site’s own”: every site’s model on that site’s test patients alone, the scores of all sites pooled; “alone” are models that the sites trained without "
    f"the others, judged the same way. They say nothing of another site’s patients. {_POOLED}",
    gained="the site’s own model of the federation does better than the one that it trained alone",
    gains="of the model that each site trained alone and of its own one in the federation",
    together="Own, federated",
    at_risk="The sites’ own models, each on its own site’s test patients, all sites together",
    subgroups="each site’s own final model on that site’s test patients, all sites together",
)


def judged(study: Study) -> Judged:
    """How the metrics of this study's run are to be read."""
    return OWN_MODELS if study.own_models else ONE_MODEL


def learning_note(study: Study) -> str:
    """What a point of the learning curve is."""
    if study.evaluation.folds > 1:
        return OF_FOLDS
    some = BUFFERED if isinstance(study.strategy, FedBuff) else ASKED if study.strategy.fraction < 1 else ""
    return (EACH_POINT_OWN if study.own_models else EACH_POINT) + some + TOGETHER


def beside_own_models(strategies: Iterable[str]) -> str:
    """What to know of a table in which these strategies stand side by side: how those with models of the sites' own are judged; empty without one."""
    personal = {name for options in PERSONAL for name in typing.get_args(options.model_fields["name"].annotation)}
    found = [name for name in dict.fromkeys(strategies) if name in personal]
    if not found:
        return ""
    return (
        f"With {', '.join(found)} each site’s own model is judged, federated and alone, on that site’s test patients; with other strategies every model is, on the test patients "
        "of all sites. Where sites differ the first is the easier question, so compare such a row with its own “alone”, and with other rows with care."
    )
