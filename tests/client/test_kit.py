"""Taking up a kit: nothing escapes from a zip, nothing that is the site's own is overwritten, and what is asked for is said."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.kit import MAX_MEMBERS, MAX_TOTAL_BYTES, SiteAnswers, init_site, unpack_kit
from client.policy import SiteFile
from server.provisioning import renew, zip_bytes
from shared import kit
from shared.certificates import load_signing_key, signing_key_text
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataError, DataMissingError, KitError, SchemaError, UnknownTaskError
from shared.kit import SiteRequest, verify_kit
from shared.tasks.heart_disease import heart_disease, load_cohort
from tests.provisioned import check_modes, opened, provisioned
from tests.site_under_check import NUM_PATIENTS, heart_rows

NOW = datetime(2030, 1, 1, tzinfo=UTC)
COHORT = "processed.va.data"


def cohort_in(folder: Path) -> Path:
    """Data of the task heart-disease."""
    (folder / COHORT).write_text(heart_rows(NUM_PATIENTS))
    return folder / COHORT


def broken_loader(path: Path | None, options: Mapping[str, object]) -> Cohort:
    """As a hospital's own loader may be."""
    raise ValueError("Mrs. Example, born 1931")


TAKES_ANY_OPTION = replace(heart_disease(), load_cohort=lambda path, options: load_cohort(path, {}))
BREAKS = replace(heart_disease(), load_cohort=broken_loader)


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    provisioned(tmp_path / "kits", now=NOW)
    return tmp_path / "kits"


@pytest.fixture
def folder(kits: Path, tmp_path: Path) -> Path:
    unpack_kit(kits / "sites" / "north.zip", tmp_path / "north", now=NOW)
    return tmp_path / "north"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def member(name: str, *, mode: int = 0) -> zipfile.ZipInfo:
    """A zip's member whose name is written as it is."""
    info = zipfile.ZipInfo("placeholder", (1980, 1, 1, 0, 0, 0))
    info.filename = name
    info.create_system, info.external_attr = 3, mode << 16
    return info


def spoiled(genuine: Path, spoil: Callable[[zipfile.ZipFile], None]) -> bytes:
    """A genuine kit's zip with something added to it."""
    buffer = io.BytesIO(genuine.read_bytes())
    with zipfile.ZipFile(buffer, "a") as archive:
        spoil(archive)
    return buffer.getvalue()


def lying(data: bytes, by: int) -> bytes:
    """The zip `data`, whose directory says that its first member is `by` bytes larger than it is."""
    start = data.index(b"PK\x01\x02")
    [size] = struct.unpack_from("<I", data, start + 24)
    return data[: start + 24] + struct.pack("<I", size + by) + data[start + 28 :]


ESCAPES: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "parent": (lambda z: z.writestr(member("../escaped"), "x"), "escape"),
    "parent inside": (lambda z: z.writestr(member("keys/../../escaped"), "x"), "escape"),
    "absolute": (lambda z: z.writestr(member("/tmp/escaped"), "x"), "escape"),
    "drive": (lambda z: z.writestr(member("C:/escaped"), "x"), "characters"),
    "backslash": (lambda z: z.writestr(member("..\\escaped"), "x"), "characters"),
    "plain form": (lambda z: z.writestr(member("keys/./x"), "x"), "plain form"),
    "link": (lambda z: z.writestr(member("keys", mode=stat.S_IFLNK | 0o777), "/tmp"), "link"),
    "device": (lambda z: z.writestr(member("pipe", mode=stat.S_IFIFO | 0o666), ""), "device"),
    "other case": (lambda z: z.writestr(member("KIT.JSON"), "x"), "twice"),
    "unsigned": (lambda z: z.writestr(member("site.toml"), "x"), "'site.toml'"),
    "many": (lambda z: [z.writestr(member(f"file{number}"), "") for number in range(MAX_MEMBERS)] and None, "members"),
    "large": (lambda z: z.writestr("large", b"\0" * (MAX_TOTAL_BYTES + 1), zipfile.ZIP_DEFLATED), "bytes unpacked"),
}


@pytest.mark.parametrize("case", ESCAPES)
def test_a_spoiled_zip_is_refused_and_nothing_written(kits: Path, tmp_path: Path, case: str) -> None:
    spoil, message = ESCAPES[case]
    (tmp_path / "spoiled.zip").write_bytes(spoiled(kits / "sites" / "north.zip", spoil))
    before = contents(tmp_path)
    with pytest.raises(KitError, match=message) as caught:
        unpack_kit(tmp_path / "spoiled.zip", tmp_path / "out" / "north", now=NOW)
    assert caught.value.exit_code == 4 and contents(tmp_path) == before and not (tmp_path / "out").exists()
    assert not Path("/tmp/escaped").exists()


def test_a_double_encrypted_lying_or_torn_zip_is_refused(kits: Path, tmp_path: Path) -> None:
    genuine = (kits / "sites" / "north.zip").read_bytes()
    with pytest.warns(UserWarning, match="Duplicate name"):
        double = spoiled(kits / "sites" / "north.zip", lambda z: z.writestr(member(kit.README), "x"))
    directory = genuine.index(b"PK\x01\x02")
    encrypted = genuine[: directory + 8] + b"\x01" + genuine[directory + 9 :]
    cases = [
        (double, "twice"),
        (encrypted, "encrypted"),
        *((lying(genuine, by), "not a zip, or damaged") for by in (1000, -10)),
        (genuine[:-30], "not a zip"),
        (b"", "not a zip"),
    ]
    for data, message in cases:
        (tmp_path / "spoiled.zip").write_bytes(data)
        with pytest.raises(KitError, match=message):
            unpack_kit(tmp_path / "spoiled.zip", tmp_path / "out", now=NOW)
        assert not (tmp_path / "out").exists()


def test_a_genuine_zip_altered_at_any_byte_never_gives_another_kit(kits: Path, tmp_path: Path) -> None:
    """Bytes of a zip that mean nothing (a time, a flag) may change; then the kit is the same."""
    genuine, expected = (kits / "sites" / "north.zip").read_bytes(), contents(kits / "sites" / "north")
    refused = 0
    for position in range(0, len(genuine), 23):
        (tmp_path / "altered.zip").write_bytes(genuine[:position] + bytes([genuine[position] ^ 0xFF]) + genuine[position + 1 :])
        out = tmp_path / f"out-{position}"
        try:
            unpack_kit(tmp_path / "altered.zip", out, now=NOW)
        except KitError:
            refused += 1
            assert not out.exists()
        else:
            assert contents(out) == expected
    assert refused > 50


def test_a_newer_kit_replaces_an_older_and_leaves_what_is_the_sites(kits: Path, folder: Path, tmp_path: Path) -> None:
    init_site(folder, SiteAnswers(), now=NOW)
    old = (kits / "sites" / "north.zip").read_bytes()
    own = {name: content for name, content in contents(folder).items() if name.startswith("keys/") or name == kit.REQUEST}
    assert len(own) == 3
    later = NOW + timedelta(days=300)
    with opened(kits, now=later) as consortium:
        renew(consortium)
    assert unpack_kit(kits / "sites" / "north.zip", folder, now=later).generation == 2
    assert own.items() <= contents(folder).items()
    init_site(folder, SiteAnswers(), now=NOW + timedelta(days=600))
    (tmp_path / "old.zip").write_bytes(old)
    provisioned(tmp_path / "other", now=NOW)
    for archive, message in (
        (tmp_path / "old.zip", "holds generation 2, newer than 1"),
        (kits / "sites" / "south.zip", "holds the kit of north in tests, not of south"),
        (tmp_path / "other" / "sites" / "north.zip", "holds a kit of another CA"),
    ):
        before = contents(folder)
        with pytest.raises(KitError, match=message):
            unpack_kit(archive, folder, now=later)
        assert contents(folder) == before


def test_keys_from_a_kit_are_used_and_never_overwritten(tmp_path: Path) -> None:
    provisioned(tmp_path / "kits", with_keys=True, now=NOW)
    archive, folder = tmp_path / "kits" / "sites" / "north.zip", tmp_path / "north"
    unpack_kit(archive, folder, now=NOW)
    check_modes(folder)
    key = (folder / kit.NODE_KEY).read_bytes()
    assert key == (tmp_path / "kits" / "sites" / "north" / kit.NODE_KEY).read_bytes()
    init_site(folder, SiteAnswers(), now=NOW)
    assert (folder / kit.NODE_KEY).read_bytes() == key
    (folder / kit.NODE_KEY).write_bytes(b"the site's own")
    with pytest.raises(KitError, match="keys are never overwritten"):
        unpack_kit(archive, folder, now=NOW)


def test_init_makes_keys_for_the_owner_alone_and_a_request_without_them(folder: Path) -> None:
    taken = init_site(folder, SiteAnswers(declared_size=80), now=NOW)
    check_modes(folder)
    assert stat.S_IMODE((folder / kit.KEYS).stat().st_mode) == 0o700
    request = SiteRequest.read(folder / kit.REQUEST)
    assert request == taken.request and request.declared_size == 80
    assert request.signing_key == signing_key_text(load_signing_key(folder / kit.SIGNING_KEY))
    assert b"PRIVATE" not in (folder / kit.REQUEST).read_bytes()
    verify_kit(folder, now=NOW)


def test_init_again_changes_nothing_but_what_was_said_anew(folder: Path, tmp_path: Path) -> None:
    first = init_site(folder, SiteAnswers(), now=NOW)
    before = contents(folder)
    init_site(folder, SiteAnswers(), now=NOW + timedelta(days=1))
    assert contents(folder) == before
    assert first.site_file is None and not (folder / kit.SITE_FILE).exists()
    (folder / kit.SIGNING_KEY).chmod(0o644)
    cohort_in(tmp_path)
    answers = SiteAnswers(data=tmp_path / COHORT, task="heart-disease", declared_size=80, epsilon=3.0)
    again = init_site(folder, answers, now=NOW)
    assert any("could be read by other users" in note for note in again.notes)
    check_modes(folder)
    assert again.request.declared_size == 80 and again.request.fingerprint == first.request.fingerprint
    text = (folder / kit.SITE_FILE).read_text()
    kept = init_site(folder, SiteAnswers(declared_size=90), now=NOW)
    assert (folder / kit.SITE_FILE).read_text() == text and kept.request.declared_size == 80
    [note] = [note for note in kept.notes if "was left as it is" in note]
    assert "declared_size is 80 there, 90 was given: what is there counts, edit the file" in note


def test_init_again_names_every_answer_that_the_file_does_not_have(folder: Path, tmp_path: Path) -> None:
    data = cohort_in(tmp_path)
    same = SiteAnswers(data=data, task="heart-disease", declared_size=80, declared_test_size=40, epsilon=3.0)
    init_site(folder, same, now=NOW)
    [note] = init_site(folder, same, now=NOW).notes
    assert note.endswith("was left as it is")
    other = SiteAnswers(
        data=tmp_path / "other", task="breast-cancer", declared_size=90, declared_test_size=30, epsilon=20.0, options={"encoding": "latin-1"}
    )
    [note] = init_site(folder, other, now=NOW).notes
    for words in (
        f"path is {data} there, {tmp_path / 'other'} was given", "declared_size is 80 there, 90 was given", "declared_test_size is 40 there, 30 was given",
        "max_epsilon is 3.0 there, 20.0 was given", "options is {} there, {'encoding': 'latin-1'} was given",
        "allowed_tasks is heart-disease there, breast-cancer was given",
    ):  # fmt: skip
        assert words in note, words
    assert init_site(folder, SiteAnswers(epsilon=20.0), now=NOW).notes[0].count("was given") == 1


def test_the_site_file_says_what_was_answered(folder: Path) -> None:
    (folder / "data").mkdir()
    cohort_in(folder / "data")
    answers = SiteAnswers(
        data=folder / "data",
        task=f"{__name__}:TAKES_ANY_OPTION",
        declared_size=80,
        declared_test_size=40,
        epsilon=2.5,
        options={"a": 1, "b.c": 'x "y" \x7f\\', "d": True},
    )
    taken = init_site(folder, answers, now=NOW)
    assert taken.site_file == folder / kit.SITE_FILE
    file = SiteFile.load(folder / kit.SITE_FILE)
    assert (file.name, file.state, file.cohort.path) == ("north", "state", "data")  # inside the kit: relative, so that the folder can move
    assert (file.cohort.declared_size, file.cohort.declared_test_size, file.cohort.options) == (80, 40, dict(answers.options))
    assert (file.policy.max_epsilon, file.policy.allowed_tasks) == (2.5, (answers.task,))  # as a study will name it
    assert "auroc" in file.policy.allowed_metrics and not file.policy.exact_metrics and not file.policy.allow_no_privacy


def test_a_cohort_elsewhere_is_named_absolutely(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    init_site(folder, SiteAnswers(data=Path(COHORT), task="heart-disease", declared_size=80, epsilon=3.0), now=NOW)
    assert SiteFile.load(folder / kit.SITE_FILE).cohort.path == str((tmp_path / COHORT).resolve())


def test_without_all_answers_there_is_an_example_and_no_half_site_file(folder: Path) -> None:
    taken = init_site(folder, SiteAnswers(declared_size=80, task="heart-disease"), now=NOW)
    example = folder / kit.SITE_EXAMPLE
    assert taken.site_file is None and not (folder / kit.SITE_FILE).exists()
    [note] = [note for note in taken.notes if "fill in" in note]
    assert note.startswith("--data, --epsilon not given")
    with pytest.raises(ConfigurationError, match=r"cohort\.path: expected a value, got none\n.*policy\.max_epsilon: expected a value"):
        SiteFile.load(example)
    filled = example.read_text().replace("# path =", 'path = "x.csv"').replace("# max_epsilon =", "max_epsilon = 3.0")
    (folder / kit.SITE_FILE).write_text(filled)
    assert SiteFile.load(folder / kit.SITE_FILE).cohort.declared_size == 80


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": Path("nowhere.csv")}, DataMissingError, "nowhere.csv: expected data"),
        ({"task": "hart-disease"}, UnknownTaskError, "did you mean 'heart-disease'"),
        ({"declared_size": 1}, ConfigurationError, "cohort.declared_size"),
        ({"epsilon": -1.0}, ConfigurationError, "policy.max_epsilon"),
        ({"declared_test_size": -1}, ConfigurationError, "cohort.declared_test_size"),
        ({"data": Path(__file__)}, DataMissingError, r"expected processed\.<hospital>\.data"),
        ({"task": "breast-cancer"}, SchemaError, "expected columns 'mean radius'"),
        ({"options": {"encoding": "x"}}, ConfigurationError, "its loader has no option 'encoding'"),
        ({"task": f"{__name__}:BREAKS"}, DataError, "failed with ValueError"),
    ],
)
def test_a_wrong_answer_is_told_before_anything_is_made(
    folder: Path, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    cohort_in(tmp_path)
    good: dict[str, object] = {"data": tmp_path / COHORT, "task": "heart-disease", "declared_size": 80, "epsilon": 3.0}
    before = contents(folder)
    with pytest.raises(error, match=message):
        init_site(folder, SiteAnswers(**{**good, **change}), now=NOW)  # type: ignore[arg-type]  # as the command line fills it
    assert contents(folder) == before


def test_data_of_another_task_are_refused_with_the_loaders_error_and_no_patients_value(folder: Path, tmp_path: Path) -> None:
    (tmp_path / COHORT).write_text("patient,age,diagnosis\np-77,4711,malignant\n")
    answers = SiteAnswers(data=tmp_path / COHORT, task="heart-disease", declared_size=80, epsilon=3.0)
    init_site(folder, SiteAnswers(), now=NOW)
    before = contents(folder)
    with pytest.raises(SchemaError, match="expected 14 columns") as caught:
        init_site(folder, answers, now=NOW)
    assert "4711" not in str(caught.value) and "p-77" not in str(caught.value)
    with pytest.raises(DataError) as caught_other:
        init_site(folder, replace(answers, task=f"{__name__}:BREAKS"), now=NOW)
    assert "1931" not in str(caught_other.value) and caught_other.value.__suppress_context__
    assert contents(folder) == before  # keys already made stay


def test_only_a_verified_site_kit_is_taken_up(kits: Path, folder: Path) -> None:
    with pytest.raises(KitError, match="expected a site's kit, got the coordinator's"):
        init_site(kits / "coordinator", SiteAnswers(), now=NOW)
    with pytest.raises(KitError, match="expired"):
        init_site(folder, SiteAnswers(), now=NOW + timedelta(days=366))
    (folder / kit.README).write_text("altered")
    with pytest.raises(KitError, match="README.txt"):
        init_site(folder, SiteAnswers(), now=NOW)
    assert not (folder / kit.KEYS).exists()


def test_the_same_files_give_the_same_zip() -> None:
    assert zip_bytes({"b": b"2", "a": b"1"}) == zip_bytes({"a": b"1", "b": b"2"})
