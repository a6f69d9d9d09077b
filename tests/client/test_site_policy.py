"""Every rule of a site's policy refuses by its name; site.toml is read as strictly as a study."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from client.keys import site_key
from client.policy import Policy, SiteFile
from shared.errors import ConfigurationError, PolicyRefusedError, StorageError, describe_exception
from shared.plan import plan_site, shape_site
from shared.study import Study
from shared.task import Task, resolve_task


def policy(**changes: object) -> Policy:
    return Policy.model_validate({"max_epsilon": 3.0, "max_delta": 1e-3, "allowed_tasks": ["tiny"], **changes})


@pytest.mark.parametrize(
    ("rules", "change", "size", "message"),
    [
        ({"allowed_tasks": ["other"]}, {}, 60, "policy.allowed_tasks: expected one of other, got 'tiny'"),
        ({}, {"privacy": {"unit": "none"}}, 60, "policy.allow_no_privacy: expected a study with differential privacy, got unit = 'none'"),
        ({"max_delta": 1e-5}, {}, 60, "policy.max_delta: expected at most 1e-05, got 0.001"),
        ({}, {"privacy": {"epsilon": 3.5}}, 60, "policy.max_epsilon: expected at most 3, got 3.5"),
        ({}, {"privacy": {"noise_multiplier": 0.4}}, 60, "policy.max_epsilon: expected at most 3, got"),
        ({"min_patients": 61}, {}, 60, "policy.min_patients: expected at least 61 declared patients, got 60"),
        ({"max_grad_norm": 0.5}, {}, 60, "policy.max_grad_norm: expected at most 0.5, got 0.7"),
        ({"max_steps": 5}, {}, 60, "policy.max_steps: expected at most 5, got 6"),
        ({}, {"privacy": {"unit": "record"}}, 60, "policy.allow_record_unit: expected a promise to patients, got unit = 'record'"),
        ({}, {"privacy": {"evaluation_epsilon": 5.0}}, 60, "policy.max_epsilon: expected at most 3, got 5"),
    ],
)
def test_each_rule_refuses_by_name(
    rules: dict[str, object], change: dict[str, object], size: int, message: str, task: Task, make_study: Callable[..., Study]
) -> None:
    study = make_study(**change)
    with pytest.raises(PolicyRefusedError) as caught:
        rules_of = policy(**rules)
        rules_of.check(study, task, shape_site(study, size))
        rules_of.check_noise(plan_site(study, size))
    assert str(caught.value).startswith(message) and caught.value.exit_code == 6
    assert describe_exception(caught.value)[1].endswith(f"Rule: {message.split(':')[0]}.")  # the rule is told outside, and nothing else


def test_what_is_within_the_rules_passes(task: Task, make_study: Callable[..., Study]) -> None:
    policy().check(make_study(privacy={"epsilon": 3.0}), task, plan_site(make_study(privacy={"epsilon": 3.0}), 20))
    plain = make_study(privacy={"unit": "none"})
    policy(allow_no_privacy=True).check(plain, task, plan_site(plain, 20))


def test_exact_sums_leave_only_when_every_metric_of_them_may(task: Task) -> None:
    names = [metric.name for metric in task.metrics]
    assert policy(allowed_metrics=names, min_metric_patients=20).withholds(task, "score_histogram", num_test=20, exact=False) is None
    assert "min_metric_patients" in str(
        policy(allowed_metrics=names, min_metric_patients=20).withholds(task, "score_histogram", num_test=19, exact=False)
    )
    assert "exact_metrics" in str(policy(allowed_metrics=names).withholds(task, "score_histogram", num_test=100, exact=True))
    for name in names:
        assert name in str(
            policy(allowed_metrics=[other for other in names if other != name]).withholds(task, "score_histogram", num_test=100, exact=False)
        )
    assert policy().withholds(resolve_task("breast-cancer"), "score_histogram", num_test=10_000, exact=False) is not None  # by default nothing leaves


GOOD = """
name = "north"
cohort = { path = "patients.csv", declared_size = 60 }
policy = { max_epsilon = 3, allowed_tasks = ["tiny"] }
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_epsilon = 3, ", "", "policy.max_epsilon: expected a value, got none"),
        ("max_epsilon = 3", "max_epsilon = 0", "policy.max_epsilon: expected greater than 0, got 0"),
        ("max_epsilon = 3", "max_epsilon = inf", "policy.max_epsilon: expected a finite number, got inf"),
        ("max_epsilon = 3", "max_epsilon = true", "policy.max_epsilon: expected a number, got True"),
        ("max_epsilon = 3", "max_epsilon = 3, max_delta = 0.1", "policy.max_delta: expected less than 0.1, got 0.1"),
        ("max_epsilon = 3", "max_epsilon = 3, maximum_delta = 0.01", "policy.maximum_delta: unknown key (did you mean 'max_delta'?)"),
        ("max_epsilon = 3", "max_epsilon = 3, allow_no_privacy = 1", "policy.allow_no_privacy: expected"),
        ('["tiny"]', "[]", "policy.allowed_tasks: expected"),
        ('name = "north"', 'name = "no/rth"', "name: expected"),
        ('name = "north"', 'name = "north"\nstate = " "', "state: expected a folder, got an empty text"),
        ("declared_size = 60", "declared_size = 1", "cohort.declared_size: expected greater than or equal to 2, got 1"),
        ("declared_size = 60", "declared_size = 60.5", "cohort.declared_size: expected a valid integer, got 60.5"),
        (', declared_size = 60', "", "cohort.declared_size: expected a value, got none"),
    ],
)  # fmt: skip
def test_a_bad_site_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(GOOD)
    assert SiteFile.load(path).policy.allow_no_privacy is False
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigurationError) as caught:
        SiteFile.load(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_sites_key_is_made_once_and_is_its_own(tmp_path: Path) -> None:
    state = tmp_path / "state"
    key = site_key(state)
    assert len(key) == 32 and site_key(state) == key and site_key(tmp_path / "other") != key
    assert stat.S_IMODE((state / "patient-hash.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_key_is_refused(tmp_path: Path, content: bytes) -> None:
    """An empty key would make the hashes of patients, and the split, anybody's to compute."""
    (tmp_path / "patient-hash.key").write_bytes(content)
    with pytest.raises(StorageError, match="expected a key of 32 bytes"):
        site_key(tmp_path)


def test_a_key_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not make or read the site's key"):
        site_key(tmp_path / "file")
