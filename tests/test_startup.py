"""What goes wrong while a script's packages load ends in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.stem != "lora_layers")
MISSING = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"


def start(tmp_path: Path, torch: str, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a command, where `import torch` runs the given code."""
    (tmp_path / "torch.py").write_text(torch, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.scripts
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_package_and_ctrl_c_are_one_line(script: str, tmp_path: Path) -> None:
    code, err = start(tmp_path, MISSING, script, "--help")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: expected the package torch, found none in {sys.executable}; ")
    assert "pip install -r requirements.txt" in err
    assert start(tmp_path, "raise KeyboardInterrupt", script) == (130, "interrupted\n")


@pytest.mark.scripts
def test_a_bug_and_debug_keep_the_traceback(tmp_path: Path) -> None:
    code, err = start(tmp_path, "1 / 0", "prepare_data.py")
    assert code == 1 and "Traceback" in err and "ZeroDivisionError" in err
    code, err = start(tmp_path, MISSING, "prepare_data.py", "--debug")
    assert code == 1 and "Traceback" in err and "ModuleNotFoundError" in err


@pytest.mark.scripts
def test_packages_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch-1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n"
    (tmp_path / "torch-1.0.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    for raised in ("ImportError('no Tensor in torch')", "RuntimeError('torchvision::nms is not')"):
        code, err = start(tmp_path, f"raise {raised}", "prepare_data.py")
        assert code == 2 and err.count("\n") == 1 and "torch>=2.11 (found 1.0)" in err
        assert "pip install -r requirements.txt" in err


@pytest.mark.scripts
def test_an_old_python_is_refused(tmp_path: Path) -> None:
    code = "import sys; sys.version_info = (3, 10, 12, 'final', 0); import sam3_lora.startup"
    done, err = start(tmp_path, "", "-c", code)
    assert done == 2 and err == (
        f"error: expected Python 3.11 or newer, found 3.10 in {sys.executable}; start the script "
        "with a newer one\n"
    )
