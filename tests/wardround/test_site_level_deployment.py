"""A study with a promise to whole sites on its way to real hospitals: what is filled in, what is warned of, and what the plan says."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import ConfigurationError
from shared.kit import Roster, RosterSite
from shared.study import Study
from shared.task import resolve_task
from simulations.attacks.poisoning import attack_poisoning
from tests.provisioned import approved
from wardround.cli.submitted import print_plan
from wardround.deployment import deployed_study, plan_deployment

BASE = {"name": "tiny", "task": "breast-cancer", "rounds": {"count": 2}, "strategy": {"weights": "equal"}}
SITE = {"unit": "site", "epsilon": 8.0, "max_site_norm": 0.5}
BESIDE = {"epsilon": 3.0, "site_epsilon": 8.0, "max_site_norm": 0.5}


@pytest.fixture(scope="module")
def roster(tmp_path_factory: pytest.TempPathFactory) -> tuple[RosterSite, ...]:
    """Two approved sites."""
    kit = approved(tmp_path_factory.mktemp("federation")) / "coordinator"
    found = Roster.read(kit / "roster.json", kit / "ca.crt").sites
    return tuple(site.model_copy(update={"declared_size": size}) for site, size in zip(found, (200, 80), strict=True))


def shown(study: Study, roster: tuple[RosterSite, ...]) -> str:
    """The plan as it is printed."""
    deployed = deployed_study(study, roster, quorum=1)
    terminal = Console(file=io.StringIO(), width=250)
    print_plan(plan_deployment(deployed, resolve_task("breast-cancer"), roster, states={}, quorum=1), terminal)
    return terminal.file.getvalue()  # type: ignore[attr-defined]  # the text that was written


def test_alone(roster: tuple[RosterSite, ...]) -> None:
    deployed = deployed_study(Study.from_table({**BASE, "privacy": SITE}), roster, quorum=1)
    assert deployed.study.privacy.delta == 1e-3 and deployed.notes == ("privacy.delta is 0.001, from the number of sites",)
    assert any("allow_site_unit = true" in warning for warning in deployed.warnings)
    assert deployed_study(deployed.study, roster, quorum=1).study == deployed.study
    text = shown(deployed.study, roster)
    assert "epsilon 8 for each site at delta 0.001, against everybody but the coordinator: NO PRIVACY FOR PATIENTS there" in text
    assert "not by a site: each round's mean, which the coordinator clips and noises" in text and "WITHOUT NOISE" in text


def test_beside(roster: tuple[RosterSite, ...]) -> None:
    deployed = deployed_study(Study.from_table({**BASE, "privacy": BESIDE}), roster, quorum=1)
    assert deployed.study.privacy.site_delta == 1e-3 and deployed.study.privacy.delta == 1e-4
    assert not any("allow_site_unit" in warning for warning in deployed.warnings)
    text = shown(deployed.study, roster)
    assert (
        "epsilon 3 for each patient at delta 0.0001; and epsilon 8 for each whole site at delta 0.001, against everybody but the coordinator" in text
    )


def test_a_delta_too_large_for_so_many_sites_is_refused(roster: tuple[RosterSite, ...]) -> None:
    many = tuple(roster[0].model_copy(update={"name": f"site-{number}"}) for number in range(20))
    with pytest.raises(ConfigurationError, match="privacy.delta: expected delta < 1/20 "):
        deployed_study(Study.from_table({**BASE, "privacy": {**SITE, "delta": 0.06}}), many, quorum=1)


def test_poisoning_which_compares_other_strategies_says_why_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="poisoning: expected no promise to whole sites"):
        attack_poisoning(Study.from_table({**BASE, "privacy": SITE}))
