"""What gets installed: every package, every file that ships, and nothing that makes it large."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import specdec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
LINKS = {"specdec/heads": "../heads", "specdec/train": "../train"}
ROOTS = {"specdec": "specdec", "heads": "specdec.heads", "train": "specdec.train"}
LARGEST_SHIPPED_MB = 30
in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def folder_of(package: str) -> Path:
    """The folder that a package is built from."""
    known = SETUPTOOLS["package-dir"]
    inside = max((name for name in known if package == name or package.startswith(f"{name}.")), key=len)
    return ROOT.joinpath(known[inside], *package[len(inside) :].split(".")[1:])


def package_of(path: Path) -> str:
    """The package whose folder a file lies in."""
    folder, *inside = path.parent.relative_to(ROOT).parts
    return ".".join([ROOTS[folder], *inside])


def files_on_disk() -> set[Path]:
    """Every file under the packages' folders that is worth shipping, each once."""
    return {
        path
        for folder in ROOTS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not any((ROOT / link) in path.parents for link in LINKS)
    }


def installed_name(path: Path) -> str:
    """A file's name in the wheel."""
    folder, *inside = path.relative_to(ROOT).parts
    return "/".join([*ROOTS[folder].split("."), *inside])


def shipped_files() -> set[Path]:
    """Files that the tables of pyproject.toml put into a wheel: modules of the packages, and package data."""
    modules = {path for package in SETUPTOOLS["packages"] for path in folder_of(package).glob("*.py")}
    data = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in folder_of(package).glob(pattern)
    }
    return modules | {path for path in data if path.is_file()}


def test_every_folder_with_modules_is_a_declared_package():
    found = {package_of(path) for path in files_on_disk() if path.suffix == ".py"}
    found.discard("specdec.demo.prompts")  # prompts are texts that happen to be Python
    assert SETUPTOOLS["packages"] == sorted(found), f"[tool.setuptools] packages should be {sorted(found)}"


def test_every_file_below_the_packages_ships():
    forgotten = sorted(str(path.relative_to(ROOT)) for path in files_on_disk() - shipped_files())
    assert not forgotten, f"no pattern of [tool.setuptools.package-data] covers {forgotten}"


def test_what_ships_stays_small():
    megabytes = sum(path.stat().st_size for path in shipped_files()) / 1e6
    assert 0.1 < megabytes < LARGEST_SHIPPED_MB, f"the package ships {megabytes:.1f} MB"


@pytest.mark.parametrize("link", LINKS)
def test_heads_and_train_are_links_in_the_checkout(link: str):
    assert (ROOT / link).is_symlink(), (
        f"{link} should be a link to {LINKS[link]}; was the tree copied with links followed?"
    )
    assert str((ROOT / link).readlink()) == LINKS[link]


@in_git
def test_git_stores_heads_and_train_as_links():
    listed = subprocess.run(["git", "ls-files", "-s", *LINKS], cwd=ROOT, capture_output=True, text=True, check=True)
    modes = {line.split()[3]: line.split()[0] for line in listed.stdout.splitlines()}
    assert modes == dict.fromkeys(LINKS, "120000")


def test_the_version_is_said_once():
    attribute = SETUPTOOLS["dynamic"]["version"]["attr"]
    assert attribute == "specdec.version.__version__"
    assert "version" in PROJECT["project"]["dynamic"]
    assert metadata.version("specdec") == specdec.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", specdec.__version__)


def test_every_dependency_is_pinned_in_the_constraints():
    names = {re.split(r"[<>=!~\[ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0]: line.split("==")[1] for line in lines if "==" in line and not line.startswith("#")}
    assert names <= set(pinned)
    assert {name: pinned[name] for name in ("torch", "transformers")} == {"torch": "2.13.0", "transformers": "5.23.0"}


def tracked_files() -> set[Path]:
    """What git knows and the tree holds."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()}


@pytest.mark.slow
@in_git
def test_the_wheel_holds_what_the_tables_promise(tmp_path: Path):
    # Built from a copy without the links, as on a system that cannot make any, and without network.
    for path in tracked_files():
        copy = tmp_path / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("specdec-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    promised = {installed_name(path) for path in shipped_files() & tracked_files()}
    assert names == promised
    assert {"specdec/heads/__init__.py", "specdec/train/__init__.py", "specdec/demo/target/model.safetensors"} <= names
    assert wheel.stat().st_size < LARGEST_SHIPPED_MB * 1e6
