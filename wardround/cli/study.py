"""`wardround study show|schema|list`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.options import (
    DebugOption,
    EpsilonOption,
    JsonOption,
    RoundsOption,
    SeedOption,
    SitesOption,
    StudyArgument,
    TaskOption,
    overrides,
    studies_folder,
    study_table,
)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Kind = Literal["study", "site", "task", "result"]


@app.command("show")
def show(
    study: StudyArgument = None,
    sites: SitesOption = None,
    rounds: RoundsOption = None,
    epsilon: EpsilonOption = None,
    task: TaskOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the merged study, and where every value came from."""
    from shared.study import flatten
    from wardround.cli.output import console, print_envelope, table
    from wardround.cli.simulate import read_study

    table_in_file, source = study_table(study, task)
    changes = overrides(sites=sites, rounds=rounds, epsilon=epsilon, task=task, seed=seed)
    resolved = read_study(study, task, changes)
    values = flatten(resolved.to_table())
    in_file, asked = flatten(table_in_file), flatten(changes)
    origins = {key: "command line" if key in asked else Path(source).name if key in in_file else "default" for key in values}
    console(as_json=as_json).print(
        table(f"study {resolved.name}", ["key", "value", "from"], [[key, str(value), origins[key]] for key, value in values.items()])
    )
    if as_json:
        print_envelope({"study": resolved.to_table(), "origins": origins, "fingerprint": resolved.fingerprint()})


@app.command("schema")
def schema(of: Annotated[Kind, typer.Option("--of", help="Which file's schema.")] = "study", debug: DebugOption = False) -> None:
    """Print the JSON Schema of a study, site or task file, or of result.json."""
    typer.echo(json.dumps(_model(of).model_json_schema(), indent=2))  # type: ignore[attr-defined]  # a pydantic model


def _model(kind: Kind) -> object:
    from client.policy import SiteFile
    from shared.results import Result
    from shared.study import Study
    from shared.tasks.tabular import TabularTask

    return {"study": Study, "site": SiteFile, "task": TabularTask, "result": Result}[kind]


@app.command("list")
def list_studies(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the shipped studies; each runs with `wardround simulate NAME`."""
    from shared.study import Study
    from wardround.cli.output import console, print_envelope, table

    studies = [Study.load(path) for path in sorted(studies_folder().glob("*.toml"))]
    console(as_json=as_json).print(
        table("shipped studies", ["name", "task", "purpose"], [[study.name, study.task, study.purpose] for study in studies])
    )
    if as_json:
        print_envelope({"studies": [{"name": study.name, "task": study.task, "purpose": study.purpose} for study in studies]})
