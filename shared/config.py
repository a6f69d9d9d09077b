"""Reading TOML into pydantic models, with errors that name file, key, expected, got and remedy."""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shared.errors import ConfigurationError

Model = TypeVar("Model", bound=BaseModel)
TomlTable = dict[str, object]
WHOLE = "(whole file)"  # the key, to others, of what concerns several


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


Real = Annotated[float, BeforeValidator(_as_float)]
Positive = Annotated[Real, Field(gt=0)]
Momentum = Annotated[Real, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Base of everything read from a file: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


def read_toml(path: Path) -> TomlTable:
    """The tables of a TOML file.

    Raises:
        ConfigurationError: the file is missing, unreadable or not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: expected a TOML file, found none", "check the path") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path}: expected a TOML file, got a folder", "name the file in it") from None
    except PermissionError:
        raise ConfigurationError(f"{path}: may not be read by this user", "change its permissions") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not valid TOML: {error}", "correct that line") from None


def validate(model: type[Model], data: Mapping[str, object], source: str) -> Model:
    """`data` as a `model`; every complaint is one line `source: key: expected ..., got ...`.

    Raises:
        ConfigurationError: `data` does not fit.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [f"{source}: {_explain(detail, model)}" for detail in error.errors()]
        rule = ", ".join(_declared_key(detail) for detail in error.errors()[:3])
        what, remedy = _parted(lines[0], error.errors()[0]) if len(lines) == 1 else ("\n".join(lines), "correct these keys")
        raise ConfigurationError(what, remedy, rule=rule[:100]) from None


def _parted(line: str, detail: ErrorDetails) -> tuple[str, str]:
    """What a single complaint says, and what to do: what it says itself behind its last semicolon, unless that is within quotes."""
    what, _, remedy = line.rpartition("; ")
    if detail["type"] == "value_error" and what and not remedy.count("'") % 2 and not remedy.count('"') % 2:
        return what, remedy
    return line, "correct this key" if detail["loc"] else "correct the file"


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """`key: expected ..., got ...`; of what concerns several keys no key, for the complaint names them."""
    said = _said(detail, model)
    key = _key(detail)
    if detail["type"] == "union_tag_invalid":
        key = f"{key}.name"
    return said if key == WHOLE else f"{key}: {said}"


def _said(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location = [str(part) for part in detail["loc"]]
    got = detail.get("input")
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(model, location[:-1])
            return f"unknown key{nearest(location[-1], known)}; known here: {', '.join(known)}"
        case "missing":
            return "expected a value, got none"
        case "value_error":
            return str(context.get("error", detail["msg"]))
        case "literal_error" | "enum":
            expected = context.get("expected", "another value")
            return f"expected {expected}, got {got!r}"
        case "union_tag_invalid":
            tags, tag = str(context.get("expected_tags")), str(context.get("tag"))
            return f"expected one of {tags}, got {tag!r}{nearest(tag, [name.strip(chr(39)) for name in tags.split(', ')])}"
        case "too_short":
            return f"expected at least {context.get('min_length')}, got {context.get('actual_length')}"
        case "finite_number":
            return f"expected a finite number, got {got!r}"
        case _:
            expected = detail["msg"].removeprefix("Input should be ").split(" or instance of ")[0]
            expected = expected.replace("a valid dictionary", "a table").replace("a valid number", "a number")
            return f"expected {expected}, got {_shorten(got)}"


def _key(detail: ErrorDetails) -> str:
    parts = list(map(str, detail["loc"]))
    if parts[:1] == ["strategy"]:
        del parts[1:2]  # the strategy's name, by which its options were chosen
    return ".".join(part for part in parts if not part.startswith(("literal[", "constrained-"))) or WHOLE


def _declared_key(detail: ErrorDetails) -> str:
    """The key that a rule may name to others: in the place of one that nobody declared, and that may say anything, the table that it stands in."""
    return _key({**detail, "loc": detail["loc"][:-1]}) if detail["type"] == "extra_forbidden" else _key(detail)


def _known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    current: object = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        else:
            for option in get_args(current):
                field = getattr(option, "model_fields", {}).get("name")
                if field is not None and get_args(field.annotation) == (part,):
                    current = option
    tables = [option for option in (current, *get_args(current)) if hasattr(option, "model_fields")]  # of a table that may be absent
    return sorted(tables[0].model_fields) if len(tables) == 1 else []


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
