"""Fusion: an absent modality says nothing and learns nothing, fused beats each alone, folders and eICU's tables are read, and bad input."""

import dataclasses
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.private_probe import probe_model
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError, WardroundError
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import Task, resolve_task
from shared.tasks import multimodal_eicu, multimodal_files, multimodal_risk
from shared.tasks.multimodal_files import COLUMNS, FEATURES, PANEL, SIDE, load_cohort
from shared.tasks.multimodal_model import NUM_TOKENS, tokens_of, with_only, words_input
from simulations.blocks.choice import check_alike

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eicu_demo"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"eicu_demo data are not at {DATA}")
STUDIES = Path(__file__).resolve().parents[2] / "studies"
TASKS = [resolve_task("multimodal-risk"), multimodal_eicu.multimodal_risk_eicu()]
EVERY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: str(task.name))
MODALITIES = {"multimodal-risk": multimodal_files.MODALITIES, "multimodal-risk-eicu": multimodal_eicu.MODALITIES}
HEADER = "patient,label,site,image,note,age,sex,heart_rate,lactate"
NUM_ROWS = 24


def row(index: int, **changes: str) -> str:
    image = "" if index % 4 == 3 else f"images/{index}.png"
    values = {
        "patient": f"p{index}", "label": str(index % 2), "site": f"s{index % 3}", "image": image, "note": f"Fever and cough of case {chr(97 + index)}{chr(97 + index)}",
        "age": str(40 + index), "sex": "F" if index % 2 else "M", "heart_rate": "90", "lactate": "" if index % 3 else "2.5", **changes,
    }  # fmt: skip
    return ",".join(values.values())


def folder_of(path: Path, rows: list[str] | None = None, header: str = HEADER) -> Path:
    (path / "images").mkdir(exist_ok=True)
    for index in range(NUM_ROWS):
        if not (path / "images" / f"{index}.png").exists():
            pixels = np.random.default_rng(index).integers(0, 256, size=(SIDE, SIDE), dtype=np.uint8)
            Image.fromarray(pixels).save(path / "images" / f"{index}.png")
    lines = [row(index) for index in range(NUM_ROWS)] if rows is None else rows
    (path / "patients.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def panel_csv(path: Path, patients: list[str], value: Callable[[int], str] = lambda place: str(PANEL[place].low)) -> None:
    lines = [",".join(["patient", *(marker.name for marker in PANEL)])]
    lines += [",".join([name, *(value(place) for place in range(len(PANEL)))]) for name in patients]
    (path / "panel.csv").write_text("\n".join(lines) + "\n")


# The model ----------------------------------------------------------------------------------------------------------------------


def moved(task: Task) -> torch.nn.Module:
    """A model with every parameter away from zero."""
    model = task.model()
    start = initial_parameters(model, 3)
    set_parameters(model, {name: value + np.random.default_rng(1).normal(0, 0.3, value.shape).astype(value.dtype) for name, value in start.items()})
    return model


@EVERY_TASK
def test_an_absent_modality_says_nothing(task: Task) -> None:
    """Whatever stands in its place in the inputs."""
    cohort, names = task.synthetic_cohort(60, 2), MODALITIES[task.name]
    model = moved(task)
    expected = predict_in_batches(model, cohort.inputs)
    lacks = cohort.inputs[-1] == 0
    assert lacks.any(axis=0).all() and expected.std() > 0.1
    other = task.synthetic_cohort(60, 9)
    for place in range(len(names)):
        values = [part.copy() for part in cohort.inputs]
        present = other.inputs[-1][:, place] > 0  # of the other patients, so that something stands there
        values[place][lacks[:, place] & present] = other.inputs[place][lacks[:, place] & present]
        assert not np.array_equal(values[place], cohort.inputs[place])
        assert torch.equal(predict_in_batches(model, tuple(values)), expected)
    nothing = predict_in_batches(model, with_only(cohort, names, ()).inputs)
    assert torch.equal(nothing, torch.full_like(nothing, nothing[0].item()))


@EVERY_TASK
def test_an_absent_modality_learns_nothing(task: Task) -> None:
    cohort, names = task.synthetic_cohort(20, 2), MODALITIES[task.name]
    for only in names:
        model = moved(task)
        masked = with_only(cohort, names, (only,))
        has = masked.inputs[-1].any(axis=1)
        assert has.any()
        outputs = model(*(torch.from_numpy(values) for values in masked.inputs))
        task.loss(outputs, torch.from_numpy(masked.labels)).sum().backward()
        learnt = {name.split(".")[1] for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0}
        assert learnt == {only}


@EVERY_TASK
def test_logits_add_up(task: Task) -> None:
    cohort, names, model = task.synthetic_cohort(40, 4), MODALITIES[task.name], moved(task)
    usual = predict_in_batches(model, with_only(cohort, names, ()).inputs)
    alone = [predict_in_batches(model, with_only(cohort, names, (name,)).inputs) - usual for name in names]
    assert torch.allclose(torch.stack(alone).sum(dim=0) + usual, predict_in_batches(model, cohort.inputs), atol=1e-4)


@EVERY_TASK
def test_it_may_be_trained_privately_and_in_blocks(task: Task) -> None:
    probe_model(task, Study.load(STUDIES / str(task.default_study)))
    check_alike(task)  # raises where the sites would be trained one after another


def test_words_are_counted_once_and_their_order_does_not_matter() -> None:
    assert tokens_of("sepsis shock SEPSIS the shock") == tokens_of("Sepsis: shock") and len(tokens_of("sepsis shock")) == 2
    assert tokens_of("") == [] and words_input([" ".join(chr(97 + i // 26) * 3 + chr(97 + i % 26) for i in range(200))]).shape == (1, NUM_TOKENS)
    encoder = moved(TASKS[0]).encoders["text"]
    words = torch.from_numpy(words_input(["sepsis shock hypoxia"]))
    assert torch.allclose(encoder(words), encoder(words.flip(1)), atol=1e-6)


# Synthetic patients -------------------------------------------------------------------------------------------------------------


@EVERY_TASK
def test_synthetic_patients_lack_modalities_and_differ_by_site(task: Task) -> None:
    cohort, again = task.synthetic_cohort(800, 3), task.synthetic_cohort(800, 3)
    assert all(np.array_equal(one, two) for one, two in zip(cohort.inputs, again.inputs, strict=True)) and cohort.synthetic
    for part, values in zip(task.schema, cohort.inputs, strict=True):
        assert values.shape == (800, *part.shape) and str(values.dtype) == part.dtype and part.low <= values.min() <= values.max() <= part.high
    present, sites = cohort.inputs[-1], cohort.attributes["site"]
    assert present.any(axis=1).all() and (present.mean(axis=0) < 0.97).all()
    shares = np.stack([present[sites == site].mean(axis=0) for site in np.unique(sites)])
    assert (shares == 0).any(axis=0).sum() >= (3 if len(shares.T) == 4 else 1) and len(shares) == 4
    for place, name in enumerate(MODALITIES[task.name]):
        assert not cohort.inputs[place][present[:, place] == 0].any(), name
    with pytest.raises(DataMissingError):
        task.synthetic_cohort(0, 1)


def trained(task: Task, cohort: Cohort, *, steps: int) -> torch.nn.Module:
    model = task.model()
    set_parameters(model, initial_parameters(model, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels, rng = torch.from_numpy(cohort.labels), np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(cohort.num_records, size=128)
        optimizer.zero_grad()
        task.loss(model(*(torch.from_numpy(values[rows]) for values in cohort.inputs)), labels[rows]).mean().backward()
        optimizer.step()
    return model


def area(task: Task, model: torch.nn.Module, cohort: Cohort) -> float:
    predictions = task.predict(predict_in_batches(model, cohort.inputs)).numpy()
    return task.metrics[0].finish(task.metrics[0].statistic.summarise(predictions, cohort)) or 0.0


@pytest.mark.slow
@EVERY_TASK
def test_fused_beats_each_modality_alone(task: Task) -> None:
    """AUROC of 1500 test patients has a standard error of some 0.015; what is asked for is far less than the differences seen (0.05 and more)."""
    names, training, test = MODALITIES[task.name], task.synthetic_cohort(1500, 3), task.synthetic_cohort(1500, 4)
    fused = area(task, trained(task, training, steps=150), test)
    for name in names:
        alone = trained(task, with_only(training, names, (name,)), steps=150)
        assert 0.55 < area(task, alone, with_only(test, names, (name,))) < fused - 0.01, name


# A folder -----------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    panel_csv(folder, ["p0", "p1", "stranger"])
    (folder / "notes.csv").write_text('patient,text\np0,"Sepsis,\nand shock"\np0,hypoxia\nnobody,fever\n', encoding="utf-8")
    cohort = load_cohort(folder, {})
    image, table, words, panel, present = cohort.inputs
    assert cohort.num_patients == cohort.num_records == NUM_ROWS and cohort.labels.tolist() == [index % 2 for index in range(NUM_ROWS)]
    assert cohort.attributes["site"].tolist() == [f"s{index % 3}" for index in range(NUM_ROWS)]
    assert present[:, 0].tolist() == [index % 4 != 3 for index in range(NUM_ROWS)] and present[:, 3].tolist() == [1, 1, *[0] * (NUM_ROWS - 2)]
    assert present[:, 1:3].all() and not image[3].any() and image[0].std() > 0.1
    assert panel[0].tolist() == [-1.0] * len(PANEL) and not panel[2:].any()
    assert {*tokens_of("sepsis shock hypoxia"), *tokens_of("fever cough case")} <= set(words[0].tolist())
    rate, lactate = FEATURES.index("heart_rate"), FEATURES.index("lactate")
    assert np.allclose(table[:, rate], 2 * (90 - 20) / 200 - 1) and table[1, lactate] == 0 and table[1, lactate + 1] == 1
    assert table[0, lactate + 1] == 0 and (table[:, FEATURES.index("creatinine missing")] == 1).all()  # a column that this hospital has not
    assert {key: cohort.notes[key] for key in ("records_bad", "records_without_image", "records_without_panel")} == {
        "records_bad": 0, "records_without_image": 6, "records_without_panel": NUM_ROWS - 2,
    }  # fmt: skip
    assert (cohort.notes["notes_of_nobody"], cohort.notes["panels_of_nobody"]) == (1, 1)


def test_a_hospital_may_have_one_modality_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [f"p{index},{index % 2},cough and fever" for index in range(6)] + ["p6,1,", "p7,,fever"], "patient,label,note")
    cohort = load_cohort(folder, {})
    assert cohort.inputs[-1].tolist() == [[0, 0, 1, 0]] * 6 and not any(cohort.inputs[place].any() for place in (0, 1, 3))
    assert (cohort.notes["records_without_any_modality"], cohort.notes["records_without_label"]) == (1, 1)
    with pytest.raises(DataMissingError, match="no patient is left"):
        load_cohort(folder_of(tmp_path, ["p0,1,", "p1,,fever"], "patient,label,note"), {})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"patient": ""}, "without identifier"), ({"patient": "p0"}, "row before"), ({"label": "2"}, "outside its set"), ({"label": "inf"}, "outside its set"),
        ({"site": ""}, "without site"), ({"image": "images/none.png"}, "row 25"), ({"image": "../x.png"}, "below the folder"),
        ({"image": "images/empty.png"}, "empty"), ({"image": "images/cut.png"}, "cannot be read"), ({"note": "\x01\x02 binary"}, "control"),
        ({"heart_rate": "fast"}, "for a number"), ({"lactate": "inf"}, "for a number"), ({"sex": "Doe"}, "category"),
    ],
)  # fmt: skip
def test_a_bad_row_is_skipped_up_to_the_tolerance(tmp_path: Path, changes: dict[str, str], match: str) -> None:
    folder = folder_of(tmp_path, [*(row(index) for index in range(NUM_ROWS)), row(NUM_ROWS, **{"image": "", **changes})])
    (folder / "images" / "empty.png").touch()
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "0.png").read_bytes()[:200])
    cohort = load_cohort(folder, {})
    assert cohort.num_patients == NUM_ROWS and cohort.notes["records_bad"] == 1
    with pytest.raises(SchemaError, match=match) as caught:
        load_cohort(folder, {"tolerance": 0.01})
    assert "Doe" not in str(caught.value) and "fast" not in str(caught.value)


@pytest.mark.slow
def test_panels_that_are_sparse_doubled_or_out_of_bounds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    panel_csv(folder, [f"p{index}" for index in range(22)], lambda place: "8" if place > len(PANEL) // 2 else "NA")
    assert not load_cohort(folder, {}).inputs[-1][:, 3].any()
    panel_csv(folder, [*(f"p{index}" for index in range(22)), "p0"])
    assert load_cohort(folder, {}).inputs[-1][:, 3].sum() == 22
    with pytest.raises(SchemaError, match="second panel"):
        load_cohort(folder, {"tolerance": 0.01})
    panel_csv(folder, [f"p{index}" for index in range(22)], lambda place: "4000" if place == 3 else "8")
    with pytest.raises(SchemaError, match=PANEL[3].name):
        load_cohort(folder, {})
    (folder / "panel.csv").write_text("patient,other\np0,1\n")
    with pytest.raises(SchemaError, match=PANEL[0].name):
        load_cohort(folder, {})


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", DataMissingError, "empty"), (HEADER.encode(), DataMissingError, "row"), (b"patient,outcome\np0,1\n", SchemaError, "label"),
        (f"{HEADER}\n{row(0)},more,fields\n".encode(), SchemaError, "same number of fields"), (b"patient,label\n\xff\xfe,1\n", SchemaError, "UTF-8"),
    ],
)  # fmt: skip
def test_files_that_are_no_list_of_patients(tmp_path: Path, content: bytes, error: type[WardroundError], match: str) -> None:
    (tmp_path / "patients.csv").write_bytes(content)
    with pytest.raises(error, match=match):
        load_cohort(tmp_path, {})


def test_no_files_at_all(tmp_path: Path) -> None:
    for path in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(DataMissingError):
            load_cohort(path, {})
    with pytest.raises(ConfigurationError, match="no option"):
        load_cohort(folder_of(tmp_path), {"only": "image"})


@pytest.mark.parametrize("name", ["patients.csv", "notes.csv", "panel.csv", "images/0.png"])
def test_a_file_that_may_not_be_read_is_no_bad_data(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    panel_csv(folder, ["p0"])
    (folder / "notes.csv").write_text("patient,text\np0,fever\n")
    if os.geteuid() == 0:  # whom no mode keeps out
        opened, read = open, Path.read_bytes

        def refuse(path: object) -> None:
            if str(path) == str(folder / name):
                raise PermissionError

        monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: refuse(path) or opened(path, *args, **kwargs))
        monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) or read(path))
    else:
        (folder / name).chmod(0)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(folder, {})


def test_other_bounds_are_another_task() -> None:
    other = dataclasses.replace(TASKS[0], schema=(*TASKS[0].schema[:-1], TASKS[0].schema[-1].model_copy(update={"shape": (5,)})))
    assert other.fingerprint() != TASKS[0].fingerprint() != multimodal_risk.image_alone().fingerprint()
    changed = [COLUMNS[0].model_copy(update={"high": 120}), *COLUMNS[1:]]
    assert multimodal_files._fingerprint(changed) != multimodal_files._fingerprint(COLUMNS)


# eICU ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_data
def test_the_demo() -> None:
    cohort = multimodal_eicu.load_cohort(DATA, {})
    assert (cohort.num_patients, cohort.num_records, int(cohort.labels.sum())) == (1445, 1827, 133)
    assert cohort.inputs[-1].sum(axis=0).tolist() == [1827 - 74, 1827 - 67] and cohort.inputs[-1].any(axis=1).all()
    assert not cohort.inputs[0][cohort.inputs[-1][:, 0] == 0].any() and not cohort.inputs[1][cohort.inputs[-1][:, 1] == 0].any()
    assert len(np.unique(cohort.attributes["site"])) == 4
    assert set(tokens_of("sepsis pulmonary")) <= set(cohort.inputs[1].reshape(-1).tolist())


def tables(folder: Path, num_stays: int = 12) -> Path:
    """Tables as the publisher's, of stays of 2 days: stay 1 has no findings, stay 2 no diagnosis but a late one, stay 3 neither; stay 0 ended early."""
    from shared.tasks.icu_apache import APS_COLUMNS

    flags, stays = multimodal_eicu._FLAGS, [str(number) for number in range(num_stays)]

    def write(name: str, header: list[str], rows: list[list[str]]) -> None:
        with gzip.open(folder / f"{name}.csv.gz", "wt") as file:
            file.write("\n".join(",".join(line) for line in [header, *rows]) + "\n")

    header = ["patientunitstayid", "uniquepid", "hospitalid", "gender", "age", "hospitaldischargestatus", "hospitaldischargeoffset"]
    write("patient", header, [[s, f"u{s}", "h1", "Male", "70", "Expired" if s == "5" else "Alive", "600" if s == "0" else "2880"] for s in stays])
    write("hospital", ["hospitalid", "region"], [["h1", "South"]])
    apache = [s for s in stays if s not in ("1", "3")]
    write("apacheApsVar", ["patientunitstayid", *APS_COLUMNS], [[s, *["1"] * 3, *["-1"] * (len(APS_COLUMNS) - 3)] for s in apache])
    write("apachePredVar", ["patientunitstayid", *flags], [[s, *["0"] * len(flags)] for s in apache])
    path = "admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Respiratory|Pneumonia"
    entries = [[s, path, "1500" if s == "2" else "12"] for s in stays if s != "3"]
    write("admissionDx", ["patientunitstayid", "admitdxpath", "admitdxenteredoffset"], entries)
    return folder


def test_stays_that_lack_a_table_or_its_text(tmp_path: Path) -> None:
    cohort = multimodal_eicu.load_cohort(tables(tmp_path), {})
    assert cohort.patient_ids == tuple(f"u{number}" for number in (1, 2, *range(4, 12))) and cohort.labels.tolist() == [0, 0, 0, 1, *[0] * 6]
    assert cohort.inputs[-1].tolist() == [[0, 1], [1, 0], *[[1, 1]] * 8]  # a diagnosis entered on the second day is not known on the first
    assert set(cohort.inputs[1][0].tolist()) == {0, *tokens_of("respiratory pneumonia")}
    assert cohort.notes["stays_ended_in_first_day"] == 1 and cohort.notes["stays_with_neither"] == 1


def test_eicu_bad_input(tmp_path: Path) -> None:
    tables(tmp_path)
    with pytest.raises(DataMissingError):
        multimodal_eicu.load_cohort(None, {})
    with pytest.raises(ConfigurationError, match="county"):
        multimodal_eicu.load_cohort(tmp_path, {"county": "x"})
    file = tmp_path / "admissionDx.csv.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SchemaError, match="cut short"):
        multimodal_eicu.load_cohort(tmp_path, {})
    file.write_bytes(gzip.compress(b"patientunitstayid,admitdxpath,admitdxenteredoffset\n4,Doe|a|b,soon\n5,Doe|a|b,inf\n"))
    with pytest.raises(SchemaError, match="no number") as caught:
        multimodal_eicu.load_cohort(tmp_path, {})
    assert "Doe" not in str(caught.value) and "soon" not in str(caught.value)
    file.write_bytes(gzip.compress(b"x" * 2**22))
    with pytest.raises(SchemaError, match="unpacks to at most"):
        multimodal_eicu.load_cohort(tmp_path, {})
    file.unlink()
    with pytest.raises(DataMissingError, match="admissionDx"):
        multimodal_eicu.load_cohort(tmp_path, {})
