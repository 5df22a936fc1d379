"""Embassy to wandb: one wandb run over all launches of a training run. Its failures never stop training.

    <run folder>/wandb_id.txt    the wandb run's id, made at the first launch, and the run's name
    <run folder>/wandb_step.txt  which steps wandb has (WandbMark): a redone step is not sent again
    <run folder>/wandb/          wandb's own files; `wandb sync` uploads those of offline launches

A run folder copied and launched under a new name (run.name) is a fork: it gets another id, and no step is sent yet. A
new run from checkpoint.load has its own folder, and so its own id.

The only file that imports wandb, and only when tracking is on: the import takes a second.
"""

import json
import logging
import netrc
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from gpt4moe.config.training import TrackingConfig, WandbMode
from gpt4moe.runlog.metrics import Number
from gpt4moe.runlog.run_files import replace_file
from gpt4moe.runlog.step_lines import StepLine

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id.txt"
STEP_FILE = "wandb_step.txt"
# With a dead network the start and the end of a launch take this long each, at most. Normally a few seconds.
NETWORK_SECONDS = 30.0


def run_id(run_folder: Path, run_name: str) -> str:
    """The wandb id of this run. Made at the first call and stored; a folder copied from another run gets a new one."""
    file = run_folder / ID_FILE
    kept, _, name = file.read_text().strip().partition(" ") if file.exists() else ("", "", "")
    if kept and name == run_name:
        return kept
    if kept:
        logger.info(
            "wandb: this folder was run %s (%s): %s is a fork of it with an id of its own", name, kept, run_name
        )
        # Before the id: after a kill in between the old id is there, and the next launch forks again.
        (run_folder / STEP_FILE).unlink(missing_ok=True)
    # wandb's own form, 8 of a-z and 0-9. Random from the system: two runs of one seed must not get one id.
    made = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))
    replace_file(file, f"{made} {run_name}\n".encode())
    return made


def offline_folders(run_folder: Path, wandb_id: str) -> list[Path]:
    """wandb's folders of this run's offline launches that are not uploaded yet, oldest first."""
    folders = sorted((run_folder / "wandb").glob(f"offline-run-*-{wandb_id}"))
    return [folder for folder in folders if not list(folder.glob("*.wandb.synced"))]


def has_key(base_url: str) -> bool:
    """Whether there is a WANDB_API_KEY, or a netrc entry for wandb's server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = base_url.split("://")[-1].split("/")[0]
    files = [os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"]
    file = next((path for path in (Path(name).expanduser() for name in files if name) if path.is_file()), None)
    try:
        return file is not None and netrc.netrc(file).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError) as error:
        logger.warning("wandb: %s cannot be read: %s", file, error)
        return False


@dataclass(slots=True)
class WandbMark:
    """Which steps wandb has, so that it gets each one once. Stored as

        <run folder>/wandb_step.txt: "<last step sent> <last step surely kept> <wandb's folder of this launch>"

    A step that was sent may still be lost: wandb's service keeps some in memory, and drops them when the training
    process is killed (wandb 0.31: "forced shutdown"). So only a launch that finished is sure of what it sent. After any
    other end WandbRun asks wandb what it has.
    """

    file: Path
    sent: int = 0
    kept: int = 0
    """The last step that wandb surely has."""
    start: str = ""
    """Name of wandb's own folder of the last launch."""

    @classmethod
    def read(cls, run_folder: Path) -> Self:
        """Raises: OSError, ValueError when the file cannot be read as a mark."""
        file = run_folder / STEP_FILE
        if not file.exists():
            return cls(file)
        words = file.read_text().split()
        if len(words) not in (2, 3):
            raise ValueError(f"{file} is no mark: {words[:4]}")
        return cls(file, int(words[0]), int(words[1]), words[2] if len(words) == 3 else "")

    @property
    def is_sure(self) -> bool:
        return self.sent == self.kept

    def settle(self, kept: int) -> None:
        """Sets the last step that wandb was found to have; later steps count as not sent."""
        self.sent = self.kept = max(self.kept, min(kept, self.sent))

    def begin(self, start: str) -> None:
        """A launch whose wandb folder is `start` begins to send, from the step after the last one kept."""
        self.start = start
        replace_file(self.file, f"{self.sent:012d} {self.kept:012d} {start}\n".encode())

    def advance(self, step: int) -> None:
        """`step` is being sent."""
        self.sent = step
        # In place and always as wide: cheap enough for every step, and a kill leaves the old number or the new one.
        file = os.open(self.file, os.O_WRONLY)
        try:
            os.pwrite(file, b"%012d" % step, 0)
        finally:
            os.close(file)

    def finish(self) -> None:
        """wandb has finished: it has all that was sent."""
        self.kept = self.sent
        self.begin(self.start)


class WandbRun:
    """One launch's connection to the wandb run, on the logging rank. Does nothing when disabled or after a failure."""

    def __init__(self, run_folder: Path):
        """Use `start`."""
        self.run: wandb.Run | None = None
        self.wandb_id: str | None = None
        self.run_folder = run_folder
        self.mark = WandbMark(run_folder / STEP_FILE)

    @classmethod
    def start(cls, tracking: TrackingConfig, run_folder: Path, run_name: str, config: Mapping[str, Any]) -> Self:
        """Opens the run folder's wandb run, or goes on with it. Raises nothing: a failure is one warning.

        Args: config: the resolved config as plain dicts; wandb shows and filters by it.
        """
        tracker = cls(run_folder)
        if tracking.wandb == WandbMode.disabled:
            return tracker
        tracker._attempt("start", lambda: tracker._open(tracking, run_folder, run_name, dict(config)))
        return tracker

    def log(self, record: Mapping[str, Number], samples: Sequence[StepLine] = ()) -> None:
        """Sends one step, unless it or a later one was sent before. So all of metrics.jsonl may be sent again.

        Args: samples: lines of samples.jsonl, which become a table on this step.
        """
        run, step = self.run, int(record["step"])
        if run is None or step <= self.mark.sent:
            return
        # The mark goes first: a kill in between never sends a step twice.
        self._attempt("log", lambda: self.mark.advance(step))
        self._attempt("log", lambda: run.log(_values(record, samples), step=step))

    def alert(self, title: str, text: str) -> None:
        """Sends an alert, which wandb mails or posts to the run's people as they set it there. Only online: an offline
        run is synced later, when nobody can act on it."""
        run = self.run
        if run is not None and not run.offline:
            self._attempt("alert", lambda: run.alert(title=title, text=text))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the run; an `exit_code` other than 0 marks it as failed. A second call does nothing."""
        run = self.run
        if run is not None:
            self._attempt("finish", lambda: run.finish(exit_code=exit_code))
        if self.run is not None:
            self._attempt("finish", self.mark.finish)
        self.run = None

    def sync_command(self) -> str | None:
        """The command that uploads the offline launches of this run; None when there is nothing to upload."""
        if self.wandb_id is None or not offline_folders(self.run_folder, self.wandb_id):
            return None
        return f"wandb sync {self.run_folder}/wandb/offline-run-*-{self.wandb_id}"

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        # Every exception: whatever goes wrong in tracking, training goes on.
        except Exception as error:
            logger.warning("wandb %s failed, tracking stops, training goes on: %s", what, _one_line(error))
            self.run = None

    def _open(self, tracking: TrackingConfig, run_folder: Path, run_name: str, config: dict[str, Any]) -> None:
        self.wandb_id = wandb_id = run_id(run_folder, run_name)
        self.mark = WandbMark.read(run_folder)
        # Read at wandb's import: its crash reports are network calls.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Where certain packages are imported (openai, for instance), it would advertise Weave on stderr.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        import wandb

        settings = wandb.Settings(
            silent=True, console="off", init_timeout=NETWORK_SECONDS, finish_timeout=NETWORK_SECONDS
        )
        mode: Literal["offline", "online"] = "online" if tracking.wandb == WandbMode.online else "offline"
        if mode == "online" and not has_key(wandb.setup(settings).settings.base_url):
            logger.warning("wandb: no WANDB_API_KEY and no netrc entry, so tracking.wandb=online goes offline")
            mode = "offline"

        def connect(mode: Literal["offline", "online"]) -> "wandb.Run":
            return wandb.init(
                mode=mode, id=wandb_id, resume="allow", dir=str(run_folder), name=run_name, config=config,
                project=tracking.project, entity=tracking.entity, group=tracking.group, tags=list(tracking.tags),
                settings=settings,
            )  # fmt: skip

        try:
            self.run = connect(mode)
        except wandb.Error as error:
            if mode == "offline":
                raise
            logger.warning("wandb: online failed, going offline: %s", _one_line(error))
            # wandb's service still has the run's id.
            wandb.teardown()
            mode = "offline"
            self.run = connect(mode)
        if not self.mark.is_sure:
            self._settle(mode == "online")
        self.mark.begin(Path(self.run.settings.sync_dir).name)

    def _settle(self, is_online: bool) -> None:
        """After a launch that was killed: finds which of the steps it sent wandb has."""
        assert self.run is not None
        if self.mark.start.startswith("offline-"):
            found = stored_step(self.run_folder / "wandb" / self.mark.start)
        else:  # only the server knows; it may be asked when this start is online too
            found = self.run.starting_step - 1 if is_online else None
        if found is None:
            logger.warning("wandb: unknown what it has of steps %d to %d", self.mark.kept + 1, self.mark.sent)
        self.mark.settle(self.mark.sent if found is None else found)


def stored_step(folder: Path) -> int | None:
    """The last step in wandb's file of an offline launch, 0 for none; None when it cannot be read."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    try:
        answer = subprocess.run(
            command, capture_output=True, timeout=2 * NETWORK_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
        return int(json.loads(answer.stdout)["step"] or 0)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None


def _values(record: Mapping[str, Number], samples: Sequence[StepLine]) -> dict[str, Any]:
    """What wandb gets of a step."""
    values: dict[str, Any] = {name: value for name, value in record.items() if name != "step"}
    if samples:
        import wandb

        columns = ["step", "prompt", "text"]
        values["samples"] = wandb.Table(columns=columns, data=[[line[name] for name in columns] for line in samples])
    return values


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
