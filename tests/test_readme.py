"""The README says what the files say."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["results", "speed/data_path", "speed/training_epoch", "speed/teacher"]
)
def test_a_table_is_the_one_that_was_written(name):
    table = (ROOT / "report" / f"{name}.md").read_text(encoding="utf-8")
    assert table.strip() in README


def test_every_file_it_links_or_lists_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    links += re.findall(r"^\| `([\w./]+)`", README, flags=re.MULTILINE)
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    missing = [link for link in local if not (ROOT / link).exists()]
    assert not missing


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install -r requirements.txt pytest && (.*)$", README, re.MULTILINE)
    assert command and command.group(1) in (ROOT / ".ci" / "run").read_text()


def test_shipped_files_stay_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    sizes = {
        name: (ROOT / name).stat().st_size
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file()
    }
    figures = {name: size for name, size in sizes.items() if name.startswith("report/")}
    assert all(size <= 300_000 for size in figures.values())
    assert sum(figures.values()) <= 4_000_000
    assert all(size <= 12_000_000 for size in sizes.values())
