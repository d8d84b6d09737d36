"""Runs of released versions, to be read by those that follow.

  python -m tests.golden tests/golden/VERSION.tar.xz

makes one with the code as it is: `done`, a tiny run with every artefact, `cut`, one
that was killed after the first of RL's two steps, and the specification of both. Once
a version is out its file is never made anew.
"""

import io
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

from tests.helpers import ROOT
from tests.helpers import command

FOLDER = pathlib.Path(__file__).with_name("golden")
STAGES = "generate,filter,sft,reward,rl,eval,report"
CHANGES = ("--config.spec.dir=specs", f"--config.stages={STAGES}")


def make(path: pathlib.Path) -> None:
  """Runs, cuts and packs."""
  with tempfile.TemporaryDirectory() as made:
    folder = pathlib.Path(made) / "golden"  # which manifests name
    shutil.copytree(ROOT / "specs", folder / "specs")
    run = command("done", *CHANGES)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run(run, cwd=folder, env=environment, check=True)
    for stage in ("filter", "sft", "reward"):
      shutil.copytree(folder / "done" / stage, folder / "cut" / stage)
    shutil.copy(folder / "done" / "config.json", folder / "cut")
    run = command("cut", *CHANGES[:1], "--config.stages=rl")
    with subprocess.Popen(run, cwd=folder, env=environment) as process:
      while not (folder / "cut" / "rl" / "checkpoints" / "1").exists():
        time.sleep(0.01)
      process.kill()
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:xz", preset=9) as archive:
      for name in ("specs", "done", "cut"):
        kept = folder / "kept" / name
        shutil.copytree(folder / name, kept, ignore=_left_out)
        archive.add(kept, name, filter=_plain)
  print(f"{path}: {path.stat().st_size} bytes")


def _left_out(folder: str, names: list[str]) -> set[str]:
  """What no later run needs: TensorBoard's files, and states of stages that ended."""
  ended = "checkpoints" in names and "params" in names
  return {"tensorboard", ".lock", "checkpoints" if ended else ""} & set(names)


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
  """Nothing of who made it and when."""
  member.uid = member.gid = member.mtime = 0
  member.uname = member.gname = ""
  return member


def unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
  """The runs of a file, in a folder named golden."""
  with tarfile.open(fileobj=io.BytesIO(path.read_bytes()), mode="r:xz") as archive:
    archive.extractall(folder, filter="data")


if __name__ == "__main__":
  make(pathlib.Path(sys.argv[1]))
