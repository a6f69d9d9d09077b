"""Late fusion: an encoder for each modality gives a logit, and the logits of those that are there are summed.

A sum of log-odds is what independent witnesses of one label add up to (a product of experts: Hinton 2002; for missing modalities Wu and Goodman 2018).
A modality that a patient lacks is multiplied by 0, so it neither says anything nor learns: its encoder's gradient of that record is exactly 0, and so
no hospital needs to have what another has. Under privacy the gradient of a record is clipped as a whole, over all encoders.

Legend: N records, M modalities, T words of a text, D width, S side of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from shared.cohort import BoolArray, Cohort, IntArray
from shared.schema import TensorSchema
from shared.tasks.text import PADDING, SmallStart, bucket, padded, words_of

NUM_WORDS = 512  # numbers of words; 0 for none
NUM_TOKENS = 48  # T
WIDTH = 8  # D
EMBEDDING_SCALE = 3.0

WORDS_SCHEMA = TensorSchema(
    name="words", shape=(NUM_TOKENS,), dtype="int64", unit="number of a word by a public hash; 0 for none", low=0, high=NUM_WORDS - 1
)


def presence_schema(modalities: Sequence[str]) -> TensorSchema:
    """The last input of a fused model: which modalities a patient has."""
    return TensorSchema(name="present", shape=(len(modalities),), unit=f"1 where there is: {', '.join(modalities)}", low=0, high=1)


def tokens_of(text: str) -> list[int]:
    """Numbers of the words in the text, each once, in the order in which they first stand, at most T.

    >>> tokens_of("Sepsis, pulmonary; no other sepsis.") == [bucket("sepsis", NUM_WORDS), bucket("pulmonary", NUM_WORDS)]
    True
    """
    return list(dict.fromkeys(bucket(word, NUM_WORDS) for word in words_of(text)))[:NUM_TOKENS]


def words_input(texts: Sequence[str]) -> IntArray:
    """`(N, T)`: the words of each text, and padding behind."""
    return padded([[(token,) for token in tokens_of(text)] for text in texts], NUM_TOKENS, 1)[..., 0]


def image_encoder() -> nn.Module:
    """A small CNN, `(N, 1, S, S) -> (N, 1)`."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 1),
    )


class WordsEncoder(nn.Module):
    """`(N, T)` numbers of words -> `(N, 1)`: their embeddings summed, over the root of their number; order does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, WIDTH)
        self.output = nn.Linear(WIDTH, 1)
        self.start = SmallStart(self.embedding)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(words)  # (N, T, D)
        present = (words != PADDING).to(embedded.dtype)  # (N, T)
        total = (embedded * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
        logits: torch.Tensor = self.output(EMBEDDING_SCALE * total)
        return logits


class FusedRisk(nn.Module):
    """M inputs, one for each encoder, and which are present `(N, M)` -> `(N, 1)` logits.

    Args:
        encoders: modality -> input to `(N, 1)`, in the order of the inputs.
        usual_logit: of a patient of whom nothing is known; public, for clipped gradients would spend rounds to find it out.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], *, usual_logit: float) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.usual_logit = usual_logit

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        *seen, present = inputs
        logits = torch.cat([encoder(values) for encoder, values in zip(self.encoders.values(), seen, strict=True)], dim=1)  # (N, M)
        return (logits * present).sum(dim=1, keepdim=True) + self.usual_logit

    def extra_repr(self) -> str:
        """What is no parameter, but part of the architecture's hash."""
        return f"usual_logit={self.usual_logit}"


def with_only(cohort: Cohort, modalities: Sequence[str], only: Collection[str]) -> Cohort:
    """The same patients, of whom nothing but the modalities `only` is there; what is absent is 0 in the inputs too."""
    keeps = np.array([name in only for name in modalities])
    values = [part if keep else np.zeros_like(part) for part, keep in zip(cohort.inputs, keeps, strict=False)]
    return replace(cohort, inputs=(*values, cohort.inputs[-1] * keeps.astype(np.float32)))


def presence_counts(present: BoolArray, modalities: Sequence[str]) -> dict[str, int]:
    """How many records lack each modality, as notes of a cohort; `present` is `(N, M)`."""
    return {f"records_without_{name}": int((~present[:, place]).sum()) for place, name in enumerate(modalities)}
