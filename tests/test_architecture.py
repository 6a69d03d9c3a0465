"""The import rules: packages import in one direction, and light entry points load light modules."""

import json
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent


def loaded_modules(code: str) -> set[str]:
    """The modules that a fresh Python has loaded after it ran this code."""
    code = f"import sys, json\ntry:\n    {code}\nexcept SystemExit: pass\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_imports_go_one_way(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)  # it would disable the loggers of later tests
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, capsys.readouterr().out


def test_no_module_imports_itself_through_others():
    graph = grimp.build_graph("clipn", cache_dir=None)
    edges = [(module, used) for module in graph.modules for used in graph.find_modules_directly_imported_by(module)]
    assert len(edges) > 100
    assert not [edge for edge in edges if graph.find_shortest_chain(importer=edge[1], imported=edge[0])]


@pytest.mark.parametrize("code", ["import clipn", "from clipn.cli import main; main(['--help'])"])
def test_help_loads_no_torch(code):
    assert not loaded_modules(code) & {"torch", "numpy", "pandas", "open_clip"}


def test_the_detector_loads_no_reports_and_no_training():
    loaded = loaded_modules("import clipn; clipn.Detector")
    heavy = {"pandas", "omegaconf", "sklearn", "matplotlib", "tensorboard", "gradio", "jinja2"}
    own = {"clipn.deploy.model_card", "clipn.report", "clipn.config.loading", "clipn.training", "clipn.toy.shapes"}
    assert "clipn.deploy.detector" in loaded and not loaded & (heavy | own)
