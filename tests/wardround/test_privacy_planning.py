"""`wardround privacy plan` and `epsilon`: what is solved holds at every site, and one more does not."""

import json
import math
import subprocess
import sys

import pytest

from shared.plan import Limit, plan_site
from shared.privacy import PrivacyEvent, delta_of, epsilon_of, sample_rate_of, steps_per_round
from shared.study import Study
from tests.wardround.conftest import Command
from wardround.planning import Planned, Question, plan_study


def asked(*patients: int, **known: object) -> Planned:
    return plan_study(Question.model_validate({"patients": patients, **known}))


def cost(size: int, *, noise: float, rounds: int, batch_size: int, delta: float = 1e-4) -> float:
    steps = rounds * steps_per_round(local_epochs=1, local_steps=None, batch_size=batch_size, declared_size=size)
    return epsilon_of([PrivacyEvent(noise_multiplier=noise, sample_rate=sample_rate_of(batch_size, size), steps=steps)], delta)


@pytest.mark.slow
def test_the_noise_is_the_one_that_sites_solve() -> None:
    planned = asked(200, 50, epsilon=3.0)
    assert (planned.solved, planned.rounds, planned.batch_size) == ("noise", 30, 32)
    study = Study.from_table({"name": "s", "task": "t", "privacy": {"epsilon": 3.0, "delta": 1e-4}})
    for site in planned.sites:
        plan = plan_site(study, site.declared_size)
        assert (plan.noise_multiplier, plan.epsilon, plan.study_event().steps) == (site.noise_multiplier, site.epsilon, site.steps)
        limited = plan_site(study, site.declared_size, limit=Limit(epsilon=3.0, delta=1e-4))
        assert limited.noise_multiplier == site.noise_multiplier_filter
        assert site.epsilon_filter > 3.0 > site.epsilon and not site.passes_filter


def test_epsilon_is_solved_from_noise() -> None:
    planned = asked(200, noise_multiplier=2.0, rounds=5)
    assert planned.solved == "epsilon" and planned.sites[0].epsilon == cost(200, noise=2.0, rounds=5, batch_size=32)


def test_the_most_rounds_fit_at_every_site_and_one_more_does_not() -> None:
    planned = asked(200, 80, epsilon=3.0, noise_multiplier=3.0)
    assert planned.solved == "rounds" and planned.batch_size == 32
    assert max(cost(size, noise=3.0, rounds=planned.rounds, batch_size=32) for size in (200, 80)) <= 3.0
    assert max(cost(size, noise=3.0, rounds=planned.rounds + 1, batch_size=32) for size in (200, 80)) > 3.0
    assert all(site.epsilon <= 3.0 for site in planned.sites)


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "rounds", "noise"), [((200, 50), 10, 3.0), ((97,), 3, 2.0), ((60, 45, 10), 20, 4.0)])
def test_the_largest_batch_fits_at_every_site_and_no_larger_one_does(patients: tuple[int, ...], rounds: int, noise: float) -> None:
    planned = asked(*patients, epsilon=3.0, noise_multiplier=noise, rounds=rounds)
    fits = [size for size in range(1, max(patients) + 1) if max(cost(n, noise=noise, rounds=rounds, batch_size=size) for n in patients) <= 3.0]
    assert planned.solved == "batch_size" and planned.batch_size == max(fits)


def test_a_batch_of_everybody_is_the_largest_there_is() -> None:
    planned = asked(40, 30, epsilon=5.0, noise_multiplier=50.0, rounds=2)
    assert planned.batch_size == 40 and [site.sample_rate for site in planned.sites] == [1.0, 1.0]


def test_delta_is_solved_when_all_four_are_given() -> None:
    planned = asked(200, 100, epsilon=2.0, noise_multiplier=4.0, rounds=10, batch_size=32)
    assert planned.solved == "delta"
    delta = planned.sites[0].delta
    events = [PrivacyEvent(noise_multiplier=4.0, sample_rate=site.sample_rate, steps=site.steps) for site in planned.sites]
    assert delta == max(delta_of([event], 2.0) for event in events) and delta < 1 / 200
    assert max(site.epsilon for site in planned.sites) == pytest.approx(2.0, rel=1e-6)


def test_spare_rounds_are_charged_but_bring_no_signal() -> None:
    plain, spared = (asked(200, noise_multiplier=3.0, rounds=20, spare_rounds=spare) for spare in (0, 5))
    assert (plain.sites[0].steps, spared.sites[0].steps) == (140, 175)
    assert spared.sites[0].epsilon == cost(200, noise=3.0, rounds=25, batch_size=32)
    assert spared.signal == plain.signal


def test_a_limit_above_the_plan_needs_no_more_noise() -> None:
    tight, loose = (asked(200, epsilon=2.0, limit=limit).sites[0] for limit in (2.0, 6.0))
    assert loose.passes_filter and loose.noise_multiplier_filter == loose.noise_multiplier == tight.noise_multiplier
    assert tight.noise_multiplier_filter is not None and 1.0 < tight.noise_multiplier_filter / tight.noise_multiplier < 1.15
    assert loose.filter_order < tight.filter_order
    below = asked(200, epsilon=2.0, limit=0.5).sites[0].noise_multiplier_filter
    assert below is not None and below > 3 * tight.noise_multiplier
    assert asked(200, epsilon=2.0, limit=1e-3).sites[0].noise_multiplier_filter is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("known", "what"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 0.5}, "even one round does not keep epsilon 1 at a site with 200 patients"),
        ({"epsilon": 1.0, "noise_multiplier": 0.5, "rounds": 5}, "even an expected batch of one patient"),
        ({"epsilon": 0.1, "noise_multiplier": 0.5, "rounds": 5, "batch_size": 32}, "any delta below 1/200"),
    ],
)
def test_where_nothing_fits_it_is_said_what_would(command: Command, known: dict[str, float], what: str) -> None:
    options = [str(part) for name, value in known.items() for part in (f"--{name.replace('_', '-')}", value)]
    outcome = command("privacy", "plan", "--patients", 200, *options)
    assert outcome.code == 3 and what in outcome.err and "or a noise multiplier of" in outcome.err
    enough = float(outcome.err.split("or a noise multiplier of ")[1].split()[0])
    assert command("privacy", "plan", "--patients", 200, *options[:2], "--noise-multiplier", enough, *options[4:]).code == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            ("--epsilon", 1, "--noise-multiplier", 2, "--rounds", 3, "--batch-size", 8, "--delta", 1e-5),
            "to be left open, got all\n  what to do: omit one",
        ),
        (("--rounds", 3), "expected either epsilon or noise_multiplier, or both, got neither"),
        (("--epsilon", 101), "less than or equal to 100"),
        (("--noise-multiplier", 0.01), "greater than or equal to 0.2"),
        (("--epsilon", 1, "--rounds", 0), "rounds: expected greater than or equal to 1, got 0"),
        (("--epsilon", 1, "--parameters", 0), "parameters: expected greater than or equal to 1, got 0"),
        (("--epsilon", 1, "--delta", 0.006), "privacy.delta: expected delta < 1/200"),
    ],
)
def test_what_cannot_be_planned_is_refused(command: Command, options: tuple[object, ...], what: str) -> None:
    outcome = command("privacy", "plan", "--patients", 200, *options)
    assert outcome.code == 3 and what in outcome.err


def test_the_ratio_of_equal_sites_is_the_formula() -> None:
    planned = asked(320, 320, noise_multiplier=2.0, rounds=8, parameters=1000)
    by_hand = 32 * math.sqrt(8 * 10 * 2) / (2.0 * math.sqrt(1000))
    assert planned.signal.ratio == pytest.approx(by_hand) and planned.signal.patients_needed is None
    assert planned.signal.largest_model == math.floor(by_hand**2 * 1000 + 1e-6)
    assert asked(320, 320, noise_multiplier=2.0, rounds=8, parameters=planned.signal.largest_model).signal.ratio == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("known", [{"epsilon": 1.0}, {"noise_multiplier": 5.0}, {"epsilon": 1.0, "delta": 1e-4}])
def test_with_the_patients_needed_the_ratio_is_one(known: dict[str, float]) -> None:
    planned = asked(200, 100, parameters=100_000_000, **known)
    assert planned.signal.ratio is not None and planned.signal.ratio < 0.2
    needed = planned.signal.patients_needed
    assert needed is not None
    batch_size = round(32 * needed[0] / 200)
    grown = {key: value for key, value in known.items() if key != "delta"}
    there = asked(*needed, parameters=100_000_000, batch_size=batch_size, **grown)
    assert there.signal.ratio == pytest.approx(1.0, rel=0.02)


def test_words_for_people_and_one_envelope_for_programs(command: Command) -> None:
    arguments = ("privacy", "plan", "--patients", 200, "--patients", 50, "--epsilon", 3, "--parameters", 1_000_000)
    said = " ".join(command(*arguments).out.split())
    assert "the noise drowns the signal" in said and "noise for the filter" in said and "solved: noise multipliers" in said
    data = command(*arguments, "--json").data
    keys = {"declared_size", "sample_rate", "steps_per_round", "noise_multiplier", "epsilon", "delta", "steps"}
    sites = data["sites"]
    assert isinstance(sites, list) and all(keys | {"epsilon_filter", "filter_order", "noise_multiplier_filter"} <= site.keys() for site in sites)
    assert (data["solved"], data["rounds"], data["batch_size"]) == ("noise", 30, 32)
    signal = data["signal"]
    assert isinstance(signal, dict) and signal["ratio"] < 1 and len(signal["patients_needed"]) == 2
    assert "--parameters D tells more" in command(*arguments[:-2]).out.replace("\n", " ")


@pytest.mark.slow
def test_planning_and_explaining_need_no_torch() -> None:
    code = (
        "import sys; from wardround.__main__ import run; code = run(sys.argv[1:]); import wardround.claim_in_words; "
        "sys.exit(code or 10 * bool({'torch', 'opacus', 'flwr'} & sys.modules.keys()))"
    )
    arguments = ["privacy", "plan", "--patients", "50", "--epsilon", "2", "--noise-multiplier", "4", "--parameters", "1000", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["solved"] == "rounds"


def test_epsilon_of_the_best_of_several_runs(command: Command) -> None:
    arguments = ("privacy", "epsilon", "--event", "4.302,0.05,500", "--delta", 1e-5)
    data = command(*arguments, "--best-of", 10, "--json").data
    assert (data["law"], data["best_of"]) == ("geometric", 10) and data["epsilon_best"] == pytest.approx(2.31, abs=0.01)
    assert data["epsilon"] == command(*arguments, "--json").data["epsilon"]
    assert "stop with probability 0.1" in command(*arguments, "--best-of", 10).out.replace("\n", " ")
    assert command(*arguments, "--best-of", 0.5).code == 3
