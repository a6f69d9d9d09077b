"""Text as numbers by a fixed public rule, and tables of text as they are read. Every task on text uses it.

No vocabulary is learned: which words a hospital's patients have never decides what a number means, so nothing of them is told by the model's shape, and
all sites agree without a message. The rule, the same everywhere and for ever:

1. `normalised`: compatibility forms become plain ones (Unicode NFKC), accents go, capitals become small.
2. `words_of`: runs of letters; function words (`FUNCTION_WORDS`) and single letters are left out, and what has a digit is no word.
3. `bucket`: a piece of text becomes a number by a hash (BLAKE2b, 64 bits, under a public person string) modulo the size of the table, as in Weinberger
   et al. 2009, "Feature hashing for large scale multitask learning"; 0 is padding. Two pieces may share a number.
4. `forms_of`: or a word becomes the numbers of the medical combining forms in it, by a list in this file: subwords (as Bojanowski et al. 2017 use
   them) that words share which no site has seen before. The list is short, so that training with noise has few numbers to move.

Legend: N records, T tokens of a record.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from shared.cohort import IntArray
from shared.errors import DataMissingError, SchemaError
from shared.tasks.images import reading
from shared.tasks.tabular import REMEDY_FOLDER, read_csv

if TYPE_CHECKING:
    import pandas as pd  # tens of megabytes that a coordinator has no use for

PADDING = 0
EMBEDDING_START = 0.01  # standard deviation
HASH_PERSON = b"wardround text"  # public: it only keeps this hash apart from others
MOST_TABLE_BYTES = 2**30
MOST_TOKEN_LETTERS = 64  # of which a token's shape and pieces are made; a longer one is no word


def listed(words: str) -> tuple[str, ...]:
    """The words of a list as it stands in a file."""
    return tuple(words.split())


FUNCTION_WORDS = frozenset(
    listed(
        """a about after again all also although among an and any are as at be because been before being between both but by can could did do does during
    each either for from further had has have having he her here hers him his how however if in into is it its itself may me might more most must my no nor
    not of on once only or other our out over own per same she should since so some such than that the their them then there these they this those through
    thus to too under until up upon us very was we were what when where whether which while who whom why will with within without would you your"""
    )
)

# Common combining forms of medical words and short names of organs, written down from general knowledge; no text was counted to choose them.
COMBINING_FORMS = listed(
    """abdom aden adren allerg alveol amnio amput anaemi anemi anesth aneurysm angin angio ankyl antibod aort apne append arrest arrhythm arter arthr
    articul asthm atax athero atri audi auric autis bacter benign bili biliar bladder blast blood bone bowel brachy brady brain breast bronch burn
    cancer carcin cardi carot cataract cephal cereb cervic chemo chemother chest cholangi chole cholecyst chondr cirrh coagul cocc cochle cognit colic
    colitis colon colorect congest convuls corne coron cortex cortic crani cyst deliver dement derm diabet dialy diarrh digest diverticul duoden
    dysphag echo eclamp edem electrocardi electroenceph embol embry encephal endocard endocr endometr endoscop enter epilep erythr esophag eye fever
    fibr fibrill fistul fractur gall gangl gastr gestat gingiv gliom globul glom gluc gluten gout granul gynec haem haemo headach hear heart heel
    hemat hemo hepat herni herpes hormon hydroceph hypert hyperten hypotens hyster ictal ileit ileum immun infarct infect inflam insul intestin
    intracran ischaem ischem jaund kidney knee laparo laryng lens lesion leuk leukem lipid lith liver lumb lung lupus lymph lymphom mamm mastect
    mediast melan melanom melen mening menstr metast migrain mitral motor muscul myasth myel myelom myocard myom myop narcot nasal nause necro neonat
    neoplas nephr nerve neur neurob neurop nodul obes ocul oedem oesophag olig onc ophthalm opioid orchi ortho osteo otit ovar pacemak pain palsy
    pancrea paralys paresis parkinson pector pediatr pelvi peptic perfus pericard perinat periton pharmac pharyng phleb placent plaque pleur pneum
    polyp portal pregnan proct prostat pseud psych pulmon pyel pylor radiother rect reflux renal resect retin rheumat rhin salping sarcom schiz scler
    sclero seiz sensor seps septic sinus skelet skin sleep spasm sphinct spinal spleen spondyl squam stenos sternal stomach strok surg synap syncop
    syndrom systol tachy tendin testic thalam therap thorac thromb thym thyr tibi tonsil toxic trache transplant trauma tremor tubercul tumor tumour
    ulcer ultrason ureter urethr urin urolog uterin uterus uve vaccin vagin vagus valv varic vasc vascul vaso ventric vertebr vertig vesic viral
    visual vitamin vomit"""
)
NUM_FORMS = len(COMBINING_FORMS) + 1  # 0: none


# The rule -----------------------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """The text in plain small letters, without accents.

    >>> normalised("Ménière ﬁbrosis")
    'meniere fibrosis'
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text))
    return "".join(letter for letter in plain if not unicodedata.combining(letter)).lower()


def words_of(text: str) -> list[str]:
    """The words that carry meaning, in their order.

    >>> words_of("The 54-year-old man's ECG was normal (p<0.05).")
    ['year', 'old', 'man', 'ecg', 'normal']
    """
    return [word for word in re.findall(r"(?<![^\W_])[^\W\d_]{2,}(?![^\W_])", normalised(text)) if word not in FUNCTION_WORDS]


@functools.lru_cache(maxsize=2**17)
def bucket(text: str, num_buckets: int) -> int:
    """1 to `num_buckets - 1`: a public hash of the text, the same everywhere.

    >>> 0 < bucket("aspirin", 4096) == bucket("aspirin", 4096) < 4096
    True
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=HASH_PERSON).digest()
    return 1 + int.from_bytes(digest, "big") % (num_buckets - 1)


_FORMS = re.compile("|".join(sorted(COMBINING_FORMS, key=len, reverse=True)))  # at each place the longest
_NUMBER_OF_FORM = {form: number for number, form in enumerate(COMBINING_FORMS, start=1)}


@functools.lru_cache(maxsize=2**16)
def forms_of(word: str) -> tuple[int, ...]:
    """Numbers, from 1, of the combining forms in the word from its beginning, each the longest that fits there; none where it has none.

    >>> [COMBINING_FORMS[number - 1] for number in forms_of("gastroenteritis")], forms_of("table")
    (['gastr', 'enter'], ())
    """
    return tuple(_NUMBER_OF_FORM[form] for form in _FORMS.findall(word[:MOST_TOKEN_LETTERS]))


def shape_of(token: str) -> str:
    """A token's shape: X for a run of capitals, x of small letters, a 0 for each digit, other signs as they are.

    >>> shape_of("Smith"), shape_of("12/03/2019"), shape_of("500mg")
    ('Xx', '00/00/0000', '000x')
    """
    signs = ["0" if sign.isdigit() else "X" if sign.isupper() else "x" if sign.isalpha() else sign for sign in token[:MOST_TOKEN_LETTERS]]
    return "".join(sign for place, sign in enumerate(signs) if sign not in "Xx" or place == 0 or signs[place - 1] != sign)


def padded(rows: Sequence[Sequence[Sequence[int]]], num_tokens: int, num_levels: int) -> IntArray:
    """`(N, T, levels)` int64: each record's tokens, the first T of them, and padding behind."""
    values = np.full((len(rows), num_tokens, num_levels), PADDING, dtype=np.int64)
    for record, tokens in enumerate(rows):
        kept = tokens[:num_tokens]
        if kept:
            values[record, : len(kept)] = kept
    return values


# Tables of text -----------------------------------------------------------------------------------------------------------------


def text_file(path: Path | None, task: str, *, ignored: Sequence[str] = ()) -> Path:
    """The CSV file that `path` is, or the only one in the folder `path`, but for those named in `ignored`.

    Raises:
        DataMissingError, DataAccessError: there is none, or more than one; it may not be read.
        SchemaError: it is another kind of file, or larger than 1 GiB.
    """
    if path is None:
        raise DataMissingError(f"task {task} has no data of its own", "give your file or folder with --data")
    with reading(str(path)):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".csv" and file.name not in ignored)
            if len(files) != 1:
                raise DataMissingError(f"{path}: expected one CSV file, found {len(files)}", REMEDY_FOLDER)
            path = files[0]
        size = path.stat().st_size
    if path.suffix.lower() != ".csv":
        raise SchemaError(f"{path.name}: expected a .csv file, got {path.suffix or 'no ending'}", "unpack it, or save it as UTF-8 CSV")
    if size > MOST_TABLE_BYTES:
        raise SchemaError(f"{path.name}: expected at most {MOST_TABLE_BYTES // 2**30} GiB, got more", "give a part of it")
    return path


def read_texts(path: Path, needed: Sequence[str], *, also: dict[str, str] | None = None) -> "pd.DataFrame":
    """A CSV as text, with at least the columns `needed`; a field in quotes may hold line breaks. Blanks around fields go, those within stay.

    Args:
        also: another name under which a file may have a column -> its name here.

    Raises:
        DataMissingError, DataAccessError, SchemaError: see `read_csv`; a column is missing or twice, there is no row, or a quote is never closed.
    """
    frame = read_csv(path)
    names = [(also or {}).get(str(name).strip().lower(), str(name).strip().lower()) for name in frame.columns]
    frame.columns = names
    for name in needed:
        count = names.count(name) + sum(re.fullmatch(rf"{name}\.\d+", other) is not None for other in names)  # as pandas calls a second one
        if count != 1:
            raise SchemaError(f"{path.name}: expected one column {name!r}, found {count}", "rename or add it in the file")
    if len(frame) == 0:
        raise DataMissingError(f"{path.name}: expected at least one row, got none", "check the export")
    stripped: pd.DataFrame = frame.apply(lambda column: column.str.strip())
    return stripped


def has_control_characters(text: str) -> bool:
    """Whether it has control characters, but for blanks and line breaks, as binary data read as text would."""
    return _CONTROL.search(text) is not None


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def content_identifier(text: str) -> str:
    """An identifier for a text from its content, where none is known."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, person=HASH_PERSON).hexdigest()


# Embeddings ---------------------------------------------------------------------------------------------------------------------


class SmallStart(nn.Module):
    """Starts an embedding near zero, where nn.Embedding's own start is a standard deviation of 1, far above what one word should say.

    A module of its own after the embedding in its model, for `initial_parameters` asks every module in order, and a subclass of nn.Embedding could not be
    trained for many sites at once.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embeddings = (embedding,)  # in a tuple, so that its weights are not this module's too
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embedding's weights anew."""
        nn.init.normal_(self._embeddings[0].weight, std=EMBEDDING_START)
