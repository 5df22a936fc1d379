"""Embassy to wandb-workspaces: a dashboard as a workspace of a wandb project. The only file that imports it.

configs/dashboard.yaml -> Dashboard -> Workspace (checked by the package, no network) -> save: one request
"""

import json
import re
from typing import TYPE_CHECKING, Any

from gpt4moe.errors import ConfigError
from gpt4moe.runlog.dashboard import Dashboard, Panel, Scale

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "gpt4moe"
SMOOTHING = 0.9
"""Of a panel with smooth: true; wandb's exponential average, 0 to 1."""


def workspace(dashboard: Dashboard, *, entity: str, project: str) -> "Workspace":
    """A dashboard as a workspace object, not saved anywhere yet. No network.

    Raises: pydantic.ValidationError when the package refuses something in the dashboard.
    """
    from wandb_workspaces import workspaces

    sections = [
        workspaces.Section(name=section.title, panels=[_line_plot(panel) for panel in section.panels], is_open=True)
        for section in dashboard.sections
    ]
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def workspace_spec(made: "Workspace") -> dict[str, Any]:
    """What `save` would send: wandb's own description of the view, as plain data. No network."""
    # The package has no public function for it (0.4.13); it sends this model's `spec` and names.
    spec: dict[str, Any] = json.loads(made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return spec


def push(dashboard: Dashboard, *, entity: str, project: str, url: str | None) -> str:
    """Saves the workspace on wandb's server and returns its address.

    Args:
        url: of a workspace pushed before, whose sections are replaced; None: a new workspace.
    Raises: ConfigError when wandb refuses or cannot be reached.
    """
    from wandb_workspaces import workspaces

    made = workspace(dashboard, entity=entity, project=project)
    try:
        if url is not None:
            kept = workspaces.Workspace.from_url(url)
            kept.sections = made.sections
            made = kept
        saved: Any = made
        return str(saved.save().url)
    # Every exception: the package raises its own, wandb's, requests' and plain ValueErrors.
    except Exception as error:
        raise ConfigError(
            f"wandb did not take the workspace: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "Log in (wandb login, or WANDB_API_KEY), and check --entity, --project, --url and WANDB_BASE_URL.",
        ) from error


def _line_plot(panel: Panel) -> Any:
    from wandb_workspaces.reports.v2 import interface as reports

    whole: list[Any] = [name for name in panel.metrics if not name.endswith("/*")]
    families = [re.escape(name[:-1]) for name in panel.metrics if name.endswith("/*")]
    return reports.LinePlot(
        title=panel.title, x="Step", y=whole, title_y=panel.unit or None,
        metric_regex=f"^({'|'.join(families)})" if families else None,
        log_y=True if panel.scale is Scale.log else None,
        smoothing_type="exponential" if panel.smooth else None,
        smoothing_factor=SMOOTHING if panel.smooth else None,
        smoothing_show_original=True if panel.smooth else None,
    )  # fmt: skip
