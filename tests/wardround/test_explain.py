"""`wardround explain`: attributions against what is known by hand, and a page that stays where it is."""

import dataclasses
import hashlib
import re
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.schema import TensorSchema
from shared.study import Study
from shared.task import Task, resolve_task, task_names
from tests.wardround.conftest import Command
from tests.wardround.test_export import altered, untrained
from wardround.explaining import (
    attribute,
    baseline_of,
    explained_outputs,
    grad_cam,
    kind_of,
    last_convolution,
    listed_names,
    require_explainable,
    schema_parts,
    singles,
)
from wardround.report.explanation_page import bars, explanation_page, in_unit, overlay
from wardround.run import simulate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one round."""
    study = Study.load(ROOT / "studies" / "heart-disease.toml").replace(
        rounds={"count": 1}, federation={"sites": 2, "partition": "iid"}, privacy={"unit": "none"}
    )
    return simulate(study, out=tmp_path_factory.mktemp("runs")).path


@pytest.mark.slow
def test_of_a_linear_model_they_are_weight_times_distance_from_the_baseline() -> None:
    task = resolve_task("heart-disease")
    trained, cohort = untrained(task), task.synthetic_cohort(30, 4)
    found = attribute(trained, cohort)
    weight = next(trained.model.parameters()).detach().numpy()[0].astype(np.float64)
    names = task.schema.feature_names  # type: ignore[union-attr]
    baseline = np.array([0.5 if name in ("sex", "fbs", "exang") else 0.0 for name in names])
    by_hand = weight * (cohort.inputs[0] - baseline)
    [part] = found.parts
    for place, column in enumerate(part.names):
        own = [name == column or name.startswith((f"{column}=", f"{column} missing")) for name in names]
        np.testing.assert_allclose(part.attributions[:, place], by_hand[:, own].sum(axis=1), atol=1e-5)
    assert found.completeness_gap is not None and found.completeness_gap < 1e-4


@pytest.mark.parametrize("name", ["icu-mortality", "icu-attention"])
def test_of_series_and_tokens_they_add_up(name: str) -> None:
    task = resolve_task(name)
    found = attribute(untrained(task), task.synthetic_cohort(12, 4))
    assert found.completeness_gap is not None and found.completeness_gap <= 0.01
    first = found.parts[0]
    if name == "icu-mortality":
        assert first.kind == "series" and first.attributions.shape == (12, 12, 37) and "Lactate" in first.names
    else:
        assert first.kind == "tokens" and first.attributions.shape == (12, 40)
        padding = (first.values == 0).all(axis=2)
        assert padding.any() and not first.attributions[padding].any(), "what is no event moves nothing"


def test_what_has_no_weight_moves_nothing() -> None:
    task = resolve_task("heart-disease")
    trained = untrained(task)
    with torch.no_grad():
        trained.model[0].weight[:, 0] = 0.0  # type: ignore[index, union-attr]  # age
    [part] = attribute(trained, task.synthetic_cohort(20, 4)).parts
    assert not part.attributions[:, part.names.index("age")].any() and part.attributions.any()


def test_grad_cam_is_the_map_weighted_by_its_mean_gradient() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 1)).eval()
    images = torch.randn(3, 1, 8, 8)
    found = last_convolution(model, (images,), dimensions=2)
    assert found is not None and found[0] == "1", "the activation after the convolution"
    heat = grad_cam(model, found[1], (images,), torch.ones(3, 1), size=torch.Size((8, 8)))
    maps = model[1](model[0](images))
    [gradient] = torch.autograd.grad(model[3](model[2](maps)).sum(), maps)
    by_hand = torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1))
    np.testing.assert_allclose(heat, by_hand.detach().numpy(), atol=1e-6)


def test_the_last_convolution_that_looks_around() -> None:
    segmentation = resolve_task("lesion-segmentation")
    images = (torch.from_numpy(segmentation.synthetic_cohort(2, 0).inputs[0]),)
    found = last_convolution(segmentation.model().eval(), images, dimensions=2)
    assert found is not None and found[0].startswith("up_first")
    assert last_convolution(nn.Linear(3, 1), (torch.zeros(2, 3),), dimensions=2) is None
    assert last_convolution(nn.Linear(3, 1), (torch.zeros(2, 3),), dimensions=0) is None


def test_which_output_is_explained() -> None:
    weights, chosen = explained_outputs(torch.tensor([[1.0, 3.0], [5.0, 2.0]]))
    assert weights.tolist() == [[0, 1], [1, 0]] and chosen is not None and chosen.tolist() == [1, 0]
    weights, chosen = explained_outputs(torch.tensor([[2.0], [-1.0]]))
    assert weights.tolist() == [[1], [1]] and chosen is None
    weights, chosen = explained_outputs(torch.tensor([[[1.0, -1.0], [2.0, -2.0]], [[-1.0, -1.0], [-1.0, -1.0]]]))
    assert weights.tolist() == [[0.5, 0, 0.5, 0], [0.25] * 4] and chosen is None


def test_words_and_kinds() -> None:
    part = TensorSchema(name="codes", shape=(40, 3), dtype="int64", low=0, high=9)
    assert kind_of(part, "events") == "tokens"
    assert kind_of(TensorSchema(name="s", shape=(12, 111), low=-1, high=1), "time series") == "series"
    assert listed_names("a; b; c", 3) == ("a", "b", "c") and listed_names("mV", 2) == ("1", "2")
    assert singles(np.array([0.2, 0.9, 0.5])) == [("highest", 1), ("median", 2), ("lowest", 0)]
    assert singles(np.array([0.2])) == [("lowest", 0)]


class Counting(nn.Module):
    """Reads whole numbers without an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 1)

    def forward(self, codes: torch.Tensor, hours: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(codes.float().mean(dim=1)) + hours.mean()
        return output


def test_whole_numbers_that_no_embedding_reads_are_refused_by_name() -> None:
    task = altered(resolve_task("icu-attention"), model=Counting)
    with pytest.raises(ConfigurationError, match="input 'codes'"):
        attribute(untrained(task), task.synthetic_cohort(4, 1))


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_page_of_real_patients_must_not_leave_and_says_no_more() -> None:
    task = resolve_task("heart-disease")
    cohort = dataclasses.replace(task.synthetic_cohort(12, 4), synthetic=False)
    page = explanation_page(attribute(untrained(task), cohort), run="a run")
    assert "This page is of patients. It must not leave the hospital." in page and "SYNTHETIC" not in page


def test_the_page_stays_and_nothing_of_it_is_elsewhere(command: Command, run: Path, tmp_path: Path) -> None:
    before = files(run)
    outcome = command("explain", run, "--patients", "25", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.data == {
        "page": "explanation.html", "task": "heart-disease", "own_model_of": None, "num_patients": 25, "synthetic": True,
        "methods": {"features": "integrated gradients"},
    }  # fmt: skip
    assert files(run) == before and [path.name for path in tmp_path.iterdir()] == ["explanation.html"]
    page = tmp_path / "explanation.html"
    text = page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert "SYNTHETIC patients." in text
    assert "must not leave" not in text + outcome.err and "hospital alone" not in text, "there is no patient whom it could give away"
    assert "<script" not in text and "http://" not in text and "https://" not in text and "noindex" in text
    cohort = resolve_task("heart-disease").synthetic_cohort(25, 7)
    assert not any(name in text for name in cohort.patient_ids), "no identifier is on it"
    assert text.count("<circle") == 25 * 10, "a point for each patient and column"
    again = command("explain", run)
    assert again.code == 1 and "--force" in again.err and page.read_text() == text
    assert command("explain", run, "--patients", "25", "--force").code == 0 and page.read_text() == text, "the same page for the same patients"


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (("--out", "RUN/page.html"), 3, "outside the run's folder"),
        (("--data", "nowhere"), 5, "found nothing"),
        (("--task", "icu-mortality"), 3, "got one of task 'heart-disease'"),
        (("--task", "nothing"), 3, "no task 'nothing'"),
        (("--patients", "0"), 2, ""),
        (("--options", "tolerance"), 2, "expected KEY=VALUE"),
        (("--out", "no/where.html"), 1, "could not write"),
    ],
)
def test_what_is_refused(command: Command, run: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, what: str) -> None:
    outcome = command("explain", run, *(argument.replace("RUN", str(run)) for argument in arguments))
    assert outcome.code == code and what in outcome.err + outcome.out
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_task_are_refused(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert command("explain", run, "--data", "other.csv").code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]


def test_captum_is_named_with_its_extra(command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    outcome = command("explain", run)
    assert outcome.code == 3 and 'pip install "wardround[explain]"' in outcome.err


def page_of(name: str, num_patients: int) -> tuple[Task, Cohort, str]:
    task = resolve_task(name)
    cohort = task.synthetic_cohort(num_patients, 3)
    return task, cohort, explanation_page(attribute(untrained(task), cohort), run="")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("icu-mortality", "By variable and step"),
        ("icu-attention", "By event"),
        ("breast-ultrasound", "what it looks at"),
        ("lesion-segmentation", "what it marks"),
        ("lung-nodule", "middle of the third axis"),
        ("chest-xray", "explained"),
        ("ecg-beat", "Over time"),
    ],
)
def test_pages_of_every_kind_of_input(name: str, holds: str) -> None:
    _, cohort, text = page_of(name, 9)
    assert holds in text and "<script" not in text and not any(name in text for name in cohort.patient_ids)
    assert page_of(name, 1)[2].count("The patient with the") >= 1


def test_overlays() -> None:
    grey = np.linspace(0, 1, 16).reshape(4, 4)
    cold = overlay(grey, np.zeros((4, 4)))
    np.testing.assert_array_equal(cold, np.repeat(np.rint(255 * grey)[..., None], 3, axis=2))
    assert not np.array_equal(overlay(grey, np.ones((4, 4))), cold)
    assert in_unit(np.full((2, 2), 3.0)).max() == 0 and in_unit(np.array([2.0, 6.0, 4.0])).tolist() == [0, 1, 0.5]


@pytest.mark.parametrize("name", ["patient-generator", "record-autoencoder", "survival-breast", "treatment-policy"])
def test_what_is_explained_rises_with_what_is_predicted(name: str) -> None:
    """Of several outputs the one that the prediction beside it is made of: not the discriminator's, the mirror image's, or one interval's."""
    task = resolve_task(name)
    trained, cohort = untrained(task), task.synthetic_cohort(25, 6)
    found = attribute(trained, cohort)
    assert task.explained is not None and found.words == task.explained.words
    told = found.predictions if found.predictions.ndim == 1 else found.predictions[:, 0]
    order = np.argsort(told, kind="stable")
    assert (np.diff(found.ranked[order]) >= -1e-6).all() and len(set(found.ranked.tolist())) > 1
    with torch.no_grad():
        inputs = tuple(torch.from_numpy(values) for values in cohort.inputs)
        nothing = tuple(baseline_of(part, values, task) for part, values in zip(schema_parts(task), inputs, strict=True))
        difference = task.explained.of(trained.model(*inputs)) - task.explained.of(trained.model(*nothing))
    total = sum(part.attributions.reshape(len(told), -1).sum(axis=1) for part in found.parts)
    np.testing.assert_allclose(total, difference.numpy(), atol=0.02 * float(difference.abs().mean()))
    page = explanation_page(found, run="")
    assert task.explained.words in page and (not task.predicted or task.predicted[0].replace("_", " ") in page)


@pytest.mark.slow
def test_the_error_of_what_was_hidden_is_explained_and_not_a_constant() -> None:
    task = resolve_task("self-supervised")
    found = attribute(untrained(task), task.synthetic_cohort(4, 6))
    np.testing.assert_allclose(found.ranked, found.predictions[:, 0], rtol=1e-5)
    assert any(part.attributions.any() for part in found.parts)


@pytest.mark.parametrize("name", ["deidentify-notes", "molecule-generator"])
def test_outputs_that_become_predictions_in_another_way_are_refused_before_patients_are_read(name: str) -> None:
    trained = untrained(resolve_task(name))
    for refuse in (lambda: require_explainable(trained), lambda: attribute(trained, trained.task.synthetic_cohort(2, 1))):
        with pytest.raises(ConfigurationError, match=f"task {name}: expected one output"):
            refuse()


def test_what_moved_nothing_is_said_and_not_drawn_as_an_empty_figure() -> None:
    task = resolve_task("icu-attention")
    found = attribute(untrained(task), task.synthetic_cohort(4, 6))
    parts = tuple(dataclasses.replace(part, attributions=np.zeros_like(part.attributions)) for part in found.parts)
    page = explanation_page(dataclasses.replace(found, parts=parts), run="r")
    assert page.count("Nothing in it moved the output.") == 3 * len(parts)
    moved = tuple(dataclasses.replace(part, attributions=np.ones_like(part.attributions)) for part in found.parts)
    assert "Nothing in it moved" not in explanation_page(dataclasses.replace(found, parts=moved), run="r")


def test_labels_of_ticks_do_not_run_into_each_other() -> None:
    for values, most in (([0.00213, 0.0004], 3), ([0.00213, -0.0004], 4), ([21.0, -4.0], 7)):  # short ones need not be thinned
        ticks = re.findall(r">(-?[0-9.]+)</text>", str(bars(("a", "b"), np.array(values)).svg))
        assert 0.0 in map(float, ticks) and 2 <= len(ticks) <= most, values


@pytest.mark.slow
def test_every_other_task_can_be_explained() -> None:
    for name in sorted({*task_names()} - {"deidentify-notes", "molecule-generator"}):
        require_explainable(untrained(resolve_task(name)))


def test_the_page_is_not_written_into_the_folder_of_a_run_that_is_named_by_its_model(command: Command, run: Path) -> None:
    outcome = command("explain", run / "model" / "final.safetensors", "--out", run / "model" / "page.html")
    assert outcome.code == 3 and "outside the run's folder" in outcome.err and not (run / "model" / "page.html").exists()
