"""Doses by conservative Q-learning: the loss against equation 4 written out, the copy that follows, bad files, the simulator, and that it learns."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from client.private_probe import probe_model
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, SchemaError
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import resolve_task
from shared.tasks import text as tables_of_text
from shared.tasks.treatment_policy import (
    CONSERVATISM,
    COURSES,
    DISCOUNT,
    FEATURES,
    FOLLOWS,
    METRICS,
    MOST_ERROR,
    MOST_RETURN,
    NUM_DOSES,
    NUM_STEPS,
    DoseValues,
    admitted,
    clinicians,
    conservative_loss,
    course_sums,
    encoded,
    follow,
    greedy,
    load_cohort,
    observed,
    stepped,
    synthetic_cohort,
)

STUDY = Path(__file__).resolve().parents[2] / "studies" / "treatment-policy.toml"
TASK = resolve_task("treatment-policy")
HEADER = "patient,step,pressure,lactate,response,dose,reward,done"


def started(seed: int) -> DoseValues:
    model = DoseValues()
    set_parameters(model, initial_parameters(model, seed))
    return model


def rows_of(count: int = 30, steps: int = 3) -> list[str]:
    return [
        f"p{patient},{step},{-1 + 0.01 * patient},{'' if step == 1 else 1.5},0.8,{(patient + step) % 5},{0.1 * step},{int(step == steps - 1)}"
        for patient in range(count)
        for step in range(steps)
    ]


def table(folder: Path, rows: list[str], header: str = HEADER) -> Path:
    path = folder / "courses.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_the_loss_is_that_of_the_paper_written_out() -> None:
    cohort = synthetic_cohort(6, 1)
    outputs = torch.randn(6, NUM_STEPS, 2 * NUM_DOSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = conservative_loss(outputs, torch.from_numpy(cohort.labels))
    for course in range(6):
        terms = []
        for step in range(NUM_STEPS):
            dose, reward, goes_on, present = cohort.labels[course, step].tolist()
            if not present:
                continue
            values = outputs[course, step, :NUM_DOSES].tolist()
            target = reward
            if goes_on:
                after = outputs[course, step + 1]
                target += DISCOUNT * after[NUM_DOSES + int(after[:NUM_DOSES].argmax())].item()
            conservative = math.log(sum(math.exp(value) for value in values)) - values[int(dose)]
            terms.append((target - values[int(dose)]) ** 2 / 2 + CONSERVATISM * conservative)
        assert math.isclose(losses[course].item(), sum(terms) / len(terms), rel_tol=1e-6)


def test_steps_that_were_not_and_other_courses_do_not_matter() -> None:
    cohort = synthetic_cohort(200, 2)
    short = np.flatnonzero(cohort.labels[..., 3].sum(axis=1) < NUM_STEPS)
    assert 2 < len(short) < 200  # some die
    model, labels = started(1), torch.from_numpy(np.asarray(cohort.labels))
    states = torch.from_numpy(cohort.inputs[0].copy())
    before = conservative_loss(model(states), labels).detach()
    states[labels[..., 3] == 0] = 0.7
    assert torch.allclose(conservative_loss(model(states), labels), before, atol=1e-6)
    assert torch.allclose(conservative_loss(model(states[short[:1]]), labels[short[:1]]), before[short[:1]], atol=1e-6)


def test_no_gradient_goes_through_the_target_and_the_copy_only_follows() -> None:
    cohort = synthetic_cohort(10, 1)
    model = started(2)
    conservative_loss(model(torch.from_numpy(cohort.inputs[0])), torch.from_numpy(np.asarray(cohort.labels))).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.target.parameters())
    assert all(parameter.grad is not None for parameter in model.q.parameters())
    before = [(still.clone(), moved.clone()) for still, moved in zip(model.target.parameters(), model.q.parameters(), strict=True)]
    follow(model)
    for (still, moved), after, same in zip(before, model.target.parameters(), model.q.parameters(), strict=True):
        assert torch.allclose(after, still + FOLLOWS * (moved - still), atol=1e-6) and torch.equal(same, moved)
    assert TASK.refine is follow


def test_a_file_is_read(tmp_path: Path) -> None:
    cohort = load_cohort(table(tmp_path, rows_of()[::-1]), {})  # in any order
    assert cohort.num_patients == 30 and cohort.patient_ids[0] == "p29" and not cohort.synthetic
    states, labels = cohort.inputs[0][-1], np.asarray(cohort.labels, dtype=np.float64)[-1]
    assert states.shape == (NUM_STEPS, len(FEATURES)) and not states[3:].any() and not labels[3:].any()
    assert np.allclose(states[:3, 0], -0.5) and np.allclose(states[:3, 1], [-0.25, 0, -0.25]) and states[:3, 3].tolist() == [0, 1, 0]
    assert np.allclose(labels[:3], [[0.0, 0.0, 1.0, 1.0], [1.0, 0.1, 1.0, 1.0], [2.0, 0.2, 0.0, 1.0]])
    named = load_cohort(table(tmp_path, [f"{row},{'ab'[int(row[1]) % 2]}" for row in rows_of(6)], f"{HEADER},site"), {})
    assert named.attributes["site"].tolist() == ["a", "b"] * 3


BAD_ROWS = {
    "dose outside its set": "p3,1,-1,1,0.8,5,0,0", "half a dose": "p3,1,-1,1,0.8,1.5,0,0", "no dose": "p3,1,-1,1,0.8,,0,0",
    "NaN": "p3,1,nan,1,0.8,1,0,0", "infinite": "p3,1,-1,inf,0.8,1,0,0", "text": "p3,1,low,1,0.8,1,0,0", "missing where it may not be": "p3,1,,1,0.8,1,0,0",
    "reward too large": "p3,1,-1,1,0.8,1,7,0", "done too early": "p3,1,-1,1,0.8,1,0,1", "step twice": "p3,0,-1,1,0.8,1,0,0",
    "step left out": "p3,7,-1,1,0.8,1,0,0", "step beyond the last": "p3,12,-1,1,0.8,1,0,0",
    "digits of another script": "p3,1,-1,1,0.8,\u0661,0,0", "Python's digits": "p3,1,-1,1,0.8,1,0_1,0", "a long number": f"p3,1,-1,{'0' * 9999}1,0.8,1,0,0",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BAD_ROWS))
def test_a_patient_with_a_bad_row_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    rows = [BAD_ROWS[kind] if row.startswith("p3,1,") else row for row in rows_of()]
    cohort = load_cohort(table(tmp_path, rows), {})
    assert cohort.num_patients == 29 and "p3" not in cohort.patient_ids and cohort.notes == {"patients_dropped": 1}
    assert np.isfinite(cohort.inputs[0]).all() and np.isfinite(cohort.labels).all()
    with pytest.raises(SchemaError, match="got 1 of 30") as error:
        load_cohort(table(tmp_path, rows), {"tolerance": 0.01})
    assert "p3" not in str(error.value)


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join([HEADER, *rows_of()])
    cases: list[tuple[bytes, type[DataError] | tuple[type[DataError], ...], str | None]] = [
        (b"", DataMissingError, "empty"),
        (HEADER.encode(), (DataMissingError, SchemaError), "row"),
        (text.replace("dose", "amount", 1).encode(), SchemaError, "'dose'"),
        (text.encode() + b"\n\xff\xfe,0\n", SchemaError, "UTF-8"),
        (text.encode() + b"\n,0,-1,1,0.8,1,0,1\n", SchemaError, "identifier"),
        (text.encode() + b"\np9,1,2,3,4,5,6,7,8,9,10\n", SchemaError, "fields"),
        (text[: len(text) // 2].encode(), SchemaError, None),
    ]
    for body, kind, words in cases[:-1]:
        (tmp_path / "courses.csv").write_bytes(body)
        with pytest.raises(kind, match=words):
            load_cohort(tmp_path / "courses.csv", {})
    (tmp_path / "courses.csv").write_bytes(cases[-1][0])  # cut off: who was the last has no last step, and is left out
    assert load_cohort(tmp_path / "courses.csv", {"tolerance": 0.2}).notes["patients_dropped"] == 1
    quoted = text.replace("p7,", '"p\n7",')
    assert load_cohort(table(tmp_path, quoted.split("\n")[1:]), {}).num_patients == 30
    for path in (None, tmp_path / "none.csv"):
        with pytest.raises(DataMissingError):
            load_cohort(path, {})
    with pytest.raises(ConfigurationError, match="gamma"):
        load_cohort(tmp_path / "courses.csv", {"gamma": 1})

    def refuse(*_: object, **__: object) -> object:
        raise DataAccessError("may not read", "ask")

    monkeypatch.setattr("shared.tasks.treatment_policy.read_texts", refuse)
    assert tables_of_text.read_texts is not refuse
    with pytest.raises(DataAccessError):
        load_cohort(tmp_path / "courses.csv", {"tolerance": 0.5})


@pytest.mark.parametrize("mark", ["NA", "nan", "?"])
def test_a_lactate_marked_as_missing_is_missing_as_everywhere(tmp_path: Path, mark: str) -> None:
    rows = [f"p3,1,-1,{mark},0.8,1,0,0" if row.startswith("p3,1,") else row for row in rows_of()]
    cohort = load_cohort(table(tmp_path, rows), {})
    assert cohort.num_patients == 30 and cohort.inputs[0][cohort.patient_ids.index("p3"), 1, FEATURES.index("lactate not measured")] == 1


def test_a_folder_with_one_table_and_a_column_twice(tmp_path: Path) -> None:
    path = table(tmp_path, rows_of())
    assert load_cohort(path.parent, {}).num_patients == 30
    table(tmp_path, [f"{row},0" for row in rows_of()], f"{HEADER},pressure")
    with pytest.raises(SchemaError, match="one column 'pressure', found 2"):
        load_cohort(path, {})


def test_two_sites_for_one_patient(tmp_path: Path) -> None:
    rows = [f"{row},{'b' if row.startswith('p3,1,') else 'a'}" for row in rows_of()]
    assert load_cohort(table(tmp_path, rows, f"{HEADER},site"), {}).num_patients == 29


def test_features_are_scaled_by_declared_ranges() -> None:
    features = encoded(np.array([[-2.0, 4.0, 1.0], [9.0, np.nan, 0.0]]), np.array([0, NUM_STEPS - 1]))
    assert features.tolist() == [[-1, 1, 0, 0, -1], [1, 0, -1, 1, 1]]


def test_metrics_are_bounded_and_agree() -> None:
    cohort = synthetic_cohort(50, 3)
    rng = np.random.default_rng(0)
    for scale in (1.0, 1e9):
        for row in range(50):
            sums = course_sums(rng.normal(size=(1, NUM_STEPS, 2 * NUM_DOSES)) * scale, cohort.select(np.array([row])))
            assert sums.min() >= 0 and sums.max() <= 1 and np.linalg.norm(sums) <= COURSES.sensitivity and COURSES.could_be(sums, patients=1)
    assert np.isfinite(course_sums(np.full((50, NUM_STEPS, 2 * NUM_DOSES), np.nan), cohort)).all()
    logged = np.zeros((50, NUM_STEPS, 2 * NUM_DOSES))
    np.put_along_axis(logged, cohort.labels[..., :1].astype(int), 1.0, axis=-1)
    values = {metric.name: metric.of(course_sums(logged, cohort)) for metric in METRICS}
    returns = (np.asarray(cohort.labels, dtype=np.float64)[..., 1] * DISCOUNT ** np.arange(NUM_STEPS)).sum(axis=1)
    assert values["agreement"] == 1 and math.isclose(values["logged_return"] or 0, returns.mean(), abs_tol=1e-5)
    assert math.isclose(values["believed_return"] or 0, 1, abs_tol=1e-9) and 0 <= (values["td_error"] or -1) <= MOST_ERROR
    assert np.abs(returns).max() <= MOST_RETURN and [metric.of(np.zeros(5)) for metric in METRICS] == [None] * 4


def test_it_says_that_it_is_no_advice() -> None:
    assert "no advice" in TASK.title and "no advice" in TASK.source and "no advice" in STUDY.read_text()


def test_it_trains_with_privacy_and_a_course_is_judged_alike_in_any_company() -> None:
    probe_model(TASK, Study.load(STUDY))
    model = started(1)
    cohort = synthetic_cohort(20, 1)
    together = predict_in_batches(model, cohort.inputs)
    assert torch.allclose(together[3:4], predict_in_batches(model, cohort.select(np.array([3])).inputs), atol=1e-6)


def test_the_synthetic_cohort_is_keyed_and_its_sites_differ() -> None:
    cohort, again, other = synthetic_cohort(400, 5), synthetic_cohort(400, 5), synthetic_cohort(400, 6)
    assert np.array_equal(cohort.labels, again.labels) and not np.array_equal(cohort.labels, other.labels)
    told = np.asarray(cohort.labels, dtype=np.float64)
    present, doses = told[..., 3] > 0, told[..., 0]
    means = [doses[cohort.attributes["site"] == site][present[cohort.attributes["site"] == site]].mean() for site in ("south", "east")]
    assert means[0] > means[1] + 0.5  # of habits 0.9 and -0.7
    assert 0.2 < (cohort.inputs[0][..., 3][present]).mean() < 0.4 and cohort.inputs[0].min() >= -1 and cohort.inputs[0].max() <= 1
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


def mean_return(policy: DoseValues | None, num_patients: int) -> float:
    """Of so many patients treated by the greedy policy, or by the clinicians."""
    rng = np.random.default_rng(11)
    patients, total = admitted(num_patients, rng), np.zeros(num_patients)
    for step in range(NUM_STEPS):
        values = observed(patients, rng)
        features = encoded(values, np.full(num_patients, step))
        liked = None if policy is None else greedy(predict_in_batches(policy, (features[:, None],))[:, 0].numpy())
        dose = clinicians(values, np.arange(num_patients) % 4, rng) if liked is None else liked
        patients, reward = stepped(patients, dose, rng)
        total += DISCOUNT**step * reward
    return float(total.mean())


@pytest.mark.slow
def test_it_learns_a_policy_that_is_better_than_the_clinicians() -> None:
    """A return has a standard deviation of about 4, so a mean of 1,500 has an error of 0.1, and 1 is out of chance's reach; an untrained policy is worse."""
    cohort, model = synthetic_cohort(1200, 1), started(0)
    states, labels = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(np.asarray(cohort.labels))
    optimizer, rng = torch.optim.Adam(model.q.parameters(), lr=0.003), np.random.default_rng(0)
    untrained = mean_return(model, 1500)
    for step in range(800):
        rows = torch.from_numpy(rng.integers(0, 1200, size=64))
        optimizer.zero_grad()
        conservative_loss(model(states[rows]), labels[rows]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 9:
            follow(model)
    assert mean_return(model, 1500) > max(mean_return(None, 1500), untrained) + 1
