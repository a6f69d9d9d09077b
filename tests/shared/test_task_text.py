"""The text pipeline: numbers by a public rule that never changes, and tables of text as they are read."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataAccessError, DataMissingError, SchemaError
from shared.models import initial_parameters
from shared.tasks.clinical_text import TextAttention
from shared.tasks.text import (
    COMBINING_FORMS,
    NUM_FORMS,
    bucket,
    content_identifier,
    forms_of,
    has_control_characters,
    normalised,
    padded,
    read_texts,
    shape_of,
    text_file,
    words_of,
)


def test_numbers_are_public_and_fixed() -> None:
    """Another number for a word would be another model: these may never change."""
    assert [bucket(text, 2048) for text in ("aspirin", "word|smith", "")] == [149, 1830, 287]
    assert forms_of("electrocardiogram") == (COMBINING_FORMS.index("electrocardi") + 1,) and NUM_FORMS == 325
    assert list(COMBINING_FORMS) == sorted(set(COMBINING_FORMS)) and all(form.isalpha() and form.islower() for form in COMBINING_FORMS)


@given(st.text(max_size=80))
def test_any_text_becomes_words_and_numbers_in_range(text: str) -> None:
    for word in words_of(text):
        assert len(word) > 1 and not any(sign.isdigit() or sign.isspace() for sign in word)
        assert 0 < bucket(word, 64) < 64 and all(0 < number < NUM_FORMS for number in forms_of(word))
    assert len(shape_of(text)) <= len(text) and words_of(text) == words_of(normalised(text))


def test_words_forms_and_shapes() -> None:
    assert words_of("The Ménière's patients (n=12, T4N1, p<0.05) WITHOUT b12") == ["meniere", "patients"]
    assert [COMBINING_FORMS[number - 1] for number in forms_of("gastroenteritis")] == ["gastr", "enter"] and forms_of("word") == ()
    assert [shape_of(token) for token in ("McDonald", "12/3/99", "", "A-1b")] == ["XxXx", "00/0/00", "", "X-0x"]


def test_padding_stands_behind_and_long_records_are_cut() -> None:
    values = padded([[(1, 2)], [], [(3, 4)] * 5], 3, 2)
    assert values.tolist() == [[[1, 2], [0, 0], [0, 0]], [[0, 0]] * 3, [[3, 4]] * 3] and values.dtype == np.int64


def test_embeddings_start_small_on_both_sides() -> None:
    """5,000 draws of standard deviation 0.01: theirs is off by a tenth in fewer than one of 1e12 cases."""
    assert initial_parameters(TextAttention(), 5)["embedding.weight"].std() == pytest.approx(0.01, rel=0.1)


# Tables -------------------------------------------------------------------------------------------------------------------------


def test_a_quoted_line_break_and_odd_tokens_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('Text,Label\n"first, line\nsecond ""quoted""",1\nNA,2\n.,3\n', encoding="utf-8")
    frame = read_texts(text_file(tmp_path, "t"), ["text", "label"])
    assert frame["text"].tolist() == ['first, line\nsecond "quoted"', "NA", "."]
    assert content_identifier("a") == content_identifier("a") != content_identifier("b")
    assert has_control_characters("a\x00") and not has_control_characters("a\tb\nc")


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", DataMissingError, "empty file"), (b"text,label\n", DataMissingError, "at least one row"),
        (b"text\na\n", SchemaError, "one column 'label', found 0"), (b"text,label,label\na,1,2\n", SchemaError, "'label'"),
        (b"text,medical_abstract,label\na,b,1\n", SchemaError, "one column 'text', found 2"), (b"text,label\nsch\xf6n,1\n", SchemaError, "UTF-8"),
        (b"text,label\na,1,2,3\n", SchemaError, "number of fields"), (b'text,label\n"never closed,1\n', SchemaError, "quote"),
        (gzip.compress(b"text,label\na,1\n"), SchemaError, "UTF-8"), ("text,label\na,1\n".encode("utf-16"), SchemaError, "UTF-8"),
    ],
)  # fmt: skip
def test_bad_tables(tmp_path: Path, content: bytes, error: type[Exception], match: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(error, match=match):
        read_texts(tmp_path / "a.csv", ["text", "label"], also={"medical_abstract": "text"})


def test_archives_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "text,label\n" + "a,1\n" * 500_000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + b"a,1\n" * 500_000))
    for name in ("a.zip", "a.csv.gz"):
        with pytest.raises(SchemaError, match="expected a .csv file"):
            text_file(tmp_path / name, "t")
    np.savez(tmp_path / "a.npz", text=np.array([{"an": "object"}]))
    with pytest.raises(SchemaError, match="expected a .csv file"):
        text_file(tmp_path / "a.npz", "t")


def test_folders_and_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, match in ((None, "no data of its own"), (tmp_path, "one CSV file, found 0"), (tmp_path / "absent.csv", "found none")):
        with pytest.raises(DataMissingError, match=match):
            text_file(path, "t")
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\na,1\n")
    with pytest.raises(DataMissingError, match="found 2"):
        text_file(tmp_path, "t")
    assert text_file(tmp_path, "t", ignored=("b.csv",)).name == "a.csv"
    monkeypatch.setattr("shared.tasks.text.MOST_TABLE_BYTES", 4)
    with pytest.raises(SchemaError, match="at most"):
        text_file(tmp_path / "a.csv", "t")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        read_texts(tmp_path / "a.csv", ["text"])
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        text_file(tmp_path, "t")
