"""Pages as tests read them: parsed, or in a headless Chromium that is told what to do
in the DevTools protocol, by pipes."""

from collections.abc import Iterator
import contextlib
import html.parser
import json
import pathlib
import shutil
import subprocess
import threading

import pytest


class Page(html.parser.HTMLParser):
  """Tags, attributes, texts outside scripts, rows of tables by section, and the data
  script of a page."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.attrs, self.texts, self.scripts = [], [], [], []
    self.numbers, self.rows = set(), {}
    self._open = self._section = ""
    self._in_cell = False
    self.feed(page)
    self.close()
    self.text = " ".join("".join(self.texts).split())
    for name, rows in self.rows.items():
      self.rows[name] = [tuple(" ".join(c.split()) for c in row) for row in rows]

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attrs += attrs
    self._open = tag
    if tag == "data":
      self.numbers.add(float(dict(attrs)["value"]))
    if tag == "section":
      self._section = dict(attrs)["id"]
      self.rows[self._section] = []
    if tag == "tr":
      self.rows[self._section].append([])
    if tag in ("th", "td"):
      self.rows[self._section][-1].append("")
      self._in_cell = True

  def handle_endtag(self, tag):
    self._open = ""
    self._in_cell &= tag not in ("th", "td")

  def handle_data(self, data):
    (self.scripts if self._open in ("script", "style") else self.texts).append(data)
    if self._in_cell:
      self.rows[self._section][-1][-1] += data

  @property
  def data(self):
    return json.loads(next(s for s in self.scripts if s.startswith("{")))


class Browser:
  """One page; `said` has its errors, and what it wrote to the console."""

  def __init__(self, process: subprocess.Popen, url: str):
    self._process, self._session, self._asked, self.said = process, {}, 0, []
    target = self.ask("Target.createTarget", url=url)
    self._session = self.ask("Target.attachToTarget", **target, flatten=True)
    while not self.value(f"document.readyState === 'complete' && location == '{url}'"):
      pass
    self.ask("Log.enable")
    self.ask("Runtime.enable")

  def ask(self, method: str, **params) -> dict:
    """What the browser replies."""
    self._asked += 1
    sent = {"id": self._asked, "method": method, "params": params} | self._session
    self._process.stdin.write(json.dumps(sent).encode() + b"\0")
    self._process.stdin.flush()
    while (got := self._next()).get("id") != self._asked:
      if got["method"] in (
        *("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"),
      ):
        self.said.append(got["params"])
    return got.get("result", {})

  def _next(self) -> dict:
    line = b""
    while (byte := self._process.stdout.read(1)) != b"\0":
      assert byte, "the browser has ended"
      line += byte
    return json.loads(line)

  def value(self, script: str):
    """What an expression comes to in the page; None where it has no value."""
    found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
    return found.get("result", {}).get("value")

  def text(self, id: str) -> str:
    return self.value(f"document.getElementById('{id}').textContent")

  def html(self) -> str:
    """The DOM after the scripts ran."""
    return self.value("document.documentElement.outerHTML")

  def choose(self, id: str, value: str) -> None:
    """Chooses a value of a field."""
    field = f"document.getElementById('{id}')"
    self.value(f"{field}.value = '{value}'")
    self.value(f"{field}.dispatchEvent(new Event('input'))")

  def press(self, key: str, code: int) -> str:
    """Presses a key; the id, or else the tag, of what then has the focus."""
    about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    for kind in ("rawKeyDown", "keyUp"):
      self.ask("Input.dispatchKeyEvent", type=kind, **about)
    return self.value("document.activeElement.id || document.activeElement.tagName")

  def tab(self) -> str:
    """Goes on to the next thing that can have the focus."""
    return self.press("Tab", 9)


@contextlib.contextmanager
def opened(path: pathlib.Path, fragment: str = "") -> Iterator[Browser]:
  """A page to drive; the browser reads of descriptor 3 and writes to 4."""
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  program = next(filter(None, map(shutil.which, names)), None)
  if not program:
    pytest.skip("needs Chromium or Chrome on the PATH")
  flags = "--headless --no-sandbox --disable-gpu --disable-background-networking"
  flags += f" --no-first-run --user-data-dir={path.parent}/profile"
  command = [program, *flags.split(), "--remote-debugging-pipe", "about:blank"]
  process = subprocess.Popen(
    ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1', *command],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  limit = threading.Timer(60, process.kill)
  limit.start()
  try:
    yield Browser(process, path.as_uri() + fragment)
  finally:
    limit.cancel()
    process.kill()
    process.communicate()
