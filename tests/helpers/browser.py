"""A headless Chromium, driven by the DevTools protocol over two pipes: what a page requests, and how wide it is."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

BINARY = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --disable-default-apps --mute-audio "
    "--hide-scrollbars --remote-debugging-pipe"
)


class Browser:
    def __init__(self, read: int, write: int):
        self._answers, self._orders = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._number, self._received, self._session = 0, b"", None
        self.events: list[dict] = []

    def ask(self, method: str, **params):
        """Sends a command and returns its result; events that arrive meanwhile are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        self._orders.write(json.dumps(command).encode() + b"\0")
        self._orders.flush()
        while (message := self._next()).get("id") != self._number:
            pass
        assert "error" not in message, message
        return message["result"]

    def _next(self) -> dict:
        while b"\0" not in self._received:
            part = self._answers.read1(1 << 20)
            assert part, "the browser ended"
            self._received += part
        text, _, self._received = self._received.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of `width` CSS pixels and waits until it is loaded."""
        if not self._session:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Network", "Page", "Runtime", "Log"):
                self.ask(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not self._of("Page.loadEventFired"):
            self._next()

    def _of(self, method: str) -> list[dict]:
        return [event["params"] for event in self.events if event["method"] == method]

    def value(self, expression: str):
        """Of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def requests(self) -> list[str]:
        """Every URL that the page requested, without the page itself and data: URLs."""
        urls = [params["request"]["url"] for params in self._of("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """The browser's log: blocked styles, broken images, refused loads."""
        return [params["entry"]["text"] for params in self._of("Log.entryAdded")]


@contextmanager
def browser(profile: Path):
    """A browser with an empty profile; needs BINARY."""
    orders, answers = os.pipe(), os.pipe()

    def connect() -> None:  # Chromium reads commands from descriptor 3 and answers on 4
        read, write = os.dup(orders[0]), os.dup(answers[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    command = [BINARY, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, **quiet)
    os.close(orders[0])
    os.close(answers[1])
    try:
        yield Browser(answers[0], orders[1])
    finally:
        process.terminate()
        process.wait(20)
