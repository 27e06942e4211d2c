# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a model was made of, stage by stage, from the files that conversion and training leave beside the weights.

Only what is certain is called an id of the Hub: `org/model` can be a folder as well, of another day or another machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .front_matter import FrontMatterError, is_license, is_repo_id, split_readme

# Files that tell of a stage, as conversion and training name them.
UPCYCLING_REPORT, RECIPE, METRICS = "upcycling_report.json", "recipe.yaml", "metrics.json"
STATE = "trainer_state.json"
CONVERSION_REPORT, PRUNE_REPORT, DENSIFY_REPORT = "conversion_report.json", "prune_report.json", "densify_report.json"
ADAPTER_CONFIG = "adapter_config.json"
LINEAGE = "lineage.json"  # all stages, as `save_card` and `push_to_hub` write them down

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)/?$")
_LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Parent:
    """A model that another was made of.

    Attributes:
        name: its id on the Hub, else the last part of its folder's path, or its class.
        hub_id: its id on the Hub, where that is certain.
        license: fields of its card about the licence.
    """

    name: str
    hub_id: str | None = None
    license: dict[str, str] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """As Markdown."""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"


@dataclass(frozen=True)
class Stage:
    """One step from one model to the next.

    Attributes:
        kind: `"upcycling"`, `"import"`, `"export"`, `"conversion"`, `"pruning"`, `"densifying"`, `"training"` or `"adapter"`.
        parents: what went in.
        method: of an upcycling.
        format: native format of an import or export.
        promise: what the method promises about exactness.
        recipe: as YAML.
        report: what the comparison of both models measured; empty if there was none.
        details: a few words more, for training (`12 steps on …`).
    """

    kind: str
    parents: tuple[Parent, ...] = ()
    method: str | None = None
    format: str | None = None
    promise: str | None = None
    recipe: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    details: str | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Stage:
        """From `dataclasses.asdict`; what is not known is left out."""
        names = {item.name for item in dataclasses.fields(cls)}
        parents = tuple(_parent_from(entry) for entry in content.get("parents") or [])
        return cls(**{**{name: value for name, value in content.items() if name in names}, "parents": parents})


def describe_parent(source: Any, folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """What a converter should write down of a source while it is at hand: its name, its id on the Hub, its licence.

    Args:
        source: a folder, an id on the Hub, or a model in memory.
        folder: where its files are, if the source does not tell.

    Returns:
        Fields of `Parent`.
    """
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name_or_path", "") or type(source).__name__
    return dataclasses.asdict(_parent(os.fspath(name), None if folder is None else Path(folder)))


def read_lineage(folder: Path) -> list[Stage]:
    """The stages that led to a checkpoint, the oldest first; empty where no file tells of one."""
    return _read(folder, set())


def stages_before(name: str | None) -> list[Stage]:
    """The stages that led to a model which was loaded from a folder or from the Hub's cache."""
    folder = None if not name else local_folder_of(name)
    return [] if folder is None else read_lineage(folder)


def parent_named(name: str) -> Parent:
    """A parent by what it was loaded from."""
    return _parent(name, None)


def local_folder_of(name: str) -> Path | None:
    """The folder that a model was loaded from: itself, or its snapshot in the Hub's cache; nothing is fetched."""
    if Path(name).is_dir():
        return Path(name)
    if not is_repo_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", ADAPTER_CONFIG):
        cached = try_to_load_from_cache(name, file)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


# ---------------------------------------------------------------------- reading


def _read(folder: Path, seen: set[Path]) -> list[Stage]:
    if folder.resolve() in seen:
        return []
    seen.add(folder.resolve())
    made = _made_here(folder)
    name, here = _last_stage(folder)
    if here is not None:
        source = None if name is None else local_folder_of(name)
        earlier = [] if source is None else _read(source, seen)
        sources = [parent.name for stage in made for parent in stage.parents]
        if any(parent.name in sources for parent in here.parents):  # it was converted in memory first
            here = dataclasses.replace(here, parents=())
        made = [*earlier, *(stage for stage in made if stage not in earlier), here]
    stored = _stored(folder)
    # written down when more was at hand, unless the folder was used again since
    return stored if stored and (not made or (_same(stored[-1], made[-1]) and len(stored) >= len(made))) else made


def _last_stage(folder: Path) -> tuple[str | None, Stage | None]:
    """What a training or an adapter was started from, and its stage; `None` for a folder that is neither."""
    metrics, state = read_json_object(folder / METRICS), read_json_object(folder / STATE)
    adapter = read_json_object(folder / ADAPTER_CONFIG)
    name = metrics.get("model") or adapter.get("base_model_name_or_path")
    if not (metrics.get("model") or state or adapter):
        return None, None
    parents = (parent_named(name),) if isinstance(name, str) else ()
    kind = "training" if metrics.get("model") or state else "adapter"
    rows = [row for row in metrics.get("log_history") or [] if isinstance(row, dict)]
    steps = state.get("global_step") or max((r["step"] for r in rows if isinstance(r.get("step"), int)), default=None)
    return name if parents else None, Stage(kind, parents, details=details_of(steps))


def details_of(steps: Any) -> str | None:
    """What a stage of training says of its length."""
    return f"{steps} optimizer steps" if isinstance(steps, int) and steps else None


def _same(one: Stage, other: Stage) -> bool:
    """Whether two records are of one stage, whatever was known of its parents."""
    names = [[parent.name.rpartition("/")[2] for parent in stage.parents] for stage in (one, other)]
    known = (one.kind, one.details, one.recipe) == (other.kind, other.details, other.recipe)
    return known and (names[0] == names[1] or not all(names))


def _stored(folder: Path) -> list[Stage]:
    stages = read_json_object(folder / LINEAGE).get("stages")
    try:
        return [Stage.from_dict(entry) for entry in stages or []]
    except (TypeError, AttributeError):  # written by hand
        return []


def _made_here(folder: Path) -> list[Stage]:
    """The conversion that made the folder, by its report."""
    return [read(folder, name) for name, read in _READERS.items() if (folder / name).is_file()]


def _upcycling(folder: Path, name: str) -> Stage:
    import yaml

    report = read_json_object(folder / name)
    recipe_file = folder / RECIPE
    recipe = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else None
    try:
        said = yaml.safe_load(recipe) if recipe else {}
    except yaml.YAMLError:
        said = {}
    said = said if isinstance(said, dict) else {}
    parents = tuple(_parent_from(entry) for entry in report.get("parents") or [])
    if not parents:  # written before parents were noted: nothing tells ids from folders
        sources = said.get("models") or [said.get("source")]
        parents = tuple(Parent(Path(str(source)).name) for source in sources if source)
    return Stage(
        kind="upcycling",
        parents=parents,
        method=said.get("method"),
        promise=report.get("promise"),
        recipe=recipe,
        report=measured(report),
    )


def _conversion(folder: Path, name: str) -> Stage:
    report = read_json_object(folder / name)
    kind = _KINDS.get(name) or str(report.get("kind") or "conversion")
    parents = tuple(_parent_from(entry) for entry in report.get("parents") or [])
    return Stage(kind=kind, parents=parents, format=report.get("format"), report=measured(report))


_KINDS = {PRUNE_REPORT: "pruning", DENSIFY_REPORT: "densifying"}
_READERS: dict[str, Callable[[Path, str], Stage]] = {
    UPCYCLING_REPORT: _upcycling,
    CONVERSION_REPORT: _conversion,
    PRUNE_REPORT: _conversion,
    DENSIFY_REPORT: _conversion,
}


def measured(report: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a converter's report that was measured; empty if nothing was."""
    return dict(report) if "max_abs_diff" in report else {}


def _parent(name: str, folder: Path | None) -> Parent:
    snapshot = _SNAPSHOT.search(Path(name).as_posix())
    hub_id = f"{snapshot[1]}/{snapshot[2]}" if snapshot else None
    found = folder or local_folder_of(name)
    if hub_id is None and found is not None and is_repo_id(name) and not Path(name).exists():
        hub_id = name
    shown = hub_id or Path(name).name or name
    return Parent(shown, hub_id, {} if found is None else _license_of(found, hub_id))


def _license_of(folder: Path, hub_id: str | None) -> dict[str, str]:
    readme = folder / "README.md"
    if not readme.is_file() and hub_id is not None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(hub_id, "README.md")
        readme = Path(cached) if isinstance(cached, str) else readme
    if not readme.is_file():
        return {}
    try:
        fields, _ = split_readme(readme.read_text(encoding="utf-8-sig").replace("\r\n", "\n"), str(readme))
    except (FrontMatterError, UnicodeDecodeError, OSError):
        return {}  # not the card that is to be written
    if not is_license(fields.get("license")):
        return {}
    return {name: fields[name] for name in _LICENSE_FIELDS if isinstance(fields.get(name), str)}


def _parent_from(entry: Any) -> Parent:
    fields = entry if isinstance(entry, dict) else {"name": str(entry)}
    license_fields = fields.get("license")
    said = license_fields if isinstance(license_fields, dict) else {}
    hub_id = fields.get("hub_id")
    return Parent(str(fields.get("name")), hub_id if isinstance(hub_id, str) else None, {k: str(v) for k, v in said.items()})


def common_license(parents: Sequence[Parent]) -> dict[str, str]:
    """The licence of parents that all have the same; empty otherwise."""
    said = [parent.license for parent in parents]
    return dict(said[0]) if said and all(entry == said[0] for entry in said) else {}


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; empty if it is not there or not that."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
