"""The Colab notebook runs as it is, on a CPU, and installs beside Colab's packages without changing them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
SMALL = (
    "--data.max_bytes 1500000 --train.max_steps 30 --optimizer.warmup_steps 5 --eval.eval_batches 2 "
    "--log.logging_steps 2"
)


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.system
def test_it_runs_from_top_to_bottom_and_again(notebook, tmp_path, monkeypatch):
    for name, value in {
        "NOTEBOOK_FLAGS": SMALL,
        "NOTEBOOK_RUNS": str(tmp_path / "runs"),
        "NOTEBOOK_PYTHON": sys.executable,
        "XLA_FLAGS": "",  # one device, as on a laptop
        "JAX_PLATFORMS": "cpu",
    }.items():
        monkeypatch.setenv(name, value)
    for cell in notebook.cells:  # what it writes beside the runs belongs into a scratch folder, too
        cell.source = cell.source.replace("first.log", f"{tmp_path}/first.log")
        cell.source = cell.source.replace("serve.log", f"{tmp_path}/serve.log")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    printed = [
        "".join(output.get("text", "") for output in cell.get("outputs", []))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "hardware: cpu" in printed[0]
    assert any("exit code 42" in text for text in printed)
    assert any("gpt2 4 layers" in text for text in printed)
    assert any('"generated_text":"class ' in text for text in printed)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "runs/interrupted/metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-1] == 30 and len(steps) >= 2


def test_what_it_installs_lies_in_an_environment_of_its_own(notebook):
    [install] = [cell.source for cell in notebook.cells if "--without-pip" in cell.source]
    commands = [
        line for cell in notebook.cells for line in cell.source.splitlines() if "install" in line and "pip" in line
    ]
    # Every pip of the notebook is told of the other environment, so Colab's own packages stay as they are.
    assert all("--python" in line or line.strip().startswith("#") or "without-pip" in line for line in commands), (
        commands
    )
    assert "sys.executable" in install and not any(
        line.lstrip().startswith(("!pip", "%pip")) for cell in notebook.cells for line in cell.source.splitlines()
    )
    assert not any(line.startswith("import jax") for cell in notebook.cells for line in cell.source.splitlines())


@pytest.mark.system
def test_an_environment_made_its_way_leaves_the_interpreter_alone(tmp_path):
    """The two commands of the install cell, with a package that lies here, asked what they would change."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check"]
    listed = lambda: subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    before = listed()
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    package = tmp_path / "package"
    package.mkdir()
    (package / "pyproject.toml").write_text('[project]\nname = "probe"\nversion = "1"\n')
    (package / "probe.py").write_text("")
    python = str(environment / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(package)], check=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    assert subprocess.run([python, "-c", "import probe"]).returncode == 0
    assert listed() == before
