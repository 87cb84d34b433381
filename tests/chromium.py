"""Drives a headless Chromium over the DevTools protocol, through its pipe: no driver and no package needed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

TRAMPOLINE = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Puts the pipe where Chromium expects it, at file descriptors 3 (commands) and 4 (events)."""


def find_browser():
    """Path of a Chromium, by the variable CHROMIUM or on PATH; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. Exceptions of the page's own scripts are collected in `errors`."""

    def __init__(self, commands, events, downloads):
        self._commands, self._events, self._count = commands, events, 0
        self.errors, self.downloads = [], downloads
        self._session = None
        downloads.mkdir()
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self._call(f"{domain}.enable")

    def _call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._read())
            if reply.get("method") == "Runtime.exceptionThrown":
                self.errors.append(reply["params"]["exceptionDetails"])
            if reply.get("id") == self._count:
                assert "error" not in reply, reply
                return reply["result"]

    def _read(self):
        parts = []
        while (byte := self._events.read(1)) != b"\0":
            assert byte, "the browser has gone"
            parts.append(byte)
        return b"".join(parts)

    def open(self, path):
        self._call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def reload(self):
        self.js("window.old = true")
        self._call("Page.reload")
        self.wait("!window.old && document.readyState === 'complete'")

    def js(self, expression):
        """The value of an expression; promises are awaited."""
        result = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"still false: {expression}"
            time.sleep(0.05)

    def press(self, *keys):
        """Types keys, named as in KeyboardEvent.key."""
        codes = {"Enter": 13, "Backspace": 8, "Tab": 9, " ": 32}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = codes.get(key, 0)
            self._call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def click(self, selector):
        """A mouse click in the middle of an element."""
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        middle = "(r => [r.x + r.width / 2, r.y + r.height / 2])"
        x, y = self.js(f"{middle}(document.querySelector({selector!r}).getBoundingClientRect())")
        assert self.js(f"document.querySelector({selector!r}).contains(document.elementFromPoint({x}, {y}))"), selector
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def downloaded(self, seconds=30):
        """The content of the latest complete download; it is removed."""
        end = time.monotonic() + seconds
        while not (files := [file for file in self.downloads.glob("*.json") if file.stat().st_size]):
            assert time.monotonic() < end, "nothing was downloaded"
            time.sleep(0.05)
        text = files[0].read_text()
        files[0].unlink()
        return files[0].name, text


@contextlib.contextmanager
def browse(executable, folder):
    """A Page of a browser of its own, with its profile in `folder`."""
    command_read, command_write = os.pipe()
    event_read, event_write = os.pipe()
    arguments = [
        executable,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--window-size=1280,900",
        f"--user-data-dir={folder / 'profile'}",
        "--remote-debugging-pipe",
    ]
    pipe = (command_read, event_write)
    browser = subprocess.Popen(
        [sys.executable, "-c", TRAMPOLINE, *map(str, pipe), *arguments],
        pass_fds=pipe,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(event_write)
    try:
        with os.fdopen(command_write, "wb", buffering=0) as commands, os.fdopen(event_read, "rb") as events:
            yield Page(commands, events, folder / "downloads")
    finally:
        browser.terminate()
        browser.wait(timeout=30)
