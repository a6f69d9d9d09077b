"""A run's folder: whole files or none, torn and damaged lines, checkpoints of another study, models without time or name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.run_folder import HEADER, RUN_PATTERN, Checkpoint, RunFolder, find_runs, read_tensors
from shared.errors import ModelMismatchError, StorageError
from shared.results import RoundRecord, SiteRound
from shared.study import Study

STUDY = Study.from_table({"name": "tiny", "task": "tiny", "privacy": {"unit": "none"}})
PARAMETERS = {"z.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.float32([1.5]), "m": np.full((), 2.5, np.float32)}
STATE = {"momentum": {"z.weight": np.full((2, 3), 1 / 3)}, "variance": {"z.weight": np.full((2, 3), 1e-300)}}
MODEL_HEADER = {"study": "tiny", "study_hash": STUDY.fingerprint(), "task": "tiny", "architecture": "abc"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", STUDY)


def record(number: int, site: str = "site-1") -> RoundRecord:
    sites = (SiteRound(name=site, status="ok", metrics={"auroc": None}, epsilon=0.1 * number),)
    return RoundRecord(round=number, evaluated_round=number - 1, sites=sites, metrics={"auroc": 0.5}, metrics_ci95={"auroc": None}, seconds=0.25)


def test_a_new_folder_holds_the_resolved_study(folder: RunFolder) -> None:
    assert RUN_PATTERN.match(folder.name) and folder.name.startswith("tiny-")
    assert folder.study == STUDY and folder.study_hash == STUDY.fingerprint()
    assert RunFolder.open(folder.path).name == folder.name
    assert find_runs(folder.path.parent) == [folder.path]
    assert find_runs(folder.path / "nowhere") == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StorageError, match="no study"):
            RunFolder.open(path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunFolder.create(tmp_path / "file" / "runs", STUDY)


# rounds.jsonl ---------------------------------------------------------------------------------------------------------------------


def test_lines_come_back_as_they_were_appended(folder: RunFolder) -> None:
    assert folder.rounds() == []
    records = [record(number, site) for number, site in enumerate(["a", "Zürich", "a\u2028b\u2029c\x85d\n\r\ve"], start=1)]
    for each in records:
        folder.append_round(each)
    assert folder.rounds() == records
    folder.keep_rounds(records[:1])
    assert folder.rounds() == records[:1]
    folder.keep_rounds([])
    assert folder.rounds() == []


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(folder: RunFolder) -> None:
    first, second = record(1), record(2, "Zürich")
    folder.append_round(first)
    whole = len((folder.path / "rounds.jsonl").read_bytes())
    folder.append_round(second)
    complete = (folder.path / "rounds.jsonl").read_bytes()
    for cut in range(whole, len(complete) - 1):
        (folder.path / "rounds.jsonl").write_bytes(complete[:cut])
        assert folder.rounds() == [first], cut
    (folder.path / "rounds.jsonl").write_bytes(complete[:-1])  # all but the end of the line
    assert folder.rounds() == [first, second]


@pytest.mark.parametrize("damage", [b"{", b"", b"\xff\xfe", b'{"round": 2}', b"null"])
def test_a_damaged_line_in_the_middle_is_named(folder: RunFolder, damage: bytes) -> None:
    lines = [record(number).model_dump_json().encode() for number in (1, 2, 3)]
    lines[1] = damage
    (folder.path / "rounds.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StorageError, match="line 2 is damaged"):
        folder.rounds()


# Checkpoint -----------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit_and_in_order(folder: RunFolder) -> None:
    assert folder.read_checkpoint() is None
    folder.write_checkpoint(Checkpoint(fold=2, round_number=17, parameters=PARAMETERS, state=STATE))
    back = folder.read_checkpoint()
    assert back is not None
    assert (back.fold, back.round_number) == (2, 17)
    assert list(back.parameters) == list(PARAMETERS)
    for name, value in PARAMETERS.items():
        assert (back.parameters[name].dtype, back.parameters[name].shape) == (value.dtype, value.shape)
        assert back.parameters[name].tobytes() == value.tobytes()
    assert {part: list(arrays) for part, arrays in back.state.items()} == {"momentum": ["z.weight"], "variance": ["z.weight"]}
    assert all(back.state[part][name].tobytes() == value.tobytes() for part, arrays in STATE.items() for name, value in arrays.items())


def test_a_checkpoint_replaces_the_one_before(folder: RunFolder) -> None:
    for number in (1, 2):
        folder.write_checkpoint(Checkpoint(fold=1, round_number=number, parameters=PARAMETERS, state={}))
    back = folder.read_checkpoint()
    assert back is not None and back.round_number == 2 and back.state == {}
    assert [path.name for path in (folder.path / "checkpoint").iterdir()] == ["latest.safetensors"]


def test_a_checkpoint_of_another_study_is_refused(folder: RunFolder) -> None:
    folder.write_checkpoint(Checkpoint(fold=1, round_number=1, parameters=PARAMETERS, state={}))
    (folder.path / "study.toml").write_text(STUDY.replace(seed=99).to_toml())
    with pytest.raises(ModelMismatchError, match="checkpoint of this study"):
        folder.read_checkpoint()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_damaged_checkpoint_is_refused_by_name(folder: RunFolder, keep: int) -> None:
    folder.write_checkpoint(Checkpoint(fold=1, round_number=1, parameters=PARAMETERS, state=STATE))
    path = folder.path / "checkpoint" / "latest.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelMismatchError, match=r"latest\.safetensors"):
        folder.read_checkpoint()


# Models ---------------------------------------------------------------------------------------------------------------------------


def test_a_model_file_is_a_function_of_model_and_study_alone(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path / name, STUDY) for name in ("a", "b")]
    for folder, header in zip(folders, (MODEL_HEADER, dict(reversed(MODEL_HEADER.items()))), strict=True):
        folder.write_model("final", PARAMETERS, header)
    first, second = ((folder.path / "model" / "final.safetensors").read_bytes() for folder in folders)
    assert first == second
    assert all(folder.name.encode() not in first for folder in folders)
    header, tensors = read_tensors(folders[0].path / "model" / "final.safetensors")
    assert header == {**MODEL_HEADER, "order": "z.weight\na.bias\nm"}
    assert {name: value.tolist() for name, value in tensors.items()} == {name: value.tolist() for name, value in PARAMETERS.items()}


def test_a_model_is_read_back_in_the_order_of_its_state(folder: RunFolder) -> None:
    folder.write_model("fold-1", PARAMETERS, MODEL_HEADER)
    back = folder.read_model("fold-1", "abc")
    assert list(back) == list(PARAMETERS)
    assert all(back[name].tobytes() == value.tobytes() for name, value in PARAMETERS.items())


@pytest.mark.parametrize("change", [{"study_hash": "0" * 64}, {"architecture": "other"}])
def test_a_model_of_another_study_or_architecture_is_refused(folder: RunFolder, change: dict[str, str]) -> None:
    folder.write_model("fold-1", PARAMETERS, {**MODEL_HEADER, **change})
    with pytest.raises(ModelMismatchError, match="this study and architecture"):
        folder.read_model("fold-1", "abc")


def test_files_that_are_not_ours_are_refused(folder: RunFolder) -> None:
    import safetensors.numpy

    path = folder.path / "model" / "foreign.safetensors"
    for metadata in (None, {"other": "x"}, {HEADER: "not json"}, {HEADER: "[1]"}):
        path.write_bytes(safetensors.numpy.save({"w": np.zeros(2)}, metadata))
        with pytest.raises(ModelMismatchError):
            read_tensors(path)
    with pytest.raises(ModelMismatchError):
        read_tensors(folder.path / "model" / "absent.safetensors")


def test_memory_order_does_not_matter(folder: RunFolder) -> None:
    fortran = {name: np.array(value, order="F") for name, value in PARAMETERS.items()}
    sliced = {name: np.repeat(value, 2, axis=-1)[..., ::2] if value.ndim else value for name, value in PARAMETERS.items()}
    written = []
    for parameters in (PARAMETERS, fortran, sliced):
        folder.write_model("final", parameters, MODEL_HEADER)
        written.append((folder.path / "model" / "final.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


# Disk full ------------------------------------------------------------------------------------------------------------------------

FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from server.run_folder import Checkpoint, RunFolder
from shared.errors import StorageError
from shared.results import RoundRecord, SiteRound

folder = RunFolder.open(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
big = {"w": np.zeros(100_000, np.float32)}
sites = tuple(SiteRound(name=f"site-{i}", status="failed", reason="x" * 50) for i in range(400))
line = RoundRecord(round=3, evaluated_round=2, sites=sites, metrics={}, metrics_ci95={}, seconds=0.0)
failures = []
for action in (
    lambda: folder.write_checkpoint(Checkpoint(fold=1, round_number=9, parameters=big, state={})),
    lambda: folder.write_model("final", big, {"study_hash": "x"}),
    lambda: folder.append_round(line),
    lambda: folder.keep_rounds([line] * 3),
):
    try:
        action()
    except StorageError as error:
        failures.append(str(error))
print(json.dumps(failures))
"""


def run_on_a_full_disk(folder: RunFolder, limit: int) -> list[str]:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL_DISK, str(folder.path), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    failures: list[str] = json.loads(finished.stdout.splitlines()[-1])
    return failures


@pytest.mark.slow
def test_a_full_disk_leaves_every_file_as_it_was(folder: RunFolder) -> None:
    """RLIMIT_FSIZE in a process of its own stands for a full disk: a write stops in the middle with an error of the system."""
    folder.write_checkpoint(Checkpoint(fold=1, round_number=2, parameters=PARAMETERS, state=STATE))
    folder.write_model("final", PARAMETERS, MODEL_HEADER)
    for number in (1, 2):
        folder.append_round(record(number))
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    failures = run_on_a_full_disk(folder, limit=12_000)
    assert len(failures) == 4
    assert all("check free space" in failure for failure in failures)
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert set(after) == set(before)  # no temporary file is left either
    assert after == before


SMALL_LINE_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from shared.errors import StorageError
from shared.files import append_line

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    append_line(Path(sys.argv[1]), "b" * 4000)
except StorageError:
    sys.exit(0)
sys.exit(1)
"""


def test_a_line_shorter_than_the_buffer_is_cut_off_whole_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_text("a" * 100 + "\n")
    command = [sys.executable, "-c", SMALL_LINE_ON_A_FULL_DISK, str(path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=60)
    assert path.read_text() == "a" * 100 + "\n"


def test_writing_over_a_file_keeps_the_old_one_until_the_new_one_is_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_checkpoint(Checkpoint(fold=1, round_number=1, parameters=PARAMETERS, state={}))

    def dies(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            folder.write_checkpoint(Checkpoint(fold=1, round_number=2, parameters=PARAMETERS, state={}))
    back = folder.read_checkpoint()
    assert back is not None and back.round_number == 1
    assert [path.name for path in (folder.path / "checkpoint").iterdir()] == ["latest.safetensors"]


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_safetensors_are_refused_and_nothing_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelMismatchError):
        read_tensors(path)


def test_the_log_is_json_lines(folder: RunFolder) -> None:
    import logging

    handler = folder.log_handler()
    try:
        handler.emit(logging.LogRecord("server.coordinator", logging.INFO, __file__, 1, "Zürich %d of\n%d", (2, 3), None))
    finally:
        handler.close()
    lines = (folder.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    entry = json.loads(lines[0])
    assert (entry["level"], entry["logger"], entry["message"]) == ("info", "server.coordinator", "Zürich 2 of\n3")
