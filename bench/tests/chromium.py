"""Drive a Chromium that is installed, by its debugging pipe: what a page asks for, complains of and draws."""

import json
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60
_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
_OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Chromium:
    """One window of a browser."""

    def __init__(self, pipe):
        self._pipe, self._received, self._number, self._session, self._events = pipe, b"", 0, {}, []
        (window,) = [one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        session = self.send("Target.attachToTarget", targetId=window["targetId"], flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._pipe.sendall(json.dumps(request).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._received:
            more = self._pipe.recv(1 << 20)
            assert more, "Chromium ended"
            self._received += more
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1280, height=900):
        """Show a file in a window of a size; what earlier pages did is forgotten."""
        self._events.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=path.as_uri())
        self.until("document.readyState === 'complete'")

    def ask(self, expression):
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression):
        """Return the first value of an expression that is true."""
        end = time.monotonic() + _SECONDS
        while not (value := self.ask(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def point(self, element, *, click=False):
        """Move the pointer onto the middle of an element, given as an expression."""
        box = f"(() => {{ const one = {element}; one.scrollIntoView({{block: 'center'}}); "
        box += "const {x, y, width, height} = one.getBoundingClientRect(); return [x + width / 2, y + height / 2]; })()"
        x, y = self.ask(box)
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if click else "none", clickCount=1)

    @property
    def requests(self):
        """What the page asked for beyond itself."""
        asked = [one["params"] for one in self._events if one["method"] == "Network.requestWillBeSent"]
        urls = [one["request"]["url"] for one in asked if one.get("type") != "Document"]
        return [url for url in urls if not url.startswith("data:")]

    @property
    def complaints(self):
        """Everything on its console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [one["params"] for one in self._events if one["method"] in kinds]


@contextmanager
def chromium(folder):
    """Start the browser with a profile in an empty folder."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed here: the page is parsed, and its script runs in node alone")
    near, far = socket.socketpair()
    with near, far, (folder / "errors").open("wb") as errors:
        # It reads from descriptor 3 and writes to descriptor 4.
        words = ["bash", "-c", f'exec "$@" 3<&{far.fileno()} 4>&{far.fileno()}', "bash", program, *_OPTIONS]
        words += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
        process = subprocess.Popen(words, pass_fds=[far.fileno()], stdout=errors, stderr=errors)
        far.close()
        near.settimeout(_SECONDS)
        try:
            yield Chromium(near)
        finally:
            near.close()
            try:
                # It ends once nobody is at the pipe.
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
