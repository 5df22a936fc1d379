"""Makes a wandb workspace of configs/dashboard.yaml. `check` needs no network; `push` saves it on wandb's server.

examples:
  python tools/dashboard.py check
  python tools/dashboard.py check --file mine.yaml --json          # what push would send
  python tools/dashboard.py push --entity TEAM --project gpt4moe
  python tools/dashboard.py push --entity TEAM --project gpt4moe --url URL     # replace a workspace

exit status: 0 good; 2 bad input, or wandb refused.
"""

import argparse
import json
import sys
from pathlib import Path

# Run as a script from a checkout: the package lies beside tools/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpt4moe.errors import Gpt4MoeError
from gpt4moe.runlog.dashboard import DASHBOARD_FILE, read_dashboard
from gpt4moe.runlog.wandb_workspace import push, workspace, workspace_spec


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|push")
    help_of = {"check": "check panels and alerts, also with wandb-workspaces", "push": "save it on the server"}
    for name, text in help_of.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--file", type=Path, help="configs/dashboard.yaml by default")
        command.add_argument("--entity", required=name == "push", default="entity", help="wandb team or user")
        command.add_argument("--project", default="gpt4moe", help="gpt4moe by default, as tracking.project")
        if name == "push":
            command.add_argument("--url", help="workspace to replace; a new one by default")
        else:
            command.add_argument("--json", action="store_true", help="the workspace as wandb's server gets it")
    given = parser.parse_args(arguments)
    try:
        dashboard = read_dashboard(given.file)
        if given.command == "push":
            sys.stdout.write(push(dashboard, entity=given.entity, project=given.project, url=given.url) + "\n")
            return 0
        spec = workspace_spec(workspace(dashboard, entity=given.entity, project=given.project))
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    panels, alerts = sum(len(section.panels) for section in dashboard.sections), len(dashboard.alerts)
    summary = f"{given.file or DASHBOARD_FILE}: {panels} panels and {alerts} alerts, all good.\n"
    sys.stdout.write(json.dumps(spec, indent=1) + "\n" if given.json else summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
