"""A trained model as a file for other programs, ONNX or PyTorch's export, that gives what the task's `predict` gives; and its model card.

What is written was run first: it must agree with the model that was trained, on synthetic patients and in several batch sizes, or nothing is left
behind. It holds weights and public facts alone: no patient, no example input, no line of anybody's source code and no path of a machine.
"""

import copy
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from shared.config import Real, Settings
from shared.errors import ConfigurationError, StorageError
from shared.files import json_text, storage_errors, write_atomic
from shared.results import StartedFrom
from shared.schema import TableSchema
from shared.task import Task, architecture_hash
from shared.whole_promise import whole_promise
from wardround.private_files import private_file, refuse_in_run
from wardround.trained import Owner, Trained, read_trained

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["onnx", "torch-export"]
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
HEADER = "wardround"  # of ONNX's metadata, and of the file in a .pt2
TOLERANCE = 1e-4  # of a prediction, or of its share where it is above 1
BATCH_SIZES = (1, 2, 7)
NUM_SYNTHETIC = 16  # patients on whom outputs are compared
NUM_CALLS, NUM_WARM_CALLS = 200, 10
PLAIN_RECURRENT: dict[str, type[nn.RNNBase]] = {"DPLSTM": nn.LSTM, "DPGRU": nn.GRU, "DPRNN": nn.RNN}
INSTALL = 'pip install "wardround[onnx]"'

Arrays = tuple[NDArray[np.generic], ...]
Session = Callable[[Arrays], NDArray[np.generic]]


class ModelInput(Settings):
    """One input of an exported model: its name, shape without the record axis, and type."""

    name: str
    shape: tuple[int, ...] = Field(strict=False)
    dtype: str


class ExportFacts(Settings):
    """What an exported model says of itself. Nothing in it is of a patient."""

    format_version: Literal[1] = 1
    format: Format
    task: str
    task_fingerprint: str = Field(description="of shared.task.Task: name, schema, metrics, architecture")
    task_schema: object = Field(description="as `wardround task show --json` gives it")
    architecture: str = Field(description="SHA-256 of the module tree that was trained")
    study: str
    study_hash: str
    weights_sha256: str = Field(description="of the .safetensors file")
    inputs: tuple[ModelInput, ...] = Field(strict=False)
    output: str = "prediction"
    privacy_unit: str = Field(description="of every run that went into the model; 'none': somebody is protected by nothing; 'unknown': not at hand")
    privacy_protects: bool
    epsilon: Real | None = Field(default=None, description="the sum, where the run started with the model of another one")
    delta: Real | None = None
    epsilon_if_all_others_collude: Real | None = Field(
        default=None, description="against the coordinator and all other sites together; None: not known"
    )
    conditions: tuple[str, ...] = Field(default=(), strict=False, description="what epsilon needs, each after 'as long as'")
    started_from: StartedFrom | None = Field(default=None, description="the model of another run that this one started with, and its promise")
    own_model_of: str | None = Field(default=None, description="the site whose own model it is, and for whom alone it is; None: the sites share it")
    own_model_run: str = Field(default="", description="the run that left that site its own model; empty: not known")
    versions: dict[str, str]

    @property
    def owner(self) -> Owner | None:
        """Whose own model it is; None of a model that is shared."""
        return Owner.of({"own_model_of": self.own_model_of, "run": self.own_model_run}) if self.own_model_of is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A written model.

    Attributes:
        facts_file: the same facts as JSON beside it, with the model's own SHA-256.
        cards: the model card beside it, HTML and Markdown.
        largest_difference: from the trained model, over all patients and batch sizes of the check.
        latency_ms: by what ran it, median over `NUM_CALLS` calls with one record each.
    """

    path: Path
    facts_file: Path
    cards: tuple[Path, ...]
    facts: ExportFacts
    num_bytes: int
    largest_difference: float
    latency_ms: dict[str, float]


def export_model(
    run: str | Path, format: Format = "onnx", *, out: str | Path | None = None, task: str | None = None, force: bool = False
) -> Exported:
    """Write the final model of a run for other programs; or a site's own model, mode 0600 as its facts, for that hospital's programs.

    Args:
        run: a run's folder, or a .safetensors file.
        format: "onnx" (extra `onnx`) or "torch-export" (a .pt2, for `torch.export.load`, which unpickles: load none from elsewhere).
        out: the file; default: `final.onnx` or `final.pt2` beside the model.
        task: in place of the task that the study names.
        force: replace files that are there: the model, its facts and its cards. What belongs to a run's folder, without `out`, is always written anew.

    Raises:
        StorageError: the run is not finished, a file is there already, or it cannot be written.
        ConfigurationError: a package is missing; or the model cannot be exported, with the layer that cannot, or gives other outputs once exported; or it
            is a site's own and would stand in a run's folder.

    Example:
        export_model("runs/heart-disease-20250101T000000Z-1a2b")
    """
    if format not in SUFFIXES:
        raise ConfigurationError(f"expected format {' or '.join(map(repr, SUFFIXES))}, got {format!r}", "give one of them")
    if format == "onnx":
        require_onnx()
    trained = read_trained(Path(run), task=task)
    path = trained.source.with_suffix(SUFFIXES[format]) if out is None else Path(out)
    if trained.owner is not None:
        refuse_in_run(path)
    refuse_present(written_files(path, cards=trained.run is not None), replace=force or (out is None and trained.run is not None))
    facts = export_facts(trained, format)
    patients = trained.task.synthetic_cohort(NUM_SYNTHETIC, 0).inputs
    data = exported_bytes(trained.task, trained.model, facts, patients)
    session = onnx_session(data) if format == "onnx" else _program_session(data)
    direct = torch_session(trained.task, trained.model)
    difference = check_agreement(direct, session, patients, task=trained.task.name)
    latency = {"torch": latency_ms(direct, patients), ("onnxruntime" if format == "onnx" else "torch-export"): latency_ms(session, patients)}
    with storage_errors(path, "make its folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, data, facts, force=force)
    return Exported(
        path=path, facts_file=_write_facts(path, facts, data, force=force), cards=_write_cards(path, trained), facts=facts, num_bytes=len(data),
        largest_difference=difference, latency_ms=latency,
    )  # fmt: skip


def written_files(path: Path, *, cards: bool) -> tuple[Path, ...]:
    """The model's file, its facts, and its cards where there are some."""
    return (path, facts_file(path), *(card_files(path) if cards else ()))


def facts_file(path: Path) -> Path:
    """The facts as JSON beside the model."""
    return path.with_name(f"{path.name}.json")


def card_files(path: Path) -> tuple[Path, Path]:
    """The model card beside the model, HTML and Markdown."""
    return path.with_name(f"{path.stem}.model-card.html"), path.with_name(f"{path.stem}.model-card.md")


def refuse_present(files: tuple[Path, ...], *, replace: bool) -> None:
    """Raise `StorageError` where one of the files is there already; a folder is never replaced."""
    for file in files:
        if file.is_dir() or (file.exists() and not replace):
            raise StorageError(
                f"{file}: expected a new file, found {'a folder' if file.is_dir() else 'one'}", "give another with --out, or add --force"
            )


def require_onnx() -> None:
    """Raise `ConfigurationError` where a package of the extra `onnx` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"ONNX: expected the packages onnx, onnxruntime and onnxscript, found not all of them: {error}", INSTALL) from error


# Facts and cards -----------------------------------------------------------------------------------------------------------------


def export_facts(trained: Trained, format: Format) -> ExportFacts:
    """What the exported file will say of itself."""
    import importlib.metadata

    task, started_from = trained.task, None if trained.run is None else trained.run.result.started_from
    schema = task.schema.model_dump(mode="json") if isinstance(task.schema, TableSchema) else [part.model_dump(mode="json") for part in task.schema]
    promised = whole_promise(trained.claim, started_from)
    return ExportFacts(
        format=format,
        task=task.name,
        task_fingerprint=task.fingerprint(),
        task_schema=schema,
        architecture=architecture_hash(task.model()),
        study=trained.study,
        study_hash=trained.study_hash,
        weights_sha256=trained.sha256,
        inputs=model_inputs(task),
        privacy_unit=promised.unit,
        privacy_protects=promised.protects,
        epsilon=promised.epsilon,
        delta=promised.delta,
        epsilon_if_all_others_collude=promised.colluding,
        conditions=promised.conditions,
        started_from=started_from,
        own_model_of=None if trained.owner is None else trained.owner.site,
        own_model_run="" if trained.owner is None else trained.owner.run,
        versions={name: importlib.metadata.version(name) for name in ("wardround", "torch")},
    )


def model_inputs(task: Task) -> tuple[ModelInput, ...]:
    """The model's inputs, named by the schema: the tensors' names, or "features" for a table."""
    if isinstance(task.schema, TableSchema):
        return (ModelInput(name="features", shape=(len(task.schema.feature_names),), dtype="float32"),)
    return tuple(ModelInput(name=part.name, shape=part.shape, dtype=part.dtype) for part in task.schema)


def _write(path: Path, data: bytes, facts: ExportFacts, *, force: bool) -> None:
    """A site's own model and what is said of it are their owner's alone to read; the model of all sites is for everybody."""
    if facts.owner is None:
        write_atomic(path, data)
        return
    with private_file(path, force=force) as file:
        file.buffer.write(data)


def _write_facts(path: Path, facts: ExportFacts, data: bytes, *, force: bool) -> Path:
    import hashlib

    file = facts_file(path)
    told = json_text({"sha256": hashlib.sha256(data).hexdigest(), **facts.model_dump(mode="json")})
    _write(file, told.encode(), facts, force=force)
    return file


def _write_cards(path: Path, trained: Trained) -> tuple[Path, ...]:
    """The model card beside the model; none where the run is not at hand."""
    if trained.run is None:
        return ()
    from wardround.report.markdown import markdown
    from wardround.report.model_card import front_matter, model_card_document
    from wardround.report.page import render_document

    document = model_card_document(trained.run)
    cards, pages = card_files(path), (render_document(document), front_matter(trained.run) + "\n" + markdown(document))
    for card, text in zip(cards, pages, strict=True):
        write_atomic(card, text)
    return cards


# The model as it is exported -------------------------------------------------------------------------------------------------------


class Deployed(nn.Module):
    """A model in evaluation mode, and what turns its outputs into predictions."""

    def __init__(self, model: nn.Module, predict: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._predict = predict
        self.eval().requires_grad_(False)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Predictions, `(N, ...)`."""
        return self._predict(self.model(*inputs))


def portable(model: Deployed, inputs: tuple[torch.Tensor, ...]) -> Deployed:
    """A copy with layers that exporters know, and the same weights and outputs.

    Opacus' recurrent layers become torch's own, one node instead of a few for each step; an adaptive mean over a volume whose size it divides
    becomes a plain one, for ONNX has no other.

    Args:
        inputs: of some records, to learn sizes from.
    """
    model = copy.deepcopy(model).eval()
    sizes = _adaptive_sizes(model, inputs)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__module__.startswith("opacus.layers") and type(child).__name__ in PLAIN_RECURRENT:
                setattr(parent, name, _plain_recurrent(child))
            elif isinstance(child, nn.AdaptiveAvgPool3d) and child in sizes:
                setattr(parent, name, sizes[child])
    return model.eval()


def _plain_recurrent(layer: Any) -> nn.Module:  # of a library that only one file may import
    kind = PLAIN_RECURRENT[type(layer).__name__]
    options = {"nonlinearity": next(cell.nonlinearity for cell in layer.modules() if hasattr(cell, "nonlinearity"))} if kind is nn.RNN else {}
    plain = kind(
        layer.input_size, layer.hidden_size, num_layers=layer.num_layers, bias=layer.bias, batch_first=layer.batch_first,
        bidirectional=layer.bidirectional, **options,
    )  # fmt: skip
    plain.load_state_dict(layer.state_dict())
    return plain


def _adaptive_sizes(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[nn.Module, nn.Module]:
    """The plain pooling for each adaptive one over a volume that it divides evenly."""
    found: dict[nn.Module, nn.Module] = {}

    def look(layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        given, wanted = arguments[0].shape[-3:], output.shape[-3:]
        if all(size % part == 0 for size, part in zip(given, wanted, strict=True)):
            depth, height, width = (size // part for size, part in zip(given, wanted, strict=True))
            found[layer] = nn.AvgPool3d((depth, height, width))

    hooks = [layer.register_forward_hook(look) for layer in model.modules() if isinstance(layer, nn.AdaptiveAvgPool3d)]
    if hooks:
        with torch.no_grad():
            model(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def exported_bytes(task: Task, model: nn.Module, facts: ExportFacts, patients: Arrays) -> bytes:
    """The file's content.

    Raises:
        ConfigurationError: the model cannot be exported; the message names the layer, where it is one.
    """
    inputs = _tensors(patients, slice(0, 3))  # three records: a batch of 1 would be taken for a constant
    deployed = portable(Deployed(model, task.predict), inputs)
    names = [part.name for part in facts.inputs]
    convert = _onnx_program if facts.format == "onnx" else _program
    try:
        with _quiet():
            return _onnx_bytes(deployed, inputs, names, facts) if facts.format == "onnx" else _program_bytes(deployed, inputs, facts)
    except Exception as error:
        with _quiet():
            layer = next(_culprits(deployed, inputs, convert), None)
        place = "its forward or its predict" if layer is None else f"layer {layer[0]!r} ({layer[1]})"
        raise ConfigurationError(
            f"task {task.name}: the model cannot be exported to {facts.format}: {place} ({type(error).__name__})",
            "use layers that torch.export knows, or predict from the run's folder with 'wardround predict'",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters say about themselves is of no use to a hospital."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tensors(arrays: Arrays, records: slice) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(np.ascontiguousarray(values[records])) for values in arrays)


def _program(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> "ExportedProgram":
    """The graph for any number of records, without example inputs and without source lines."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    return program


def _onnx_program(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    return torch.onnx.export(_program(model, inputs), inputs, dynamo=True, verbose=False)


def _program_bytes(deployed: Deployed, inputs: tuple[torch.Tensor, ...], facts: ExportFacts) -> bytes:
    program = _program(deployed, inputs)
    program.example_inputs = None  # else they are pickled into the file
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{HEADER}.json": facts.model_dump_json()})
    return buffer.getvalue()


def _onnx_bytes(deployed: Deployed, inputs: tuple[torch.Tensor, ...], names: list[str], facts: ExportFacts) -> bytes:
    program = torch.onnx.export(
        _program(deployed, inputs), inputs, dynamo=True, verbose=False, input_names=names, output_names=[facts.output],
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.functions):
        del part.metadata_props[:]  # stack traces and paths
        part.doc_string = ""
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    proto.metadata_props.add(key=HEADER, value=facts.model_dump_json())
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _culprits(model: nn.Module, inputs: tuple[torch.Tensor, ...], convert: Callable[..., object]) -> Iterator[tuple[str, str]]:
    """Name and type of each layer that cannot be converted alone."""
    seen: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {}
    names = {layer: name for name, layer in model.named_modules() if not any(layer.children())}
    hooks = [layer.register_forward_pre_hook(lambda found, given: seen.update({names[found]: (found, given)})) for layer in names]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (layer, given) in seen.items():
        try:
            convert(_Alone(layer), given)
        except Exception:
            yield name.removeprefix("model."), type(layer).__name__


class _Alone(nn.Module):
    """A layer called as the exporters call a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(*inputs)
        return output


# Running what was exported ----------------------------------------------------------------------------------------------------------


def torch_session(task: Task, model: nn.Module) -> Session:
    """Predictions of the model as it was trained."""
    model.eval()

    def run(arrays: Arrays) -> NDArray[np.generic]:
        with torch.inference_mode():
            return np.asarray(task.predict(model(*_tensors(arrays, slice(None)))).numpy())

    return run


def onnx_session(data: bytes) -> Session:
    """Predictions of an ONNX model, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [part.name for part in session.get_inputs()]

    def run(arrays: Arrays) -> NDArray[np.generic]:
        return np.asarray(session.run(None, {name: np.ascontiguousarray(values) for name, values in zip(names, arrays, strict=True)})[0])

    return run


def _program_session(data: bytes) -> Session:
    """Predictions of a .pt2 that this process wrote; none from elsewhere is ever loaded, for torch unpickles parts of it."""
    program = torch.export.load(io.BytesIO(data)).module()

    def run(arrays: Arrays) -> NDArray[np.generic]:
        with torch.inference_mode():
            return np.asarray(program(*_tensors(arrays, slice(None))).numpy())

    return run


def check_agreement(direct: Session, session: Session, patients: Arrays, *, task: str) -> float:
    """The largest difference between two ways to the same predictions, in batches of `BATCH_SIZES` and of all.

    Raises:
        ConfigurationError: it is above `TOLERANCE`, or shapes differ.
    """
    largest = 0.0
    for size in (*BATCH_SIZES, len(patients[0])):
        batch = tuple(values[:size] for values in patients)
        expected, got = (np.asarray(run(batch), dtype=np.float64) for run in (direct, session))
        shares = np.abs(expected - got) / np.maximum(1.0, np.abs(expected)) if expected.shape == got.shape else np.array([np.inf])
        difference = float(np.nan_to_num(shares, nan=np.inf).max(initial=0.0))
        if difference > TOLERANCE:
            raise ConfigurationError(
                f"task {task}: expected an exported model that agrees to {TOLERANCE:g} in a batch of {size}, got a difference of {difference:.3g}",
                "nothing was written; predict from the run's folder, and report the model",
            )
        largest = max(largest, difference)
    return largest


def latency_ms(session: Session, patients: Arrays) -> float:
    """Median of `NUM_CALLS` calls with one record each, in milliseconds, on this machine."""
    records = [tuple(values[index : index + 1] for values in patients) for index in range(len(patients[0]))]
    seconds = []
    for call in range(NUM_WARM_CALLS + NUM_CALLS):
        start = time.perf_counter()
        session(records[call % len(records)])
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[NUM_WARM_CALLS:])


# Read again --------------------------------------------------------------------------------------------------------------------------


def read_onnx_facts(path: Path, data: bytes) -> ExportFacts:
    """What an ONNX file says of itself, and, where its facts stand beside it, whether it is still the file they speak of.

    Raises:
        ModelMismatchError: it is no ONNX file, not one of ours, or was altered since it was written.
    """
    import hashlib

    import onnxruntime
    from pydantic import ValidationError

    from shared.errors import ModelMismatchError

    again = "export the run again with 'wardround export'"
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        header = session.get_modelmeta().custom_metadata_map.get(HEADER)
        taken = {part.name: len(part.shape) for part in session.get_inputs()}
    except Exception as error:  # its own types, one for each way in which a file may be wrong
        raise ModelMismatchError(f"{path}: expected an ONNX file, could not read it ({type(error).__name__})", again) from None
    if header is None:
        raise ModelMismatchError(f"{path}: expected an ONNX file written by wardround, found no header of ours", again)
    try:
        facts = ExportFacts.model_validate_json(header)
        beside = facts_file(path)
        recorded = json.loads(beside.read_bytes()).get("sha256") if beside.is_file() else None
    except (ValidationError, ValueError, AttributeError) as error:
        raise ModelMismatchError(f"{path}: expected facts of ours, could not read them ({type(error).__name__})", again) from None
    if taken != {part.name: 1 + len(part.shape) for part in facts.inputs}:
        raise ModelMismatchError(f"{path}: expected the inputs that its header names, found others", again)
    if recorded is not None and recorded != hashlib.sha256(data).hexdigest():
        raise ModelMismatchError(f"{path}: expected the file that {beside.name} beside it speaks of, got another", again)
    return facts
