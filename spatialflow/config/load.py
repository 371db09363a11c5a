# SPDX-License-Identifier: Apache-2.0
"""Configurations of the package and of YAML files."""

import os
from pathlib import Path
from typing import Any

from spatialflow.config.parse import make_config, place_overrides, read_yaml
from spatialflow.config.rules import ConfigError, short_repr
from spatialflow.config.sections import SECTIONS, Config
from spatialflow.errors import did_you_mean

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth")
CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"


def list_configs() -> list[str]:
    """List the names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.rglob("*.yaml"))


def load_config(config: str | Path | Config, **overrides: Any) -> Config:
    """Read a configuration and replace fields of it.

    Args:
        config: name of a configuration of the package, path of a YAML file, or a Config.
        overrides: values of fields, as in `build_model`.

    Returns:
        The checked, frozen Config.

    Raises:
        ConfigError: unknown name, unreadable file, or a setting that breaks a rule.
    """
    if isinstance(config, Config):
        settings = {s: dict(vars(getattr(config, s))) for s in SECTIONS}
        name = config.name
    else:
        settings = _read(config, ())
        name = Path(config).stem if str(config).endswith((".yaml", ".yml")) else str(config)
    for section, values in place_overrides(overrides).items():
        settings.setdefault(section, {}).update(values)
    return make_config(name, settings)


def own_settings(config: str | Path) -> dict[str, Any]:
    """Read the fields that a YAML file and the files of its `base` set, except files of the package.

    Args:
        config: name of a configuration of the package, which sets no field here, or path of a YAML file.

    Raises:
        ConfigError: unknown name, or unreadable file.
    """
    settings = _read(config, (), with_package=False)
    return {name: value for section in settings.values() for name, value in section.items()}


def _read(config: str | Path, chain: tuple[Path, ...], with_package: bool = True) -> dict[str, dict[str, Any]]:
    """Read the settings of one file, which replace those of its `base`; `chain`: the files whose `base` led to it."""
    path = _locate(config, chain[-1].parent if chain else None)
    if not with_package and CONFIG_FOLDER in path.parents:
        return {}
    if path in chain:
        raise ConfigError(f"{path}: base: refers back to itself ({' -> '.join(p.name for p in (*chain, path))})")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections ({', '.join(SECTIONS)}), got {type(content).__name__}")
    base = content.pop("base", None)
    settings = {} if base is None else _read(base, (*chain, path), with_package)
    for section, values in content.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: section {short_repr(section)} must hold 'field: value' lines, got {short_repr(values)}"
            )
        settings.setdefault(section, {}).update(values)
    return settings


def _locate(config: str | Path, folder: Path | None) -> Path:
    """Find the file of a configuration.

    A relative path is searched first in `folder`, the folder of the file whose `base` names the path, and then in the
    current folder. Without `folder` it is searched in the current folder only.
    """
    text = str(config)
    if text.endswith((".yaml", ".yml")):
        path = Path(text)
        candidates = [path] if folder is None else [folder / path, path]
        for candidate in candidates:
            if os.path.isfile(candidate):
                return candidate.resolve()
        raise ConfigError(f"config: no such file: {text:.200}{_similar_file(Path(text))}")
    path_by_name = {path.stem: path for path in CONFIG_FOLDER.rglob("*.yaml")}
    if text not in path_by_name:
        names = [name for name in list_configs() if not name.startswith("ablation_")]
        hint = did_you_mean(text, path_by_name, count=2)
        if text.endswith(WEIGHTS_SUFFIXES):
            hint = "; weights are given as the model (--model)"
        raise ConfigError(
            f"config: must be a path ending in .yaml or one of {', '.join(names)}, ablation_...; got "
            f"{short_repr(text)}{hint}"
        )
    return path_by_name[text].resolve()


def _similar_file(path: Path) -> str:
    """Suggest a YAML file in the folder in which `path` should be, or a configuration of the package."""
    try:
        files = [str(path.with_name(name)) for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):
        files = []
    return did_you_mean(str(path), files) or (f"; did you mean {path.stem}?" if path.stem in list_configs() else "")
