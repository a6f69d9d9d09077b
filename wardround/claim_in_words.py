"""A run's claim sheet in words for a patient's representative or a privacy officer. No torch is imported here."""

from dataclasses import dataclass

from shared.claim import event_of
from shared.errors import StorageError
from shared.privacy import epsilon_of_best
from shared.results import PrivacyClaim
from shared.view import View
from wardround.report.run_files import RunFiles
from wardround.report.summary import meaning_sentence
from wardround.report.wording import count, upper_bound

BEST_OF = 10  # runs on average, in the example of what a choice costs
WHOLE_SITES = "Whole hospitals"
OF_SITES = {
    False: "After every round the coordinator cuts down what any single hospital can change to one maximum that is the same for all, adds up, and adds random noise in "
    "proportion to that maximum; only then is there a model that anybody else sees.",
    True: "In every round each hospital cuts down what it can change to one maximum that is the same for all, and masks it; the coordinator learns the sum, and adds "
    "random noise in proportion to that maximum; only then is there a model that anybody else sees. Whether another hospital cuts down nobody can see.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and its sentences."""

    title: str
    sentences: tuple[str, ...]


def claim_sections(run: RunFiles) -> list[Section]:
    """The claim of a run, from what is promised to what is not.

    Raises:
        StorageError: the run wrote no claim sheet.
    """
    claim, view = claim_of(run), View.of(run.study)
    sections = [Section(title="What is promised", sentences=_promise(run, claim))]
    if claim.unit == "site":
        sections += [Section(title=WHOLE_SITES, sentences=_whole_sites(claim, view)), Section(title="Covered", sentences=tuple(claim.covered))]
    elif claim.unit != "none":
        sections += [
            Section(title="How", sentences=(view.steps(claim.unit), f"{claim.sampling}.", f"{claim.mechanism}.")),
            Section(title="Hospital by hospital", sentences=tuple(_site(name, claim, view) for name in claim.sites)),
            Section(title="The whole federation", sentences=_federation(claim)),
            *([Section(title=WHOLE_SITES, sentences=_whole_sites(claim, view))] if claim.site_level is not None else []),
            Section(title="Covered", sentences=tuple(claim.covered)),
        ]
    sections.append(Section(title="Not covered", sentences=tuple(claim.not_covered)))
    if choice := _choice(claim):
        sections.append(Section(title="If this run was chosen among several", sentences=(choice,)))
    if claim.assumed:
        sections.append(Section(title="Assumed", sentences=tuple(claim.assumed)))
    return sections


def claim_of(run: RunFiles) -> PrivacyClaim:
    """The claim sheet.

    Raises:
        StorageError: there is none.
    """
    if run.claim is None:
        raise StorageError("privacy.json: expected a claim sheet in the run's folder, found none", "let the run end, with simulate --resume")
    return run.claim


def _promise(run: RunFiles, claim: PrivacyClaim) -> tuple[str, ...]:
    if claim.unit == "none":
        return ("Nobody is protected by this run.", claim.statement)
    head = f"This run protects its {claim.unit}s." if claim.protects and claim.started_from is None else ""  # the statement says why not, or who else
    if claim.unit == "site":
        return tuple(sentence for sentence in (head, claim.statement) if sentence)
    meaning = meaning_sentence(run)
    return tuple(sentence for sentence in (head, claim.statement, meaning, View.of(run.study).bounds(claim.unit)) if sentence)


def _site(name: str, claim: PrivacyClaim, view: View) -> str:
    site, unit = claim.sites[name], claim.unit
    other = f"; {site.cross_check_accountant.upper()} says {upper_bound(site.epsilon_cross_check)}" if site.epsilon_cross_check is not None else ""
    together = ""
    if claim.distributed_noise is not None:
        colluding = claim.distributed_noise.sites[name].epsilon_if_all_others_collude
        together = f" Against the coordinator and all other hospitals together: epsilon {upper_bound(colluding)}."
    planned = "" if site.epsilon_planned is None else f" The whole plan that the hospital agreed to: epsilon {upper_bound(site.epsilon_planned)}."
    return (
        f"At {name}: epsilon {upper_bound(site.epsilon)} at delta {site.delta:g} (upper bound by {site.accountant.upper()}{other}). "
        f"{count(site.steps)} steps; in each, every one of about {count(site.declared_size)} {unit}s was drawn with a chance of {100 * site.sample_rate:.3g} in 100; "
        f"{view.size(site.noise_multiplier, unit)}, from {_SOURCE[site.noise_source]}.{together}{planned}"
    )


_SOURCE = {"os": "the operating system's generator, and forgotten", "seeded": "a seed"}


def _federation(claim: PrivacyClaim) -> tuple[str, ...]:
    if claim.federation is None:
        return ("No hospital sent an update.",)
    whole = f"epsilon {upper_bound(claim.federation.epsilon)} at delta {claim.federation.delta:g}"
    if claim.distributed_noise is not None:
        together = max(site.epsilon_if_all_others_collude for site in claim.distributed_noise.sites.values())
        whole = f"{whole}, and {upper_bound(together)} against the coordinator and all other hospitals together"
    if claim.federation.basis.startswith("maximum"):
        return (
            f"No {claim.unit} is known to two hospitals, says the study; so the worst hospital's numbers hold for everybody: {whole}.",
            _OVERLAP[claim.distributed_noise is not None],
        )
    return (f"A {claim.unit} may be known to several hospitals, says the study; all of them together: {whole}.",)


_OVERLAP = {
    False: "A patient whom two hospitals treat is promised less: set [privacy] patients_overlap = true to have the sites' numbers composed.",
    True: "A patient whom two hospitals treat is promised far less, for both move one sum, against one noise: nothing is said of such a patient here.",
}


def _whole_sites(claim: PrivacyClaim, view: View) -> tuple[str, ...]:
    """The promise to whole hospitals, apart from that to patients."""
    promised = claim.site_level
    assert promised is not None
    beside = () if claim.unit == "site" else (promised.statement,)
    source = "the coordinator's operating system, and forgotten" if promised.noise_source == "os" else "a seed"
    return (
        *beside,
        OF_SITES[view.masked],
        f"Epsilon {upper_bound(promised.epsilon)} at delta {promised.delta:g} after {promised.rounds} of {promised.rounds_planned} rounds (upper bound by "
        f"{promised.accountant.upper()}; {promised.cross_check_accountant.upper()} says {upper_bound(promised.epsilon_cross_check)}); the whole plan: epsilon "
        f"{upper_bound(promised.epsilon_planned)}. The noise was {promised.noise_multiplier:.3g} times what one hospital can change in a round, from {source}.",
        f"{promised.mechanism}.",
        f"{promised.neighbouring_relation}.",
        f"Sampling: {promised.sampling}.",
        *(() if claim.unit == "site" else tuple(f"Not covered by it: {item}." for item in promised.not_covered)),
    )


def _choice(claim: PrivacyClaim) -> str:
    worst = max(claim.sites.values(), key=lambda site: site.epsilon, default=None)
    event = event_of(worst) if worst is not None else None
    if worst is None or event is None:
        return ""
    chosen = epsilon_of_best([event], worst.delta, mean_runs=BEST_OF)
    return (
        f"Publishing the best of several such runs tells more than one run does. If the number of runs was drawn by lot beforehand (geometric law, "
        f"{BEST_OF} on average) and the others stay secret, epsilon {upper_bound(chosen)} instead of {upper_bound(worst.epsilon)}. For any other choice, "
        "all runs count: wardround privacy spent."
    )
