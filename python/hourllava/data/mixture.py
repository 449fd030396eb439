# SPDX-License-Identifier: Apache-2.0
"""Mixtures: a YAML file that names manifests and says how much of each is taken."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from hourllava.errors import DataError

from .failures import FailureLog
from .manifest import read_manifest
from .samples import Places, Sample, to_sample

_STRATEGY = re.compile(r"(first|end|random)\s*:\s*(\d+(?:\.\d+)?)\s*(%?)")
_LINE = "line of the file"  # where a mapping keeps the line it stands on; no key of the user's holds spaces and this
_EXAMPLE = "choose all, or first, end or random with a share or a count, such as random:10% or first:500"


@dataclass(frozen=True)
class Part:
    """One manifest of a mixture."""

    source: str  # file:line, for messages
    manifest: Path
    strategy: str
    places: Places
    stream: str


def load_mixture(
    path: str | os.PathLike[str], seed: int = 0, failures: FailureLog | None = None, decode: bool = False
) -> list[Sample]:
    """The samples of a manifest or of a mixture, the same on every call.

    A mixture is a YAML file like the original's:

        media_root: /data              # optional: folder that media are named from; by default each manifest's own
        features: /data/features       # optional: a repository of memories, or a folder of .pt files, for videos
        datasets:
          - json_path: ov.json         # JSON, JSON lines or parquet; relative to the YAML file
            sampling_strategy: first:10%     # all (the default), or first | end | random : p% or a count
          - json_path: videomarathon.parquet
            media_root: /data/videos   # for this one instead
            features: /data/memories
            stream: long               # name of the stream, for batches of one stream each
          - json_path: frames.json
            fps: 2                     # frames a second of videos that are folders of frames; by default 1

    Args:
        path: .json, .jsonl or .parquet: a manifest whose media are named from its own folder. .yaml: a mixture.
        seed: of `random`; each manifest draws its own numbers.
        failures: takes up entries that cannot be used, which are left out; None lets the first of them raise.
        decode: give videos as files, also where features of them are named.

    Raises:
        DataError: a file is missing or no manifest, a key or a strategy is not known, no sample is left, or an entry
            cannot be used; the message names file and line, or file and number.
    """
    path = Path(path)
    parts = _read_mixture(path) if path.suffix in (".yaml", ".yml") else [_manifest(path)]
    samples: list[Sample] = []
    errors: list[DataError] = []
    for number, part in enumerate(tqdm(parts, "reading", unit="manifest", disable=len(parts) == 1)):
        entries = read_manifest(part.manifest)
        places = replace(part.places, features=None) if decode else part.places
        for index in choose(len(entries), part.strategy, np.random.default_rng([seed, number]), part.source):
            try:
                samples.append(to_sample(entries[index], places, part.stream))
            except DataError as error:
                if failures is None:
                    raise
                errors.append(error)
    if failures is not None:
        failures.leave_out(errors, len(samples) + len(errors))
    if not samples:
        raise DataError(path, "not one of its entries can be used", "look at the first lines of what it names")
    return samples


def choose(count: int, strategy: str, rng: np.random.Generator, source: str) -> list[int]:
    """Which of `count` entries a strategy takes, ascending; shares are rounded up.

    Raises:
        DataError: there is no such strategy, or it takes nothing.
    """
    if strategy == "all":
        return list(range(count))
    match = _STRATEGY.fullmatch(strategy.strip())
    if match is None:
        raise DataError(source, f"there is no sampling_strategy {strategy!r}", _EXAMPLE)
    how, amount, percent = match[1], float(match[2]), bool(match[3])
    if not amount or (percent and amount > 100) or (not percent and amount != int(amount)):
        raise DataError(source, f"sampling_strategy {strategy!r} takes no such share", _EXAMPLE)
    # Rounded before it is rounded up: 7 % of 100 is 7 and not the 8 that 7.000000000000001 would give.
    taken = min(count, math.ceil(round(count * amount / 100, 6)) if percent else int(amount))
    if how == "random":
        return np.sort(rng.permutation(count)[:taken]).tolist()
    return list(range(taken) if how == "first" else range(count - taken, count))


def _manifest(path: Path) -> Part:
    return Part(str(path), path, "all", Places(path.parent), "")


def _read_mixture(path: Path) -> list[Part]:
    document = _read_yaml(path)
    common = _checked(document, path, {"media_root": str, "features": str, "datasets": list}, "datasets")
    texts = ("json_path", "sampling_strategy", "media_root", "features", "stream")
    allowed: dict[str, type] = {**dict.fromkeys(texts, str), "fps": float}
    parts = []
    for value in common["datasets"]:
        given = _checked(value, path, allowed, "json_path")
        manifest = path.parent / given["json_path"]
        root = given.get("media_root", common.get("media_root"))
        features = given.get("features", common.get("features"))
        places = Places(
            manifest.parent if root is None else path.parent / root,
            None if features is None else path.parent / features,
            given.get("fps", 1.0),
        )
        source = f"{path}:{value[_LINE]}"
        strategy = given.get("sampling_strategy", "all")
        choose(1, strategy, np.random.default_rng(0), source)  # a wrong one shows before anything is read
        parts.append(Part(source, manifest, strategy, places, given.get("stream", "")))
    if not parts:
        raise DataError(path, "its datasets are empty", "name at least one manifest")
    return parts


def _checked(value: Any, path: Path, allowed: dict[str, type], needed: str) -> dict[str, Any]:
    """The keys of a mapping, all known and of the right kind."""
    if not isinstance(value, dict):
        raise DataError(path, f"{value!r} stands where a mapping belongs", f"give {', '.join(allowed)}")
    what = f"{path}:{value[_LINE]}"
    given = {key: item for key, item in value.items() if key != _LINE}
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise DataError(what, f"there is no key {unknown[0]!r}", f"choose from {', '.join(allowed)}")
    for key, item in given.items():
        kind = allowed[key]
        sound = type(item) in (int, float) and 0 < item < math.inf if kind is float else isinstance(item, kind)
        if not sound:
            kinds = {list: "a list", str: "a text", float: "a number above 0"}
            raise DataError(what, f"{key} is {item!r}, not {kinds[kind]}", "correct it")
    if needed not in given:
        raise DataError(what, f"it has no {needed}", f"add {needed}")
    return given


class _Loader(yaml.SafeLoader):
    """Mappings tell the line that they stand on."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        return {**mapping, _LINE: node.start_mark.line + 1}


def _read_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return yaml.load(file, _Loader)
    except OSError as error:
        raise DataError(path, f"it cannot be read ({error.strerror})", "check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = path if mark is None else f"{path}:{mark.line + 1}"
        raise DataError(what, f"it is no YAML ({getattr(error, 'problem', error)})", "correct the line") from error
