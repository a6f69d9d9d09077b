"""A study is its TOML file: it reads back equal, every bad value is named, and its fingerprint is its content."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import nearest, read_toml
from shared.errors import ConfigurationError
from shared.study import Study, parse_duration
from shared.study_tables import flatten, merge_tables, toml_text

BASE = {"name": "s", "task": "t", "privacy": {"epsilon": 3.0, "delta": 1e-4}}


def study(**changes: object) -> Study:
    return Study.from_table(BASE).replace(**changes)


positive = st.floats(min_value=1e-6, max_value=1e3, allow_nan=False)
texts = st.text(max_size=40)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, object]:
    optimizer = draw(st.sampled_from(["sgd", "adam", "adamw"]))
    training: dict[str, object] = {"optimizer": optimizer, "learning_rate": draw(positive), "batch_size": draw(st.integers(1, 10**6))}
    if optimizer == "sgd":
        training["momentum"] = draw(st.floats(0.0, 0.99))
    training[draw(st.sampled_from(["local_epochs", "local_steps"]))] = draw(st.integers(1, 1000))
    privacy = draw(
        st.one_of(
            st.just({"unit": "none"}),
            st.fixed_dictionaries({"epsilon": st.floats(0.01, 100.0)}, optional={"delta": st.floats(1e-12, 0.0999), "max_grad_norm": positive}),
            st.fixed_dictionaries({"noise_multiplier": st.floats(0.2, 100.0), "unit": st.sampled_from(["patient", "record"])}),
        )
    )
    federation = draw(
        st.one_of(
            st.fixed_dictionaries({"sites": st.integers(1, 1000), "partition": st.sampled_from(["iid", "dirichlet", "quantity", "shards"])}),
            st.fixed_dictionaries({"partition": st.just("column"), "column": texts.filter(bool)}),
            st.just({"partition": "natural"}),
        )
    )
    strategy = draw(st.sampled_from([{}, {"name": "fedprox", "proximal_mu": 0.3}, {"name": "fedadam", "beta_1": 0.5}, {"fraction": 0.5}]))
    faults = draw(
        st.one_of(
            st.fixed_dictionaries({"sites": st.one_of(st.integers(1, 9), st.lists(texts, min_size=1))}, optional={"kind": st.just("late")}),
            st.just({"kind": "scaled", "factor": -3.0, "share": 0.5}),
            st.none(),
        )
    )
    return {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
        "task": draw(texts.filter(lambda text: bool(text) and not text.endswith(".toml"))),
        "purpose": draw(texts.filter(str.isprintable)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "rounds": {"count": draw(st.integers(1, 1000)), "require": draw(st.one_of(st.just("all"), st.integers(1, 9)))},
        "training": training, "strategy": strategy, "privacy": privacy, "federation": federation,
        **({} if faults is None else {"faults": faults}),
    }  # fmt: skip


@pytest.mark.slow
@given(tables())
def test_toml_reads_back_equal(tmp_path: Path, table: dict[str, object]) -> None:
    written = Study.from_table(table)
    path = tmp_path / "study.toml"
    path.write_text(written.to_toml(), encoding="utf-8", newline="")
    read = Study.load(path)
    assert read == written and read.fingerprint() == written.fingerprint() and read.to_toml() == written.to_toml()


@pytest.mark.slow
@given(tables(), tables())
def test_fingerprints_agree_exactly_when_contents_do(one: dict[str, object], other: dict[str, object]) -> None:
    first, second = Study.from_table(one), Study.from_table(other)
    assert (first.fingerprint() == second.fingerprint()) == (first.to_table() == second.to_table())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "s2"}, {"task": "t2"}, {"seed": 8}, {"purpose": "x"}, {"rounds": {"count": 31}}, {"rounds": {"require": 3}},
        {"rounds": {"deadline": "9m"}}, {"training": {"learning_rate": 0.11}}, {"training": {"momentum": 0.1}}, {"training": {"local_steps": 1}},
        {"training": {"batch_size": 33}}, {"strategy": {"name": "fedprox"}}, {"strategy": {"weights": "equal"}}, {"privacy": {"epsilon": 3.0001}},
        {"privacy": {"delta": 1.1e-4}}, {"privacy": {"unit": "record"}}, {"privacy": {"unit": "none"}}, {"privacy": {"max_grad_norm": 2.0}},
        {"faults": {}}, {"faults": {"sites": 2}}, {"faults": {"kind": "inf"}}, {"strategy": {"largest_update": 5}},
        {"privacy": {"noise_source": "os"}}, {"privacy": {"evaluation_epsilon": 1.0}}, {"evaluation": {"folds": 2}}, {"federation": {"sites": 4}}, {"federation": {"alpha": 0.4}},
    ],
)  # fmt: skip
def test_every_change_of_content_changes_the_fingerprint(change: dict[str, object]) -> None:
    assert study(**change).fingerprint() != study().fingerprint()


def test_saying_a_default_or_a_whole_number_changes_nothing() -> None:
    said = Study.from_table(
        {**BASE, "seed": 7, "training": {"local_epochs": 1, "optimizer": "sgd"}, "strategy": {}, "privacy": {"epsilon": 3, "delta": 1e-4}}
    )
    assert said == study() and said.fingerprint() == study().fingerprint()


def test_noised_statistics_are_asked_for_by_a_budget() -> None:
    noised = study(privacy={"evaluation_epsilon": 2})
    assert noised.noised_statistics and noised.privacy.evaluation_epsilon == 2.0 and noised.privacy.epsilon == 3.0
    assert not study().noised_statistics and "evaluation_epsilon" not in study().to_toml()  # studies without it keep their fingerprint
    assert noised.fingerprint() != study().fingerprint() and Study.from_table(noised.to_table()) == noised
    plain = noised.replace(privacy={"unit": "none"})  # as the baselines do
    assert not plain.noised_statistics and not plain.private
    assert noised.replace(privacy={"noise_multiplier": 2.0}).privacy.evaluation_epsilon == 2.0
    with pytest.raises(ConfigurationError, match="a patient tested in one fold is trained on in the others"):
        noised.replace(evaluation={"folds": 3})


def test_a_study_without_faults_and_bound_is_what_it_was() -> None:
    """Studies keep their fingerprint: hospitals approved it."""
    assert study().faults is None and "faults" not in study().to_toml() and "largest_update" not in study().to_toml()
    planted = study(faults={"sites": ["b", "a"], "kind": "scaled", "factor": 10})
    assert planted.to_table()["faults"] == {"sites": ["b", "a"], "kind": "scaled", "factor": 10.0, "from_round": 1, "share": 1.0}
    assert Study.from_table(planted.to_table()) == planted and planted.replace(faults=None) == study()


def test_replace_rules() -> None:
    assert study(privacy={"noise_multiplier": 2.0}).privacy.epsilon is None
    assert study(privacy={"epsilon": 1.0}).privacy.delta == 1e-4
    plain = study(privacy={"unit": "none"})
    assert not plain.private and plain.privacy.epsilon is None
    assert plain.replace(privacy={"epsilon": 2}).privacy.unit == "patient"
    assert study(training={"local_steps": 3}).training.local_steps == 3
    assert study(training={"local_steps": 3}).replace(training={"local_epochs": 2}).training.local_steps is None
    prox = study(strategy={"name": "fedprox", "proximal_mu": 0.5, "fraction": 0.5})
    assert prox.replace(strategy={"proximal_mu": 0.7}).strategy.fraction == 0.5
    assert prox.replace(strategy={"name": "fedadam"}).strategy.fraction == 1.0  # another strategy's options are not carried over
    assert study(federation={"sites": 4}).replace(federation={"partition": "natural"}).federation.sites is None
    assert study(federation={"partition": "column", "column": "ward"}).replace(federation={"sites": 4}).federation.partition == "iid"
    assert study().privacy.epsilon == 3.0  # the original is untouched


BAD = [
    ({"privacy": {"epsilon": 0}}, "privacy.epsilon: expected greater than 0, got 0"),
    ({"privacy": {"epsilon": -1.5}}, "privacy.epsilon: expected greater than 0, got -1.5"),
    ({"privacy": {"epsilon": math.nan}}, "privacy.epsilon: expected a finite number, got nan"),
    ({"privacy": {"epsilon": math.inf}}, "privacy.epsilon: expected a finite number, got inf"),
    ({"privacy": {"epsilon": "3"}}, "privacy.epsilon: expected a number, got '3'"),
    ({"privacy": {"epsilon": True}}, "privacy.epsilon: expected a number, got True"),
    ({"privacy": {"epsilon": [3]}}, "privacy.epsilon: expected a number, got [3]"),
    ({"privacy": {"epsilon": 1, "delta": 0.1}}, "privacy.delta: expected less than 0.1, got 0.1"),
    ({"privacy": {"epsilon": 1, "delta": 0}}, "privacy.delta: expected greater than 0, got 0"),
    ({"privacy": {"epsilon": 1, "noise_multiplier": 1}}, "privacy: expected either epsilon or noise_multiplier, got both"),
    ({"privacy": {}}, "privacy: expected either epsilon or noise_multiplier, got neither"),
    ({"privacy": {"unit": "none", "epsilon": 1}}, "privacy: unit 'none' keeps no promise, so expected neither"),
    ({"privacy": {"unit": "none", "evaluation_epsilon": 1}}, "privacy: unit 'none' keeps no promise, so expected no evaluation_epsilon"),
    ({"privacy": {"epsilon": 1, "evaluation_epsilon": 0}}, "privacy.evaluation_epsilon: expected greater than 0, got 0"),
    ({"privacy": {"epsilon": 1, "evaluation_epsilon": 101}}, "privacy.evaluation_epsilon: expected less than or equal to 100, got 101"),
    (
        {"privacy": {"epsilon": 1, "evaluation_epsilon": 1}, "evaluation": {"folds": 2}},
        ": privacy.evaluation_epsilon with evaluation.folds = 2: expected folds = 1",
    ),
    ({"privacy": {"unit": "ward", "epsilon": 1}}, "privacy.unit: expected 'patient', 'record', 'site' or 'none', got 'ward'"),
    ({"privacy": {"noise_multiplier": 0}}, "privacy.noise_multiplier: expected greater than"),
    ({"privacy": {"noise_multiplier": 1e-9}}, "privacy.noise_multiplier: expected greater than"),
    ({"privacy": {"epsilon": 1, "max_grad_norm": 0}}, "privacy.max_grad_norm: expected greater than"),
    ({"privacy": {"epsilon": 1, "max_grad_norm": 1e-44}}, "privacy.max_grad_norm: expected greater than"),
    ({"training": {"batch_size": 0}}, "training.batch_size: expected greater than or equal to 1, got 0"),
    ({"training": {"batch_size": 2.5}}, "training.batch_size: expected a valid integer, got 2.5"),
    ({"training": {"learning_rate": 0}}, "training.learning_rate: expected greater than 0, got 0"),
    ({"training": {"optimizer": "adam", "momentum": 0.9}}, "training: momentum belongs to optimizer 'sgd', got optimizer 'adam'; remove momentum"),
    ({"training": {"local_steps": 3, "local_epochs": 1}}, "training: expected local_epochs or local_steps, got both"),
    ({"training": {"optimizer": "sdg"}}, "training.optimizer: expected 'sgd', 'adam' or 'adamw', got 'sdg'"),
    ({"training": 3}, "training: expected a table, got 3"),
    ({"rounds": {"count": 0}}, "rounds.count: expected greater than or equal to 1, got 0"),
    ({"rounds": {"require": 0}}, "rounds.require: expected"),
    ({"rounds": {"deadline": "soon"}}, "rounds.deadline: expected a duration above zero such as '90s', '10m' or '2h', got 'soon'"),
    ({"rounds": {"deadline": "0s"}}, "rounds.deadline: expected a duration above zero"),
    ({"strategy": {"name": "fedavgg"}}, "strategy.name: expected one of 'fedavg'"),
    ({"strategy": {"proximal_mu": 1}}, "strategy.proximal_mu: unknown key"),
    ({"federation": {"partition": "column"}}, "federation: partition 'column' with column None: expected partition 'column' and a column"),
    ({"federation": {"column": "ward"}}, "federation: partition 'iid' with column 'ward'"),
    ({"federation": {"partition": "natural", "sites": 3}}, "federation: partition 'natural' takes its sites from the data, got sites = 3"),
    ({"federation": {"partition": "column", "column": "ward", "sites": 3}}, "takes its sites from the data, got sites = 3"),
    ({"federation": {"sites": 0}}, "federation.sites: expected greater than or equal to 1, got 0"),
    ({"faults": {"sites": 0}}, "faults.sites: expected names of sites, or how many, got 0"),
    ({"faults": {"sites": []}}, "faults.sites: expected names of sites, or how many, got []"),
    ({"faults": {"sites": [1]}}, "faults.sites: expected names of sites, or how many, got [1]"),
    ({"faults": {"sites": True}}, "faults.sites: expected names of sites, or how many, got True"),
    ({"faults": {"kind": "null"}}, "faults.kind: expected 'nan', 'inf', 'scaled'"),
    ({"faults": {"knd": "nan"}}, "faults.knd: unknown key (did you mean 'kind'?); known here: claimed_size, factor"),
    ({"faults": {"factor": 3}}, "faults: factor belongs to kind 'scaled', got kind 'nan'; remove factor"),
    ({"faults": {"claimed_size": 3}}, "faults: claimed_size belongs to kind 'claimed-size', got kind 'nan'; remove claimed_size"),
    ({"faults": {"share": 0}}, "faults.share: expected greater than 0"),
    ({"faults": {"from_round": 0}}, "faults.from_round: expected greater than or equal to 1, got 0"),
    ({"strategy": {"largest_update": 0}}, "strategy.largest_update: expected greater than 0, got 0"),
    ({"evaluation": {"folds": 0}}, "evaluation.folds: expected greater than or equal to 1, got 0"),
    ({"name": "a b"}, "name: expected"),
    ({"seed": -1}, "seed: expected greater than or equal to 0, got -1"),
    ({"privcy": {}}, "privcy: unknown key (did you mean 'privacy'?)"),
    ({"training": {"batchsize": 3}}, "training.batchsize: unknown key (did you mean 'batch_size'?)"),
    ({"strategy": {"name": "fedprox", "proximal": 1}}, "strategy.proximal: unknown key (did you mean 'proximal_mu'?)"),
]


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[str(change) for change, _ in BAD])
def test_a_bad_value_is_named_with_file_key_expected_and_got(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Study.from_table({**BASE, **change}, source="my/study.toml")
    assert f"my/study.toml: {expected}" in str(caught.value).replace("\n", " ") or expected in str(caught.value)
    assert str(caught.value).startswith("my/study.toml: ") and caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"study: task: expected a value, got none"):
        Study.from_table({"name": "s", "privacy": {"unit": "none"}})


@pytest.mark.parametrize(("content", "expected"), [(None, "found none"), (b"name = ", "not valid TOML"), (b"\xff\xfe", "not valid TOML")])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "study.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=expected):
        Study.load(path)
    with pytest.raises(ConfigurationError, match="got a folder"):
        read_toml(tmp_path)


def test_a_schema_file_is_found_beside_its_study(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "study.toml").write_text('name = "s"\ntask = "mine.toml"\nprivacy = { unit = "none" }\n')
    assert Study.load(tmp_path / "study.toml").task == str(tmp_path / "mine.toml")


def test_shipped_studies_load() -> None:
    shipped = sorted((Path(__file__).parents[2] / "studies").glob("*.toml"))
    assert {path.stem for path in shipped} >= {"breast-cancer", "heart-disease"}
    for path in shipped:
        table = read_toml(path)
        if "grid" not in table:
            assert Study.load(path).fingerprint() == Study.from_table(Study.load(path).to_table()).fingerprint()


@pytest.mark.parametrize(("text", "seconds"), [("250ms", 0.25), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "-1s", "0m", "1d", "1h30m", "ms"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration above zero"):
        parse_duration(text)


def test_tables_merge_and_flatten() -> None:
    assert merge_tables({"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}, "b": 1}
    assert flatten({"rounds": {"count": 3}, "seed": 7}) == {"rounds.count": 3, "seed": 7}
    assert nearest("trainin", ["training", "rounds"]) == " (did you mean 'training'?)" and nearest("zzz", ["training"]) == ""
    with pytest.raises(ConfigurationError, match="cannot write object as TOML"):
        toml_text({"a": object()})


@pytest.mark.parametrize("purpose", ["\x1b[2Jbudget  epsilon 0.01", "\x9b31m", "a\rb", "\u202eevil", "a\x00"])
def test_a_purpose_commands_no_terminal(purpose: str) -> None:
    """Whoever decides reads it on a terminal."""
    table = {"name": "s", "task": "t", "privacy": {"epsilon": 1.0}}
    with pytest.raises(ConfigurationError, match="purpose: expected text and line breaks"):
        Study.from_table({**table, "purpose": purpose})
    assert Study.from_table({**table, "purpose": "Ärzte fragen:\nwer wird krank?"}).purpose
