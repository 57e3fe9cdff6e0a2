"""A headless Chromium that tells which URLs a page requests, how wide it is, and how it looks; DevTools protocol over
two pipes.
"""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

BINARY = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--mute-audio", "--hide-scrollbars", "--remote-debugging-pipe",
]  # fmt: skip


class Browser:
    def __init__(self, read: int, write: int):
        self._answers, self._orders, self._number, self.events = os.fdopen(read, "rb"), os.fdopen(write, "wb"), 0, []
        self._heard, self._session = b"", None

    def ask(self, method: str, **params):
        """Sends an order, keeps the events that come meanwhile, and gives the answer."""
        self._number += 1
        order = {"id": self._number, "method": method, "params": params} | (
            {"sessionId": self._session} if self._session else {}
        )
        self._orders.write(json.dumps(order).encode() + b"\0")
        self._orders.flush()
        while True:
            message = self._next()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _next(self) -> dict:
        while b"\0" not in self._heard:
            part = self._answers.read1(1 << 20)
            assert part, "the browser ended"
            self._heard += part
        text, _, self._heard = self._heard.partition(b"\0")
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
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()

    def value(self, expression: str):
        """Of a JavaScript expression in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def requests(self) -> list[str]:
        """Every URL that the page asked for, itself and what it carries in itself left out."""
        asked = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked[1:] if not url.startswith("data:")]

    def complaints(self) -> list[str]:
        """What the browser had to say: blocked styles, broken images, refused loads."""
        return [event["params"]["entry"]["text"] for event in self.events if event["method"] == "Log.entryAdded"]

    def screenshot(self, out: Path, whole: bool = True) -> None:
        out.write_bytes(
            base64.b64decode(self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"])
        )


@contextmanager
def browser(profile: Path):
    """A browser with an empty profile; needs BINARY."""
    orders, answers = os.pipe(), os.pipe()

    def places() -> None:  # Chromium reads orders from descriptor 3 and answers on 4
        read, write = os.dup(orders[0]), os.dup(answers[1])
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen(
        [BINARY, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=places,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(orders[0])
    os.close(answers[1])
    try:
        yield Browser(answers[0], orders[1])
    finally:
        process.terminate()
        process.wait(20)
