"""What fusion is worth: the model of all modalities beside the same model that is given one of them alone, without privacy and at epsilon 3.

All see the same patients at the same sites, with the same split. AUROC of the federated model over all test patients, where a patient who lacks the one
modality gets the usual risk; and in brackets over those test records alone that have it, with the fused model's over the same records: so it is told
apart whether fusion helps only by reaching more patients.

python benchmarks/modalities.py [--data EICU_DIR] [--seeds N] [--json]
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, Study, finish, run_quietly, with_privacy

from server.run_folder import RunFolder
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.metrics import NUM_BINS, auroc, score_cells
from shared.models import Parameters, predict_in_batches, set_parameters
from shared.task import Task, architecture_hash, resolve_task
from simulations.federation import load_patients

FIRST_SEED = 7
SETTINGS = {"no privacy": None, "epsilon 3": 3.0}
TASKS = {
    "multimodal-risk": ("shared.tasks.multimodal_risk", ("image", "table", "text", "panel")),
    "multimodal-risk-eicu": ("shared.tasks.multimodal_eicu", ("table", "text")),
}  # study -> module, and its modalities in the order of the columns of presence
TO_REACH = "to reach: fused above each modality alone"


def auroc_where(task: Task, parameters: Parameters, cohort: Cohort, records: np.ndarray) -> float:
    """AUROC over the chosen records `(N,)`, each counted as one."""
    model = task.model()
    set_parameters(model, parameters)
    scores = task.predict(predict_in_batches(model, tuple(values[records] for values in cohort.inputs))).numpy().astype(np.float64)
    cells = score_cells(scores, cohort.labels[records])
    return float(auroc(np.bincount(cells, minlength=2 * NUM_BINS).reshape(2, NUM_BINS).astype(np.float64)) or 0)


def fused_and_alone(study: Study, module: str, modalities: tuple[str, ...], data: Path | None) -> dict[str, list[float]]:
    """Fused: over all, then over who has each modality. Each alone: over all, and over who has it. The split is the public one of simulations."""
    rows: dict[str, list[float]] = {}
    for place, name in [(None, "fused"), *enumerate(modalities)]:
        own = study if place is None else study.replace(task=f"{module}:{name}_alone")
        task = resolve_task(own.task)
        run = run_quietly(own, data=data)
        parameters = RunFolder.open(run.path).read_model("final", architecture_hash(task.model()))
        cohort = load_patients(resolve_task(study.task), study, data)  # with all that is present, by which patients are chosen
        test = cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY))
        seen = load_patients(task, own, data)
        seen = seen.select(held_out_patients(seen, SIMULATION_SPLIT_KEY))
        places = range(len(modalities)) if place is None else [place]
        where = [test.inputs[-1][:, column] > 0 for column in places]
        rows[name] = [float(run.metrics["federated"]["auroc"] or 0), *(auroc_where(task, parameters, seen, records) for records in where)]
    return rows


def told(rows: dict[str, list[list[float]]], modalities: tuple[str, ...]) -> list[str]:
    """A line for the fused model and one for each modality: means over seeds, and every seed."""

    def words(values: list[float]) -> str:
        return f"{statistics.fmean(values):.4f} ({', '.join(f'{value:.3f}' for value in values)})"

    lines = [f"fused  {words([row[0] for row in rows['fused']])}"]
    for place, name in enumerate(modalities, start=1):
        own, fused = [row[1] for row in rows[name]], [row[place] for row in rows["fused"]]
        lines.append(f"{name:6} {words([row[0] for row in rows[name]])}  [who has it: {words(own)}; fused there {words(fused)}]")
    return lines


def main() -> None:
    """Print all of it, a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of eICU's tables; that task is left out without")
    parser.add_argument("--task", choices=sorted(TASKS), help="this one alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for study_name, (module, modalities) in TASKS.items():
        eicu = study_name == "multimodal-risk-eicu"
        if (eicu and arguments.data is None) or arguments.task not in (None, study_name):
            continue
        shipped = Study.load(ROOT / "studies" / f"{study_name}.toml")
        for setting, epsilon in SETTINGS.items():
            rows: dict[str, list[list[float]]] = {}
            for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
                study = with_privacy(shipped.replace(seed=seed), epsilon)
                for name, values in fused_and_alone(study, module, modalities, arguments.data if eicu else None).items():
                    rows.setdefault(name, []).append(values)
            results[f"{study_name}, {setting}"] = rows
            for line in told(rows, modalities):
                print(f"{study_name:21} {setting:11} {line}", file=sys.stderr, flush=True)
    print(TO_REACH, file=sys.stderr)
    finish(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
