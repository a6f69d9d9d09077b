"""A panel of markers: bounds, files good and bad, the elastic net against its definition, and informative markers found again."""

import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from client.private_probe import probe_model
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.models import mlp
from shared.study import Study
from shared.task import Task, resolve_task
from shared.tasks.biomarker_panel import (
    L1_STEP,
    L2_STEP,
    NUM_INFORMATIVE,
    NUM_MARKERS,
    Marker,
    biomarker_panel,
    biomarker_panel_elastic_net,
    biomarker_panel_mlp,
    elastic_net_step,
    informative_markers,
    load_panel,
    panel_task,
    read_panel,
    shipped_panel,
    strongest_markers,
)
from simulations.blocks.choice import check_alike
from wardround import simulate

STUDIES = Path(__file__).resolve().parents[2] / "studies"
PANEL = tuple(Marker(name=name, low=low, high=low + 8.0) for name, low in (("TP53", 2.0), ("BRCA1", 4.0), ("MYC", 0.0)))
HEADER = ["patient", "label", "TP53", "BRCA1", "MYC"]


def small_task() -> Task:
    return panel_task("small-panel", PANEL)


def row(number: int, **changes: object) -> list[str]:
    values: dict[str, object] = {"patient": f"p{number}", "label": number % 2, "TP53": 2 + number / 8, "BRCA1": 6.0, "MYC": 8.0, **changes}
    return [str(values[name]) for name in HEADER]


def write(path: Path, rows: list[list[str]], *, header: list[str] | None = None) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header or HEADER, *rows])
    return path


def table(folder: Path, *more: list[str]) -> Path:
    return write(folder / "a.csv", [*(row(number) for number in range(24)), *more])


# Files --------------------------------------------------------------------------------------------------------------------------


def test_a_wide_table_becomes_features_by_public_bounds(tmp_path: Path) -> None:
    cohort = small_task().load_cohort(table(tmp_path, row(3, TP53=2.2), row(25, TP53="", label="1.0"), row(26, label="")), {})
    assert (cohort.num_patients, cohort.num_records) == (25, 26) and cohort.patient_of_record[24] == 3  # a second sample of a patient
    assert cohort.inputs[0][8].tolist() == [-0.75, -0.5, 1.0] and cohort.inputs[0][25, 0] == 0.0
    assert cohort.labels[:3].tolist() == [0, 1, 0] and cohort.labels[25] == 1 and cohort.labels.dtype == np.float32
    assert cohort.notes == {"records_bad": 0, "records_without_label": 1, "values_imputed": 1, "values_clipped": 0} and "p3" not in repr(cohort)


def test_columns_may_stand_in_any_order_and_others_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [["x\ny", f"s{n % 2}", *reversed(row(n))] for n in range(8)], header=["remark", "site", *reversed(HEADER)])
    cohort = small_task().load_cohort(path, {})
    plain = small_task().load_cohort(write(tmp_path / "a.csv", [row(n) for n in range(8)]), {})
    assert np.array_equal(cohort.inputs[0], plain.inputs[0]) and cohort.attributes["site"].tolist() == ["s0", "s1"] * 4 and plain.attributes == {}


@pytest.mark.parametrize(
    "bad",
    [
        row(5),
        row(99, patient=""),
        row(99, label=2),
        row(99, label="sick"),
        row(99, MYC="inf"),
        row(99, MYC="987654321x"),
        row(99, MYC="", TP53="nan"),
    ],
)
def test_a_bad_record_is_skipped_up_to_the_tolerance(tmp_path: Path, bad: list[str]) -> None:
    path = table(tmp_path, bad)
    cohort = small_task().load_cohort(path, {})
    assert cohort.num_records == 24 and cohort.notes["records_bad"] == 1
    with pytest.raises(SchemaError, match="got 1 of 25") as caught:
        small_task().load_cohort(path, {"tolerance": 0.01})
    assert "987654321" not in str(caught.value) and "sick" not in str(caught.value)


def test_values_far_out_are_clipped_and_many_are_refused(tmp_path: Path) -> None:
    cohort = small_task().load_cohort(table(tmp_path, row(99, MYC=300, TP53=3)), {})
    assert cohort.inputs[0][-1, 2] == 1.0 and cohort.notes["values_clipped"] == 1
    raw = write(tmp_path / "a.csv", [row(n, MYC=300, BRCA1=5000) for n in range(24)])
    with pytest.raises(SchemaError, match="on the log2 scale"):
        small_task().load_cohort(raw, {})


def test_a_patient_at_two_sites_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [[*row(n, patient="p"), f"s{n}"] for n in range(2)], header=[*HEADER, "site"])
    with pytest.raises(SchemaError, match="expected one 'site' for each patient"):
        small_task().load_cohort(path, {})


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", DataMissingError, "empty file"),
        (b"patient,label,TP53,BRCA1,MYC\n", DataMissingError, "at least one row"),
        (b"patient,label,TP53,BRCA-1,MYC\np,1,1,1,1\n", SchemaError, r"'BRCA1' \(did you mean 'BRCA-1'"),
        (b"patient,label\np,1\n", SchemaError, "'TP53', 'BRCA1', 'MYC'"),
        (b"patient,label,TP53,BRCA1,MYC\np,1,3,5,F\xe9\n", SchemaError, "UTF-8"),
        (b"patient,label,TP53,BRCA1,MYC\np,1,3,5,1,9,9\n", SchemaError, "line with more"),
        (b"patient,label,TP53,BRCA1,MYC\np,,3,5,1\n", DataMissingError, "lacks its label"),
        (b"patient,label,TP53,BRCA1,MYC\np,1,3,5,1\nq,0,3", SchemaError, "unusable"),  # cut short
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, error: type[Exception], words: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(error, match=words):
        small_task().load_cohort(tmp_path, {})


def test_no_data_no_option_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task()
    for path in (None, tmp_path, tmp_path / "none"):
        with pytest.raises(DataMissingError):
            task.load_cohort(path, {})
    path = table(tmp_path)
    with pytest.raises(ConfigurationError, match="no option 'panel'"):
        task.load_cohort(path, {"panel": "x"})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        task.load_cohort(path, {})


# Panels -------------------------------------------------------------------------------------------------------------------------


def test_a_panel_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "panel.csv").write_text("marker,low,high\nTP53,2,10\nBRCA1,4,12\nMYC,0,8\n")
    panel = read_panel(tmp_path / "panel.csv")
    assert panel == PANEL and panel_task("small-panel", panel).fingerprint() == small_task().fingerprint()


@pytest.mark.parametrize(
    "content",
    ["marker,low\nA,1\n", "marker,low,high\nA,1,2\nA,1,2\n", "marker,low,high\n,1,2\n", "marker,low,high\nlabel,1,2\n", "marker,low,high\nA,2,2\n",
     "marker,low,high\nA,0,inf\n", "marker,low,high\nA,,2\n", "marker,low,high\n"],
)  # fmt: skip
def test_a_panel_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "panel.csv").write_text(content)
    with pytest.raises(ConfigurationError, match=r"panel\.csv"):
        read_panel(tmp_path / "panel.csv")


def test_other_panels_and_other_orders_are_other_tasks() -> None:
    wider = (*PANEL[:2], Marker(name="MYC", low=0.0, high=9.0))
    prints = {panel_task("small-panel", panel).fingerprint() for panel in (PANEL, PANEL[::-1], wider)}
    assert len(prints) == 3


# The elastic net ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_the_step_is_the_least_of_what_it_is_the_proximal_map_of(weights: list[float]) -> None:
    model = nn.Linear(len(weights), 1)
    before = torch.tensor(weights, dtype=torch.float32)
    with torch.no_grad():
        model.weight.copy_(before[None])
        bias = model.bias.clone()
    elastic_net_step(model)
    after = model.weight.detach()[0]

    def value(w: torch.Tensor) -> torch.Tensor:
        return (w - before).double() ** 2 / 2 + L1_STEP * w.double().abs() + L2_STEP * w.double() ** 2 / 2

    for other in (after + 1e-3, after - 1e-3, torch.zeros_like(after), before):
        assert (value(after) <= value(other) + 1e-9).all()
    assert torch.equal(model.bias.detach(), bias) and (after[before.abs() <= L1_STEP] == 0).all()


def test_the_strongest_markers_are_named() -> None:
    model = mlp(3, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, -2.0, 0.5]]))
    assert [(marker.name, round(weight, 3)) for marker, weight in strongest_markers(model, PANEL, 2)] == [("BRCA1", -2.0), ("MYC", 0.5)]
    for wrong in (mlp(4, 1), mlp(3, 1, hidden=(2,))):
        with pytest.raises(ConfigurationError, match="linear model of 3 markers"):
            strongest_markers(wrong, PANEL, 2)


# The task -----------------------------------------------------------------------------------------------------------------------


def test_tasks_of_the_shipped_panel() -> None:
    task, study = resolve_task("biomarker-panel"), Study.load(STUDIES / "biomarker-panel.toml")
    assert task.fingerprint() == biomarker_panel().fingerprint()
    kinds = (biomarker_panel(), biomarker_panel_elastic_net(), biomarker_panel_mlp())
    assert len({kind.fingerprint() for kind in kinds}) == 3, "another refinement is another task"
    assert kinds[1].name == "biomarker-panel-elastic-net" != kinds[0].name, "a model's file names the task alone"
    assert shipped_panel() == shipped_panel() and len({marker.name for marker in shipped_panel()}) == NUM_MARKERS
    for each in (task, biomarker_panel_elastic_net(), biomarker_panel_mlp()):
        assert check_alike(each).held > 0
        probe_model(each, study)
    assert task.refine is None and biomarker_panel_elastic_net().refine is elastic_net_step


def test_a_marker_in_another_unit_is_refused_by_name_however_many_others_fit(tmp_path: Path) -> None:
    """One of 500 for every patient is a 500th of all values, and the whole of its own."""
    panel = shipped_panel()
    frame = pd.DataFrame([[f"{(marker.low + marker.high) / 2:.1f}" for marker in panel]] * 40, columns=[marker.name for marker in panel])
    frame = frame.assign(patient=[f"p{index}" for index in range(40)], label="1", marker_007="5000")
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(SchemaError, match="40 of 40 values outside in 'marker_007'"):
        load_panel(tmp_path / "a.csv", {}, name="biomarker-panel", panel=panel)


@pytest.mark.slow
def test_one_long_cell_takes_no_memory_and_is_no_number(tmp_path: Path) -> None:
    panel = shipped_panel()
    frame = pd.DataFrame([[f"{(marker.low + marker.high) / 2:.1f}" for marker in panel]] * 40, columns=[marker.name for marker in panel])
    frame = frame.assign(patient=[f"p{index}" for index in range(40)], label="1")
    frame.loc[3, "marker_007"] = "1" * 200_000
    frame.to_csv(tmp_path / "a.csv", index=False)
    tracemalloc.start()
    try:
        with pytest.raises(SchemaError, match="1 of 40: row 4"):
            load_panel(tmp_path / "a.csv", {"tolerance": 0}, name="biomarker-panel", panel=panel)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000, "15 GB as an array of text of one width"
    finally:
        tracemalloc.stop()


def test_synthetic_patients_differ_where_they_should_and_by_batch() -> None:
    """2,000 patients, 500 t-tests: informative markers differ by 0.6, standard error 0.05; the largest of 480 others is under 0.3 but in 1e-5."""
    cohort = biomarker_panel().synthetic_cohort(2000, 5)
    truth = informative_markers(NUM_MARKERS)
    assert len(set((truth // 10).tolist())) == len(truth) == NUM_INFORMATIVE and cohort.notes["values_imputed"] > 0 and cohort.synthetic
    values, site = 4 * cohort.inputs[0].astype(np.float64), cohort.attributes["site"]
    batches = np.stack([values[site == name].mean(axis=0) for name in np.unique(site)])
    assert 0.2 < batches.std(axis=0).mean() < 0.8
    centred = values - batches[np.unique(site, return_inverse=True)[1]]
    diseased = cohort.labels == 1
    difference = np.abs(centred[diseased].mean(axis=0) - centred[~diseased].mean(axis=0))
    others = np.setdiff1d(np.arange(NUM_MARKERS), truth)
    assert difference[truth].min() > 0.35 and difference[others].max() < 0.3
    assert abs(np.corrcoef(centred[:, 0], centred[:, 1])[0, 1] - 0.4) < 0.1 and abs(np.corrcoef(centred[:, 0], centred[:, 15])[0, 1]) < 0.1
    small = small_task()
    assert small.synthetic_cohort(30, 1).inputs[0].shape == (30, 3) and len(informative_markers(3)) == 1
    assert np.array_equal(small.synthetic_cohort(30, 1).inputs[0], small.synthetic_cohort(30, 1).inputs[0])
    with pytest.raises(DataMissingError):
        small.synthetic_cohort(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomarker-panel", "shared.tasks.biomarker_panel:biomarker_panel_elastic_net"])
def test_federated_models_find_informative_markers_as_a_pooled_one_does(tmp_path: Path, name: str) -> None:
    """Without privacy, as shipped, seed 7: fixed numbers. Of the 20 strongest at least 12 are informative; chance gives one, 12 in under 1e-12."""
    study = Study.load(STUDIES / "biomarker-panel.toml").replace(task=name, privacy={"unit": "none"})
    run = simulate(study, out=tmp_path, processes=1)
    federated = run.metrics["federated"]["auroc"]
    assert federated is not None and federated > 0.85
    from safetensors.numpy import load_file

    weights = load_file(run.path / "model" / "final.safetensors")["0.weight"][0]
    truth = set(informative_markers(NUM_MARKERS).tolist())
    assert len(truth & set(np.argsort(-np.abs(weights))[:NUM_INFORMATIVE].tolist())) >= 12
    cohort = biomarker_panel().synthetic_cohort(400, 7)
    pooled = LogisticRegression(l1_ratio=0.5, solver="saga", C=0.3, max_iter=200, tol=1e-2).fit(cohort.inputs[0], cohort.labels)
    assert len(truth & set(np.argsort(-np.abs(pooled.coef_[0]))[:NUM_INFORMATIVE].tolist())) >= 12
