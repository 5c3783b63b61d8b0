"""A real browser for tests, driven through its debugging pipe: keys, clicks, reloads, downloads, screenshots."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REASON = "no chromium or google-chrome on the path, so no page can be used"
SECONDS = 120  # for any answer
# Not by a shell's redirection, which may know descriptors of one digit only.
WITH_PIPES = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Navigated(Exception):
    """The page that was asked has gone."""


class Chromium:
    """One page. The browser reads commands from its descriptor 3 and answers on 4, each a JSON text and a zero byte."""

    def __init__(self, folder: Path):
        self.folder, self.number, self.buffer = folder, 0, b""
        read, self.to = os.pipe()
        self.answers, write = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1100,800", "about:blank"]
        command = [sys.executable, "-I", "-S", "-c", WITH_PIPES, str(read), str(write), BROWSER, *options]
        self.process = subprocess.Popen(
            command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        os.set_blocking(self.answers, False)
        target = next(one for one in self.send("Target.getTargets", alone=True)["targetInfos"] if one["type"] == "page")
        attached = self.send("Target.attachToTarget", alone=True, targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        self.send("Page.enable")
        self.send(
            "Browser.setDownloadBehavior", alone=True, behavior="allow", downloadPath=str(folder), eventsEnabled=False
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.send("Browser.close", alone=True)
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.to)
            os.close(self.answers)

    def send(self, method, alone=False, **parameters):
        """The result of one command; ``alone``: of the browser, not of the page."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if not alone:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            pass
        if "navigated" in answer.get("error", {}).get("message", ""):
            raise Navigated
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self):
        until = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            try:
                part = os.read(self.answers, 1 << 16)
                assert part, "the browser has ended"
                self.buffer += part
            except BlockingIOError:
                assert time.monotonic() < until, "the browser does not answer"
                time.sleep(0.01)
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until the expression is true."""
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(Navigated):  # the old page was asked
                if self.run(expression):
                    return
            time.sleep(0.02)
        raise AssertionError(f"never true: {expression}")

    def open(self, path):
        self.send("Page.navigate", url=Path(path).as_uri())
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(Path(path).as_uri())}")

    def reload(self):
        self.run("window.before = true")
        self.send("Page.reload")
        self.wait("document.readyState === 'complete' && !window.before")

    def key(self, key):
        """Press and release a key, as a keyboard does."""
        text = {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def click(self, selector):
        """Press the mouse in the middle of an element."""
        box = self.run(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def look(self, path, scheme="light", width=1100, height=800):
        """A screenshot of the page, in a colour scheme."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def downloaded(self, pattern):
        """The file that matches, once it is whole."""
        until = time.monotonic() + SECONDS
        while not (found := list(self.folder.glob(pattern))):
            assert time.monotonic() < until, f"no download {pattern}"
            time.sleep(0.02)
        return found[0]
