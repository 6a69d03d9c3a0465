"""The how-tos and the README's Python, run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipn.pipeline import run_training

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the built-in run has been made, in small."""
    folder = tmp_path_factory.mktemp("docs")
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    small = "world.num_pairs=40 world.images_per_class=4 train.batch_size=16 train.epochs=1 base.train.epochs=1"
    run_training("toy", [*small.split(), "data.workers=0", "run.device=cpu", f"data.index_dir={folder}/index"])
    os.chdir(before)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(workplace, tmp_path, monkeypatch):
    """Runs a page's blocks in order: a text that opens with a file's name is written there, the rest is run."""
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    clipn = tmp_path / "bin" / "clipn"
    clipn.parent.mkdir()
    clipn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clipn "$@"\n')
    clipn.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    more = {"PATH": f"{clipn.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def _run(blocks):
        program = {}  # a page's Python is one program
        for kind, text in blocks:
            named = re.match(r"# (\S+\.\w+)\n", text)
            if named:
                Path(named[1]).write_text(text if kind else text[named.end() :])
            if kind == "python":
                exec(compile(text, "a page's Python", "exec"), program)
            elif kind == "sh":
                command = ["sh", "-e", "-c", text]
                done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return program

    return _run


def blocks(path):
    return _BLOCK.findall((ROOT / path).read_text(encoding="utf-8"))


def test_own_classes(run, capsys):
    run(blocks("docs/own_classes.md"))
    rows = Path("verdicts.csv").read_text().splitlines()
    assert rows[0] == "file,label,is_ood,score,p_yes,p_no,error" and len(rows) == 1 + 2 * 4
    assert "show none of the classes" in capsys.readouterr().out


def test_own_pairs(run):
    run(blocks("docs/own_pairs.md"))
    for name in ("own", "own_slower"):
        assert Path("runs", name, "report.html").is_file()


def test_choosing_a_score(run):
    program = run(blocks("docs/choosing_a_score.md"))
    assert Path("runs/compare/report.html").is_file()
    assert set(program["results"]["method"]) == {"MSP", "MaxLogit", "Energy", "MCM", "CTW", "ATD"}


def test_the_python_of_the_readme(run, capsys):
    Path("configs").symlink_to(ROOT / "configs")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use it in Python\n")[2]
    found = [text for kind, text in _BLOCK.findall(section.partition("### Behind a server")[0]) if kind == "python"]
    assert len(found) == 2
    run([("python", text) for text in found])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[0].split()[0] in ("key", "fish", "drum") and shown[2].startswith("ID score:")


def test_the_server_of_the_readme(run):
    testclient = pytest.importorskip("fastapi.testclient")
    pytest.importorskip("multipart")
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Behind a server\n")[2]
    kind, text = _BLOCK.search(section).groups()
    assert len(text.splitlines()) < 15
    with testclient.TestClient(run([(kind, text)])["app"]) as client:
        picture = Path("runs/toy/world/id/key/0000.jpg").read_bytes()
        told = client.post("/judge", files={"picture": picture}).json()
        assert told["label"] in ("key", "fish", "drum") and isinstance(told["is_ood"], bool) and 0 <= told["score"] <= 1
        broken = client.post("/judge", files={"picture": b"no picture"})
        assert broken.status_code == 422 and "unknown format" in broken.text
