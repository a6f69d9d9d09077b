"""A promise to whole sites protects no patient against the coordinator: a hospital takes part only where its policy says so by name, and by hand."""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from client.approvals import MASKED_SITE_LEVEL_LINE, SITE_LEVEL_LINE, Approvals, what_is_asked
from client.checks import _loose
from client.policy import AdvanceApproval, Policy, SiteFile
from client.private_probe import probe_model
from shared.config import validate
from shared.errors import ModelRefusedError, NotApprovedError, PolicyRefusedError
from shared.plan import plan_site, shape_site
from shared.study import Study
from shared.task import Task
from tests.client.conftest import POLICY, SITE_FILE

SITE = {"unit": "site", "epsilon": 2.0, "delta": 1e-3, "max_site_norm": 1.0}
BESIDE = {"site_epsilon": 50.0, "site_delta": 1e-2, "max_site_norm": 1.0}


def policy(**changes: object) -> Policy:
    return Policy.model_validate({"max_epsilon": 3.0, "max_delta": 1e-3, "allowed_tasks": ["tiny"], **changes})


def test_it_is_refused_by_name_unless_the_policy_allows_it(task: Task, make_study: Callable[..., Study]) -> None:
    study = make_study(strategy={"weights": "equal"}, privacy=SITE)
    shape = shape_site(study, 60)
    assert not plan_site(study, 60).private
    for rules in ({}, {"allow_no_privacy": True}, {"allow_record_unit": True}):
        with pytest.raises(PolicyRefusedError, match=r"policy.allow_site_unit: expected a promise to patients, got unit = 'site'") as caught:
            policy(**rules).check(study, task, shape)
        assert caught.value.rule == "policy.allow_site_unit" and caught.value.exit_code == 6
    policy(allow_site_unit=True).check(study, task, shape)
    with pytest.raises(PolicyRefusedError, match="policy.allow_no_privacy"):  # the one does not allow the other
        policy(allow_site_unit=True).check(make_study(privacy={"unit": "none"}), task, shape)


def test_beside_a_promise_to_patients_it_asks_nothing_of_the_policy(task: Task, make_study: Callable[..., Study]) -> None:
    """The coordinator's noise is its own affair: the hospital's limits are for its patients' promise, which is the same."""
    study = make_study(strategy={"weights": "equal"}, privacy=BESIDE)
    policy().check(study, task, shape_site(study, 60))
    assert plan_site(study, 60) == plan_site(make_study(), 60)


def test_it_is_never_approved_in_advance_and_says_what_it_is(task: Task, make_study: Callable[..., Study], tmp_path: Path) -> None:
    file = validate(SiteFile, tomllib.loads(SITE_FILE.format(**POLICY)), "site.toml")
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    approvals = Approvals(tmp_path, key, AdvanceApproval(tasks=(task.name,), max_epsilon=50.0, until=date(2999, 1, 1)))
    asked = what_is_asked(make_study(strategy={"weights": "equal"}, privacy=SITE), task, file)
    with pytest.raises(NotApprovedError):
        approvals.check(asked)
    assert asked.promise.startswith("NO PRIVACY FOR PATIENTS against the coordinator")
    assert asked.promise.endswith("epsilon 2 for each site at delta 0.001")
    assert "WITHOUT NOISE" in asked.leaves[1] and SITE_LEVEL_LINE in asked.leaves
    beside = what_is_asked(make_study(strategy={"weights": "equal"}, privacy=BESIDE), task, file)
    assert approvals.check(beside) == "approved in advance" and SITE_LEVEL_LINE in beside.leaves
    assert SITE_LEVEL_LINE not in what_is_asked(make_study(), task, file).leaves
    masked = what_is_asked(make_study(strategy={"weights": "equal"}, privacy=SITE, secure_aggregation={}), task, file)
    assert MASKED_SITE_LEVEL_LINE in masked.leaves and SITE_LEVEL_LINE not in masked.leaves


def test_a_check_of_the_site_warns_of_it() -> None:
    [(said, fix)] = [found for found in _loose(policy(allow_site_unit=True), 60) if "allow_site_unit" in found[0]]
    assert "without noise" in said and "false" in fix
    assert not [found for found in _loose(policy(), 60) if "allow_site_unit" in found[0]]


def test_a_model_that_keeps_running_statistics_is_refused(task: Task, make_study: Callable[..., Study]) -> None:
    """Noise on a running variance may make it negative."""
    normalised = replace(task, model=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    study = make_study(strategy={"weights": "equal"}, privacy=SITE)
    with pytest.raises(ModelRefusedError, match="keeps running buffers"):
        probe_model(normalised, study)
    probe_model(task, study)
    probe_model(normalised, make_study(privacy={"unit": "none"}))
