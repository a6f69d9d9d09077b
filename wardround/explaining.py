"""What a trained model looks at in a hospital's own patients, for a page that stays there.

Integrated gradients (Sundararajan, Taly, Yan 2017) for tables, series, signals and tokens: how much each input moved the model's output away from
the output for a public baseline, the middle of the declared ranges. They add up to that difference, and how nearly they do is measured.
Grad-CAM (Selvaraju et al. 2017) for images and volumes, at the maps of the last convolution that looks at more than one pixel; of a map that a model gives, such
as a segmentation's, the mean over the pixels that it marks is explained (Vinogradova et al. 2020). Both by captum.

What is explained is the model's output before it becomes a prediction: the logit of a risk, of the likeliest class, or what the task names
(`Task.explained`). A model whose outputs become predictions in another way, as tags or symbols, is refused: an attribution of some output of it
would be read as one of the prediction beside it.

Legend: N records (one a patient), F features, T steps, V variables, C channels.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.data_check import DataSource
from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataError, DataMissingError
from shared.schema import TableSchema, TensorSchema
from shared.seeding import generator
from shared.task import ExplainedOutput, Task
from wardround.deploying import NUM_SYNTHETIC
from wardround.predicting import is_map, open_patients
from wardround.trained import Owner, Trained, read_trained

Kind = Literal["table", "series", "signal", "picture", "volume", "tokens"]
FloatArray = NDArray[np.float64]
INSTALL = 'pip install "wardround[explain]"'
STEPS = (50, 200, 800)  # of the integral, until attributions add up
ENOUGH = 0.01  # of the mean difference from the baseline: how far they may be from adding up
INTERNAL_BATCH = 512  # rows in a model at once
PATIENTS = 100
MOST_SIGNAL_CHANNELS = 64
INTEGRATED, GRAD_CAM = "integrated gradients", "Grad-CAM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One input of the model, and how much it mattered.

    Attributes:
        names: of columns, features or variables; empty where they have none.
        levels: of a table `(N, F)`, where in its range each value is, in [-1, 1]; NaN where it has no place, as a category.
        values: `(N, ...)` as the model took them.
        attributions: `(N, ...)`; of a table `(N, F)`, a series `(N, T, V)`, tokens `(N, E)`, else of the shape of one channel, `(N, H, W)` ...
        method: `INTEGRATED` or `GRAD_CAM` and at which layer.
    """

    name: str
    kind: Kind
    names: tuple[str, ...] = ()
    levels: FloatArray | None = field(default=None, repr=False)
    values: NDArray[np.generic] = field(repr=False)
    attributions: FloatArray = field(repr=False)
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributions:
    """Patients, what the model predicts for them, and why.

    Attributes:
        predictions: `(N, ...)` as the task gives them, `(N, K)` where it says what fits a row.
        ranked: `(N,)` by what patients are called high or low: what is explained where the task names it, else the prediction.
        words: what is explained.
        chosen: `(N,)` index of the output that is explained, where there are several; else None.
        completeness_gap: largest deviation of a patient's sum from the difference it should be, as a share of the mean difference over patients;
            None where nothing was explained by integrated gradients.
    """

    task: Task
    cohort: Cohort
    parts: tuple[Part, ...]
    predictions: FloatArray = field(repr=False)
    ranked: FloatArray = field(repr=False)
    words: str
    chosen: NDArray[np.int64] | None = field(repr=False)
    completeness_gap: float | None
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """A page that was written, in counts alone; `owner` is whose own model it is of, None of a model that is shared."""

    page: Path
    task: str
    num_patients: int
    synthetic: bool
    parts: tuple[Part, ...] = field(repr=False)
    completeness_gap: float | None
    num_steps: int
    owner: Owner | None = None


def explain_run(
    run: str | Path,
    data: str | Path | None = None,
    *,
    patients: int = PATIENTS,
    out: str | Path = "explanation.html",
    task: str | None = None,
    options: Mapping[str, str | int | float | bool] | None = None,
    force: bool = False,
) -> Explained:
    """Write a page about what the final model of a run looks at. Nothing of it goes anywhere else: not into the run's folder, not into a log.

    Args:
        run: a run's folder, or a .safetensors file.
        data: as for `simulate`, or a site.toml; None: the task's own patients, and synthetic ones where it has none.
        patients: so many at most, drawn by the run's seed; the first record of each.
        out: the page, mode 0600.
        force: replace `out` where it is there.

    Raises:
        ConfigurationError: captum is not installed, the page would stand in a run's folder, or the model has an input or outputs that cannot be
            explained.
        StorageError: the run is not finished, or the page is there already.
        DataError: the data are missing, may not be read, or do not fit.

    Example:
        explain_run("runs/heart-disease-20250101T000000Z-1a2b", "data/heart-disease")
    """
    from wardround.private_files import private_file, refuse_in_run
    from wardround.report.explanation_page import explanation_page

    require_captum()
    page, folder = Path(out), Path(run)
    refuse_in_run(page)
    trained = read_trained(folder, task=task)
    require_explainable(trained)
    seed = 0 if trained.run is None else trained.run.study.seed
    cohort = chosen_patients(trained.task, data, patients=patients, seed=seed, options=options or {})
    with private_file(page, force=force) as file:
        found = attribute(trained, cohort)
        file.write(explanation_page(found, run=_whose(trained)))
    return Explained(
        page=page, task=trained.task.name, num_patients=cohort.num_patients, synthetic=cohort.synthetic, parts=found.parts,
        completeness_gap=found.completeness_gap, num_steps=found.num_steps, owner=trained.owner,
    )  # fmt: skip


def _whose(trained: Trained) -> str:
    """What the page calls the model: by its run, or by the site whose own it is; nothing of a file that stands alone."""
    if trained.owner is not None:
        return f"own model of site {trained.owner.site}{f', run {trained.owner.run}' if trained.owner.run else ''}"
    return "" if trained.run is None else trained.run.result.run


def require_captum() -> None:
    """Raise `ConfigurationError` where captum is missing."""
    try:
        import captum.attr  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"explain: expected the package captum, found none: {error}", INSTALL) from error


def require_explainable(trained: Trained) -> None:
    """Raise `ConfigurationError`, before patients are read, where no output of the model is the prediction's; tried on synthetic ones."""
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(values[:1])) for values in trained.task.synthetic_cohort(NUM_SYNTHETIC, 0).inputs)
    with torch.no_grad():
        outputs = trained.model.eval()(*inputs)
        _check_outputs(trained.task, outputs, trained.task.predict(outputs))


def _check_outputs(task: Task, outputs: torch.Tensor, predictions: torch.Tensor) -> None:
    """One output; or several that become as many predictions; or a map of an input; or what the task names."""
    alike = outputs.dim() == 2 and (outputs.shape[1] == 1 or predictions.shape == outputs.shape)
    if task.explained is None and not alike and not is_map(task, predictions.shape[1:]):
        raise ConfigurationError(
            f"task {task.name}: expected one output, one for each prediction, or a map of an input, got {tuple(outputs.shape[1:])}, which become predictions "
            "in another way",
            "explain another model, or declare Task.explained",
        )


def chosen_patients(task: Task, data: str | Path | None, *, patients: int, seed: int, options: Mapping[str, str | int | float | bool]) -> Cohort:
    """At most so many patients with their records, in the data's order.

    Raises:
        DataError: see the task's loader.
    """
    if data is None and not task.bundled:
        cohort = task.synthetic_cohort(patients, seed)
    else:
        cohort = open_patients(task, DataSource.of(None if data is None else Path(data), dict(options)), skip_bad_rows=True).cohort()
    if cohort.num_patients == 0:
        raise DataMissingError(f"{data}: expected at least one patient, found none", "check the data with 'wardround data check'")
    if cohort.num_patients <= patients:
        return cohort
    return cohort.select(generator(seed, "explain").choice(cohort.num_patients, size=patients, replace=False))


def attribute(trained: Trained, cohort: Cohort) -> Attributions:
    """How much each input of each patient's first record moved the model's output.

    Raises:
        ConfigurationError: an input is of whole numbers that no embedding reads, or a layer is used in a way that cannot be explained.
    """
    task, model = trained.task, trained.model.eval().requires_grad_(False)
    _, first = np.unique(cohort.patient_of_record, return_index=True)
    arrays = tuple(np.ascontiguousarray(values[first]) for values in cohort.inputs)
    inputs = tuple(torch.from_numpy(values) for values in arrays)
    with torch.no_grad():
        outputs = model(*inputs)
        given = task.predict(outputs)
        _check_outputs(task, outputs, given)
        predictions = (given.numpy() if task.row is None else task.row(given.numpy(), arrays)).astype(np.float64)
        ranked = ranking(predictions) if task.explained is None else task.explained.of(outputs).numpy().astype(np.float64)
    if not np.isfinite(predictions).all() or not np.isfinite(ranked).all():
        raise DataError("expected finite predictions, got NaN or infinity for some patients", "check the data with 'wardround data check'")
    weights, chosen = (torch.ones(len(outputs), 1), None) if task.explained is not None else explained_outputs(outputs)
    kinds = [kind_of(part, task.modality) for part in schema_parts(task)]
    layers = [last_convolution(model, inputs, dimensions=_DIMENSIONS.get(kind, 0)) for kind in kinds]
    by_gradients = [place for place, layer in enumerate(layers) if layer is None]
    found: dict[int, tuple[FloatArray, str]] = {}
    gap, steps = None, 0
    if by_gradients:
        integrated, gap, steps = integrated_gradients(model, inputs, weights, task=task)
        found |= {place: (integrated[place], INTEGRATED) for place in by_gradients}
    for place, layer in enumerate(layers):
        if layer is not None:
            name, module = layer
            found[place] = (grad_cam(model, module, inputs, weights, size=inputs[place].shape[2:], task=task), f"{GRAD_CAM} at layer {name!r}")
    parts = tuple(
        _part(task, part, kind, arrays[place], *found[place]) for place, (part, kind) in enumerate(zip(schema_parts(task), kinds, strict=True))
    )
    return Attributions(
        task=task, cohort=cohort, parts=parts, predictions=predictions, ranked=ranked, words=words_of(task, outputs), chosen=chosen,
        completeness_gap=gap, num_steps=steps,
    )  # fmt: skip


def words_of(task: Task, outputs: torch.Tensor) -> str:
    """What is explained of a model with these outputs."""
    if task.explained is not None:
        return task.explained.words
    if outputs.dim() > 2:
        return "the mean over the pixels that the model marks"
    return "the likeliest of its outputs" if outputs.flatten(1).shape[1] > 1 else "its only output"


# What is explained -------------------------------------------------------------------------------------------------------------------


def schema_parts(task: Task) -> tuple[TensorSchema, ...]:
    """The model's inputs; a table is one of them."""
    if isinstance(task.schema, TableSchema):
        return (TensorSchema(name="features", shape=(len(task.schema.feature_names),), low=-1.0, high=1.0),)
    return task.schema


def kind_of(part: TensorSchema, modality: str) -> Kind:
    """How an input is looked at, by its type and shape.

    >>> [kind_of(TensorSchema(name="x", shape=shape, low=-1, high=1), "signal") for shape in ((16,), (1, 88), (1, 28, 28), (1, 24, 24, 24))]
    ['table', 'signal', 'picture', 'volume']
    """
    if not part.dtype.startswith("float"):
        return "tokens"
    if len(part.shape) == 2:
        channels_first = part.shape[0] < part.shape[1] and part.shape[0] <= MOST_SIGNAL_CHANNELS
        return "signal" if channels_first and not modality.startswith("time") else "series"
    return {3: "picture", 4: "volume"}.get(len(part.shape), "table")  # type: ignore[return-value]  # literals all


_DIMENSIONS: dict[Kind, int] = {"picture": 2, "volume": 3}


def explained_outputs(outputs: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
    """Weights `(N, M)` over a record's M outputs, whose sum is explained; and which output it is where a record has several, `(N,)`.

    One output: it. Several: the largest. A map: the mean over what is above 0, and over all of it where nothing is.
    """
    flat = outputs.flatten(1)
    if flat.shape[1] == 1:
        return torch.ones_like(flat), None
    if outputs.dim() == 2:
        chosen = flat.argmax(dim=1)
        return nn.functional.one_hot(chosen, flat.shape[1]).to(flat.dtype), chosen.numpy()
    marked = (flat > 0).to(flat.dtype)
    marked = torch.where(marked.sum(dim=1, keepdim=True) > 0, marked, torch.ones_like(marked))
    return marked / marked.sum(dim=1, keepdim=True), None


def baseline_of(part: TensorSchema, values: torch.Tensor, task: Task) -> torch.Tensor:
    """The public baseline, as `values`: a patient of whom a table says nothing; else 0, or the end of the declared range that is nearest to it."""
    baseline = torch.zeros_like(values)
    if isinstance(task.schema, TableSchema):
        names = task.schema.feature_names
        for column in task.schema.columns:
            if column.type == "binary":
                baseline[:, names.index(column.name)] = 0.5
        return baseline
    return baseline.clamp(part.low, part.high)


# Integrated gradients ----------------------------------------------------------------------------------------------------------------


class _Explained(nn.Module):
    """The explained output `(n,)` of inputs as captum gives them: floats and embedded tokens are moved, whole numbers and weights are not.

    It is what the task names, else the sum of all outputs by `weights`, the last argument.
    """

    def __init__(self, model: nn.Module, embeddings: list[nn.Module], is_float: list[bool], named: ExplainedOutput | None = None) -> None:
        super().__init__()
        self.model, self._embeddings, self._is_float, self._named = model, embeddings, is_float, named

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        *rest, weights = given
        embedded, rest = rest[: len(self._embeddings)], rest[len(self._embeddings) :]
        floats = iter(rest[: sum(self._is_float)])
        whole = iter(rest[sum(self._is_float) :])
        inputs = [next(floats) if is_float else next(whole) for is_float in self._is_float]
        with _replaced(dict(zip(self._embeddings, embedded, strict=True))):
            outputs = self.model(*inputs)
        if self._named is not None:
            return self._named.of(outputs).to(weights.dtype)
        explained: torch.Tensor = (outputs.flatten(1) * weights).sum(dim=1)
        return explained


@contextmanager
def _replaced(outputs: Mapping[nn.Module, torch.Tensor]) -> Iterator[None]:
    """Within, these layers give these outputs."""
    hooks = [layer.register_forward_hook(lambda _layer, _given, _output, value=value: value) for layer, value in outputs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def integrated_gradients(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], weights: torch.Tensor, *, task: Task
) -> tuple[list[FloatArray], float, int]:
    """Attributions of every input `(N, ...)` (of tokens `(N, E)`), how far they are from adding up, and in how many steps.

    Raises:
        ConfigurationError: whole numbers that no embedding reads, or an embedding that is used more than once.
    """
    from captum.attr import IntegratedGradients

    parts = schema_parts(task)
    is_float = [values.is_floating_point() for values in inputs]
    embeddings = embedding_outputs(model, inputs, parts) if not all(is_float) else {}
    explained = _Explained(model, list(embeddings), is_float, task.explained)
    moved = [*embeddings.values(), *(values for values, moves in zip(inputs, is_float, strict=True) if moves)]
    fixed = (*(values for values, moves in zip(inputs, is_float, strict=True) if not moves), weights)
    baselines = [torch.zeros_like(values) for values in embeddings.values()]
    baselines += [baseline_of(part, values, task) for part, values, moves in zip(parts, inputs, is_float, strict=True) if moves]
    with torch.no_grad():
        difference = explained(*moved, *fixed) - explained(*baselines, *fixed)
    scale = max(float(difference.abs().mean()), 1e-6)
    for steps in STEPS:
        found = IntegratedGradients(explained).attribute(
            tuple(moved), tuple(baselines), additional_forward_args=fixed, n_steps=steps, internal_batch_size=max(INTERNAL_BATCH, len(weights))
        )
        total = sum(values.detach().flatten(1).sum(dim=1) for values in found)
        gap = float((total - difference).abs().max()) / scale
        if gap <= ENOUGH:
            break
    numbers = [values.detach().double().numpy() for values in found]
    tokens, floats = numbers[: len(embeddings)], iter(numbers[len(embeddings) :])
    return [next(floats) if moves else _of_tokens(tokens, values.shape) for values, moves in zip(inputs, is_float, strict=True)], gap, steps


def embedding_outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...], parts: tuple[TensorSchema, ...]) -> dict[nn.Module, torch.Tensor]:
    """What each embedding gives for these records, `(N, E, ..., D)`; one that gives the same whoever comes (of places) is left out.

    Raises:
        ConfigurationError: see `integrated_gradients`.
    """
    outputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in model.modules() if isinstance(layer, nn.Embedding)}
    hooks = [layer.register_forward_hook(lambda found, _given, output: outputs[found].append(output.detach())) for layer in outputs]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    names = {layer: name for name, layer in model.named_modules()}
    found = {}
    for layer, given in outputs.items():
        of_records = [output for output in given if output.dim() > 2 and len(output) == len(inputs[0])]
        if len(of_records) > 1:
            raise ConfigurationError(
                f"layer {names[layer]!r}: expected an embedding that is used once, got {len(of_records)} uses", "explain another model"
            )
        if of_records:
            found[layer] = of_records[0]
    for part, values in zip(parts, inputs, strict=True):
        if not values.is_floating_point() and not any(output.shape[:2] == values.shape[:2] for output in found.values()):
            raise ConfigurationError(
                f"input {part.name!r}: expected whole numbers that an embedding reads, found no such embedding",
                "explain needs an nn.Embedding for it",
            )
    return found


def _of_tokens(attributions: list[FloatArray], shape: torch.Size) -> FloatArray:
    """`(N, E)`: the sum of all embeddings of as many places."""
    fitting = [values.reshape(*values.shape[:2], -1).sum(axis=2) for values in attributions if values.shape[:2] == tuple(shape[:2])]
    return np.asarray(sum(fitting))


# Grad-CAM ----------------------------------------------------------------------------------------------------------------------------


def last_convolution(model: nn.Module, inputs: tuple[torch.Tensor, ...], *, dimensions: int) -> tuple[str, nn.Module] | None:
    """Name and module that gives the maps of the last convolution to run that looks at more than one pixel; None where there is no such convolution.

    That is the last of the layers that follow it and keep their shape, such as its norm and activation: of maps before an activation, most of
    what is negative says nothing about where a thing is.
    """
    kind: Any = {2: nn.Conv2d, 3: nn.Conv3d}.get(dimensions)
    if kind is None:
        return None
    calls: list[tuple[nn.Module, torch.Size]] = []
    leaves = {layer: name for name, layer in model.named_modules() if not any(layer.children())}
    hooks = [layer.register_forward_hook(lambda found, _given, output: calls.append((found, output.shape))) for layer in leaves]
    try:
        with torch.no_grad():
            model(*(values[:1] for values in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    wide = [place for place, (layer, _) in enumerate(calls) if isinstance(layer, kind) and max(layer.kernel_size) > 1]
    if not wide:
        return None
    after = itertools.takewhile(lambda call: call[1] == calls[wide[-1]][1], calls[wide[-1] :])
    used = [layer for layer, _ in calls]
    once = [layer for layer, _ in after if used.count(layer) == 1]
    return (leaves[once[-1]], once[-1]) if once else None


def grad_cam(
    model: nn.Module, layer: nn.Module, inputs: tuple[torch.Tensor, ...], weights: torch.Tensor, *, size: torch.Size, task: Task | None = None
) -> FloatArray:
    """`(N, *size)`, 0 and above: where in the image what the layer saw raises the explained output."""
    from captum.attr import LayerGradCam

    model.requires_grad_(True)  # else the layer's output has no gradient
    explained = _Explained(model, [], [True] * len(inputs), None if task is None else task.explained)
    found = []
    for start in range(0, len(weights), INTERNAL_BATCH // 8):
        batch = slice(start, start + INTERNAL_BATCH // 8)
        part = LayerGradCam(explained, layer).attribute(
            tuple(values[batch] for values in inputs), additional_forward_args=(weights[batch],), relu_attributions=True
        )
        found.append(
            nn.functional.interpolate(part.detach(), size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)
        )
    return np.asarray(torch.cat(found)[:, 0].double().numpy())


# Parts -------------------------------------------------------------------------------------------------------------------------------


def _part(task: Task, schema: TensorSchema, kind: Kind, values: NDArray[np.generic], attributions: FloatArray, method: str) -> Part:
    levels, names = None, tuple[str, ...]()
    if isinstance(task.schema, TableSchema):
        names, attributions, levels = by_column(task.schema, values.astype(np.float64), attributions)
    elif kind == "table":
        listed = listed_names(schema.unit, attributions.shape[-1])
        names = tuple(f"{schema.name} {name}" if name.isdigit() else name for name in listed)
        levels = _levels(values.astype(np.float64), schema)
    elif kind == "series":
        names = listed_names(schema.unit, attributions.shape[-1])
        attributions = attributions.reshape(*attributions.shape[:2], -1, len(names)).sum(axis=2)  # value, mask and gap of one variable
    elif kind in ("picture", "volume") and attributions.ndim == values.ndim:
        attributions = attributions.sum(axis=1)  # over channels
    return Part(name=schema.name, kind=kind, names=names, levels=levels, values=values, attributions=attributions, method=method)


def _levels(values: FloatArray, schema: TensorSchema) -> FloatArray:
    return np.asarray(np.clip(2 * (values - schema.low) / (schema.high - schema.low) - 1, -1, 1))


def by_column(schema: TableSchema, features: FloatArray, attributions: FloatArray) -> tuple[tuple[str, ...], FloatArray, FloatArray]:
    """Names of the columns, attributions `(N, columns)`, the sum over each column's features, and levels."""
    sums, levels, start = [], [], 0
    for column in schema.columns:
        end = start + len(column.feature_names)
        sums.append(attributions[:, start:end].sum(axis=1))
        known = features[:, start] if column.type == "number" else 2 * features[:, start] - 1
        levels.append(known if column.type != "category" else np.full(len(features), np.nan))
        start = end
    return tuple(column.name for column in schema.columns), np.stack(sums, axis=1), np.stack(levels, axis=1)


def listed_names(unit: str, count: int) -> tuple[str, ...]:
    """The names of `count` channels, or of what they are a multiple of, that a schema's unit lists; numbers where it lists none.

    >>> listed_names("value, measured; of each of HR, Temp", 4)
    ('HR', 'Temp')
    >>> listed_names("1 where there is: image, table", 2)
    ('image', 'table')
    """
    for text in (unit.rpartition(": ")[2], unit, unit.rpartition(" of each of ")[2]):
        for mark in ("; ", ", "):
            names = tuple(name.strip() for name in text.split(mark))
            if len(set(names)) == count > 1:
                return names
    names = tuple(name.strip() for name in unit.rpartition(" of each of ")[2].split(","))
    if " of each of " in unit and len(set(names)) == len(names) > 1 and count % len(names) == 0:
        return names
    return tuple(f"{index + 1}" for index in range(count))


def ranking(predictions: FloatArray) -> FloatArray:
    """`(N,)`: by what patients are called high or low: the prediction, the likeliest class's probability, or the mean of a map."""
    if predictions.ndim == 1:
        return predictions
    return np.asarray(predictions.max(axis=1) if predictions.ndim == 2 else predictions.reshape(len(predictions), -1).mean(axis=1))


def singles(ranked: FloatArray) -> list[tuple[str, int]]:
    """The patients with the highest, the median and the lowest of these numbers `(N,)`; fewer where there are not three."""
    order = np.argsort(ranked, kind="stable")
    places = {int(order[-1]): "highest", int(order[len(order) // 2]): "median", int(order[0]): "lowest"}
    return [(title, place) for place, title in places.items()]
