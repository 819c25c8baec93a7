"""
`python scripts/install.py VENV EXTRAS [--oldest]`: makes the virtual environment, or takes the one that is there, and
installs the project into it, with extras of pyproject.toml (`train,demo`). With `--oldest`, every package for which
the project or one of these extras names a lower bound is installed in just that version.

On Linux without an NVIDIA GPU a CPU build of torch is installed, and a build that brings CUDA along (gigabytes) is
refused before it is downloaded. `TORCH_INDEX` names another package index to look for the CPU build in.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path


TORCH = "torch==2.13.0"
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")

# Lists what of CUDA a wheel would bring along here. It runs in the new environment, whose pip can read requirements.
FIND_CUDA = """
import json, sys
from pip._vendor.packaging.requirements import Requirement
needed = [Requirement(text) for text in json.load(sys.stdin)]
needed = [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
print(" ".join(name for name in needed if name.startswith(("nvidia", "cuda"))))
"""


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, check=True, text=True, **kwargs)


def install_cpu_torch(python: str) -> None:
    # The index is asked only once and briefly: where it cannot be reached, pip goes on with its other sources.
    search = ["--extra-index-url", TORCH_INDEX, "--retries", "0", "--timeout", "10"]
    install = [python, "-m", "pip", "install", "--no-deps"]
    choose = [*install, "--dry-run", "-qq", "--report", "-", *search, TORCH]
    report = run(*choose, stdout=subprocess.PIPE).stdout
    for wheel in json.loads(report)["install"]:  # empty if torch is there already
        requirements = json.dumps(wheel["metadata"].get("requires_dist", []))
        cuda = subprocess.run(
            [python, "-c", FIND_CUDA], check=True, text=True, input=requirements, stdout=subprocess.PIPE
        ).stdout.strip()
        if cuda:
            sys.exit(
                f"There is no NVIDIA GPU here (no `nvidia-smi`), but the {TORCH} that pip finds brings CUDA along: "
                f"{cuda}.\nThe index of CPU builds, {TORCH_INDEX}, could not be used. Make it reachable, or name "
                "another one: TORCH_INDEX=<url> make install."
            )
        run(*install, wheel["download_info"]["url"])


def lower_bounds(extras: str) -> list[str]:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    needed = chain(project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras.split(",")))
    return sorted({requirement.replace(">=", "==") for requirement in needed if ">=" in requirement})


def main(venv: str, extras: str, oldest: str = "") -> None:
    if oldest not in ("", "--oldest"):
        sys.exit(f"The third argument may be --oldest, not {oldest!r}.")
    run(sys.executable, "-m", "venv", venv)
    python = str(Path(venv) / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "pip>=23.2")  # `--report`, and metadata without the whole wheel
    packages = ["-e", f".[{extras}]"]
    if platform.system() == "Linux" and shutil.which("nvidia-smi") is None:
        install_cpu_torch(python)
        packages.insert(0, TORCH)  # or pip might replace it by a newer one, with CUDA
    if oldest:
        constraints = Path(venv) / "oldest.txt"
        constraints.write_text("\n".join(lower_bounds(extras)))
        packages += ["--constraint", str(constraints)]
    run(python, "-m", "pip", "install", "--quiet", *packages)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"The install failed (exit status {error.returncode}): {' '.join(error.cmd)}")
