"""The commands as a user runs them, in a small form; the README's own are in `test_readme.py`."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

from shared.errors import ConnectionFailedError, DataError
from shared.study import Study
from tests.wardround.conftest import Command
from wardround.fetch import SOURCES, fetch_data
from wardround.studies import shipped_studies

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_simulate_prints_one_envelope_and_human_text_beside_it(command: Command) -> None:
    outcome = command("simulate", "--rounds", "2", "--sites", "3", "--no-baselines", "--json")
    assert outcome.code == 0
    run = Path(str(outcome.data["run_dir"]))
    assert json.loads((run / "result.json").read_text()) == {key: value for key, value in outcome.data.items() if key != "run_dir"}
    assert re.search(r"round 1/2  3 of 3 sites  AUROC 0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\]  epsilon \d\.\d{2}/3  0:\d{2}", outcome.err)
    assert "round 2/2" in outcome.err
    assert "protects nobody" in outcome.err
    expected = {"study.toml", "rounds.jsonl", "result.json", "privacy.json", "evaluation.json", "report.html", "log.jsonl"}
    assert expected <= {path.name for path in run.iterdir()}
    assert (run / "model" / "final.safetensors").is_file()


@pytest.mark.slow
def test_synthetic_patients_are_named_so(command: Command) -> None:
    outcome = command("simulate", "--task", "heart-disease", "--sites", "2", "--rounds", "1", "--epsilon", "none")
    assert outcome.code == 0
    assert "SYNTHETIC" in outcome.out
    [run] = Path("runs").iterdir()
    assert "SYNTHETIC" in (run / "report.html").read_text()
    assert json.loads((run / "result.json").read_text())["synthetic"] is True
    assert json.loads((run / "privacy.json").read_text())["unit"] == "none"


@pytest.mark.slow
def test_report_is_written_anew(command: Command, simulated: dict[str, object]) -> None:
    data = simulated
    report = Path(str(data["run_dir"])) / "report.html"
    before = report.read_text()
    report.unlink()
    assert command("report", data["run_dir"]).code == 0
    assert report.read_text() == before


def test_resume_takes_the_run_of_its_own_study(command: Command, simulated: dict[str, object]) -> None:
    data = simulated
    again = command("simulate", "--resume", data["run_dir"], "--no-baselines", "--json")
    assert again.code == 0
    assert again.data["metrics"] == data["metrics"]
    assert again.data["privacy"] == data["privacy"]
    refused = command("simulate", "--resume", data["run_dir"], "--rounds", "3", "--json")
    assert (refused.code, refused.data["code"]) == (3, "E300")


def test_study_show_says_where_every_value_came_from(command: Command) -> None:
    data = command("study", "show", "breast-cancer", "--epsilon", "1", "--json").data
    origins = data["origins"]
    assert isinstance(origins, dict)
    assert origins["privacy.epsilon"] == "command line"
    assert origins["federation.alpha"] == "breast-cancer.toml"
    assert origins["rounds.on_missing"] == "default"


def test_study_schema_describes_the_shipped_studies(command: Command) -> None:
    schema = json.loads(command("study", "schema").out)
    for path in shipped_studies():
        table = tomllib.loads(path.read_text())
        assert set(table) <= set(schema["properties"])
        assert Study.load(path).name == path.stem


@pytest.mark.parametrize("of", ["site", "task", "result"])
def test_other_schemas(command: Command, of: str) -> None:
    assert json.loads(command("study", "schema", "--of", of).out)["properties"]


def test_task_list_and_show(command: Command) -> None:
    listed = command("task", "list", "--json").data["tasks"]
    assert isinstance(listed, list)
    assert {"breast-cancer", "heart-disease"} <= {task["name"] for task in listed}
    shown = command("task", "show", "heart-disease")
    assert "mmHg" in shown.out
    assert "80 to 220" in shown.out


@pytest.mark.slow
def test_own_table_without_a_line_of_python(command: Command, tmp_path: Path) -> None:
    rows = [f"p{index},{20 + index % 60},{'FM'[index % 2]},{int(index % 60 > 30)}" for index in range(200)]
    (tmp_path / "my data.csv").write_text("patient_id,age,sex,died\n" + "\n".join(rows) + "\n")
    first = command("task", "init", "--from", "my data.csv")
    assert first.code == 0
    assert "'my data.toml'" in first.out
    schema = tmp_path / "my data.toml"
    assert "# low =" in schema.read_text()
    assert command("task", "init", "--from", "my data.csv").code == 1  # would overwrite
    schema.write_text(re.sub(r"# low = .*", "low = 18", re.sub(r"# high = .*", "high = 110", schema.read_text())))
    assert command("data", "check", "--task", "my data.toml", "--data", "my data.csv").code == 0
    data = command("simulate", "--task", "my data.toml", "--data", "my data.csv", "--rounds", "8", "--json").data
    metrics = data["metrics"]
    assert isinstance(metrics, dict)
    assert metrics["federated"]["auroc"] > 0.8


@pytest.mark.slow
def test_privacy_plan_spent_and_epsilon_agree(command: Command, simulated: dict[str, object]) -> None:
    plan = command("privacy", "plan", "--patients", "100", "--patients", "40", "--epsilon", "2", "--rounds", "5", "--json").data["sites"]
    assert isinstance(plan, list)
    for site in plan:
        event = f"{site['noise_multiplier']},{site['sample_rate']},{site['steps']}"
        epsilon = command("privacy", "epsilon", "--event", event, "--delta", site["delta"], "--json").data["epsilon"]
        assert epsilon == pytest.approx(site["epsilon"], rel=1e-9)
        assert 1.98 < site["epsilon"] <= 2.0
    run = simulated
    ledgers = command("privacy", "spent", run["run_dir"], "--json").data["ledgers"]
    assert isinstance(ledgers, list)
    privacy = run["privacy"]
    assert isinstance(privacy, dict)
    assert {ledger["name"]: ledger["epsilon"] for ledger in ledgers} == {
        name: pytest.approx(site["epsilon"]) for name, site in privacy["sites"].items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["privacy", "plan", "--patients", "50", "--epsilon", "1"], ["study", "list"], ["study", "show"]])
def test_no_torch_at_start_up(arguments: list[str]) -> None:
    script = f"import sys; from wardround.__main__ import run; code = run({arguments!r}); sys.exit(code or 10 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_wardround() -> None:
    done = subprocess.run([sys.executable, "-m", "wardround", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("wardround 0.")


class Publisher:
    """A publisher of files, as an httpx transport: real requests and responses, no network."""

    def __init__(self, content: bytes) -> None:
        self.asked: list[str] = []
        self._content = content

    def client(self) -> httpx.Client:
        """A client that reaches nobody else."""

        def respond(request: httpx.Request) -> httpx.Response:
            self.asked.append(request.url.path)
            return httpx.Response(200, content=self._content)

        return httpx.Client(transport=httpx.MockTransport(respond))


def test_fetch_refuses_a_file_that_is_not_the_pinned_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SHA-256"):
        fetch_data("heart-disease", tmp_path / "heart", client=Publisher(b"something else").client())
    assert list((tmp_path / "heart").iterdir()) == []


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data" / "fed_heart_disease").is_dir(), reason="the UCI heart files are not beside the checkout")
def test_fetch_leaves_right_files_alone_and_asks_for_nothing(tmp_path: Path) -> None:
    source = ROOT.parent / "shared" / "data" / "fed_heart_disease"
    for name in SOURCES["heart-disease"].files:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    publisher = Publisher(b"")
    assert fetch_data("heart-disease", tmp_path, client=publisher.client()) == tmp_path
    assert publisher.asked == []


def test_fetch_without_a_network_says_what_to_download_from_where(tmp_path: Path) -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no route", request=request)

    with pytest.raises(ConnectionFailedError) as raised:
        fetch_data("heart-disease", tmp_path, client=httpx.Client(transport=httpx.MockTransport(unreachable)))
    assert raised.value.exit_code == 4
    assert "processed.va.data" in raised.value.remedy
    assert "archive.ics.uci.edu" in raised.value.remedy
    assert str(tmp_path) in raised.value.remedy
