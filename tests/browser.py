"""Headless Chromium, told over a pair of pipes (DevTools protocol): what a report looks like, and whether it is well.

    Browser(program) -> open(file) -> evaluate, move_pointer, screenshot -> errors, requests

No driver and no package: a message is JSON with a zero byte after it, on the browser's file descriptors 3 and 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from gpt4moe.errors import LaunchError

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
# A sandbox needs rights that containers lack, and the only page is our own. /dev/shm is 64 MB in a container.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
SECONDS = 60.0


def find_program() -> str | None:
    """Chromium's path: the one that CHROMIUM names, else the first of PROGRAMS on the PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for path in map(shutil.which, PROGRAMS) if path), None)


class Browser:
    """One page of a fresh browser, from `with` to its end."""

    def __init__(self, program: str, *, width: int = 1240, height: int = 900, dark: bool = False):
        """
        Args:
            width, height: of the window in CSS pixels.
            dark: prefer the dark colours.
        """
        self.errors: list[str] = []
        """What went to the console as an error or a warning, and exceptions nobody caught."""
        self.requests: list[str] = []
        """Every address that the page asked for, the page's own first."""
        self._program, self._number, self._session = program, 0, ""
        self._size, self._dark = (width, height), dark
        self._waiting: list[dict[str, Any]] = []
        self._rest = b""

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        silent = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        files = [
            (os.POSIX_SPAWN_DUP2, own, number) for number, own in enumerate((silent,) * 3 + (theirs_in, theirs_out))
        ]
        arguments = [self._program, f"--user-data-dir={self._profile.name}", *FLAGS]
        self._process = os.posix_spawnp(self._program, arguments, os.environ, file_actions=files, setpgroup=0)
        for file in (silent, theirs_in, theirs_out):
            os.close(file)
        try:
            self._attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def open(self, page: Path) -> None:
        """Loads a file and waits until it is there, scripts run.

        Raises: LaunchError when the browser does not answer.
        """
        self._tell("Page.navigate", url=page.resolve().as_uri())
        self._event("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON can hold it."""
        answer = self._tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise ValueError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def move_pointer(self, x: float, y: float) -> None:
        """To a place in the window, CSS pixels."""
        self._tell("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, *, top: float = 0.0, height: float | None = None) -> bytes:
        """PNG of the page's full width, from `top` for `height` CSS pixels; by default down to its end."""
        if height is None:
            height = float(self.evaluate("document.documentElement.scrollHeight")) - top
        clip = {"x": 0, "y": top, "width": self._size[0], "height": height, "scale": 1}
        answer = self._tell("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def _attach(self) -> None:
        target = self._tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._tell(f"{domain}.enable")
        width, height = self._size
        self._tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        colours = [{"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}]
        self._tell("Emulation.setEmulatedMedia", features=colours)

    def _tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            heard = self._hear(until, method)
            if heard.get("id") == self._number:
                if "error" in heard:
                    raise ValueError(f"{method}: {heard['error']}")
                result: dict[str, Any] = heard["result"]
                return result
            self._waiting.append(heard)

    def _event(self, method: str) -> None:
        until = time.monotonic() + SECONDS
        while not any(heard.get("method") == method for heard in self._waiting):
            self._waiting.append(self._hear(until, method))
        self._waiting.clear()

    def _hear(self, until: float, what: str) -> dict[str, Any]:
        """The next message; errors and requests are noted on the way."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                why = "said nothing" if not ready else "ended"
                raise LaunchError(
                    f"{self._program} {why} where {what} was waited for.",
                    "Try another one: CHROMIUM=/path/to/chromium. Ubuntu's is a snap, which cannot run in a container.",
                )
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str(told["args"]))


def _pipe() -> tuple[int, int]:
    """Both ends above 9, so that none of them is in the way when the child gets them as 3 and 4."""
    ends = []
    for low in os.pipe():
        ends.append(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(low)
    return ends[0], ends[1]
