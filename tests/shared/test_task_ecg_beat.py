"""Heartbeats: kinds, what is cut out and how early it came, patients and their files, synthetic beats, and bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.metrics import finish_metrics
from shared.models import predict_in_batches
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.ecg_beat import (
    AFTER,
    BEFORE,
    KIND_WEIGHTS,
    KINDS,
    LENGTH,
    MILLIVOLTS,
    NAME,
    SYMBOLS,
    SYNTHETIC_BEATS,
    BeatModel,
    EcgOptions,
    beats_of,
    evenly,
    load_cohort,
    rhythm_of,
    synthetic_cohort,
    weighted_loss,
    windows,
)
from shared.tasks.wfdb_records import Lead
from simulations.blocks.choice import check_alike
from tests.shared.wfdb_files import CODES, ECG, NO_VALUE, NUM, RATE, SECRET, needs_ecg, write_record

STUDY = Path(__file__).resolve().parents[2] / "studies" / "ecg-beat.toml"
TASK = resolve_task(NAME)
PATIENTS = "record,patient,site,age,sex\n"


def ward(folder: Path, count: int = 24, patients: str | None = None) -> Path:
    """A folder of records with eight beats each, and maybe a table of patients."""
    for index in range(count):
        write_record(folder, f"r{index:02d}")
    if patients is not None:
        (folder / "patients.csv").write_text(patients)
    return folder


def rows(count: int = 24) -> list[str]:
    return [f"r{index:02d},p{index // 2},s{index // 12},{40 + index // 2},{'FM'[index // 2 % 2]}" for index in range(count)]


def lead_with(millivolts: np.ndarray, rate: float = 125.0) -> Lead:
    return Lead(millivolts=millivolts, rate=rate, preferred=True)


# What a beat is -----------------------------------------------------------------------------------------------------------------


def test_every_symbol_of_a_beat_has_a_kind_and_no_other_mark_has(tmp_path: Path) -> None:
    symbols = sorted(CODES)
    write_record(tmp_path, marks=[(50 + 80 * place, symbol) for place, symbol in enumerate(symbols)])
    found = load_cohort(tmp_path, {})
    beats = [symbol for symbol in symbols if symbol not in "+~"]
    assert [KINDS[label] for label in found.labels.tolist()] == [next(kind for kind in KINDS if symbol in SYMBOLS[kind]) for symbol in beats]
    assert len(beats) == sum(len(symbols) for symbols in SYMBOLS.values()) == 19


def test_a_beat_is_cut_out_around_its_mark() -> None:
    signal = np.random.default_rng(1).normal(size=1001)
    signal -= np.median(signal)
    marks = np.array([200, 321, 500])
    cut = windows(lead_with(signal), marks)
    assert cut.shape == (3, 1, LENGTH) and cut.dtype == np.float32
    assert np.allclose(cut[1, 0], np.clip(signal[321 - BEFORE : 321 + AFTER] / MILLIVOLTS, -2, 2), atol=1e-6)
    assert np.allclose(windows(lead_with(signal + 7), marks), cut, atol=1e-6)  # whatever the level
    early, late = windows(lead_with(signal), np.array([10, 995]))
    assert (early[0, : BEFORE - 10] == 0).all() and (late[0, BEFORE + 6 :] == 0).all()  # the record had not begun, or was over


@pytest.mark.parametrize("rate", [100.0, 128.0, 250.0, 360.0, 1000.0, 257.3])
def test_the_mark_stays_in_its_place_at_every_rate(rate: float) -> None:
    time = np.arange(int(20 * rate)) / rate
    at = np.array([3.0, 7.21, 16.4])
    signal = sum(np.exp(-0.5 * ((time - middle) / 0.03) ** 2) for middle in at)
    cut = windows(lead_with(np.asarray(signal), rate), np.rint(at * rate).astype(np.int64))
    assert (np.abs(cut[:, 0].argmax(axis=1) - BEFORE) <= 1).all() and np.allclose(cut.max(axis=(1, 2)), 1 / MILLIVOLTS, atol=0.02)


def test_intervals_are_told_against_the_patient_s_own() -> None:
    before = np.array([np.nan, 1.0, 1.0, 0.5, 1.5, 1.0, 1.0])
    after = np.array([1.0, 1.0, 0.5, 1.5, 1.0, 1.0, np.nan])
    rhythm = rhythm_of(before, after)
    assert rhythm[:, 0].tolist() == pytest.approx([0, 0, 0, -1, np.log2(1.5), 0, 0]) and rhythm[3, 1] == pytest.approx(np.log2(1.5))
    assert (
        rhythm[:, 2] == pytest.approx(np.log2(1 / 0.8)) and rhythm[:, 3].tolist() == [1, 0, 0, 0, 0, 0, 0] and rhythm[:, 4].tolist() == [0] * 6 + [1]
    )
    assert np.allclose(rhythm_of(before * 0.8, after * 0.8)[:, [0, 1, 3, 4]], rhythm[:, [0, 1, 3, 4]], atol=1e-6)
    assert rhythm_of(np.array([np.nan]), np.array([np.nan])).tolist() == [[0, 0, 0, 1, 1]]
    assert rhythm_of(np.array([1.0, 60.0]), np.array([60.0, 1e-3])).min() == -1  # cut to the range


def test_a_beat_without_signal_is_left_out_and_counted(tmp_path: Path) -> None:
    values = write_record(tmp_path)[:, 0]
    values[810:815] = NO_VALUE  # after the beat at 600 is over, before that at 1000 begins
    (tmp_path / "r.dat").write_bytes(values.astype("<i2").tobytes())
    cohort = load_cohort(tmp_path, {})
    assert cohort.num_records == 7 and cohort.notes["beats_without_signal"] == 1
    assert not cohort.inputs[1][2:4, 3:].any()  # the intervals to it are known all the same
    lead = lead_with(np.full(NUM, np.nan), RATE)
    with pytest.raises(SchemaError, match="around any"):
        beats_of(tmp_path, "r", lead, EcgOptions(), source="record 1")


@given(st.integers(0, 300), st.integers(1, 60))
def test_beats_are_thinned_by_time_alone(count: int, most: int) -> None:
    chosen = evenly(count, most)
    assert len(chosen) == min(count, most) and (np.diff(chosen) > 0).all() and (count == 0 or (chosen[0] >= 0 and chosen[-1] < count))
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


# Files and patients -------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_and_a_record_is_a_patient(tmp_path: Path) -> None:
    cohort = load_cohort(ward(tmp_path, 3), {})
    assert cohort.patient_ids == ("r00", "r01", "r02") and cohort.num_records == 24 and (cohort.labels == 0).all() and not cohort.attributes
    assert cohort.inputs[0].shape == (24, 1, LENGTH) and cohort.inputs[1].shape == (24, 5) and cohort.labels.dtype == np.int64
    assert cohort.notes == {"records_dropped": 0, "records_of_another_lead": 0, "beats_without_signal": 0, "beats_above_most_beats": 0}


@pytest.mark.slow
def test_a_table_says_whose_records_they_are(tmp_path: Path) -> None:
    cohort = load_cohort(ward(tmp_path, patients=PATIENTS + "\n".join(rows())), {})
    assert cohort.patient_ids == tuple(f"p{index}" for index in range(12)) and np.bincount(cohort.patient_of_record).tolist() == [16] * 12
    assert cohort.attributes["site"].tolist() == ["s0"] * 6 + ["s1"] * 6 and cohort.attributes["age"][3] == "43"
    assert [TASK.subgroups[0].groups_of(cohort.attributes["sex"])[index] for index in (0, 1)] == ["female", "male"]
    thinned = load_cohort(tmp_path, {"most_beats": 5})
    assert np.bincount(thinned.patient_of_record).tolist() == [5] * 12 and thinned.notes["beats_above_most_beats"] == 12 * 11


def test_the_number_of_beats_of_a_patient_is_bounded_evenly_over_time(tmp_path: Path) -> None:
    write_record(tmp_path, marks=[(90 * beat, "NNV"[beat % 3]) for beat in range(1, 21)])
    whole, few = load_cohort(tmp_path, {}), load_cohort(tmp_path, {"most_beats": 7})
    assert (whole.num_records, few.num_records, few.notes["beats_above_most_beats"]) == (20, 7, 13)
    assert np.array_equal(few.inputs[0], whole.inputs[0][evenly(20, 7)]) and np.array_equal(few.inputs[1], whole.inputs[1][evenly(20, 7)])


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("record,site\n", "'patient'"), ("record,patient\nr00,a\nr00,b\n", "every record once"), (PATIENTS, "at least one row"),
        (PATIENTS + "\n".join([*rows(5), "r05,p2,s9,42,F"]), "one 'site'"), (PATIENTS + "\n".join([*rows(5), "r05,,s0,42,F"]), "identifier"),
        (PATIENTS + "\n".join(rows(4)), "got 2 of 6"), ("record,patient\nr00,a,b\n", "same number"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused(tmp_path: Path, table: str, match: str) -> None:
    ward(tmp_path, 6, patients=table)
    with pytest.raises((SchemaError, DataMissingError), match=match):
        load_cohort(tmp_path, {})


def test_a_line_break_within_quotes_is_part_of_a_name(tmp_path: Path) -> None:
    cohort = load_cohort(ward(tmp_path, 6, PATIENTS + "\n".join([*rows(5), 'r05,"p2\nb",s0,42,F'])), {})
    assert cohort.patient_ids == ("p0", "p1", "p2", "p2\nb")


def test_a_table_of_other_bytes_or_permissions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ward(tmp_path, 2)
    (tmp_path / "patients.csv").write_bytes(b"record,patient\nr00,M\xfcller\n")
    with pytest.raises(SchemaError, match="UTF-8"):
        load_cohort(tmp_path, {})

    def forbidden(_: Path) -> bytes:
        raise PermissionError

    (tmp_path / "patients.csv").unlink()
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(tmp_path, {})


@pytest.mark.slow
def test_bad_records_are_skipped_up_to_the_tolerance(tmp_path: Path) -> None:
    ward(tmp_path)
    (tmp_path / "r03.atr").unlink()
    assert load_cohort(tmp_path, {}).notes["records_dropped"] == 1 and "r03" not in load_cohort(tmp_path, {}).patient_ids
    (tmp_path / "r07.dat").write_bytes(b"")
    with pytest.raises(SchemaError, match=r"got 2 of 24 .the first: .*record 4: annotations: expected a file, found none"):
        load_cohort(tmp_path, {})
    assert load_cohort(tmp_path, {"tolerance": 0.1}).num_patients == 22


def test_records_without_usable_beats(tmp_path: Path) -> None:
    write_record(tmp_path, marks=[(10, "+"), (30, "~")])
    with pytest.raises(SchemaError, match="got 1 of 1 .the first: .*annotated beats, found none"):
        load_cohort(tmp_path, {})
    write_record(tmp_path, marks=[(100, "N"), (100, "V"), (300, "N")])
    with pytest.raises(SchemaError, match="two at one time"):
        load_cohort(tmp_path, {})


def test_another_lead_or_annotator(tmp_path: Path) -> None:
    write_record(tmp_path, signals=["16 200 12 0 0 0 0 MLII", "16 200 12 0 0 0 0 V5"])
    assert not np.array_equal(load_cohort(tmp_path, {"lead": "V5"}).inputs[0], load_cohort(tmp_path, {}).inputs[0])
    (tmp_path / "r.atr").rename(tmp_path / "r.qrs")
    assert load_cohort(tmp_path, {"annotator": "qrs"}).num_records == 8
    write_record(tmp_path, signals=["16 200 12 0 0 0 0 V1"])
    assert load_cohort(tmp_path, {}).notes["records_of_another_lead"] == 1
    with pytest.raises(SchemaError, match="that lead"):
        load_cohort(tmp_path, {"lead": "aVR"})


@pytest.mark.parametrize("options", [{"leads": "II"}, {"annotator": "../x"}, {"most_beats": 0}, {"tolerance": 1.0}, {"tolerance": "much"}])
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=NAME):
        load_cohort(tmp_path, options)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="no data of its own"):
        load_cohort(None, {})
    with pytest.raises(DataMissingError, match="expected records"):
        load_cohort(tmp_path, {})


def test_what_a_header_says_of_a_patient_gets_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    cohort = load_cohort(ward(tmp_path, 2), {})
    told = f"{cohort!r} {cohort.attributes} {cohort.notes} {cohort.patient_ids} {caplog.text} {capsys.readouterr()}"
    assert SECRET in (tmp_path / "r00.hea").read_text() and SECRET.encode() in (tmp_path / "r00.atr").read_bytes()
    assert all(word not in told for word in (*SECRET.split(), "87", "age", "sex"))


@needs_ecg
def test_record_100_has_the_beats_that_its_publisher_counts() -> None:
    cohort = load_cohort(ECG / "mitdb_100", {})
    assert dict(zip(KINDS, np.bincount(cohort.labels, minlength=5).tolist(), strict=True)) == {"N": 2239, "S": 33, "V": 1, "F": 0, "Q": 0}
    assert cohort.num_patients == 1 and cohort.inputs[0].shape == (2273, 1, LENGTH) and sum(cohort.notes.values()) == 0
    peaks = cohort.inputs[0][cohort.labels == 0, 0].argmax(axis=1)
    assert (np.abs(peaks - BEFORE) <= 2).mean() > 0.99  # R is where the mark is
    early = cohort.inputs[1][:, 0]
    assert np.median(early[cohort.labels == 1]) < -0.2 < np.median(early[cohort.labels == 0])


@needs_ecg
def test_records_without_annotations_are_refused() -> None:
    with pytest.raises(SchemaError, match="got 4 of 4 .the first: wfdb_samples: record 1: annotations: expected a file"):
        load_cohort(ECG / "wfdb_samples", {})


# Synthetic patients and model ---------------------------------------------------------------------------------------------------


def test_synthetic_beats_are_seeded_and_sites_differ() -> None:
    cohort, again = synthetic_cohort(400, 3), synthetic_cohort(400, 3)
    assert all(np.array_equal(one, other) for one, other in zip(cohort.inputs, again.inputs, strict=True)) and np.array_equal(
        cohort.labels, again.labels
    )
    assert cohort.synthetic and cohort.num_records == 400 * SYNTHETIC_BEATS and np.isfinite(cohort.inputs[0]).all()
    assert np.abs(cohort.inputs[0]).max() <= 2 and np.abs(cohort.inputs[1]).max() <= 1
    shares = np.bincount(cohort.labels, minlength=5) / cohort.num_records
    assert shares[0] > 0.5 and (shares[1:] > 0.04).all()
    missing = cohort.inputs[1][:, 3:].mean()
    assert 0.015 < missing < 0.045  # a rate of 0.03 of 9,600: off by so much once in 10^16 cohorts
    site = cohort.attributes["site"][cohort.patient_of_record]
    normal = [cohort.inputs[0][(site == name) & (cohort.labels == 0)] for name in np.unique(site)]
    rough = [float(np.abs(np.diff(beats[:, 0, :20], n=2)).mean()) for beats in normal]
    assert max(rough) > 1.5 * min(rough) and len(normal) == 4
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)


def test_synthetic_beats_keep_time_as_their_kinds_do() -> None:
    cohort = synthetic_cohort(600, 5)
    before, after, _, *missing = cohort.inputs[1].T
    known = ~(np.add(*missing) > 0)
    of = {kind: known & (cohort.labels == index) for index, kind in enumerate(KINDS)}
    middle = {kind: float(np.median(before[chosen])) for kind, chosen in of.items()}
    assert middle["V"] < -0.3 and -0.4 < middle["S"] < -0.2 and -0.2 < middle["F"] < -0.03 and abs(middle["N"]) < 0.03
    assert np.median(after[of["V"]]) > np.median(after[of["S"]]) + 0.1  # the full pause
    assert np.abs(before[of["Q"]]).mean() < np.abs(before[of["N"]]).mean() * 1.2


def test_the_kinds_can_be_told_apart_and_not_by_one_input_alone() -> None:
    found = []
    for columns in ("beat", "rhythm", "both"):
        parts = []
        for seed, count in ((1, 150), (2, 120)):
            cohort = synthetic_cohort(count, seed)
            choices = {"beat": [cohort.inputs[0][:, 0]], "rhythm": [cohort.inputs[1]], "both": [cohort.inputs[0][:, 0], cohort.inputs[1]]}
            parts.append((np.concatenate(choices[columns], axis=1), cohort))
        (train, known), (test, truth) = parts
        model = LogisticRegression(C=3.0, max_iter=200, tol=1e-3).fit(train, known.labels)
        found.append(macro_f1(model.predict_proba(test), truth))
    assert found[2] > 0.75 and found[2] > found[0] + 0.03 and found[2] > found[1] + 0.3


def macro_f1(scores: np.ndarray, cohort: Cohort) -> float:
    statistic = TASK.metrics[0].statistic
    value = finish_metrics(TASK.metrics, {statistic.name: statistic.summarise(scores, cohort)})["macro_f1"]
    assert value is not None
    return value


@given(st.integers(0, 2**32 - 1))
def test_a_patient_moves_the_confusion_matrix_by_at_most_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cohort = synthetic_cohort(3, seed % 1000)
    scores = rng.random((cohort.num_records, len(KINDS)))
    statistic = TASK.metrics[0].statistic
    rest = cohort.select(np.array([1, 2]))
    moved = statistic.summarise(scores, cohort) - statistic.summarise(scores[SYNTHETIC_BEATS:], rest)
    assert np.linalg.norm(moved) <= statistic.sensitivity + 1e-12 and moved.sum() == pytest.approx(1)


def test_the_loss_is_of_each_beat_alone() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(5, 5), torch.arange(5)
    losses = weighted_loss(outputs, labels)
    expected = [-torch.log_softmax(outputs[index], 0)[index].item() * KIND_WEIGHTS[index] for index in range(5)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    assert sum(parameter.numel() for parameter in BeatModel().parameters()) == 1950
    probe_model(TASK, Study.load(STUDY))
    check_alike(TASK)


@pytest.mark.slow
def test_a_few_steps_tell_the_kinds_apart() -> None:
    cohort, test = synthetic_cohort(300, 5), synthetic_cohort(150, 6)
    torch.manual_seed(0)
    model = BeatModel().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    beats, rhythms, labels = *(torch.from_numpy(values) for values in cohort.inputs), torch.from_numpy(cohort.labels)
    for step in range(300):
        rows = slice(step * 64 % 3584, step * 64 % 3584 + 64)
        optimizer.zero_grad()
        weighted_loss(model(beats[rows], rhythms[rows]), labels[rows]).mean().backward()
        optimizer.step()
    assert macro_f1(TASK.predict(predict_in_batches(model, test.inputs)).double().numpy(), test) > 0.8  # all taken for normal: 0.15
