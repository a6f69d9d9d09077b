"""Studies as tables: changed, flattened and written as TOML."""

import json
import re
from collections.abc import Mapping

from shared.config import TomlTable
from shared.errors import ConfigurationError


def merge_tables(base: Mapping[str, object], changes: Mapping[str, object]) -> TomlTable:
    """`base` with `changes` merged in, tables within tables; a change of strategy name drops the old one's options."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            if key == "strategy" and value.get("name", old.get("name")) != old.get("name"):
                old = {}
            if key == "privacy":
                old = _without_rival_budgets(old, value)
            if key == "training" and "local_steps" in value:
                old = {name: item for name, item in old.items() if name != "local_epochs"}
            if key == "training" and "local_epochs" in value:
                old = {name: item for name, item in old.items() if name != "local_steps"}
            if key == "federation":
                old = _without_rival_sites(old, value)
            value = merge_tables(old, value)
        merged[key] = value
    return merged


def _without_rival_sites(old: Mapping[str, object], change: Mapping[str, object]) -> TomlTable:
    """Sites come from the data or from a number: a change to one takes the place of the other."""
    kept = dict(old)
    if change.get("partition") in ("natural", "column"):
        kept.pop("sites", None)
    if "sites" in change and "partition" not in change and kept.get("partition") in ("natural", "column"):
        kept["partition"] = "iid"
        kept.pop("column", None)
    return kept


def _without_rival_budgets(old: Mapping[str, object], change: Mapping[str, object]) -> TomlTable:
    rivals, unit = {"epsilon", "noise_multiplier"}, change.get("unit", old.get("unit"))
    of_sites = {"max_site_norm", "site_epsilon", "site_delta"}
    if unit != old.get("unit", "patient") and "site" in (unit, old.get("unit")):
        old = {key: value for key, value in old.items() if key not in rivals | of_sites | {"delta", "evaluation_epsilon"}}
    if change.get("unit") == "none" or rivals & change.keys():
        dropped = rivals | of_sites | {"evaluation_epsilon"} if change.get("unit") == "none" else rivals
        kept = {key: value for key, value in old.items() if key not in dropped}
        if kept.get("unit") == "none" and "unit" not in change:
            kept["unit"] = "patient"
        return kept
    return dict(old)


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """`{"rounds": {"count": 3}}` as `{"rounds.count": 3}`."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def toml_text(table: Mapping[str, object]) -> str:
    """TOML for tables of scalars, lists of scalars and tables within; scalars first."""
    lines: list[str] = []
    _write_table(table, "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, object], path: str, lines: list[str]) -> None:
    if path and any(not isinstance(value, Mapping) for value in table.values()):
        lines.extend(["", f"[{path}]"])
    for key, value in table.items():
        if not isinstance(value, Mapping):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, f"{path}.{_toml_key(key)}" if path else _toml_key(key), lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one control character that JSON leaves bare and TOML forbids
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    raise ConfigurationError(f"cannot write {type(value).__name__} as TOML", "use text, numbers, lists and tables")
