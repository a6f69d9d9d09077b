"""What a secure sum costs beside a plain round: bytes each way, and seconds of processor time of a site and of the coordinator, by stage.

Every site is run in this process, one after another, on one thread; messages are counted as their JSON and the arrays beside it. Both rounds send the
model down; the plain one sends the update up in float32, the secure one the masked input and the messages of its five stages. Envelopes and seals, a
few hundred bytes a message, are left out of both. The coordinator's plain work is the exact mean, its secure work all it does. Of the sites, a tenth
drops out after it has shared its keys, which is when it costs most: every mask of it has to be made again.

    python benchmarks/secure_sum.py [--parameters N] [--sites N ...] [--repeats N] [--json]
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from measuring import finish

from client.secure_sum import SumSite
from server.aggregation import ExactMean
from server.secure_sum import STAGES, SecureSum, Stage
from shared.messages import Content, Trained, TrainTask, to_array_record
from shared.secure_sum import agreement
from shared.secure_sum.messages import AdvertiseKeysTask, MaskInputTask, ShareKeysTask, SignSurvivorsTask, SumReply, SumTask, UnmaskTask
from shared.secure_sum.setting import SumForm, SumRound, SumSetting, least_threshold

OF = SumRound(run="benchmark", study_hash="0" * 64, fold=1, round=1)
SITES_PER_DROPPED = 10
BYTES_TARGET, SITE_SECONDS_TARGET = 2.0, 1.5
T = TypeVar("T")


@dataclass(slots=True)
class Costs:
    """Of one round: bytes by site, seconds by stage and site, and the coordinator's."""

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    site_seconds: dict[Stage, list[float]] = field(default_factory=dict)
    server_seconds: dict[Stage, float] = field(default_factory=dict)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the seconds of processor time that it took."""
    started = time.process_time()
    given = work()
    return given, time.process_time() - started


def as_sent(content: Content) -> bytes:
    """Its JSON."""
    return content.model_dump_json().encode()


def answered(site: SumSite, kind: type[SumTask], text: bytes, update: np.ndarray) -> tuple[bytes, type[SumReply], np.ndarray | None]:
    """All of a site's work on a request: read it, answer, write that down."""
    reply, payload = answer(site, kind.model_validate_json(text), update)
    return as_sent(reply), type(reply), payload


def answer(site: SumSite, task: SumTask, update: np.ndarray) -> tuple[SumReply, np.ndarray | None]:
    """The site's reply to whichever request this is."""
    if isinstance(task, AdvertiseKeysTask):
        return site.advertise_keys(task), None
    if isinstance(task, ShareKeysTask):
        return site.share_keys(task), None
    if isinstance(task, MaskInputTask):
        return site.mask_input(task, update, 100)
    if isinstance(task, SignSurvivorsTask):
        return site.sign_survivors(task), None
    assert isinstance(task, UnmaskTask)
    return site.unmask(task), None


def secure_round(updates: dict[str, np.ndarray], dropped: frozenset[str]) -> tuple[Costs, float]:
    """What a round costs, and its largest error in a coordinate of the mean."""
    names, num_parameters = tuple(updates), len(next(iter(updates.values())))
    signers = {name: Ed25519PrivateKey.generate() for name in names}
    roster = {name: signer.public_key() for name, signer in signers.items()}
    form = SumForm(num_values=num_parameters, max_value=1.0, max_weight=1000)
    setting = SumSetting(of=OF, sites=names, threshold=least_threshold(len(names)), form=form)
    server = SecureSum(setting, roster=roster)
    sites = {name: SumSite(name, form, run=OF.run, study_hash=OF.study_hash, sign=signers[name].sign, roster=roster) for name in names}
    costs = Costs(up=dict.fromkeys(names, 0), down=dict.fromkeys(names, 0))
    for stage in STAGES:
        tasks, seconds = timed(lambda: {name: (type(task), as_sent(task)) for name, task in server.tasks().items()})
        costs.site_seconds[stage] = []
        for name, (kind, text) in tasks.items():
            if stage >= Stage.MASK_INPUT and name in dropped:
                continue
            costs.down[name] += len(text)
            agreement._check_signature.cache_clear()  # each site, in a process of its own, checks every signature itself
            (said, reply_kind, payload), spent = timed(functools.partial(answered, sites[name], kind, text, updates[name]))
            costs.site_seconds[stage].append(spent)
            costs.up[name] += len(said) + (0 if payload is None else payload.nbytes)
            reply, read_seconds = timed(functools.partial(reply_kind.model_validate_json, said))
            seconds += read_seconds + timed(functools.partial(server.take, name, reply, payload))[1]
        costs.server_seconds[stage] = seconds + timed(server.close_stage)[1]
    stayed = [updates[name] for name in names if name not in dropped]
    return costs, float(np.abs(server.total.mean() - np.mean(stayed, axis=0, dtype=np.float64)).max())


def plain_round(updates: dict[str, np.ndarray]) -> tuple[int, int, float, float]:
    """Bytes up and down of a site, and seconds of a site and of the coordinator."""
    update = next(iter(updates.values()))
    task = TrainTask(run=OF.run, study_hash=OF.study_hash, round=1, fold=1)
    reply = Trained(name=next(iter(updates)), round=1, fold=1, privacy=None)
    record, site_seconds = timed(lambda: to_array_record({"model": update}))
    array_bytes = len(record["model"].data)
    mean, seconds = ExactMean(), 0.0
    for one in updates.values():
        seconds += timed(functools.partial(mean.add, {"model": one}, 100))[1]
    return len(as_sent(reply)) + array_bytes, len(as_sent(task)) + array_bytes, site_seconds, seconds + timed(mean.mean)[1]


def compare(num_sites: int, num_parameters: int, repeats: int, *, dropping: bool) -> dict[str, object]:
    """Medians over the sites and repeats of a secure round, beside a plain one."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1 / np.sqrt(num_parameters), num_parameters).astype(np.float32)
    updates = {f"site-{number:03}": np.roll(base, number) for number in range(num_sites)}
    names = tuple(updates)
    dropped = frozenset(names[::SITES_PER_DROPPED]) if dropping else frozenset()
    rounds = [secure_round(updates, dropped) for _ in range(repeats)]
    up, down, plain_site, plain_server = plain_round({name: update for name, update in updates.items() if name not in dropped})
    stayed = [name for name in names if name not in dropped]
    secure_up = statistics.median(costs.up[name] for costs, _ in rounds for name in stayed)
    secure_down = down + statistics.median(costs.down[name] for costs, _ in rounds for name in stayed)
    total = sum(rounds[0][0].up.values()) + sum(rounds[0][0].down.values()) + num_sites * down
    plain_total = (up + down) * len(stayed) + down * len(dropped)
    by_stage = {stage.name.lower(): statistics.median(spent for costs, _ in rounds for spent in costs.site_seconds[stage]) for stage in STAGES}
    server = {stage.name.lower(): statistics.median(costs.server_seconds[stage] for costs, _ in rounds) for stage in STAGES}
    return {
        "sites": num_sites, "dropped": len(dropped), "parameters": num_parameters,
        "plain_up_bytes": up, "plain_down_bytes": down, "plain_total_bytes": plain_total,
        "secure_up_bytes": secure_up, "secure_down_bytes": secure_down, "secure_total_bytes": total, "bytes_ratio": total / plain_total,
        "plain_site_seconds": plain_site, "site_seconds": sum(by_stage.values()), "site_seconds_by_stage": by_stage,
        "plain_server_seconds": plain_server, "server_seconds": sum(server.values()), "server_seconds_by_stage": server,
        "largest_error_of_the_mean": max(error for _, error in rounds),
    }  # fmt: skip


def told(row: dict[str, object]) -> str:
    """One case in three lines."""
    stages = "  ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in row["site_seconds_by_stage"].items())  # type: ignore[attr-defined]
    return (
        f"{row['sites']} sites, {row['dropped']} dropped: bytes of a site up {row['secure_up_bytes']:,.0f} (plain {row['plain_up_bytes']:,}), "
        f"down {row['secure_down_bytes']:,.0f} ({row['plain_down_bytes']:,}); in all {row['secure_total_bytes']:,} ({row['plain_total_bytes']:,}), "
        f"ratio {row['bytes_ratio']:.3f}  to reach: at most {BYTES_TARGET}\n"
        f"  a site {row['site_seconds']:.3f} s (plain {row['plain_site_seconds']:.3f} s), in ms: {stages}  to reach: at most {SITE_SECONDS_TARGET} s\n"
        f"  the coordinator {row['server_seconds']:.2f} s (plain {row['plain_server_seconds']:.2f} s); "
        f"largest error of the mean {row['largest_error_of_the_mean']:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for num_sites in arguments.sites:
        for dropping in (False, True):
            rows.append(compare(num_sites, arguments.parameters, arguments.repeats, dropping=dropping))
            print(told(rows[-1]), file=sys.stderr)
    finish({"rounds": rows}, as_json=arguments.json)


if __name__ == "__main__":
    main()
