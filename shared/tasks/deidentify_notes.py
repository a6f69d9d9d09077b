"""De-identification of notes: which tokens are names, dates and identifiers, which are drugs and doses, and which dose is of which drug.

Tags are BIO (Ramshaw and Marcus 1995): B- begins an entity, I- goes on with it, O is none. The model is a convolution over tokens' embeddings (Collobert
et al. 2011, "Natural language processing (almost) from scratch", their sentence approach), a linear layer for the tags, and for relations a pointer:
every dose scores the tokens around it, of which those that begin a drug may be chosen, or itself for none (after Vinyals et al. 2015, "Pointer
networks"; bilinear as in Dozat and Manning 2017). A token is told by hashes of its word, of its shape and of its first and last letters (see
`shared.tasks.text`), so no vocabulary of names is learned, and a name nobody has seen still has the shape of one.

Metrics are of exact spans, micro over kinds as in CoNLL-2003, by sums over patients, which sums over sites give exactly. De-identification is judged by its
recall: an identifier that is missed stays in the text. This model does not make a note anonymous; somebody reads what it gives.

Legend: N records (a note, or a piece of a long one), T tokens of a record, F features of a token, D width, H channels, W tokens on each side, R width of
the pointer.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort, IntArray
from shared.errors import DataMissingError, SchemaError
from shared.metrics import ROUNDING, FloatArray, Metric, Statistic
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import attribute_of, patients_of, refuse_too_many, tolerance_of
from shared.tasks.text import PADDING, SmallStart, bucket, has_control_characters, listed, normalised, padded, read_texts, shape_of, text_file

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

NAME = "deidentify-notes"
KINDS = ("NAME", "DATE", "ID", "DRUG", "DOSE")
IDENTIFIERS = ("NAME", "DATE", "ID")
TAGS = ("O", *(f"{mark}-{kind}" for kind in KINDS for mark in "BI"))
NUMBER_OF_TAG = {tag: number for number, tag in enumerate(TAGS)}
BEGINS_DRUG, BEGINS_DOSE = NUMBER_OF_TAG["B-DRUG"], NUMBER_OF_TAG["B-DOSE"]
UNKNOWN = -1  # of a label where there is no token, or no dose
NUM_TOKENS = 64
NUM_BUCKETS = 2048
FEATURES = ("word", "shape", "first 3 letters", "last 2", "last 3", "last 4")
REACH = 12  # W: tokens between a dose and its drug, at most
MOST_ENTITIES, MOST_RELATIONS = 32, 16  # of a record that count; more do not
WIDTH, CHANNELS, POINTER = 16, 32, 16
EMBEDDING_SCALE = 3.0
RELATION_WEIGHT = 0.3  # of the pointer's loss beside that of the tags
NO_TOKEN = -1e4  # logit of what cannot be

SCHEMA = (
    TensorSchema(
        name="tokens",
        shape=(NUM_TOKENS, len(FEATURES)),
        dtype="int64",
        unit=f"hashes: {', '.join(FEATURES)}; 0 for none",
        low=0,
        high=NUM_BUCKETS - 1,
    ),
)


# Notes --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A note, or a piece of one: its tokens, each one's tag, and where the dose that begins there has its drug (`UNKNOWN`: no dose, or of no drug)."""

    tokens: tuple[str, ...] = field(repr=False)
    tags: tuple[int, ...] = field(repr=False)
    drugs: tuple[int, ...] = field(repr=False)


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV with a row for each token: columns `patient`, `note`, `token`, `tag` and `head`, and there may be `site`; or a folder with it.

    The rows of a note stand one after another, in the order of its tokens. A tag is O, or B- or I- and one of NAME, DATE, ID, DRUG and DOSE. Where a dose
    begins, `head` is the number, from 1, of the token in its note with which its drug begins; it is empty or 0 everywhere else. A note of more than 64
    tokens becomes several records of its patient, cut after a sentence where one ends, and never within an entity. A dose whose drug is more than
    12 tokens away, or in another piece, counts as one without a drug.

    Args:
        options: `tolerance`, see `tolerance_of`; of notes.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many notes are.
    """
    tolerance = tolerance_of(options, NAME)
    file = text_file(path, NAME)
    frame = read_texts(file, ["patient", "note", "token", "tag", "head"])
    key = frame["patient"] + "\x1f" + frame["note"]
    parts = frame.groupby((key != key.shift()).cumsum(), sort=False)
    notes: list[Note | None] = []
    owners: list[int] = []  # of each note, its first row
    seen: set[str] = set()
    first = ""
    for number, rows in enumerate(parts.indices.values(), start=1):
        name = key.iloc[rows[0]]
        try:
            if name in seen:
                raise SchemaError(f"{file.name}: note {number}: expected the rows of a note one after another, and every note once, got another part")
            notes.append(note_of(frame.iloc[rows], source=f"{file.name}: note {number}"))
        except SchemaError as error:
            notes.append(None)
            first = first or error.what
        seen.add(name)
        owners.append(int(rows[0]))
    num_bad = sum(note is None for note in notes)
    refuse_too_many(num_bad, len(notes), tolerance=tolerance, source=file.name, first=first)
    rows_kept = [row for row, note in zip(owners, notes, strict=True) if note is not None]
    return _cohort_of_file(frame.iloc[rows_kept], [note for note in notes if note is not None], num_bad, source=file.name)


def _cohort_of_file(frame: "pd.DataFrame", notes: Sequence[Note], num_bad: int, *, source: str) -> Cohort:
    """The cohort of these notes; `frame` has a row for each."""
    people = patients_of(frame["patient"].tolist(), source=source)
    pieces = [pieces_of(note) for note in notes]
    tokens, labels = arrays_of([piece for own in pieces for piece in own])
    relations = sum(drug != UNKNOWN for note in notes for drug in note.drugs)
    return Cohort(
        inputs=(tokens,),
        labels=labels,
        patient_of_record=np.repeat(people.patient_of_record, [len(own) for own in pieces]),
        patient_ids=people.patient_ids,
        attributes={"site": attribute_of(frame["site"].to_numpy(), people, "site", source=source)} if "site" in frame.columns else {},
        notes={
            "records_dropped": num_bad,
            "notes_cut": sum(len(own) > 1 for own in pieces),
            "relations_out_of_reach": relations - int((labels[..., 1] >= 0).sum() - (labels[..., 1] == REACH).sum()),
        },
    )


def note_of(rows: "pd.DataFrame", *, source: str) -> Note:
    """The note of these rows.

    Raises:
        SchemaError: a token is empty, or has control characters; a tag is outside its set, or an I- goes on with nothing; or a head is where no dose
            begins, or names no token with which a drug begins.
    """
    tokens, names = rows["token"].tolist(), rows["tag"].str.upper().tolist()
    if any(not token or has_control_characters(token) for token in tokens):
        raise SchemaError(f"{source}: expected a token in every row, got none, or control characters", "leave out such rows")
    if not all(name in NUMBER_OF_TAG for name in names):
        raise SchemaError(f"{source}: expected tags {', '.join(TAGS)}, got another: outside its set", "correct it")
    tags = [NUMBER_OF_TAG[name] for name in names]
    if any(goes_on(tag) and not same_entity(before, tag) for before, tag in zip([0, *tags], tags, strict=False)):
        raise SchemaError(f"{source}: expected every I- after a B- or I- of its kind, got one that goes on with nothing", "begin entities with B-")
    return Note(tokens=tuple(tokens), tags=tuple(tags), drugs=tuple(_heads(rows["head"].tolist(), tags, source)))


def _heads(texts: Sequence[str], tags: Sequence[int], source: str) -> list[int]:
    """Where the drug of the dose that begins at each token begins, from 0."""
    drugs = []
    for text, tag in zip(texts, tags, strict=True):
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else UNKNOWN
        if text in ("", "0"):
            drugs.append(UNKNOWN)
        elif tag != BEGINS_DOSE or not 1 <= number <= len(tags) or tags[number - 1] != BEGINS_DRUG:
            raise SchemaError(
                f"{source}: expected a head only where a dose begins, and the number of a token with which a drug begins, got another",
                "tokens are numbered from 1 in their note",
            )
        else:
            drugs.append(number - 1)
    return drugs


def goes_on(tag: int) -> bool:
    """Whether it is an I-."""
    return tag > 0 and tag % 2 == 0


def same_entity(before: int, tag: int) -> bool:
    """Whether I- `tag` goes on with the entity of the tag before it."""
    return before in (tag, tag - 1)


def pieces_of(note: Note) -> list[Note]:
    """The note in pieces of at most T tokens, cut after a sentence in a piece's second half where one ends there, else where no entity is.

    Relations that leave a piece, or reach further than W tokens, are left out.
    """
    pieces, start = [], 0
    while start < len(note.tokens):
        end = _end_of_piece(note, start)
        drugs = [drug - start if start <= drug < end and abs(drug - place) <= REACH else UNKNOWN for place, drug in enumerate(note.drugs)]
        pieces.append(Note(tokens=note.tokens[start:end], tags=note.tags[start:end], drugs=tuple(drugs[start:end])))
        start = end
    return pieces


def _end_of_piece(note: Note, start: int) -> int:
    last = start + NUM_TOKENS
    if len(note.tokens) <= last:
        return len(note.tokens)
    whole = [end for end in range(start + 1, last + 1) if not goes_on(note.tags[end])]
    sentences = [end for end in whole if end > start + NUM_TOKENS // 2 and note.tokens[end - 1] == "."]
    return max(sentences or whole, default=last)  # an entity of T tokens and more is cut


def arrays_of(notes: Sequence[Note]) -> tuple[IntArray, IntArray]:
    """Tokens `(N, T, F)` and labels `(N, T, 2)`: the tag, and W + how many tokens further the dose's drug is (W itself for none); `UNKNOWN` elsewhere."""
    tokens = padded([[features_of(token) for token in note.tokens] for note in notes], NUM_TOKENS, len(FEATURES))
    labels = np.full((len(notes), NUM_TOKENS, 2), UNKNOWN, dtype=np.int64)
    for record, note in enumerate(notes):
        labels[record, : len(note.tags), 0] = note.tags
        for place, (tag, drug) in enumerate(zip(note.tags, note.drugs, strict=True)):
            if tag == BEGINS_DOSE:
                labels[record, place, 1] = REACH + (drug - place if drug != UNKNOWN else 0)
    return tokens, labels


@functools.lru_cache(maxsize=2**16)
def features_of(token: str) -> tuple[int, ...]:
    """F numbers of a token: hashes of what `FEATURES` names, none 0. Digits are one digit, so a date or a number is not told by its value."""
    word = "".join("0" if sign.isdigit() else sign for sign in normalised(token))
    pieces = (word, shape_of(token), word[:3], word[-2:], word[-3:], word[-4:])
    return tuple(bucket(f"{kind}|{piece}", NUM_BUCKETS) for kind, piece in zip(FEATURES, pieces, strict=True))


# Model and loss -----------------------------------------------------------------------------------------------------------------


class TokenTagger(nn.Module):
    """`(N, T, F)` numbers of tokens -> `(N, T, tags + 2 W + 1)` logits: of each tag, and of each place around a token at which its drug may begin.

    A token sees four on each side for its tag. Padding is O.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BUCKETS, WIDTH)
        self.near = nn.Conv1d(WIDTH, CHANNELS, 5, padding=2)
        self.norm = nn.LayerNorm(CHANNELS)
        self.far = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
        self.tags = nn.Linear(CHANNELS, len(TAGS))
        self.places = nn.Linear(CHANNELS, 2 * REACH + 1)
        self.dose, self.drug = nn.Linear(CHANNELS, POINTER), nn.Linear(CHANNELS, POINTER)
        self.start = SmallStart(self.embedding)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(tokens).sum(dim=2)  # (N, T, D)
        present = (tokens[..., :1] != PADDING).to(embedded.dtype)  # (N, T, 1)
        embedded = embedded * EMBEDDING_SCALE * present
        near = torch.relu(self.norm(self.near(embedded.transpose(1, 2)).transpose(1, 2))) * present  # (N, T, H)
        seen = near + torch.relu(self.far(near.transpose(1, 2)).transpose(1, 2))
        is_tag = nn.functional.one_hot(torch.zeros_like(tokens[..., 0]), len(TAGS))  # O
        tags = self.tags(seen) * present + (1 - present) * (1 - is_tag) * NO_TOKEN
        pairs = torch.einsum("ntr,ntrp->ntp", self.dose(seen), around(self.drug(seen)))
        return torch.cat([tags, self.places(seen) + pairs / POINTER**0.5], dim=-1)


def around(values: torch.Tensor) -> torch.Tensor:
    """`(N, T, ...)` -> `(N, T, ..., 2 W + 1)`: the values at the W tokens before each, at it and at the W after it; 0 beyond the ends."""
    beside = [0, 0] * (values.dim() - 2) + [REACH, REACH]
    return nn.functional.pad(values, beside).unfold(1, 2 * REACH + 1, 1)


def begins_drug(tags: torch.Tensor) -> torch.Tensor:
    """`(N, T)`, True where a drug begins, by tags that need not be well formed: an I- that goes on with nothing begins one."""
    before = nn.functional.pad(tags, [1, 0])[:, :-1]
    inside = BEGINS_DRUG + 1
    return (tags == BEGINS_DRUG) | ((tags == inside) & (before != BEGINS_DRUG) & (before != inside))


def pointing(outputs: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """`(N, T, 2 W + 1)` logits of the pointer, where only drugs of these `tags` `(N, T)` can be chosen, or the token itself for none."""
    none = torch.arange(2 * REACH + 1, device=outputs.device) == REACH
    possible = around(begins_drug(tags).to(outputs.dtype)) > 0
    return outputs[..., len(TAGS) :].masked_fill(~(possible | none), NO_TOKEN)


def tagging_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the tags, mean over tokens, and `RELATION_WEIGHT` times that of the pointer among the true drugs, mean over doses; `(N,)`."""
    tags, drugs = labels[..., 0], labels[..., 1]
    of_tags = _mean_cross_entropy(outputs[..., : len(TAGS)], tags)
    return of_tags + RELATION_WEIGHT * _mean_cross_entropy(pointing(outputs, tags.clamp(min=0)), drugs)


def _mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Over the places of each record that have a label; 0 where none has one."""
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=UNKNOWN)
    return losses.sum(dim=1) / (labels != UNKNOWN).sum(dim=1).clamp(min=1)


def predict(outputs: torch.Tensor) -> torch.Tensor:
    """`(N, T, 2)`, as the labels: the likeliest tag, and the likeliest place of a drug among those found."""
    tags = outputs[..., : len(TAGS)].argmax(dim=-1)
    return torch.stack([tags, pointing(outputs, tags).argmax(dim=-1)], dim=-1).to(outputs.dtype)


def entity_rows(predictions: NDArray[np.generic], inputs: tuple[NDArray[np.generic], ...]) -> FloatArray:
    """`(N, 6)`: how many entities of each kind are found in a record, and how many doses with their drug.

    Args:
        predictions: `(N, T, 2)` as `predict` gives them.
        inputs: the tokens `(N, T, F)`.
    """
    there = inputs[0][..., 0] != PADDING
    rows = np.zeros((len(predictions), len(KINDS) + 1))
    for record, (present, given) in enumerate(zip(there, predictions.astype(np.int64), strict=True)):
        spans = spans_of(given[present, 0].tolist())
        rows[record, :-1] = np.bincount([span[2] for span in spans], minlength=len(KINDS))
        rows[record, -1] = len(relations_of(spans, given[:, 1].tolist()))
    return rows


# Metrics ------------------------------------------------------------------------------------------------------------------------

Span = tuple[int, int, int]  # first token, end, number of the kind


def spans_of(tags: Sequence[int]) -> list[Span]:
    """The entities of a record, in their order; an I- that goes on with nothing begins one (as conlleval counts them).

    >>> spans_of([0, 1, 2, 0, 4, 1])
    [(1, 3, 0), (4, 5, 1), (5, 6, 0)]
    """
    spans: list[Span] = []
    before = 0
    for place, tag in enumerate(tags):
        if goes_on(tag) and same_entity(before, tag):
            spans[-1] = (spans[-1][0], place + 1, spans[-1][2])
        elif tag > 0:
            spans.append((place, place + 1, (tag - 1) // 2))
        before = tag
    return spans


def relations_of(spans: Sequence[Span], places: Sequence[int]) -> list[tuple[Span, Span]]:
    """Each dose of `spans` with its drug, where it has one; `places` as in the labels."""
    drugs = {span[0]: span for span in spans if KINDS[span[2]] == "DRUG"}
    doses = [span for span in spans if KINDS[span[2]] == "DOSE"]
    return [(dose, drugs[place]) for dose in doses if (place := dose[0] + places[dose[0]] - REACH) in drugs]


def entity_sums(predictions: FloatArray, cohort: Cohort) -> FloatArray:
    """`(19,)`: patients; then for each kind the entities found that are true, those found and the true ones; then the same of relations.

    Entities are counted as shares of `MOST_ENTITIES` and relations of `MOST_RELATIONS`, the first of each record; a patient's records share a
    weight of 1. So each of the seven parts has a norm of at most 1 a patient.

    Args:
        predictions: `(N, T, 2)` as `predict` gives them; what is no tag or place counts as O and as none.
    """
    finite = np.nan_to_num(predictions, nan=-1.0, posinf=-1.0, neginf=-1.0)
    tags = np.where((finite[..., 0] > 0) & (finite[..., 0] < len(TAGS)), finite[..., 0], 0).astype(np.int64)
    places = np.where((finite[..., 1] >= 0) & (finite[..., 1] <= 2 * REACH), finite[..., 1], REACH).astype(np.int64)
    there = cohort.labels[..., 0] != UNKNOWN
    sums = np.zeros((1 + 3 * len(KINDS) + 3, len(tags)))
    sums[0] = 1
    for record, (labels, present) in enumerate(zip(cohort.labels, there, strict=True)):
        true = spans_of(labels[present, 0].tolist())
        found = spans_of(tags[record, present].tolist())
        sums[1:-3, record] = _entity_counts(found[:MOST_ENTITIES], true[:MOST_ENTITIES])
        given = relations_of(found, places[record].tolist())[:MOST_RELATIONS]
        asked = relations_of(true, labels[:, 1].tolist())[:MOST_RELATIONS]
        sums[-3:, record] = np.array([len(set(given) & set(asked)), len(given), len(asked)]) / MOST_RELATIONS
    return np.asarray(sums @ cohort.record_weights())


def _entity_counts(found: Sequence[Span], true: Sequence[Span]) -> FloatArray:
    parts = (set(found) & set(true), found, true)
    counts = [np.bincount([span[2] for span in part], minlength=len(KINDS)) for part in parts]
    return np.concatenate(counts) / MOST_ENTITIES


def sums_agree(sums: FloatArray) -> bool:
    """Whether they are of entities: no more true ones found than found or true, and no share above 1."""
    count, slack = sums[0], ROUNDING * max(sums[0], 1.0)
    both, found, true = sums[1:-3].reshape(3, len(KINDS))
    pairs, given, asked = sums[-3:]
    within = max(found.sum(), true.sum(), given, asked) <= count + slack
    return bool(within and (both <= np.minimum(found, true) + slack).all() and pairs <= min(given, asked) + slack)


ENTITIES = Statistic(name="entities", shape=(1 + 3 * len(KINDS) + 3,), summarise=entity_sums, sensitivity=7**0.5, is_counts=False, agrees=sums_agree)


def _of_kinds(sums: FloatArray, kinds: Sequence[str]) -> tuple[float, float, float]:
    """Found and true, found, and true, summed over these kinds."""
    both, found, true = sums[1:-3].reshape(3, len(KINDS))[:, [KINDS.index(kind) for kind in kinds]].sum(axis=1).tolist()
    return both, found, true


def entity_f1(sums: FloatArray) -> float | None:
    """2 TP / (2 TP + FP + FN) over the entities of all kinds."""
    both, found, true = _of_kinds(sums, KINDS)
    return 2 * both / (found + true) if found + true > 0 else None


def relation_f1(sums: FloatArray) -> float | None:
    """The same over relations; one is right where both spans are, and it joins them."""
    pairs, given, asked = sums[-3:].tolist()
    return float(2 * pairs / (given + asked)) if given + asked > 0 else None


def _recall(*kinds: str) -> Metric:
    """Of the true entities of these kinds, the share that is found."""

    def finish(sums: FloatArray) -> float | None:
        both, _, true = _of_kinds(sums, kinds)
        return both / true if true > 0 else None

    name = "identifier" if kinds == IDENTIFIERS else kinds[0].lower()
    return Metric(name=f"{name}_recall", statistic=ENTITIES, finish=finish, low=0, high=1)


METRICS = (
    Metric(name="entity_f1", statistic=ENTITIES, finish=entity_f1, low=0, high=1),
    Metric(name="relation_f1", statistic=ENTITIES, finish=relation_f1, low=0, high=1),
    _recall(*IDENTIFIERS),
    *(_recall(kind) for kind in IDENTIFIERS),
)


# Synthetic notes ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Words that fill the templates; those of test patients share none with those of the others."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    drugs: tuple[str, ...]


TRAINED = Lists(
    first=listed("""Anna Brian Carla David Elena Frank Grace Henry Irene James Karen Louis Maria Nathan Olivia Peter Quentin Rachel Samuel Teresa Ursula Victor
        Wendy Xavier Yvonne Zachary Amir Beatriz Chloe Dmitri Esther Fatima Gustavo Hannah Ivan Jun Keiko Leila Mateo Noor"""),
    last=listed("""Anderson Baker Carter Dawson Ellis Foster Garcia Harris Ibrahim Jenkins Keller Lambert Morris Nguyen Osborne Patterson Quinn Ramirez Sanders
        Thompson Underwood Vargas Walker Xu Yamamoto Zimmerman Abbott Bennett Coleman Delgado Eriksen Fischer Gordon Holland Jansen Kowalski Larsen
        Mancini Novak Okafor Petrov Rossi Schmidt Tanaka"""),
    drugs=listed("""lisinopril enalapril ramipril metoprolol atenolol bisoprolol atorvastatin simvastatin amlodipine nifedipine omeprazole lansoprazole fluconazole
        amoxicillin ampicillin ciprofloxacin moxifloxacin azithromycin doxycycline metformin glipizide sertraline fluoxetine lorazepam clonazepam
        valsartan candesartan cefazolin cefepime furosemide aspirin heparin warfarin digoxin prednisone ibuprofen tramadol insulin_glargine metoprolol_succinate"""),
)
HELD_OUT = Lists(
    first=listed("Alice Boris Celia Derek Edith Felix Gloria Hugo Ines Jonas Kavita Lionel Miriam Nils Ophelia Pavel Rosa Stefan Tamara Umar"),
    last=listed("""Archer Bishop Chavez Dupont Eastwood Ferguson Grant Hoffman Iverson Jimenez Knight Lindqvist Moretti Nakamura Olsen Pereira Reyes Sharma Toledo
        Vance Winters Young"""),
    drugs=listed("""captopril benazepril propranolol carvedilol rosuvastatin pravastatin felodipine pantoprazole esomeprazole voriconazole piperacillin oxacillin
        levofloxacin clarithromycin minocycline glyburide paroxetine diazepam losartan irbesartan ceftriaxone torsemide clopidogrel insulin_lispro
        morphine_sulfate"""),
)
# {name}, {date}, {id}, {age}, {what}, {when} draw anew; {drug:a} draws a drug, and {dose:a} is a dose of it; {dose} is of no drug.
SHARED_TEMPLATES = (
    "{name} is a {age} year old admitted on {date} with {what} .", "seen by Dr. {name} on {date} for {what} .", "started on {drug:a} {dose:a} {when} .",
    "{drug:a} {dose:a} {when} and {drug:b} {dose:b} {when} .", "patient was given {dose:a} of {drug:a} for {what} .", "{drug:a} was stopped on {date} .",
    "{drug:a} and {drug:b} were continued at {dose:a} and {dose:b} respectively .", "dose of {drug:a} raised from {dose:a} to {dose:a} on {date} .",
    "no history of {what} .", "received {dose} of oxygen overnight .", "allergic to {drug:a} , so {drug:b} {dose:b} was chosen .",
    "will follow up with {name} in {num} weeks .", "blood pressure {num} / {num} , heart rate {num} .", "please call {name} with results .",
)  # fmt: skip
SITE_TEMPLATES = {
    "synthetic-1": (
        "Name : {name} MRN : {id} Admitted : {date}", "Medications : {drug:a} {dose:a} ; {drug:b} {dose:b} ; {drug:c} {dose:c}",
        "Attending : {name} , MD",
    ),
    "synthetic-2": (
        "I had the pleasure of seeing {name} ( record {id} ) in clinic on {date} .", "we agreed to reduce {drug:a} to {dose:a} {when} because of {what} .",
        "Sincerely , {name}",
    ),
    "synthetic-3": (
        "pt {name} # {id} seen {date}", "{what} , on {dose:a} {drug:a} {when}", "d/w {name} re {what}", "cont {drug:a} {dose:a} , d/c {drug:b}",
    ),
    "synthetic-4": (
        "PATIENT {name} / FILE {id} / VISIT {date}", "PLAN : INCREASE {drug:a} TO {dose:a} ; HOLD {drug:b}", "DICTATED BY {name} ON {date}",
    ),
}  # fmt: skip
SITE_TYPOS, SITE_SMALL, SITE_ABBREVIATED = (0.01, 0.01, 0.04, 0.02), (0.0, 0.05, 0.6, 0.0), (0.1, 0.05, 0.7, 0.2)  # rates: of words, notes, words
ABBREVIATIONS = {"patient": "pt", "history": "hx", "with": "w/", "daily": "qd", "follow": "f/u", "twice": "bid", "respectively": "resp"}
COMPLAINTS = (
    "chest pain", "shortness of breath", "fever and chills", "abdominal pain", "pneumonia", "atrial fibrillation", "a fall", "heart failure", "back pain",
    "a rash",
)  # fmt: skip
FREQUENCIES = ("daily", "twice daily", "at bedtime", "every 8 hours", "as needed", "weekly")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
UNITS = ("mg", "mg", "mg", "mcg", "g", "units", "ml")
SYNTHETIC_TEST_RATE = 0.3


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients with one or two notes of four to seven sentences and lines, drawn from templates.

    Four sites write in styles of their own: forms, letters, abbreviations in small letters, capitals; and date and number records each their own way.
    Names and drugs of test patients (`published_test`) are of lists of their own, so knowing words by heart does not help; drugs of both share
    some endings, as real ones do. Words have typos and abbreviations, and some names are the names of things.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    test = rng.random(num_patients) < SYNTHETIC_TEST_RATE
    site = rng.integers(len(SITE_TEMPLATES), size=num_patients)
    counts = rng.integers(1, 3, size=num_patients)
    patient = np.repeat(np.arange(num_patients, dtype=np.int64), counts)
    notes = [_synthetic_note(_Pen(rng, HELD_OUT if test[person] else TRAINED, int(site[person]))) for person in patient.tolist()]
    pieces = [pieces_of(note) for note in notes]
    tokens, labels = arrays_of([piece for own in pieces for piece in own])
    return Cohort(
        inputs=(tokens,),
        labels=labels,
        patient_of_record=np.repeat(patient, [len(own) for own in pieces]),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": np.array(list(SITE_TEMPLATES))[site]},
        published_test=test,
        synthetic=True,
    )


class _Pen:
    """Draws what fills a template, in the way of a site."""

    def __init__(self, rng: np.random.Generator, lists: Lists, site: int) -> None:
        self.chances = iter(rng.random(1024).tolist())  # one call for a note, not one for each word
        self.lists, self.site = lists, site

    def below(self, count: int) -> int:
        """A number from 0 to under `count`."""
        return int(next(self.chances) * count)

    def one(self, options: Sequence[str]) -> str:
        """One of them."""
        return options[self.below(len(options))]

    def chance(self, rate: float) -> bool:
        """True at this rate."""
        return bool(next(self.chances) < rate)

    def name(self) -> list[str]:
        """A name, in one, two or three tokens."""
        first, last = self.one(self.lists.first), self.one(self.lists.last)
        return [[last], [first, last], [first, last], [first, f"{self.one('ABCDEHJKLMNPRSTW')}.", last], [last, ",", first]][self.below(5)]

    def date(self) -> list[str]:
        """A date."""
        day, month, year = 1 + self.below(28), self.below(12), 1990 + self.below(35)
        ways = (
            [f"{month + 1:02}/{day:02}/{year}"], [str(day), MONTHS[month], str(year)], [f"{month + 1}/{day}/{year % 100:02}"],
            [f"{year}-{month + 1:02}-{day:02}"], [MONTHS[month][:3], str(day)], [MONTHS[month], str(day), ",", str(year)],
        )  # fmt: skip
        return ways[self.site] if self.chance(0.6) else ways[self.below(6)]

    def identifier(self) -> list[str]:
        """The number of a record."""
        number = 10_000_000 + self.below(90_000_000)
        own = ([str(number)], [f"{str(number)[:3]}-{str(number)[3:]}"], [str(number)[:6]], ["MRN", f"{self.one('ABCD')}{str(number)[:7]}"])[self.site]
        return own if self.chance(0.8) else [f"{self.one('HKPX')}{str(number)[:6]}"]

    def dose(self) -> list[str]:
        """A dose, in one or two tokens."""
        amount, unit = self.one(("5", "10", "20", "25", "40", "50", "75", "100", "250", "500", "2.5", "0.5", "1")), self.one(UNITS)
        return [f"{amount}{unit}"] if self.chance(0.3) else [amount, unit]


def _synthetic_note(pen: _Pen) -> Note:
    own = list(SITE_TEMPLATES.values())[pen.site]
    templates = [own[0], *(pen.one(own) if pen.chance(0.35) else pen.one(SHARED_TEMPLATES) for _ in range(3 + pen.below(4)))]
    style = _Style(small=pen.chance(SITE_SMALL[pen.site]), typos=SITE_TYPOS[pen.site], abbreviated=SITE_ABBREVIATED[pen.site])
    tokens: list[str] = []
    tags: list[int] = []
    drugs: list[int] = []
    for template in templates:
        _fill(template, pen, style, (tokens, tags, drugs))
    return Note(tokens=tuple(tokens), tags=tuple(tags), drugs=tuple(drugs))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    small: bool
    typos: float
    abbreviated: float


def _fill(template: str, pen: _Pen, style: _Style, note: tuple[list[str], list[int], list[int]]) -> None:
    """Append the template, filled, to the note's tokens, tags and drugs; a dose may stand before its drug."""
    tokens, tags, drugs = note
    begins: dict[str, int] = {}  # of a drug's letter, its token
    doses: list[tuple[int, str]] = []
    capitals = re.sub(r"{[^}]*}", "", template).isupper()
    for part in template.split():
        slot, _, letter = part.strip("{}").partition(":")
        words, kind = _words_of_slot(slot, pen) if part.startswith("{") else ([part], "")
        if kind == "DRUG":
            begins[letter] = len(tokens)
        if kind == "DOSE" and letter:
            doses.append((len(tokens), letter))
        marks = [NUMBER_OF_TAG[f"{'I' if place else 'B'}-{kind}"] if kind else 0 for place in range(len(words))]
        tokens += [_as_written(word, kind, pen, style, capitals=capitals) for word in words]
        tags += marks
        drugs += [UNKNOWN] * len(words)
    for place, letter in doses:
        drugs[place] = begins[letter]


def _words_of_slot(slot: str, pen: _Pen) -> tuple[list[str], str]:
    """What fills a slot, and of which kind of entity it is; no kind where it is none."""
    if slot == "drug":
        return pen.one(pen.lists.drugs).split("_"), "DRUG"
    entities = {"name": (pen.name, "NAME"), "date": (pen.date, "DATE"), "id": (pen.identifier, "ID"), "dose": (pen.dose, "DOSE")}
    if slot in entities:
        draw, kind = entities[slot]
        return draw(), kind
    plain = {"what": COMPLAINTS, "when": FREQUENCIES}
    return (pen.one(plain[slot]).split() if slot in plain else [str(18 + pen.below(80))]), ""


def _as_written(word: str, kind: str, pen: _Pen, style: _Style, *, capitals: bool) -> str:
    """The word as the site writes it: abbreviated, with a typo, in small letters or capitals; numbers as they are."""
    if not word.isalpha():
        return word
    if not kind and word in ABBREVIATIONS and pen.chance(style.abbreviated):
        word = ABBREVIATIONS[word]
    if len(word) > 4 and pen.chance(style.typos):
        place = 1 + pen.below(len(word) - 3)
        word = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if style.small:
        return word.lower()
    if kind == "DRUG" and pen.chance(0.2):
        return word.capitalize()
    return word.upper() if capitals else word


def deidentify_notes() -> Task:
    """The task `deidentify-notes`."""
    return Task(
        name=NAME,
        title="Names, dates, identifiers, drugs and doses in notes, and which dose is of which drug",
        modality="text",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=TokenTagger,
        loss=tagging_loss,
        predict=predict,
        predicted=(*(f"{kind.lower()}s_found" for kind in KINDS), "doses_with_drug"),
        row=entity_rows,
        metrics=METRICS,
        primary_metric="entity_f1",
        source="your own notes as a BIO-tagged CSV; synthetic notes",
        default_study="deidentify-notes.toml",
    )
