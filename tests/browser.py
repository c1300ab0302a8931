"""Chromium without a window, driven through the DevTools protocol on two pipes: no driver, no port, no package."""

import base64
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for one answer: a cold start on a busy machine takes several


class Browser:
    """One page of one browser, which cannot reach any network; it ends with the `with` block."""

    def __init__(self, program: str, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self.reading, self.writing, self.buffer, self.number = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                 "--remote-debugging-pipe", "--proxy-server=http://127.0.0.1:9", "--disable-background-networking",
                 "--disable-dev-shm-usage", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        # Chromium speaks on descriptors 3 and 4; in a session of its own, so that it can be ended with its children.
        start = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", program, *flags]
        self.process = subprocess.Popen(start, pass_fds=(theirs_in, theirs_out), start_new_session=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> "Browser":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        os.close(self.reading)
        os.close(self.writing)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come meanwhile are kept."""
        self.number += 1
        session = {"sessionId": self.session} if hasattr(self, "session") else {}
        message = {"id": self.number, "method": method, "params": parameters} | session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, file: Path, width: int, scheme: str = "light") -> None:
        """Show a file in a window so wide (pixels) and 900 high."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.run("Promise.all([...document.images].map(image => image.decode()))")
        self.frame()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, which may be a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def frame(self) -> None:
        """Wait until what changed is on the screen."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def mouse(self, kind: str, x: float, y: float, is_down: bool = False) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": 1} if is_down else {}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("mousePressed", *start, is_down=True)
        self.mouse("mouseMoved", *end, is_down=True)
        self.mouse("mouseReleased", *end, is_down=True)

    def key(self, name: str) -> None:
        """Press and release a key by its name, as ArrowLeft."""
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def picture(self, clip: dict[str, float] | None = None) -> bytes:
        """PNG of the whole page, or of a rectangle of it."""
        area = {"clip": {**clip, "scale": 1}} if clip else {}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, **area)
        return base64.b64decode(shot["data"])

    def of(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events so far with one of these names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(0, end - time.monotonic()))
            data = os.read(self.reading, 1 << 20) if ready else b""
            assert data, f"chromium {'ended' if ready else 'did not answer'}"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)
