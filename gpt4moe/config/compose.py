"""Hydra's composition of a config, without the settings of Hydra itself.

hydra.compose also composes launchers, sweepers, logging and help of Hydra's own, 12 of 28 files, and takes them out
again: half of the time that each command and each test begins with. The same parts of Hydra are called here for our
files alone. They are not public names: `tests/config/test_compose.py` compares with hydra.compose.
"""

from pathlib import Path

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

VERSION_BASE = "1.3"
"""Of Hydra's rules for defaults lists and packages."""


def compose(folder: Path, name: str, overrides: list[str]) -> DictConfig:
    """configs/<name>.yaml with its defaults, and the overrides: what hydra.compose returns.

    Args:
        folder: has the files; schemas come from Hydra's ConfigStore.
    Raises: HydraException and OmegaConfBaseException as hydra.compose does.
    """
    version.setbase(VERSION_BASE)
    Plugins.instance()  # finds the readers of folders and schemas
    path = ConfigSearchPathImpl()
    path.append("main", f"file://{folder}")
    path.append("schema", "structured://")
    loader = ConfigLoaderImpl(path)
    try:
        parsed, files = loader._parse_overrides_and_create_caching_repo(name, overrides)
        loader.validate_sweep_overrides_legal(parsed, run_mode=RunMode.RUN, from_shell=False)
        chosen = create_defaults_list(files, name, parsed, prepend_hydra=False, skip_missing=False)
        config = loader._compose_config_from_defaults_list(chosen.defaults, files)
        OmegaConf.set_struct(config, True)
        loader._apply_overrides_to_config(chosen.config_overrides, config)
    except OmegaConfBaseException as error:
        raise ConfigCompositionException() from error
    return config
