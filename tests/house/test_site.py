"""The site builds, holds what it should, and its commands run as they stand.

A block ```console of a page is a script of its lines that begin with "$ "; one with a
title is that file. Blocks run in the page's order in one folder with the files of
configs/ and specs/, on the tiny config (SMALL). What would install, or wants a cloud,
is not run (OUTSIDE), and flags of dalign in it make a config all the same.
"""

import html.parser
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.parse

import pytest
import yaml

import dalign
from dalign.config import explain
from dalign.config.convert import flat
from dalign.config.convert import to_json
from dalign.config.schema import Config
from tests.helpers import ROOT
from tests.helpers import clean_environment
from tests.helpers import python
from tests.helpers import read_flags
from tests.helpers import tiny
from tests.runs import test_processes

PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
README = (ROOT / "README.md").read_text()

LITTLE = [  # two prompts are enough to need both processes
  *(arg for arg in test_processes.SMALL if "stages" not in arg),
  "--config.stages=generate",
]
OUTSIDE = (  # how lines begin that are not run
  *("gcloud", "pip", "python3 -m venv", "sbatch", "sky", "xpk"),
  "python -m dalign.main --mode=plan --config=configs/large.py",  # wants libtpu
  "python -m dalign.main --mode=serve",  # until it is ended
)
SMALL = {  # what is said, and what is run
  "--mode=sweep --config=configs/q": "--mode=sweep --config=configs/./q",  # has one
  "configs/quickstart.py": "configs/tiny.py",
  "configs/large.py:qwen3_8b_8gpu": "configs/tiny.py",
  "configs/large.py:qwen3_8b": "configs/tiny.py",
  "from configs import quickstart": "from configs import tiny as quickstart",
  "--config.filter.threshold=0.6": "--config.filter.threshold=0.0",
  "--workdir=runs/plan": "--workdir=runs/plan --config.stages=sft",
  "--workdir=runs/two": " ".join(["--workdir=runs/two", *LITTLE]),
  "  return c\n": """\
  c.generate.teacher = "base"
  c.filter.threshold = 0.0
  c.sft.batch.length = 512
  c.reward.steps = c.rl.steps = 1
  c.rl.update(max_new=16, prompts=4)
  c.rl.batch = dict(micro=4, rows=4, length=512)
  c.eval.arms = ("base", "sft_rl")
  return c
""",
}
TO_BE_SAID = {  # what README's table says in words, beside a flag
  "--config.generate.teacher=endpoint": "--config.generate.endpoint.url=URL "
  "--config.generate.endpoint.model=NAME",
  "--config.filter.judge=endpoint": (
    JUDGE := "--config.filter.endpoint.url=URL --config.filter.endpoint.model=NAME"
  ),
  "--mode=label --config.filter.judge=endpoint": JUDGE,
  "--config.eval.grader=rules,endpoint": (
    "--config.eval.grader_endpoint.url=URL --config.eval.grader_endpoint.model=NAME"
  ),
  "--config=configs/large.py:NAME": "--config=configs/large.py:qwen3_8b",
  **dict.fromkeys(
    (
      "--config.world.base=train",
      "--config.world.judge_errors.rate=0.2",
      "--config.world.judge_errors.habit=long:8 "
      "--config.world.judge_errors.habit_rate=1.0",
    ),
    WORLD := "--config=configs/world.py",
  ),
}


def blocks(text: str, language: str) -> list[tuple[str, str]]:
  """(title, content) of the fenced blocks in a language, "" for no title."""
  rule = rf'^```{language}(?: title="([^"]+)")?\n(.*?)^```$'
  return re.findall(rule, text, re.MULTILINE | re.DOTALL)


def scripts(text: str) -> list[str]:
  """The blocks of commands, as what a shell is given."""
  found = []
  for _, block in blocks(text, "console"):
    assert block.startswith("$ "), block
    lines = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    found.append("\n".join(lines))
  return found


def commands() -> list[str]:
  """Every command line of dalign in the pages, the README and the config files."""
  texts = [*PAGES.values(), README, *(p.read_text() for p in configs())]
  joined = "\n".join(texts).replace("\\\n", " ")
  found = re.findall(r"python -m dalign\.main( --?[a-z][^\n`&';{]*)", joined)
  return sorted({re.sub(r"(  (#|on)| >) .*", "", line).strip() for line in found})


def configs() -> list[pathlib.Path]:
  return sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> pathlib.Path:
  """Where pages are tried: a folder like a checkout's, with the pages' files."""
  place = tmp_path_factory.mktemp("desk") / ROOT.name  # which manifests hold
  place.mkdir()
  for name in ("configs", "specs", "dalign", ".ci"):
    (place / name).symlink_to(ROOT / name)
  (place / "bank").symlink_to(ROOT / "docs" / "bank")  # as the tutorial copies it
  for page in PAGES.values():
    for language in ("json", "markdown", "python", "yaml", "bash"):
      for title, content in blocks(page, language):
        if not title:
          continue
        path = place / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(small(content) if language == "python" else content)
  for name in ("quickstart", "mine"):  # of which some flags are read
    (place / "runs" / name).mkdir(parents=True)
    said = json.dumps(to_json(tiny()))
    (place / "runs" / name / "config.json").write_text(said)
  return place


def small(text: str) -> str:
  for said, run in SMALL.items():
    text = text.replace(said, run)
  return text


# Commands.


def test_every_command_line_makes_a_config(desk):
  lines = commands()
  assert len(lines) > 20 and sum("--distributed" in line for line in lines) >= 5
  said = read_flags([shlex.split(line.replace("$", "")) for line in lines], desk)
  assert {line: error for line, error in zip(lines, said, strict=True) if error} == {}


def test_every_flag_that_is_spoken_of_makes_a_config(desk):
  """Of README's table and the pages; flags in one code span belong together."""
  table = README.split("| to | say |")[1].split("\n\n")[0]
  texts = [re.sub(r"^```.*?^```", "", p, flags=re.M | re.S) for p in PAGES.values()]
  spans = re.findall(r"`(--(?:config|mode)[^`]*)`", "\n".join([table, *texts]))
  named = {
    s.removeprefix("--config.") for s in spans if re.fullmatch(r"--config[.\w]+", s)
  }
  assert named <= set(flat(tiny()))
  lines = []
  for span in sorted(spans):
    if span.removeprefix("--config.") in named or span.endswith(".*"):
      continue
    more = TO_BE_SAID.get(span, "")
    config = "" if "--config=" in span + more else "--config=configs/quickstart.py"
    span = "" if "--config=" in more and more != WORLD else span
    lines.append(f"--workdir=runs/readme {config} {more} {span}")
  assert len(lines) > 30
  said = read_flags([shlex.split(line) for line in lines], desk)
  assert {line: error for line, error in zip(lines, said, strict=True) if error} == {}


@pytest.mark.slow
def test_what_pages_say_runs(desk, workdir):
  """All of them in the order of the navigation: one may go on from another. The first
  run is the one that all tests share, which the same command made."""
  shutil.copytree(workdir, desk / "runs" / "quickstart", dirs_exist_ok=True)
  ran = 0
  order = re.findall(r"- ([a-z]+\.md)", (ROOT / "mkdocs.yml").read_text())
  assert set(order) == set(PAGES)
  for name in order:
    for script in scripts(PAGES[name]):
      lines = [line for line in script.splitlines() if not line.startswith(OUTSIDE)]
      if lines:
        ran += sum("dalign.main" in line for line in lines)
        shell(small("\n".join(lines)), desk, name)
  assert ran >= 12


def shell(script: str, place: pathlib.Path, page: str) -> None:
  """Runs a script as a reader would, on a CPU."""
  port = str(free_port())
  tools = pathlib.Path(sys.executable).parent
  env = clean_environment() | {
    "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
  }
  done = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script.replace("9911", port)],
    cwd=place,
    env=env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, f"{page}:\n{script}\n{done.stderr[-3000:]}"


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


# Many hosts.


@pytest.mark.slow
def test_the_command_of_a_cluster_runs_as_two_processes(desk):
  """The words of the page that srun is given, but for the config's size, with the
  variables that it sets. (That the address is found otherwise, the page itself tries.)
  """
  [script] = [
    t for title, t in blocks(PAGES["clusters.md"], "bash") if "sbatch" in title
  ]
  [said] = re.findall(r"srun (python .* --distributed)", script)
  words = [small(word) for word in shlex.split(said)]
  assert words[1:4] == ["-m", "dalign.main", "--config=configs/tiny.py"]
  # The mesh and kernels are a large model's, and the workdir is everybody's.
  left = ("--config.mesh", "--config.compute", "--config.plan")
  args = [word for word in words[1:] if not word.startswith(left)]
  args = [f"--workdir={desk}/srun" if "workdir" in w else w for w in args]
  shared = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_PORT": str(free_port()),
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
  }
  runs = []
  for i in map(str, range(2)):
    own = {"SLURM_PROCID": i, "SLURM_LOCALID": i}
    with (desk / f"srun.{i}.log").open("w") as log:
      runs.append(
        subprocess.Popen(
          [sys.executable, *args, *LITTLE],
          cwd=desk,
          env=clean_environment() | shared | own,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
  codes = test_processes.end(runs, 300)
  logs = [(desk / f"srun.{i}.log").read_text() for i in range(2)]
  assert codes == [0, 0], "".join(logs)
  assert "generate" in logs[0] and "generate" not in logs[1]  # one of them speaks
  manifest = json.loads((desk / "srun/generate/manifest.json").read_text())
  assert manifest["finished"]


# The site.


class _Page(html.parser.HTMLParser):
  """What a page links to, loads, and has as anchors."""

  def __init__(self, text: str):
    super().__init__()
    self.links, self.loads, self.ids, self.text = set(), set(), {""}, ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    named = dict(attrs)
    self.ids |= {named[key] for key in ("id", "name") if named.get(key)}
    if tag == "a":
      self.links.add(named.get("href") or "")
    elif named.get("src") or (tag == "link" and named.get("href")):
      self.loads.add(named.get("src") or named["href"])

  def handle_data(self, data):
    self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[str, _Page]:
  """The pages of the site by name, built as a reader would."""
  place = tmp_path_factory.mktemp("site")
  env = clean_environment() | {"NO_MKDOCS_2_WARNING": "1"}
  done = python("-m", "mkdocs", "build", "--strict", "-d", str(place), env=env)
  assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
  return {
    path.relative_to(place).as_posix(): _Page(path.read_text())
    for path in sorted(place.rglob("*.html"))
    if path.name != "404.html"
  }


def test_the_site_holds_what_the_repository_does(site):
  def said(page: str) -> str:
    return " ".join(site[page].text.split())

  modules = {p.relative_to(ROOT) for p in (ROOT / "dalign").rglob("*.py")}
  pages = {f"{p}.html" for p in modules if (ROOT / p).stat().st_size}
  assert pages | {f"configs/{p.name}.html" for p in configs()} <= set(site)
  assert "Context distillation is a signature" in said("ARCHITECTURE.html")
  assert "The checked config, or None where the mode does without" in said(
    "dalign/main.py.html"
  )
  for name, kind, meaning in (
    (
      "sft.average_share",
      "float, a share in [0, 1]",
      "the share of the steps, the last",
    ),
    ("mesh.fsdp", "int", "the same rows, and parameters and optimizer state"),
    ("eval.arms", "tuple of one of base", ""),
  ):
    assert f"{name} {kind} {meaning}".strip() in said("config.html")
  missing = [name for name in flat(tiny()) if f" {name} " not in said("config.html")]
  assert [name for name in missing if not name.startswith("model.random")] == []
  sections = {name.partition(".")[0] for name in flat(tiny()) if "." in name}
  for name, text in explain.fields(Config).items():
    row = f"{text} its fields" if name in sections else text
    assert " ".join(row.replace("`", "").split()) in said("config.html")
  assert "Share of thoughts that cite a clause which is in no policy." in said(
    "evaluation.html"
  )


@pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")))
def test_notebooks_are_pages(site, path):
  text = "".join(site[f"colab/{path.name}.html"].text.split())
  for cell in json.loads(path.read_text())["cells"]:
    words = "".join(re.findall(r"[A-Za-z]+", "".join(cell["source"]).split("\n")[0]))
    assert words[:20] in re.sub(r"[^A-Za-z]", "", text)


def test_links_lead_somewhere(site):
  count = 0
  for name, page in site.items():
    for link in page.links:
      url = urllib.parse.urlsplit(link)
      if url.scheme:
        continue
      path = urllib.parse.unquote(url.path)
      to = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
      if to == ".":
        to = "index.html"
      assert to in site, (name, link)
      assert urllib.parse.unquote(url.fragment) in site[to].ids, (name, link)
      count += 1
  assert count > 500


def test_the_site_loads_nothing_from_other_hosts(site):
  loads = {load for page in site.values() for load in page.loads}
  assert loads and [load for load in loads if urllib.parse.urlsplit(load).netloc] == []


# What else is there.


def test_the_citation_is_of_this_release():
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert cited["version"] == dalign.__version__
  assert f'name="{cited["title"]}"' in (ROOT / "setup.py").read_text()
  assert cited["references"][0]["url"] in README
