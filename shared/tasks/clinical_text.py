"""Clinical text: which of five kinds of disease a medical abstract is about.

Data: the Medical Abstracts Text Classification corpus (Schopf, Braun, Matthes 2022, "Evaluating unsupervised text classification: zero-shot and
similarity-based approaches"), or your own texts. Its labels are noisy: where an abstract was given two kinds it stands twice, and the fifth kind,
general pathological conditions, overlaps all others.

The model is one layer of self-attention (Vaswani et al. 2017, section 3.2) over embeddings of the medical combining forms in a text's words ("gastr" and
"enter" in "gastroenteritis"), and their mean. The forms are a fixed public list (see `shared.tasks.text`), so no vocabulary is taken from anybody's
texts; words without a form are left out, and where a form stands does not matter. Hashed words beside the forms did not help (docs/tasks/clinical-text.md).

Legend: N records, T forms of a record, D width, K kinds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shared.cohort import Cohort, IntArray
from shared.errors import DataMissingError
from shared.metrics import confusion_metrics
from shared.models import make_private
from shared.schema import TensorSchema
from shared.seeding import generator
from shared.task import Task
from shared.tasks.images import attribute_of, in_set, patients_of, refuse_too_many, tolerance_of
from shared.tasks.text import (
    NUM_FORMS,
    PADDING,
    SmallStart,
    content_identifier,
    forms_of,
    has_control_characters,
    listed,
    padded,
    read_texts,
    text_file,
    words_of,
)

NAME = "clinical-text"
KINDS = ("neoplasms", "digestive system diseases", "nervous system diseases", "cardiovascular diseases", "general pathological conditions")
KIND_WEIGHTS = (1.0, 1.6, 1.4, 1.0, 0.8)  # of a text in the loss: what is rarer in the published corpus counts more; public, and the same everywhere
MEANINGS = {str(number): float(number - 1) for number in range(1, 6)} | {kind: float(number) for number, kind in enumerate(KINDS)}
LABELS_FILE = "medical_tc_labels.csv"  # of the corpus: what its numbers mean
OTHER_NAMES = {"medical_abstract": "text", "condition_label": "label"}  # as the corpus calls them
NUM_TOKENS = 40  # T; half the corpus's abstracts have 16 or fewer
LEAST_WORDS = 2
WIDTH, NUM_HEADS = 16, 2
EMBEDDING_SCALE = 3.0

SCHEMA = (TensorSchema(name="forms", shape=(NUM_TOKENS,), dtype="int64", unit="number of a combining form; 0 for none", low=0, high=NUM_FORMS - 1),)


# Data ---------------------------------------------------------------------------------------------------------------------------


def load_cohort(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """A CSV with a row for each text: columns `text`, `label` (1 to 5, or the kind's name), and there may be `patient` and `site`; or a folder with it.

    The corpus's own names of columns do as well. Without a column `patient`, equal texts are of one patient, and every other text is a patient of its
    own: so the corpus's twice-labelled abstracts are not trained on under one label and tested under the other. The same text twice under the
    same label and patient is unusable, as is an empty one, one without two words, and a label outside the set.

    Args:
        options: `tolerance`, see `tolerance_of`.

    Raises:
        DataMissingError, DataAccessError, SchemaError: the data are missing, unreadable or not as declared, or too many texts are.
    """
    tolerance = tolerance_of(options, NAME)
    file = text_file(path, NAME, ignored=(LABELS_FILE,))
    frame = read_texts(file, ["text", "label"], also=OTHER_NAMES)
    kinds, known = in_set(frame["label"], MEANINGS)
    words = [words_of(text) for text in frame["text"]]
    unreadable = np.array([len(own) < LEAST_WORDS or has_control_characters(text) for own, text in zip(words, frame["text"], strict=True)])
    repeated = frame.duplicated([name for name in ("patient", "text", "label") if name in frame.columns]).to_numpy(dtype=np.bool_)
    problems = {
        "a label outside its set": ~known,
        "a text without words, or with control characters": unreadable,
        "a text and label listed twice": repeated,
    }
    usable = ~np.any(list(problems.values()), axis=0)
    first = next((what for what, bad in problems.items() if bad.any()), "")
    refuse_too_many(int((~usable).sum()), len(frame), tolerance=tolerance, source=file.name, first=first, bad=~usable)
    kept = frame[usable]
    forms = [[form for word in own for form in forms_of(word)] for own, keep in zip(words, usable, strict=True) if keep]
    identifiers = kept["patient"].tolist() if "patient" in kept.columns else [content_identifier(text) for text in kept["text"]]
    people = patients_of(identifiers, source=file.name)
    notes = {
        "records_dropped": int((~usable).sum()),
        "records_without_forms": sum(not own for own in forms),
        "forms_left_out": sum(max(0, len(own) - NUM_TOKENS) for own in forms),
    }
    return Cohort(
        inputs=(numbers_of(forms),),
        labels=kinds[usable].astype(np.int64),
        patient_of_record=people.patient_of_record,
        patient_ids=people.patient_ids,
        attributes={"site": attribute_of(kept["site"].to_numpy(), people, "site", source=file.name)} if "site" in kept.columns else {},
        notes=notes,
    )


def numbers_of(forms: Sequence[Sequence[int]]) -> IntArray:
    """`(N, T)`: the first T forms of each text, and padding behind."""
    return padded([[(form,) for form in own[:NUM_TOKENS]] for own in forms], NUM_TOKENS, 1)[..., 0]


# The model ----------------------------------------------------------------------------------------------------------------------


class TextAttention(nn.Module):
    """`(N, T)` numbers of forms -> `(N, K)` logits; padding is no form. Made with `make_private`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_FORMS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, len(KINDS))
        self.start = SmallStart(self.embedding)

    def forward(self, forms: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(forms)  # (N, T, D)
        present = (forms != PADDING).to(embedded.dtype)  # (N, T)
        embedded = embedded * present[..., None] * EMBEDDING_SCALE
        attended = self.attention(embedded, embedded, embedded, key_padding_mask=(1 - present) * -1e4, need_weights=False)[0]
        total = ((embedded + attended) * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
        logits: torch.Tensor = self.output(self.norm(total))
        return logits


def weighted_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy times the weight of the record's kind, `(N,)`."""
    weights = torch.tensor(KIND_WEIGHTS, dtype=outputs.dtype, device=outputs.device)
    return nn.functional.cross_entropy(outputs, labels, reduction="none") * weights[labels]


# Synthetic texts ----------------------------------------------------------------------------------------------------------------

SYNTHETIC_SITES = {
    "synthetic-1": (0.22, 0.10, 0.13, 0.21, 0.34),
    "synthetic-2": (0.40, 0.10, 0.10, 0.15, 0.25),
    "synthetic-3": (0.10, 0.10, 0.35, 0.20, 0.25),
    "synthetic-4": (0.10, 0.15, 0.10, 0.40, 0.25),
}  # shares of the kinds
SYNTHETIC_LENGTHS = (24, 18, 30, 12)  # words with a form, on the mean, by site
SYNTHETIC_NOISE = 0.1  # of the labels
SYNTHETIC_SHORT_RATE = 0.05  # of texts, of which little more than a title is left
KIND_WORDS: tuple[tuple[str, ...], ...] = (
    listed("carcinoma tumor metastasis cancer neoplasm lymphoma leukemia oncology chemotherapy adenocarcinoma melanoma sarcoma malignant glioma"),
    listed("gastric hepatitis colitis bowel biliary pancreatitis duodenal esophageal gastroenteritis cirrhosis intestinal ulcer liver colon"),
    listed("cerebral neurological epilepsy seizures spinal encephalitis brain dementia parkinsonism nerve migraine stroke meningitis palsy"),
    listed("cardiac coronary myocardial hypertension arterial aortic infarction ventricular angina thrombosis vascular systolic valve"),
    listed("infection pain syndrome trauma pregnancy fever renal immunology diabetes fracture bacterial urinary skin respiratory inflammation"),
)
COMMON_WORDS = listed("surgery therapy blood surgical lesion therapeutic transplantation perfusion biopsy antibody lung serum patients study")
OWN_RATE, COMMON_RATE = 0.35, 0.4  # of words: of the text's own kind, of no kind; the rest are of any


def synthetic_cohort(num_patients: int, seed: int) -> Cohort:
    """Synthetic patients with a text each: of its words a third are typical of its kind, two fifths of none, and the rest of any kind.

    Four sites differ in the kinds they see and in how much they write; one label in ten is another kind's, and one text in twenty is cut short.
    """
    if num_patients < 1:
        raise DataMissingError("expected at least one synthetic patient, got none", "ask for more")
    rng = generator(seed, "synthetic", NAME)
    site = rng.integers(len(SYNTHETIC_SITES), size=num_patients)
    ends = np.cumsum(list(SYNTHETIC_SITES.values()), axis=1)[site]
    kind = np.minimum((rng.random((num_patients, 1)) > ends).sum(axis=1), len(KINDS) - 1)
    lengths = 2 + rng.poisson(np.where(rng.random(num_patients) < SYNTHETIC_SHORT_RATE, 2, np.array(SYNTHETIC_LENGTHS)[site]))
    forms = [_synthetic_forms(int(own), int(length), rng) for own, length in zip(kind, lengths, strict=True)]
    other = rng.integers(len(KINDS), size=num_patients)
    return Cohort(
        inputs=(numbers_of(forms),),
        labels=np.where(rng.random(num_patients) < SYNTHETIC_NOISE, other, kind).astype(np.int64),
        patient_of_record=np.arange(num_patients, dtype=np.int64),
        patient_ids=tuple(f"synthetic-{index}" for index in range(num_patients)),
        attributes={"site": np.array(list(SYNTHETIC_SITES))[site]},
        synthetic=True,
    )


def _synthetic_forms(kind: int, length: int, rng: np.random.Generator) -> list[int]:
    """The forms of `length` words."""
    forms: list[int] = []
    for which, what in rng.random((length, 2)).tolist():
        any_kind = int((which - OWN_RATE - COMMON_RATE) / (1 - OWN_RATE - COMMON_RATE) * len(KINDS))
        words = KIND_WORDS[kind] if which < OWN_RATE else COMMON_WORDS if which < OWN_RATE + COMMON_RATE else KIND_WORDS[any_kind]
        forms += forms_of(words[int(what * len(words))])
    return forms


def clinical_text() -> Task:
    """The task `clinical-text`."""
    return Task(
        name=NAME,
        title="Kind of disease that a medical text is about",
        modality="text",
        schema=SCHEMA,
        load_cohort=load_cohort,
        synthetic_cohort=synthetic_cohort,
        model=lambda: make_private(TextAttention()),
        loss=weighted_loss,
        predict=lambda outputs: torch.softmax(outputs, dim=1),
        predicted=tuple(kind.replace(" ", "_") for kind in KINDS),
        metrics=confusion_metrics(len(KINDS)),
        primary_metric="macro_f1",
        source="Medical Abstracts Text Classification corpus (Schopf, Braun, Matthes 2022), or your own CSV",
        default_study="clinical-text.toml",
    )
