"""De-identification: BIO-tagged notes, pieces of long ones, exact spans and relations as sums, synthetic notes, and bad input."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataMissingError, SchemaError
from shared.metrics import finish_metrics
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import resolve_task
from shared.tasks.deidentify_notes import (
    BEGINS_DOSE,
    BEGINS_DRUG,
    ENTITIES,
    FEATURES,
    HELD_OUT,
    KINDS,
    METRICS,
    MOST_ENTITIES,
    NUM_BUCKETS,
    NUM_TOKENS,
    NUMBER_OF_TAG,
    REACH,
    TAGS,
    TRAINED,
    UNKNOWN,
    Note,
    TokenTagger,
    around,
    arrays_of,
    begins_drug,
    entity_sums,
    features_of,
    load_cohort,
    pieces_of,
    predict,
    relations_of,
    spans_of,
    synthetic_cohort,
    tagging_loss,
)
from simulations.blocks.choice import check_alike

STUDY = Path(__file__).resolve().parents[2] / "studies" / "deidentify-notes.toml"
TASK = resolve_task("deidentify-notes")
NOTE = (
    ("Mr.", "O", ""), ("Hugo", "B-NAME", ""), ("Reyes", "I-NAME", ""), ("seen", "O", ""), ("12/03/2019", "B-DATE", ""), (",", "O", "0"),
    ("5", "B-DOSE", "10"), ("mg", "I-DOSE", ""), ("of", "O", ""), ("ramipril", "B-DRUG", ""), ("2", "B-DOSE", ""), ("l", "I-DOSE", ""), (".", "O", ""),
)  # fmt: skip
NUM = 24


def quoted(text: str) -> str:
    return f'"{text}"'


def table(folder: Path, *, notes: int = NUM, extra: tuple[tuple[str, ...], ...] = (), header: str = "patient,note,token,tag,head") -> Path:
    """NUM notes of 12 patients, and `extra` rows."""
    rows = [(f"p{number // 2}", f"n{number}", *row) for number in range(notes) for row in NOTE]
    (folder / "notes.csv").write_text("\n".join([header, *(",".join(map(quoted, row)) for row in [*rows, *extra])]) + "\n", encoding="utf-8")
    return folder


def cohort_of(notes: list[Note], patient_of_record: list[int] | None = None) -> Cohort:
    tokens, labels = arrays_of(notes)
    index = np.array(range(len(notes)) if patient_of_record is None else patient_of_record)
    return Cohort(inputs=(tokens,), labels=labels, patient_of_record=index, patient_ids=tuple(str(i) for i in range(int(index.max()) + 1)))


def random_note(rng: np.random.Generator, length: int) -> Note:
    """Well-formed tags; every dose has a drug within reach, where there is one."""
    tags: list[int] = []
    while len(tags) < length:
        kind = int(rng.integers(len(KINDS) + 3))
        tags += [0] if kind >= len(KINDS) else [2 * kind + 1, *[2 * kind + 2] * int(rng.integers(3))]
    tags = tags[:length]
    drugs = [UNKNOWN] * length
    for place in np.flatnonzero(np.array(tags) == BEGINS_DOSE).tolist():
        near = [other for other in range(length) if tags[other] == BEGINS_DRUG and abs(other - place) <= REACH]
        drugs[place] = near[int(rng.integers(len(near)))] if near else UNKNOWN
    return Note(tokens=tuple(f"t{number}" for number in rng.integers(9, size=length)), tags=tuple(tags), drugs=tuple(drugs))


# Data ---------------------------------------------------------------------------------------------------------------------------


def test_a_table_is_read(tmp_path: Path) -> None:
    cohort = load_cohort(table(tmp_path), {})
    assert (cohort.num_patients, cohort.num_records) == (12, NUM) and cohort.inputs[0].shape == (NUM, NUM_TOKENS, len(FEATURES))
    tags, places = cohort.labels[0, : len(NOTE)].T.tolist()
    assert [TAGS[tag] for tag in tags] == [tag for _, tag, _ in NOTE] and (cohort.labels[:, len(NOTE) :] == UNKNOWN).all()
    assert places == [*[UNKNOWN] * 6, REACH + 3, *[UNKNOWN] * 3, REACH, UNKNOWN, UNKNOWN]
    assert cohort.inputs[0][0, 1].tolist() == list(features_of("Hugo")) and (cohort.inputs[0][:, len(NOTE) :] == 0).all()
    assert cohort.notes == {"records_dropped": 0, "notes_cut": 0, "relations_out_of_reach": 0}
    assert "Hugo" not in repr(cohort) and "Hugo" not in repr(random_note(np.random.default_rng(0), 5))


def test_sites_come_along(tmp_path: Path) -> None:
    rows = [f'p{number // 2},n{number},"{token}",{tag},{head},s{number // 12}' for number in range(NUM) for token, tag, head in NOTE]
    (tmp_path / "notes.csv").write_text("\n".join(["patient,note,token,tag,head,site", *rows]) + "\n")
    assert load_cohort(tmp_path, {}).attributes["site"].tolist() == ["s0"] * 6 + ["s1"] * 6


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ((("Doe", "B-PLACE", ""),), "outside its set"), ((("Doe", "", ""),), "outside its set"), ((("Doe", "I-NAME", ""),), "goes on with nothing"),
        ((("Doe", "B-NAME", ""), ("x", "I-DATE", "")), "goes on with nothing"), ((("", "O", ""),), "a token in every row"),
        ((("Doe\x00", "O", ""),), "control characters"), ((("5", "B-DOSE", "2"), ("Doe", "O", "")), "a token with which a drug begins"),
        ((("5", "B-DOSE", "-1"), ("Doe", "B-DRUG", "")), "a token with which"), ((("5", "B-DOSE", "nan"), ("Doe", "B-DRUG", "")), "a token with which"),
        ((("Doe", "B-DRUG", "1"),), "a token with which"), ((("5", "B-DOSE", "²"), ("Doe", "B-DRUG", "")), "a token with which"),
    ],
)  # fmt: skip
def test_a_bad_note_is_skipped_up_to_the_tolerance(tmp_path: Path, rows: tuple[tuple[str, str, str], ...], match: str) -> None:
    path = table(tmp_path, extra=tuple(("p0", "bad", *row) for row in rows))
    assert load_cohort(path, {}).notes["records_dropped"] == 1
    with pytest.raises(SchemaError, match=match) as caught:
        load_cohort(path, {"tolerance": 0.01})
    assert "Doe" not in str(caught.value)


def test_a_note_in_two_parts_is_a_bad_note(tmp_path: Path) -> None:
    path = table(tmp_path, extra=(("p0", "n0", "again", "O", ""),))
    with pytest.raises(SchemaError, match="every note once"):
        load_cohort(path, {"tolerance": 0.01})
    assert load_cohort(table(tmp_path, extra=(("p99", "n0", "own", "O", ""),)), {}).num_patients == 13  # of another patient it is another note


@pytest.mark.parametrize(("header", "match"), [("patient,note,token,tag,x", "'head'"), ("patient,note,word,tag,head", "'token'")])
def test_missing_columns_are_named(tmp_path: Path, header: str, match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        load_cohort(table(tmp_path, header=header), {})


def test_nobody_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="identifier"):
        load_cohort(table(tmp_path, extra=(("", "n", "a", "O", ""),)), {})
    with pytest.raises(ConfigurationError, match="no option"):
        load_cohort(table(tmp_path), {"tags": "BIO"})
    with pytest.raises(DataMissingError):
        load_cohort(None, {})
    with pytest.raises(DataMissingError):
        synthetic_cohort(0, 1)
    (tmp_path / "notes.csv").write_bytes((tmp_path / "notes.csv").read_bytes()[:-9])  # cut short within a quote
    with pytest.raises(SchemaError):
        load_cohort(tmp_path, {"tolerance": 0.01})


@given(st.integers(0, 2**32 - 1), st.integers(1, 4 * NUM_TOKENS))
def test_pieces_hold_every_token_once_and_cut_no_entity(seed: int, length: int) -> None:
    note = random_note(np.random.default_rng(seed), length)
    pieces = pieces_of(note)
    assert sum((piece.tokens for piece in pieces), ()) == note.tokens and sum((piece.tags for piece in pieces), ()) == note.tags
    assert max(len(piece.tokens) for piece in pieces) <= NUM_TOKENS
    assert sum(len(spans_of(piece.tags)) for piece in pieces) == len(spans_of(note.tags))
    start = 0
    for piece in pieces:
        kept = [drug if drug == UNKNOWN else drug + start for drug in piece.drugs]
        assert all(own in (UNKNOWN, whole) for own, whole in zip(kept, note.drugs[start : start + len(kept)], strict=True))
        start += len(kept)
    if len(pieces) == 1:
        assert pieces[0].drugs == note.drugs


def test_long_notes_are_cut_after_a_sentence(tmp_path: Path) -> None:
    words = [("w", "O", "")] * 50 + [(".", "O", "")] + [("w", "O", "")] * 10 + [("a", "B-DRUG", ""), ("5", "B-DOSE", "62"), ("w", "O", "")]
    far = [("5", "B-DOSE", "62"), *[("w", "O", "")] * 13]
    cohort = load_cohort(table(tmp_path, notes=0, extra=tuple(("p", "n", *row) for row in words + far)), {})
    assert (cohort.labels[..., 0] != UNKNOWN).sum(axis=1).tolist() == [51, 27] and cohort.num_patients == 1
    assert cohort.notes == {"records_dropped": 0, "notes_cut": 1, "relations_out_of_reach": 0}
    far = [("w", "O", "")] * 20 + [("5", "B-DOSE", "62")]
    assert load_cohort(table(tmp_path, notes=0, extra=tuple(("p", "n", *row) for row in words + far)), {}).notes["relations_out_of_reach"] == 1


# Metrics and loss ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_spans_are_those_that_were_marked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.choice(41, size=12, replace=False)).reshape(6, 2)
    spans = [(int(start), int(end), int(rng.integers(len(KINDS)))) for start, end in edges]
    tags = [0] * 40
    for start, end, kind in spans:
        tags[start:end] = [2 * kind + 1, *[2 * kind + 2] * (end - start - 1)]
    assert spans_of(tags) == spans
    found = begins_drug(torch.tensor([tags]))[0].nonzero()[:, 0].tolist()
    assert found == [start for start, _, kind in spans if KINDS[kind] == "DRUG"]


@given(st.lists(st.integers(0, len(TAGS) - 1), max_size=30))
def test_tags_of_any_kind_have_spans_one_after_another(tags: list[int]) -> None:
    spans = spans_of(tags)
    assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(spans))
    assert sum(end - start for start, end, _ in spans) == sum(tag > 0 for tag in tags)
    drugs = [start for start, _, kind in spans if KINDS[kind] == "DRUG"]
    assert not tags or begins_drug(torch.tensor([tags]))[0].nonzero()[:, 0].tolist() == drugs


def test_f1_is_that_of_all_entities_together() -> None:
    """Against sets of (record, span, kind) and (record, dose, drug), over two sites."""
    rng = np.random.default_rng(4)
    notes = [random_note(rng, 30) for _ in range(40)]
    cohort = cohort_of(notes)
    predictions = cohort.labels.astype(np.float64)
    wrong = rng.random(predictions.shape[:2]) < 0.15
    predictions[wrong, 0] = rng.integers(len(TAGS), size=int(wrong.sum()))
    predictions[rng.random(predictions.shape[:2]) < 0.1, 1] = REACH
    halves = [entity_sums(predictions[part], cohort.select(np.arange(40)[part])) for part in (slice(0, 15), slice(15, 40))]
    found = finish_metrics(METRICS, {"entities": halves[0] + halves[1]})
    true, given_, asked, answered = set(), set(), set(), set()
    for record in range(40):
        tags = np.maximum(predictions[record, :30, 0], 0).astype(int).tolist()
        own, theirs = spans_of(notes[record].tags), spans_of(tags)
        true |= {(record, span) for span in own}
        given_ |= {(record, span) for span in theirs}
        asked |= {(record, pair) for pair in relations_of(own, cohort.labels[record, :, 1].tolist())}
        places = np.where(predictions[record, :, 1] < 0, REACH, predictions[record, :, 1]).astype(int).tolist()
        answered |= {(record, pair) for pair in relations_of(theirs, places)}
    assert found["entity_f1"] == pytest.approx(2 * len(true & given_) / (len(true) + len(given_)))
    assert len(asked) > 20 and found["relation_f1"] == pytest.approx(2 * len(asked & answered) / (len(asked) + len(answered)))
    names = {(record, span) for record, span in true if KINDS[span[2]] == "NAME"}
    assert found["name_recall"] == pytest.approx(len(names & given_) / len(names))


def test_edges_of_the_metrics() -> None:
    note = Note(tokens=tuple(token for token, _, _ in NOTE), tags=tuple(NUMBER_OF_TAG[tag] for _, tag, _ in NOTE), drugs=(*[-1] * 6, 9, *[-1] * 6))
    cohort = cohort_of([note])
    values = finish_metrics(METRICS, {"entities": entity_sums(cohort.labels.astype(float), cohort)})
    assert values.pop("id_recall") is None and set(values.values()) == {1.0}  # there is none in the note
    for strange in (np.nan, np.inf, -5.0, 1e9):
        values = finish_metrics(METRICS, {"entities": entity_sums(np.full((1, NUM_TOKENS, 2), strange), cohort)})
        assert values.pop("id_recall") is None and set(values.values()) == {0.0}
    assert set(finish_metrics(METRICS, {"entities": np.zeros(ENTITIES.shape)}).values()) == {None}


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_a_patient_adds_at_most_the_sensitivity_and_sums_agree(seed: int, records: int) -> None:
    """With an entity at every token, too, where only the first count."""
    rng = np.random.default_rng(seed)
    notes = [random_note(rng, NUM_TOKENS) for _ in range(records + 2)]
    predictions = rng.integers(0, [[len(TAGS), 2 * REACH + 1]], size=(records + 2, NUM_TOKENS, 2)).astype(float)
    predictions[0, :, 0] = np.where(rng.random() < 0.5, BEGINS_DOSE, predictions[0, :, 0])
    alone = entity_sums(predictions[:records], cohort_of(notes[:records], [0] * records))
    rest = entity_sums(predictions[records:], cohort_of(notes[records:]))
    whole = entity_sums(predictions, cohort_of(notes, [*[0] * records, 1, 2]))
    assert np.allclose(whole, alone + rest) and np.linalg.norm(alone) <= ENTITIES.sensitivity + 1e-12
    assert ENTITIES.could_be(whole, patients=3) and not ENTITIES.could_be(whole, patients=1)


@pytest.mark.parametrize(("place", "value"), [(1, 2.0), (6, 4.5), (11, 4.5), (16, 1.0), (17, 4.5), (2, -1.0), (3, np.nan)])
def test_sums_that_no_notes_have_are_told(place: int, value: float) -> None:
    sums = np.array([4.0, *[0.1] * 5, *[0.4] * 10, 0.2, 0.3, 0.3])
    assert ENTITIES.could_be(sums, patients=4)
    sums[place] = value
    assert not ENTITIES.could_be(sums, patients=4)


def test_the_loss_is_of_each_record_alone_and_padding_adds_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(cohort_of([random_note(rng, 20), random_note(rng, 40), Note(tokens=(), tags=(), drugs=())]).labels)
    outputs = torch.randn(3, NUM_TOKENS, len(TAGS) + 2 * REACH + 1, requires_grad=True)
    losses = tagging_loss(outputs, labels)
    assert losses.shape == (3,) and losses[2].item() == 0 and torch.allclose(tagging_loss(outputs[1:2], labels[1:2]), losses[1:2])
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None and (outputs.grad[0, 20:] == 0).all() and (outputs.grad[0, :20].abs().sum(dim=1) > 0).all()
    right = torch.full(outputs.shape, -20.0)
    right[..., : len(TAGS)].scatter_(2, labels[..., :1].clamp(min=0), 20.0)
    right[..., len(TAGS) :].scatter_(2, labels[..., 1:].clamp(min=0), 20.0)
    assert (tagging_loss(right, labels) < 1e-3).all() and torch.equal(predict(right)[0, :20, 0], labels[0, :20, 0].float())


def test_a_dose_points_only_to_drugs_that_were_found() -> None:
    outputs = torch.zeros(1, NUM_TOKENS, len(TAGS) + 2 * REACH + 1)
    outputs[0, :, 0] = 1.0  # O
    outputs[0, 10, BEGINS_DRUG] = outputs[0, 14, BEGINS_DOSE] = 5.0
    outputs[0, 14, len(TAGS) :] = torch.arange(2 * REACH + 1, 0, -1)  # the furthest before it likes it best
    assert predict(outputs)[0, 14].tolist() == [BEGINS_DOSE, REACH - 4] and predict(outputs)[0, 40].tolist() == [0, REACH]


def test_around_is_what_stands_there() -> None:
    values = torch.arange(1.0, NUM_TOKENS + 1)[None, :, None]
    windows = around(values)
    assert windows.shape == (1, NUM_TOKENS, 1, 2 * REACH + 1)
    assert windows[0, 0, 0, : REACH + 2].tolist() == [*[0.0] * REACH, 1.0, 2.0] and windows[0, 30, 0, REACH].item() == 31


# Synthetic notes and model ------------------------------------------------------------------------------------------------------


def test_test_patients_have_names_and_drugs_of_their_own() -> None:
    assert all(
        not set(one) & set(other) for one, other in ((TRAINED.first, HELD_OUT.first), (TRAINED.last, HELD_OUT.last), (TRAINED.drugs, HELD_OUT.drugs))
    )


def test_synthetic_notes_are_seeded_and_differ_by_site() -> None:
    cohort, again = synthetic_cohort(400, 3), synthetic_cohort(400, 3)
    assert np.array_equal(cohort.inputs[0], again.inputs[0]) and np.array_equal(cohort.labels, again.labels) and cohort.synthetic
    tags = cohort.labels[..., 0]
    assert set(range(len(TAGS))) <= set(np.unique(tags).tolist()) and cohort.inputs[0].max() < NUM_BUCKETS
    assert cohort.published_test is not None and 0.2 < cohort.published_test.mean() < 0.4  # 0.3, a standard error of 0.023: 1e-5
    doses = cohort.labels[tags == BEGINS_DOSE, 1]
    assert (doses >= 0).all() and (doses < REACH).mean() > 0.3 and (doses > REACH).mean() > 0.1 and (doses == REACH).mean() > 0.02
    pointed = np.argwhere((tags == BEGINS_DOSE) & (cohort.labels[..., 1] != REACH))
    assert all(tags[record, place + cohort.labels[record, place, 1] - REACH] == BEGINS_DRUG for record, place in pointed)
    site = cohort.attributes["site"][cohort.patient_of_record]
    shapes = [np.bincount(cohort.inputs[0][site == name][..., 1].ravel(), minlength=NUM_BUCKETS)[1:] for name in np.unique(site)]
    shares = [own / own.sum() for own in shapes]  # of some 4,000 tokens a site
    assert len(shares) == 4 and all(np.abs(one - other).sum() > 0.1 for one, other in itertools.combinations(shares, 2))
    assert max(len(spans_of(own[own >= 0].tolist())) for own in tags) <= MOST_ENTITIES


def test_the_model_may_be_trained_privately_and_in_blocks() -> None:
    probe_model(TASK, Study.load(STUDY))
    check_alike(TASK)  # raises where the sites would be trained one after another


def test_padding_is_no_entity_and_tells_nothing() -> None:
    model, tokens = TASK.model(), synthetic_cohort(20, 2).inputs[0]
    set_parameters(model, initial_parameters(model, 3))
    expected = predict_in_batches(model, (tokens,))
    assert (predict(expected)[..., 0][torch.from_numpy(tokens[..., 0] == 0)] == 0).all()
    state = initial_parameters(model, 3)
    state["embedding.weight"][0] = 100.0
    set_parameters(model, state)
    assert torch.allclose(predict_in_batches(model, (tokens,)), expected, atol=1e-4)


@pytest.mark.slow
def test_a_few_steps_find_names_never_seen() -> None:
    cohort = synthetic_cohort(500, 5)
    assert cohort.published_test is not None
    train, test = cohort.select(~cohort.published_test), cohort.select(cohort.published_test)
    torch.manual_seed(0)
    model = TokenTagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens, labels = torch.from_numpy(train.inputs[0]), torch.from_numpy(train.labels)
    for step in range(120):
        rows = torch.arange(step * 32, step * 32 + 32) % len(tokens)
        optimizer.zero_grad()
        tagging_loss(model(tokens[rows]), labels[rows]).mean().backward()
        optimizer.step()
    values = finish_metrics(METRICS, {"entities": entity_sums(predict(predict_in_batches(model, test.inputs)).double().numpy(), test)})
    assert (values["entity_f1"] or 0) > 0.7 and (values["relation_f1"] or 0) > 0.6
