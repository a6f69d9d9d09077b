"""What a study file is told when it does not fit: the key where there is one, what was expected, and the rule's own remedy."""

from collections.abc import Mapping

import pytest

from shared.errors import ConfigurationError
from shared.study import Study

BASE = {"name": "small", "task": "breast-cancer", "privacy": {"unit": "none"}}
DISTRIBUTED = {"noise": "distributed", "sites": 4}


@pytest.mark.parametrize(
    ("changes", "what", "remedy"),
    [
        (  # of several keys: no key in front, and the rule's own remedy
            {"strategy": {"name": "scaffold"}, "training": {"local_steps": 2, "momentum": 0.9}},
            "study.toml: strategy 'scaffold' is defined for plain SGD: expected training.momentum 0, got 0.9",
            "change it, or the strategy",
        ),
        (
            {"strategy": {"name": "apfl"}, "training": {"optimizer": "adam"}},
            "study.toml: strategy 'apfl' is defined for plain SGD: expected training.optimizer 'sgd', got 'adam'",
            "change it, or the strategy",
        ),
        (
            {"privacy": {"unit": "patient", "epsilon": 1.0}, "secure_aggregation": DISTRIBUTED, "training": {"local_steps": 1, "optimizer": "adam"}},
            "study.toml: secure_aggregation.noise 'distributed' holds for one sum a step, so expected optimizer 'sgd' without momentum or weight_decay, got "
            "optimizer 'adam'",
            "use a server optimizer such as 'fedadam'",
        ),
        (
            {"privacy": {"unit": "patient", "epsilon": 1.0}, "secure_aggregation": DISTRIBUTED, "training": {"local_steps": 1, "momentum": 0.5, "weight_decay": 0.01}},
            "study.toml: secure_aggregation.noise 'distributed' holds for one sum a step, so expected optimizer 'sgd' without momentum or weight_decay, got "
            "optimizer 'sgd', momentum 0.5, weight_decay 0.01",
            "use a server optimizer such as 'fedadam'",
        ),
        (
            {"secure_aggregation": DISTRIBUTED, "training": {"local_steps": 1}},
            "study.toml: secure_aggregation.noise 'distributed' is noise for a promise to patients, so expected privacy.unit 'patient' or 'record', got 'none'",
            "use noise 'local'",
        ),
        ({"privacy": {"unit": "none", "epsilon": 1.0}}, "study.toml: privacy: unit 'none' keeps no promise, so expected neither epsilon nor noise_multiplier", "remove it"),
        ({"rounds": {"count": 0}}, "study.toml: rounds.count: expected greater than or equal to 1, got 0", "correct this key"),
        ({"rounds": {"count": 0, "deadline": 3}}, "study.toml: rounds.deadline: ", "correct these keys"),
        ({"rounds": {"deadline": "10m; 5'"}}, "got \"10m; 5'\"", "correct this key"),  # what came is no remedy
    ],
)  # fmt: skip
def test_the_message_names_what_is_wrong_and_what_to_do(changes: Mapping[str, object], what: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Study.from_table({**BASE, **changes}, source="study.toml")
    assert what in caught.value.what and caught.value.remedy == remedy
    assert "(whole file)" not in str(caught.value)


@pytest.mark.parametrize(("written", "meant"), [("scafold", "scaffold"), ("FedAvg", "fedavg"), ("fed-per", "fedper"), ("krumm", "krum")])
def test_a_misspelt_strategy_is_recognised(written: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"strategy.name: expected one of .*, got {written!r} \\(did you mean {meant!r}\\?\\);") as caught:
        Study.from_table({**BASE, "strategy": {"name": written}})
    assert caught.value.remedy == "correct this key"


def test_a_rule_of_several_keys_is_told_to_others_without_their_values() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Study.from_table({**BASE, "strategy": {"name": "scaffold"}})
    assert caught.value.rule == "(whole file)"
