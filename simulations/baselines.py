"""What federation is compared with: every site alone, and all data in one place, each without and with the study's privacy.

They train with the sites' own code, for as many rounds, from the same initial parameters; only nobody is averaged with.
"""

from collections.abc import Mapping

import numpy as np

from client.evaluation import evaluate_parameters
from client.local_training import LocalRound, torch_keyed, train_round
from client.noise import subkey
from client.private_training import Randomness, train_round_private
from client.refinement import refined
from server.evaluation import add_statistics
from server.outcome import Baseline
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.messages import Statistics
from shared.models import Parameters, get_parameters, initial_parameters, set_parameters
from shared.plan import plan_site
from shared.privacy import default_delta
from shared.results import PairedTest
from shared.seeding import derive_key, generator_of
from shared.study import Study
from shared.task import Task
from simulations.paired_test import paired_test

POOLED = "all sites\n"  # no site's name has a line break, so no site shares the pooled model's randomness


def run_baselines(
    cohorts: dict[str, Cohort], task: Task, study: Study, *, plain: bool = True, federated: Mapping[str, Parameters] | None = None,
    start: Parameters | None = None,
) -> dict[str, Baseline]:  # fmt: skip
    """The baselines of a study on these sites: two without privacy, and two with it where the study is private.

    Args:
        plain: also those without privacy of a private study.
        federated: by site, the model that it has of the federation, the same for all or its own: what it has alone is tested against it on its test
            patients.
        start: what they start with; None: what follows from the study's seed.
    """
    parts = {name: _split(cohort) for name, cohort in cohorts.items()}
    variants = {"": study.replace(privacy={"unit": "none"})} if plain or not study.private else {}
    if study.private:
        variants["_private"] = study
    if study.noised_statistics:  # test patients were promised something: nothing exact is said of the federated model on them
        federated = None
    baselines = {}
    for suffix, variant in variants.items():
        baselines[f"local_only{suffix}"] = _local_only(parts, task, variant, federated, start)
        baselines[f"pooled{suffix}"] = _pooled(parts, task, variant, start)
    return baselines


def _split(cohort: Cohort) -> tuple[Cohort, Cohort]:
    test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)
    return cohort.select(~test), cohort.select(test)


def _local_only(
    parts: dict[str, tuple[Cohort, Cohort]], task: Task, study: Study, federated: Mapping[str, Parameters] | None, start: Parameters | None
) -> Baseline:  # fmt: skip
    """Each model on the patients of all sites; where the strategy gives sites models of their own, as these are judged: each on its own site's, summed."""
    trained = {name: train_alone(train, task, study, who=name, start=start) for name, (train, _) in parts.items()}
    model = task.model()
    own = {name: evaluate_parameters(task, test, trained[name], model=model) for name, (_, test) in parts.items()}
    if study.own_models:
        models = {"each": add_statistics(own.values())}
    else:
        models = {name: add_statistics(_tested_everywhere(parts, task, parameters).values()) for name, parameters in trained.items()}
    gains: dict[str, PairedTest] = {}
    if federated is not None:
        for name, test in ((name, test) for name, (_, test) in parts.items() if name in federated):
            gain = paired_test(task, test, federated[name], trained[name], resamples=study.evaluation.bootstrap, seed=study.seed)
            gains |= {} if gain is None else {name: gain}
    return Baseline(models=models, own=own, gains=gains)


def _pooled(parts: dict[str, tuple[Cohort, Cohort]], task: Task, study: Study, start: Parameters | None) -> Baseline:
    union = pool([train for train, _ in parts.values()])
    own = _tested_everywhere(parts, task, train_alone(union, task, _with_delta_for(study, union.num_patients), who=POOLED, start=start))
    return Baseline(models={"all": add_statistics(own.values())}, own=own)


def _with_delta_for(study: Study, num_patients: int) -> Study:
    """The study; where its delta suits each site but not so many patients, with the default one for them."""
    delta = study.privacy.delta
    if study.private and delta is not None and delta * num_patients >= 1:
        return study.replace(privacy={"delta": default_delta(num_patients)})
    return study


def _tested_everywhere(parts: dict[str, tuple[Cohort, Cohort]], task: Task, parameters: Parameters) -> dict[str, Statistics]:
    """Site -> statistics of this model on the site's test patients."""
    model = task.model()
    return {site: evaluate_parameters(task, test, parameters, model=model) for site, (_, test) in parts.items()}


def pool(cohorts: list[Cohort]) -> Cohort:
    """One cohort of all patients of these; patients of different sites are different patients."""
    offsets = np.cumsum([0, *(cohort.num_patients for cohort in cohorts[:-1])])
    return Cohort(
        inputs=tuple(np.concatenate(values) for values in zip(*(cohort.inputs for cohort in cohorts), strict=True)),
        labels=np.concatenate([cohort.labels for cohort in cohorts]),
        patient_of_record=np.concatenate([cohort.patient_of_record + offset for cohort, offset in zip(cohorts, offsets, strict=True)]),
        patient_ids=tuple(f"{index}/{name}" for index, cohort in enumerate(cohorts) for name in cohort.patient_ids),
        synthetic=any(cohort.synthetic for cohort in cohorts),
    )


def train_alone(train: Cohort, task: Task, study: Study, *, who: str, start: Parameters | None = None) -> Parameters:
    """The parameters after all rounds of training on one cohort alone, from `start` or from the seed's."""
    plan = plan_site(study, train.num_patients)
    model = task.model()
    set_parameters(model, start or initial_parameters(model, study.seed))
    for number in range(1, study.rounds.count + 1):
        path = ("baseline", who, plan.unit, number)
        key = derive_key(study.seed, *path)
        local = LocalRound(study=study, task=task, round_number=number)
        with torch_keyed(key):
            if plan.private:
                train_round_private(model, train, local, plan=plan, randomness=Randomness.simulated(key))
            else:
                train_round(model, train, local, rng=generator_of(key))
        if task.refine is not None:
            set_parameters(model, refined(task, get_parameters(model), key=subkey(key, b"refine")))
    return get_parameters(model)
