"""YAML and command-line overrides -> a checked RunConfig.

    configs/train.yaml --compose--> DictConfig --schema walk--> RunConfig --validate--> a run that may start

This file calls Hydra's compose API instead of @hydra.main, which writes files from every rank and exits with 1 on a bad
key; our exit status is 2. An unknown key is an error even with `+` or `++`, with which Hydra accepts any key.
"""

import dataclasses
import difflib
import re
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.compose import compose
from gpt4moe.config.cures import type_cure
from gpt4moe.config.plain import plain_data
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stored import from_stored
from gpt4moe.config.training import NAME_CURE
from gpt4moe.errors import ConfigError

_GENERAL = (
    "Write an override as key=value; a value with other letters than of words in quotes: 'key=\"a, b\"'. configs/ has "
    "the groups, resolved.yaml of a run every key."
)
_EXPONENTS = {"K": 3, "M": 6, "G": 9, "B": 9, "T": 12}
_CLUSTER = re.compile(r"""([+]?cluster=)(['"]?)([^'"]*)\2""")
_SCHEMAS = {"run_schema": RunConfig, "plan_schema": PlanConfig}
CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"


def load_run_config(overrides: list[str], config_name: str = "train") -> RunConfig:
    """The run of configs/<config_name>.yaml and the overrides.

    Args:
        overrides: Hydra's, as on a command line: `+experiment=tiny`, `parallel.tp=2`.
    Raises: ConfigError for an unknown key or group, a value of the wrong type, a missing value, a failed check.
    """
    return _checked(_compose(overrides, config_name, RunConfig), RunConfig)


def load_plan_config(overrides: list[str]) -> PlanConfig:
    """The run of configs/plan.yaml and the overrides, with the planner's own keys.

    Raises: ConfigError as load_run_config does.
    """
    given = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if "ranks" in given:  # a key of other tools; the planner counts devices
        raise ConfigError("ranks is no key of a plan.", "Say gpus: gpus=8 plans 8 devices, a rank each.")
    in_fp8 = {f"precision={name}": ["precision=bf16", f"beyond.products={name}"] for name in ("fp8", "mxfp8")}
    overrides = [one for override in overrides for one in in_fp8.get(override, [override])]
    plan = _checked(_compose(overrides, "plan", PlanConfig), PlanConfig)
    assert isinstance(plan, PlanConfig)
    plan.require_used(given)
    plan.take_tokens(given)
    return plan


def known_clusters() -> list[ClusterConfig]:
    """The clusters of configs/cluster, sorted by name."""
    schema, files = OmegaConf.structured(ClusterConfig), sorted((CONFIG_FOLDER / "cluster").glob("*.yaml"))
    clusters = [OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(file))) for file in files]
    return [cluster for cluster in clusters if isinstance(cluster, ClusterConfig)]


def whole_cluster_name(name: str) -> str:
    """The cluster that a short name stands for: h100 -> h100_80g, MI300X -> mi300x. Other names come back unchanged.

    Raises: ConfigError if several clusters have this beginning.
    """
    files = [file.stem for file in sorted((CONFIG_FOLDER / "cluster").glob("*.yaml"))]
    asked = _plain(name)
    same = [file for file in files if _plain(file) == asked]
    meant = same or [file for file in files if _plain(file.partition("_")[0]) == asked]
    if name in files or not meant:
        return name
    if len(meant) > 1:
        raise ConfigError(
            f"cluster={name} may be {' or '.join(meant)}, which are different devices.",
            f"Set {' or '.join(f'cluster={one}' for one in meant)}.",
        )
    return meant[0]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()


def _compose(overrides: list[str], config_name: str, schema: type[RunConfig]) -> DictConfig:
    """A config whose every node has its type from the schema, the first of the defaults in configs/*.yaml."""
    for override in overrides:
        if not re.match(r"~|[+]{0,2}[^=+~]+=", override):
            raise ConfigError(f"{override!r} is not an override.", "Write key=value, e.g. parallel.tp=2.")
        if re.match(r"[~+]*hydra\b", override):
            raise ConfigError(f"{override!r} is a setting of Hydra's own, which has no effect here.", "Leave it out.")
        if re.search(r"\$\{\s*oc\.", override):  # a run's folder, reports and checkpoints have every value in them
            key = override.partition("=")[0].lstrip("+")
            raise ConfigError(
                f"The value of {key} is to be read from the environment: it would be written into the run folder.",
                f"Write the value itself: {key}=... .",
            )
    overrides = [
        f"{named[1]}{whole_cluster_name(named[3])}" if (named := _CLUSTER.fullmatch(one)) else one for one in overrides
    ]
    _store("plan_schema" if issubclass(schema, PlanConfig) else "run_schema")
    try:
        composed = compose(CONFIG_FOLDER, config_name, overrides)
        OmegaConf.resolve(composed)
        return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, schema) from error
    except (ValueError, TypeError) as error:  # Hydra's own, where a group's value is no name
        raise _nameless_group(overrides, error) from error
    except AssertionError as error:  # what OmegaConf raises where a value is set below a null
        raise ConfigError(
            "An override sets a key of a group that is null here (model.moe of a dense model?).",
            "Choose a model that has the group, or leave the key out.",
        ) from error


@cache
def _store(name: str) -> None:
    """The schema that the defaults of configs/*.yaml begin with, once for all loads: 0.05 s."""
    ConfigStore.instance().store(name=name, node=OmegaConf.structured(_SCHEMAS[name]))


def _nameless_group(overrides: list[str], error: Exception) -> ConfigError:
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = key.partition("@")[0]
        files = sorted(file.stem for file in (CONFIG_FOLDER / group).glob("*.yaml"))
        if group.isidentifier() and files and not re.fullmatch(r"(?!(null|true|false)$)[a-z]\w*", value, re.IGNORECASE):
            return ConfigError(f"{override}: a group takes a name.", f"Give {key}= one of: {' '.join(files)}.")
    return ConfigError(f"An override is none that Hydra takes: {str(error).splitlines()[0]}.", _GENERAL)


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """A checked RunConfig from plain nested data: resolved.yaml, a checkpoint's manifest.

    Raises: ConfigError as load_run_config does.
    """
    stored = from_stored(RunConfig, raw)
    if stored is not None:
        stored.validate()
        return stored
    _refuse_unknown_keys(raw, RunConfig, "")
    try:
        typed = OmegaConf.merge(_run_schema(), raw)
    except OmegaConfBaseException as error:
        raise _explain(error, RunConfig) from error
    assert isinstance(typed, DictConfig)
    return _checked(typed, RunConfig)


@cache
def _run_schema() -> Any:
    """Made once, and never changed: merge copies it."""
    return OmegaConf.structured(RunConfig)


def _checked(typed: DictConfig, schema: type[RunConfig]) -> RunConfig:
    """The objects of a typed config, without interpolations, after every check."""
    raw: Any = OmegaConf.to_container(typed, enum_to_str=True)
    keys = [field.name for field in dataclasses.fields(schema) if not field.metadata.get("omegaconf_ignore")]
    for removed in (key for key in keys if key not in raw):
        raise ConfigError(f"~{removed} removes a part that every run has.", f"Leave it out, or set keys of {removed}.")
    _refuse_unknown_keys(raw, schema, "")
    _refuse_missing(raw, "")
    try:
        run = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise _explain(error, schema) from error
    assert isinstance(run, RunConfig)
    run.validate()
    return run


def config_to_dict(run: RunConfig) -> dict[str, Any]:
    """The run as plain nested data for YAML or JSON. config_from_dict is the inverse."""
    plain = plain_data(run)
    assert isinstance(plain, dict)
    return plain


def config_to_yaml(run: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(run), sort_keys=False)


def _dataclass_of(annotation: Any) -> type | None:
    """Of a key's values, or of the entries of a list."""
    return next(
        (one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and dataclasses.is_dataclass(one)),
        None,
    )


def _refuse_unknown_keys(raw: dict[str, Any], schema: type, path: str) -> None:
    hints = get_type_hints(schema)
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"Unknown key {full}.", _nearest(str(key), list(hints), path))
        nested = _dataclass_of(hints[key])
        entries = [(f"{full}[{number}]", one) for number, one in enumerate(value)] if isinstance(value, list) else []
        for where, one in entries or [(full, value)]:
            if nested is not None and isinstance(one, dict):
                _refuse_unknown_keys(one, nested, where)


def _refuse_missing(raw: dict[str, Any], path: str) -> None:
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict):
            _refuse_missing(value, full)
        elif value == "???":
            if full == "run.name":  # no experiment has one
                raise ConfigError(f"{full} is not set.", f"Add {full}=first.")
            raise ConfigError(f"{full} is not set.", f"Add {full}=VALUE, or choose a whole run: +experiment=tiny.")


def _entry_named(name: str, schema: type, path: str = "") -> tuple[str, list[str]] | None:
    """The key whose list has entries of a class, and their keys; OmegaConf does not say in which list a key stands."""
    for key, hint in get_type_hints(schema).items():
        full, nested = f"{path}.{key}" if path else key, _dataclass_of(hint)
        if nested is not None and get_origin(hint) is list and nested.__name__ == name:
            return full, list(get_type_hints(nested))
        found = None if nested is None else _entry_named(name, nested, full)
        if found:
            return found
    return None


def _nearest(key: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    prefix = f"{path}." if path else ""
    return f"Did you mean {prefix}{close[0]}?" if close else f"Keys here: {', '.join(prefix + name for name in known)}."


def _explain(error: Exception, root: type[RunConfig]) -> ConfigError:
    """An error of Hydra or OmegaConf, which has many lines, as one line of cause and one of cure."""
    text = str(error.__cause__ or error)
    full_key = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown:
        owner = re.search(r"object_type=(\w+)", text)
        entry = _entry_named(owner.group(1), root) if owner else None
        if entry:
            where, known = entry
            cause = f"Unknown key {unknown.group(1)} in an entry of {where}."
            return ConfigError(cause, _nearest(unknown.group(1), known, ""))
        path = full_key.group(1) if full_key else unknown.group(1)
        parent = path.rpartition(".")[0]
        schema: type | None = root
        for part in filter(None, parent.split(".")):
            schema = _dataclass_of(get_type_hints(schema)[part]) if schema else None
        if schema is None:  # an entry of a dictionary, data.sources
            return ConfigError(f"{path} is a new entry of {parent}.", f"Write it with two pluses: ++{path}=VALUE.")
        return ConfigError(f"Unknown key {path}.", _nearest(unknown.group(1), list(get_type_hints(schema)), parent))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = lines[0] if full_key is None else f"{full_key.group(1)}: {lines[0]}"
    skipped = r"(full_key|object_type|reference_type|Config search path|provider=)"
    options = [line for line in lines[1:] if not re.match(skipped, line)]
    group = re.search(r"Could not override '([^']+)'", text)
    if group:
        cause, options = (
            f"Unknown key or group {group.group(1)}.",
            ["An experiment is added with a plus: +experiment=tiny."],
        )
    twice = re.match(r"Multiple values for ([^ ]+)\.", lines[0])
    if twice:
        cause, options = f"{twice[1]} has a value already; a plus adds one.", [f"Leave the plus out: {twice[1]}=... ."]
    unparsed = getattr(error, "override", None)
    if unparsed is not None:  # its lines are a parser's, and an address
        cause, options = f"{unparsed!r} is no override: {lines[0]}.", []
    if re.match(r"[+]*run\.name=", unparsed or lines[0].partition("Ambiguous value for argument '")[2]):
        options = [f"{NAME_CURE} Other signs stand for something in an override."]
    of_type = type_cure(root, full_key.group(1)) if full_key else None
    listed = re.search(r", expected one of \[(.*)\]$", cause)
    if of_type and listed and listed[1] not in of_type:  # its group refuses some of them
        cause = cause[: listed.start()]
    size = re.match(r"Value '(\d+\.?\d*)([kKMGBT])' of type 'str' could not be converted to (\w+)", lines[0])
    if size and of_type and not options:
        exponent = _EXPONENTS[size[2].upper()]
        written = round(float(size[1]) * 10**exponent) if size[3] == "Integer" else f"{size[1]}e{exponent}"
        of_type += f" Write {written}."
    return ConfigError(cause, " ".join(options) or of_type or _GENERAL)
