"""The noised mean of DP-FedAvg: what one site can move, what the noise is, what counts as zero; and a whole study beside the algorithm written out."""

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Context, Message, MessageType
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import server.strategies.dp_fedavg as dp_fedavg
from server.coordinator import Coordinator
from server.run_folder import Checkpoint, RunFolder, read_tensors
from server.strategies.dp_fedavg import NoisedMean, SiteNoise
from server.witness import Witness
from shared.errors import ProtocolError
from shared.messages import PARAMETERS, Refused, encode, from_array_record, to_array_record
from shared.models import Parameters, initial_parameters
from shared.noise import GaussianNoise, NoiseGrid
from shared.seeding import derive_key
from shared.site_level import plan_site_level

SHAPES = {"w": (3, 2), "b": (3,)}
SITE_LEVEL = {"unit": "site", "noise_multiplier": 0.7, "delta": 1e-3, "max_site_norm": 0.1}


def site_noise(*, max_norm: float = 1.0, noise: float = 2.0, names: object = SHAPES, seed: int | None = 5) -> SiteNoise:
    return SiteNoise(max_norm=max_norm, noise_multiplier=noise, released=frozenset(names), seed=seed)  # type: ignore[call-overload]


def mean_of(noise: SiteNoise, *, num_asked: int = 4, fold: int = 1, number: int = 1) -> NoisedMean:
    return NoisedMean(noise, num_asked=num_asked, fold=fold, round_number=number)


def update(seed: int, scale: float = 1.0) -> Parameters:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def flat(arrays: Parameters) -> np.ndarray:
    return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in SHAPES])


def length(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).sum()))


def sum_of(updates: dict[str, Parameters], max_norm: float) -> np.ndarray:
    """Before the noise."""
    mean = mean_of(site_noise(max_norm=max_norm), num_asked=len(updates) + 1)
    mean.add({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, 1, site="one more")
    for site, values in updates.items():
        mean.add(values, 1, site=site)
    return flat(mean.take_sum())


# What one site can move -----------------------------------------------------------------------------------------------------------

scales = st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 1.0, 30.0, 1e6])


@given(
    sizes=st.lists(scales, min_size=0, max_size=6), scale=scales, max_norm=st.sampled_from([1e-6, 0.3, 1.0, 1e6]), seed=st.integers(0, 1000)
)  # fmt: skip
def test_one_site_moves_the_sum_by_at_most_the_norm(sizes: list[float], scale: float, max_norm: float, seed: int) -> None:
    others = {f"site-{place}": update(seed + place, size) for place, size in enumerate(sizes)}
    own = update(seed + 100, scale)
    without, with_it = sum_of(others, max_norm), sum_of({**others, "own": own}, max_norm)
    assert length(with_it - without) <= max_norm * (1 + 2**-13)  # half of the room that the grid's sensitivity leaves for arithmetic
    if length(flat(own)) <= max_norm:
        assert with_it - without == pytest.approx(flat(own), rel=1e-6, abs=1e-12 * max(1.0, max_norm))  # what is short is not touched
    grid = NoiseGrid.of(max_norm, 9)
    assert length(np.rint(with_it / grid.spacing) - np.rint(without / grid.spacing)) * grid.spacing <= grid.sensitivity
    zero = sum_of({**others, "own": {name: np.zeros_like(values) for name, values in own.items()}}, max_norm)
    assert np.array_equal(zero, without)  # an update of zeros, and none
    replaced = sum_of({**others, "own": update(seed + 200, scale)}, max_norm)
    assert length(replaced - with_it) <= 2 * max_norm * (1 + 2**-13)


def test_the_sum_does_not_depend_on_order_or_on_how_updates_come() -> None:
    updates = {f"site-{place}": update(place, 10.0 ** (place - 20)) for place in range(40)}
    forward = sum_of(updates, 0.8)
    assert np.array_equal(forward, sum_of(dict(reversed(updates.items())), 0.8))
    blocked = mean_of(site_noise(max_norm=0.8), num_asked=40)
    rows = np.stack([flat(values) for values in updates.values()]).astype(np.float32)
    assert blocked.add_rows(SHAPES, rows, [1] * 40, sites=list(updates)) == [None] * 40
    assert flat(blocked.take_sum()) == pytest.approx(forward, rel=1e-12, abs=1e-15)


def test_released_are_the_named_entries_alone() -> None:
    """What no site moves gets no noise, and a site that moves it all the same moves nothing, and clips nothing of the rest."""
    noise = site_noise(max_norm=1.0, names=["b"])
    lone, many = mean_of(noise), mean_of(noise)
    values = {"w": np.full((3, 2), 1e6, np.float32), "b": np.array([0.5, 0.0, 0.0], np.float32)}
    lone.add(values, 1, site="a")
    many.add_rows(SHAPES, flat(values)[None].astype(np.float32), [1], sites=["a"])
    for mean in (lone, many):
        total = mean.take_sum()
        assert set(total) == {"b"} and total["b"].tolist() == [0.5, 0.0, 0.0]


def test_of_one_site_only_one_update_counts() -> None:
    mean = mean_of(site_noise())
    mean.add(update(1, 0.1), 1, site="a")
    with pytest.raises(ProtocolError, match="expected one update of a site in a round"):
        mean.add(update(2, 0.1), 1, site="a")
    rows = np.stack([flat(update(seed, 0.1)) for seed in (3, 4, 5)])
    first, second, third = mean.add_rows(SHAPES, rows, [1] * 3, sites=["b", "a", "b"])
    assert first is None and "expected one update of a site" in str(second) and "expected one update of a site" in str(third)
    assert flat(mean.take_sum()) == pytest.approx(flat(update(1, 0.1)) + rows[0])


def test_what_is_not_finite_is_refused_and_the_sum_stays() -> None:
    for bad in (np.nan, np.inf):
        mean = mean_of(site_noise())
        mean.add(update(1, 0.1), 1, site="a")
        spoiled = {**update(2), "b": np.array([0.0, bad, 0.0], np.float32)}
        with pytest.raises(ProtocolError):
            mean.add(spoiled, 1, site="b")
        [refusal] = mean.add_rows(SHAPES, flat(spoiled)[None], [1], sites=["c"])
        assert refusal is not None and flat(mean.take_sum()) == pytest.approx(flat(update(1, 0.1)))


# The noise ------------------------------------------------------------------------------------------------------------------------


def released(*, number: int = 1, num_answered: int = 4, size: int = 20_000, seed: int | None = 5, num_asked: int = 4) -> np.ndarray:
    mean = mean_of(site_noise(max_norm=0.3, noise=1.7, names=["w"], seed=seed), num_asked=num_asked, number=number)
    for place in range(num_answered):
        mean.add({"w": np.zeros(size, np.float32)}, 1, site=f"site-{place}")
    assert mean.total_weight == num_asked
    return mean.take_mean()["w"]


def test_the_noise_is_gaussian_of_the_promised_size() -> None:
    """Over 20,000 draws: mean and variance beyond 5.5 standard deviations, or a Kolmogorov-Smirnov p below 1e-6, happen by chance less than once in 900,000."""
    grid = NoiseGrid.of(0.3, 20_000)
    draws = released() * 4 / (1.7 * grid.sensitivity)
    assert grid.sensitivity >= 0.3  # never less than the promise
    assert abs(draws.mean()) * np.sqrt(len(draws)) < 5.5
    assert abs(np.square(draws).sum() - len(draws)) / np.sqrt(2 * len(draws)) < 5.5
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    steps = released() * 4 / grid.spacing
    assert np.array_equal(steps, np.rint(steps))  # whole points of the grid, and nothing below


def test_the_denominator_is_the_sites_asked_however_many_answered() -> None:
    assert np.array_equal(released(num_answered=1), released(num_answered=4))
    assert np.array_equal(released(num_answered=1, num_asked=8) * 2, released(num_answered=1))
    assert mean_of(site_noise()).total_weight == 0  # of nobody's update no model is made


def test_every_release_has_noise_of_its_own() -> None:
    """Correlations beyond 5.5 / sqrt(20,000) happen by chance less than once in 20 million."""
    first = released()
    assert np.array_equal(first, released())  # seeded, so drawn again
    for other in (released(number=2), released(seed=6), released(seed=None), released(seed=None)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 5.5 / np.sqrt(len(first))
    assert not np.array_equal(released(seed=None), released(seed=None))
    noise = site_noise()
    assert len({noise.key(fold, number) for fold in (1, 2) for number in (1, 2, 12)} | {noise.key(11, 2)}) == 7


def test_a_sum_from_under_masks_is_released_as_one_in_the_clear() -> None:
    """The same grid, noise and denominator; entries that are not released are dropped."""
    clear, masked = (mean_of(site_noise(max_norm=0.8, names=["w"]), num_asked=5) for _ in range(2))
    updates = [update(place, 0.1) for place in range(3)]
    for place, values in enumerate(updates):
        clear.add(values, 1, site=f"site-{place}")
    total = {name: np.sum([np.asarray(values[name], np.float64) for values in updates], axis=0) for name in SHAPES}
    found, expected = masked.release(total), clear.take_mean()
    assert set(found) == {"w"} == set(expected) and np.array_equal(found["w"], expected["w"]) and masked.num_asked == 5


# Whole studies --------------------------------------------------------------------------------------------------------------------


def spying(
    sent: dict[tuple[int, str], Parameters], answer: Callable[[str, int, Message], Message | None] = lambda name, number, reply: None
) -> Callable:
    """Keeps every site's update, by round and site; `answer` may put another reply in its place."""

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        reply = app(message, context)
        name = str(context.node_config["site"])
        if message.metadata.message_type == MessageType.TRAIN:
            number = int(message.metadata.group_id)
            other = answer(name, number, reply)
            if other is not None:
                return other
            sent[number, name] = from_array_record(reply.content[PARAMETERS])
        return reply

    return tamper


def written_out(rig: object, sent: dict[tuple[int, str], Parameters], *, num_asked: int = 3) -> Parameters:
    """Algorithm 1 of the paper on these updates, with the seeded draws."""
    study = rig.study
    plan = plan_site_level(study)
    model = {name: value.astype(np.float32) for name, value in initial_parameters(rig.task.model(), study.seed).items()}
    size = sum(value.size for value in model.values())
    grid = NoiseGrid.of(plan.max_norm, size)
    for number in range(1, study.rounds.count + 1):
        total = np.zeros(size)
        for (round_number, _), values in sent.items():
            if round_number == number:
                own = np.concatenate([values[name].reshape(-1).astype(np.float64) for name in model])
                total += own * min(1.0, plan.max_norm / length(own))
        stream, std = GaussianNoise(derive_key(study.seed, "site-level noise", 1, number)), plan.noise_multiplier * grid.sensitivity / grid.spacing
        draws = np.concatenate([stream.normal((value.size,), std).numpy() for value in model.values()])
        mean = (np.rint(total / grid.spacing) + np.rint(draws)) * grid.spacing / num_asked
        start = 0
        for name, value in model.items():
            model[name] = (value + mean[start : start + value.size].reshape(value.shape)).astype(np.float32)
            start += value.size
    return model


def final(folder: RunFolder) -> Parameters:
    return read_tensors(folder.path / "model" / "final.safetensors")[1]


def test_a_study_is_the_algorithm_of_the_paper(make_rig) -> None:
    sent: dict[tuple[int, str], Parameters] = {}
    rig = make_rig(tamper=spying(sent), privacy=SITE_LEVEL, strategy={"weights": "equal"})
    folder = rig.new_folder()
    history = rig.run(folder)
    assert len(sent) == 9 and history.privacy == {}
    assert any(length(np.concatenate([v.reshape(-1) for v in values.values()])) > 0.1 for values in sent.values())  # something is clipped
    model = final(folder)
    for name, value in written_out(rig, sent).items():
        assert model[name] == pytest.approx(value, abs=1e-6)
    plan = rig.coordinator.site_level
    assert [record.site_level_epsilon for record in rig.records] == [plan.epsilon_after(number) for number in (1, 2, 3)]
    assert [record.site_level_epsilon for record in folder.rounds()] == [record.site_level_epsilon for record in rig.records]


def test_bad_and_missing_updates_count_as_zero(make_rig) -> None:
    """One site sends NaN in round 1, another refuses round 2: the sum is over the others, the denominator stays three."""

    def answer(name: str, number: int, reply: Message) -> Message | None:
        if (name, number) == ("site-1", 1):
            values = {key: np.full_like(value, np.nan) for key, value in from_array_record(reply.content[PARAMETERS]).items()}
            return _replaced(reply, values)
        if (name, number) == ("site-2", 2):
            reply.content.clear()
            reply.content.update(encode(Refused(name=name, code="E600", reason="not today")))
            return reply
        return None

    sent: dict[tuple[int, str], Parameters] = {}
    rig = make_rig(tamper=spying(sent, answer), privacy=SITE_LEVEL, strategy={"weights": "equal"})
    folder = rig.new_folder()
    rig.run(folder)
    assert len(sent) == 7
    statuses = [{site.name: site.status for site in record.sites} for record in rig.records]
    assert statuses[0]["site-1"] == "failed" and statuses[1]["site-2"] == "refused" and set(statuses[2].values()) == {"ok"}
    model = final(folder)
    for name, value in written_out(rig, sent).items():
        assert model[name] == pytest.approx(value, abs=1e-6)


def _replaced(reply: Message, values: Parameters) -> Message:
    reply.content[PARAMETERS] = to_array_record(values)
    return reply


class Killed(BaseException):
    """The process ends here."""


def killing(method: Callable, *, at: int, lost: list[Checkpoint]) -> Callable:
    """`RunFolder.write_checkpoint`, before which the process ends in this round."""

    def write(folder: RunFolder, checkpoint: Checkpoint) -> None:
        if checkpoint.round_number == at and not lost:
            lost.append(checkpoint)
            raise Killed
        method(folder, checkpoint)

    return write


@pytest.mark.parametrize("source", ["seeded", "os"])
def test_a_release_that_a_crash_cut_short_never_left(make_rig, monkeypatch, source: str) -> None:
    """The round is done again from the checkpoint before it. Of the lost model no site is ever sent anything, so the account has one release a round."""
    received: dict[int, list[Parameters]] = {}

    def tamper(app: Callable, message: Message, context: Context) -> Message:
        if message.metadata.message_type in (MessageType.TRAIN, MessageType.EVALUATE):
            received.setdefault(int(message.metadata.group_id), []).append(from_array_record(message.content[PARAMETERS]))
        return app(message, context)

    rig = make_rig(tamper=tamper, privacy={**SITE_LEVEL, "noise_source": source}, strategy={"weights": "equal"})
    whole = rig.new_folder()
    rig.run(whole)
    received.clear()
    folder, lost = rig.new_folder(), []
    monkeypatch.setattr(RunFolder, "write_checkpoint", killing(RunFolder.write_checkpoint, at=2, lost=lost))
    with pytest.raises(Killed):
        rig.run(folder)
    assert [record.round for record in folder.rounds()] == [1, 2]  # its spend was on disk; over, never under
    assert max(received) == 2  # and its model with nobody
    rig.run(folder)
    [checkpoint] = lost
    same = [all(np.array_equal(values[name], checkpoint.parameters[name]) for name in values) for models in received.values() for values in models]
    assert any(same) == (source == "seeded")  # seeded noise is drawn alike, and the model of round 2 is that which was lost
    assert len(folder.rounds()) == 3 and [record.round for record in folder.rounds()] == [1, 2, 3]
    twice = received[2]
    assert all(np.array_equal(values[name], twice[0][name]) for values in twice for name in values)  # what was asked again is what was asked
    equal = all(np.array_equal(final(folder)[name], final(whole)[name]) for name in final(whole))
    assert equal == (source == "seeded")  # bit for bit


def test_real_sites_get_the_operating_systems_noise_whatever_the_study_says(make_rig, tmp_path) -> None:
    rig = make_rig(privacy={**SITE_LEVEL, "noise_source": "seeded"}, strategy={"weights": "equal"})
    virtual = Coordinator(rig.study, rig.task, rig.new_folder())
    real = Coordinator(rig.study, rig.task, rig.new_folder(), witness=Witness(tmp_path / "witness"))
    assert virtual._strategy._site_noise.seed == rig.study.seed and real._strategy._site_noise.seed is None
    assert "seed" not in repr(virtual._strategy._site_noise)


@pytest.mark.parametrize("strategy", ["scaffold", "feddyn", "fedavgm", "fedadam"])
def test_nothing_after_the_sum_tells_how_many_answered(make_rig, strategy: str) -> None:
    """Of two runs, in the one a site sends zeros and in the other nothing: model and strategy state come out the same."""

    def zeros(name: str, number: int, reply: Message) -> Message | None:
        return (
            _replaced(reply, {key: np.zeros_like(value) for key, value in from_array_record(reply.content[PARAMETERS]).items()})
            if name == "site-3"
            else None
        )

    def nothing(name: str, number: int, reply: Message) -> Message | None:
        if name == "site-3":
            reply.content.clear()
            reply.content.update(encode(Refused(name=name, code="E600", reason="no")))
        return reply if name == "site-3" else None

    ended = []
    for answer in (zeros, nothing):
        rig = make_rig(tamper=spying({}, answer), privacy=SITE_LEVEL, strategy={"name": strategy, "weights": "equal"}, training={"local_steps": 2})
        folder = rig.new_folder()
        rig.run(folder)
        ended.append(folder.read_checkpoint())
    zero, missing = ended
    assert all(np.array_equal(zero.parameters[name], missing.parameters[name]) for name in zero.parameters)
    assert zero.state.keys() == missing.state.keys() and all(
        np.array_equal(zero.state[part][name], missing.state[part][name]) for part in zero.state for name in zero.state[part]
    )


def test_noise_is_drawn_once_a_round_and_nowhere_else(make_rig, monkeypatch) -> None:
    drawn: list[tuple[int, ...]] = []
    normal = GaussianNoise.normal
    monkeypatch.setattr(dp_fedavg.GaussianNoise, "normal", lambda self, shape, std: drawn.append(tuple(shape)) or normal(self, shape, std))
    rig = make_rig(privacy=SITE_LEVEL, strategy={"weights": "equal"})
    rig.run(rig.new_folder())
    assert drawn == [(2,), (1,)] * 3  # two weights and a bias, in three rounds
