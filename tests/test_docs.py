"""The documentation: its code blocks run as they stand, its links lead somewhere, and its file tree is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clipn
from clipn.pipeline import run_training

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which a small version of the built-in run has been made."""
    folder = tmp_path_factory.mktemp("docs")
    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    small = "world.num_pairs=40 world.images_per_class=4 train.batch_size=16 train.epochs=1 base.train.epochs=1"
    run_training("toy", [*small.split(), "data.workers=0", "run.device=cpu", f"data.index_dir={folder}/index"])
    os.chdir(before)
    torch.set_num_threads(threads)
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture
def run(workplace, tmp_path, monkeypatch):
    """Runs the blocks of a page in order. A block that opens with a file name is written to that file instead.

    `clipn` commands run in this process: they are tested as processes elsewhere.
    """
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True, symlinks=True)
    clipn = tmp_path / "bin" / "clipn"
    clipn.parent.mkdir()
    clipn.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m clipn "$@"\n')
    clipn.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PATH": f"{clipn.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def _run(blocks):
        program = {}  # the Python blocks of a page are one program
        for kind, text in blocks:
            named = re.match(r"# (\S+\.\w+)\n", text)
            if named:
                Path(named[1]).write_text(text)
            if kind == "python":
                exec(compile(text, "a Python block", "exec"), program)
            elif kind == "sh":
                command = ["sh", "-e", "-c", text]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return program

    return _run


def blocks(path):
    return _BLOCK.findall((ROOT / path).read_text(encoding="utf-8"))


def test_own_classes(run, capsys):
    run(blocks("docs/own_classes.md"))
    rows = Path("predictions.csv").read_text().splitlines()
    assert rows[0] == "file,label,is_ood,score,p_yes,p_no,error" and len(rows) == 1 + 2 * 4
    assert "show none of the classes" in capsys.readouterr().out


def test_unlabelled_images(run):
    program = run(blocks("docs/unlabelled_images.md"))
    assert program["again"].predict(program["images"]) and Path("my_detector_2/detector.json").is_file()
    assert Path("runs/compare_learning/report.html").is_file()
    fitted = program["adapter"].detector
    id_scores, ood_scores = (
        [result.score for result in fitted.predict(program[name])] for name in ("id_images", "scenes")
    )
    ours, theirs = clipn.metrics.ood_metrics(id_scores, ood_scores), program["metrics"].compute()
    assert float(theirs["AUROC"]) == pytest.approx(ours["AUROC"], abs=1e-4)


def test_object_features(run, tmp_path):
    small = "world.num_pairs=40 world.images_per_class=2 train.batch_size=16 train.epochs=1 eval.id=null eval.ood=null"
    small = f"{small} base.train.batch_size=16 base.train.epochs=1 data.workers=0 run.device=cpu"
    run_training("toy_vit", [*small.split(), f"data.index_dir={tmp_path}/index"])
    program = run(blocks("docs/object_features.md"))
    assert "Tokens that TagOOD keeps" in Path("runs/object_features/report.html").read_text(encoding="utf-8")
    assert program["detector"].method == "TagOOD-PL" and Path("my_object_detector/detector.json").is_file()


def test_own_pairs(run):
    run(blocks("docs/own_pairs.md"))
    for name in ("own", "own_slower"):
        assert Path("runs", name, "report.html").is_file()
    assert Path("own_weights", "README.md").is_file()


def test_choosing_a_score(run):
    program = run(blocks("docs/choosing_a_score.md"))
    assert Path("runs/compare/report.html").is_file()
    assert set(program["results"]["method"]) == {"MSP", "MaxLogit", "Energy", "MCM", "CTW", "ATD"}


def test_the_python_of_readme_and_api(run, capsys):
    run([block for block in blocks("README.md") if block[0] == "python"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].split()[0] in ("key", "fish", "drum")
    run([block for block in blocks("docs/api.md") if "create_model" in block[1]])
    assert capsys.readouterr().out.startswith("ID score:")


def test_an_adapter_is_trained_and_shared(run):
    [(kind, text)] = [block for block in blocks("docs/deploy.md") if "shared_adapter" in block[1]]
    run([(kind, text.replace("train.epochs=9", "train.epochs=1 train.batch_size=16"))])
    assert Path("runs/toy_adapter/report.html").is_file()
    assert 5e5 < Path("shared_adapter/clipn.safetensors").stat().st_size < 6e5


def test_the_server(run):
    testclient = pytest.importorskip("fastapi.testclient")
    pytest.importorskip("multipart")
    server = [block for block in blocks("docs/deploy.md") if "FastAPI()" in block[1]]
    with testclient.TestClient(run(server)["app"]) as client:
        image = Path("runs/toy/world/id/key/0000.jpg").read_bytes()
        answer = client.post("/predict", files={"image": image}).json()
        assert answer["label"] in ("key", "fish", "drum")
        assert isinstance(answer["is_ood"], bool) and 0 <= answer["score"] <= 1
        broken = client.post("/predict", files={"image": b"no image"})
        assert broken.status_code == 422 and "unknown format" in broken.text


def test_every_link_leads_to_a_file_and_a_heading():
    def anchors(page):
        headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}

    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_architecture_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = _BLOCK.search(page)[2]
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith((".py", ".yaml", ".j2")):
            named.add((folder if line.startswith(" ") else "") + name)
    package = ROOT / "clipn"
    files = {
        str(path.relative_to(package))
        for suffix in ("py", "yaml", "j2")
        for path in package.glob(f"**/*.{suffix}")
        if path.name != "__init__.py" and "configs" not in path.parts
    }
    assert named == files, f"only in the page: {named - files}; missing there: {files - named}"


def test_the_readme_is_short_and_names_no_removed_script():
    assert (ROOT / "README.md").stat().st_size <= 9000
    for page in PAGES:
        for script in re.findall(r"(?:scripts|tests/drills)/\w+\.\w+", page.read_text(encoding="utf-8")):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
