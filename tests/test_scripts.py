"""scripts/train and scripts/setup choose what is installed: CUDA by the driver, extras that add up, and never twice."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(command: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "JAXTRAIN_EXTRAS"}
    path = f"{root / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [root / command], env=clean | {"PATH": path} | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine's own driver comes first")
@pytest.mark.parametrize(
    ("driver", "extras", "said"),
    [
        ("580.65.06", "cuda13", ""),
        ("595.1", "cuda13", ""),
        ("535.104.05", "cuda12", ""),
        ("525.60.13", "cuda12", ""),
        ("470.256.02", "", "the NVIDIA driver 470 is too old for CUDA 12, which needs 525"),
        ("NVIDIA-SMI has failed", "", ""),
    ],
)
def test_the_driver_decides_which_cuda(driver: str, extras: str, said: str, tmp_path: Path):
    script(tmp_path / "bin/nvidia-smi", f"echo '{driver}'")
    script(tmp_path / "scripts/setup", 'echo "extras=$JAXTRAIN_EXTRAS"; exit 3')
    shutil.copy(ROOT / "scripts/train", tmp_path / "scripts/train")
    done = run("scripts/train", tmp_path)
    assert (done.returncode, done.stdout) == (3, f"extras={extras}\n")
    assert said in done.stderr
    assert run("scripts/train", tmp_path, JAXTRAIN_EXTRAS="data").stdout == "extras=data\n"
    assert run("scripts/train", tmp_path, JAXTRAIN_EXTRAS="").stdout == "extras=\n"


def test_extras_add_up_and_nothing_is_done_twice(tmp_path: Path):
    """With a pip that writes down what it is asked for, and knows no extra `typo`."""
    for name in ("scripts/setup", "scripts/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    script(
        python,
        f"""[[ $1 == -c ]] && exec {sys.executable} "$@"
[[ $4 == --no-input ]] || exit 0
echo "${{@: -1}}" >>{tmp_path}/asked
[[ $* == *typo* ]] && echo "WARNING: jaxtrain 0.1.0 does not provide the extra 'typo'"
exit 0""",
    )

    def setup(extras: str) -> tuple[int, list[str], str]:
        (tmp_path / "asked").unlink(missing_ok=True)
        done = run("scripts/setup", tmp_path, JAXTRAIN_EXTRAS=extras)
        asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
        return done.returncode, [words.removeprefix(str(tmp_path)) for words in asked], done.stderr

    assert setup("")[:2] == (0, [""])
    assert setup("") == (0, [], "")
    assert setup("data, cuda12")[:2] == (0, ["[cuda12,data]"])
    assert setup("data") == (0, [], "")
    assert setup("dev")[:2] == (0, ["[cuda12,data,dev]"])
    assert setup("") == (0, [], "")
    code, _, said = setup("typo")
    assert (code, "pyproject.toml has not the extra 'typo'" in said) == (1, True)
    (tmp_path / ".venv/.setup-stamp").write_text("another\ndev\n")
    assert setup("data")[:2] == (0, ["[data,dev]"])
