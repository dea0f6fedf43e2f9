"""The README says what the files say, and the files keep to the limits of the design."""

import ast
import re
import subprocess

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = {
    "model_ultracompact.py": 140, "model_standard.py": 140, "kd_losses.py": 280,
    "voc_data.py": 700, "train.py": 480, "test.py": 360, "test_pretrained_fcn.py": 80,
    "README.md": 220,
}  # fmt: skip


@pytest.mark.parametrize("document, name, block", [
    ("README.md", "results", 0), ("README.md", "seeds/results", 2),
    ("README.md", "speed/training_epoch", 0), ("report/report.md", "results", 0),
    ("report/report.md", "seeds/results", 2), ("report/report.md", "long/results", 0),
    ("report/report.md", "controls/labelled_only/results", 2),
])  # fmt: skip
def test_a_table_is_the_one_that_was_written(document, name, block):
    table = (ROOT / "report" / f"{name}.md").read_text(encoding="utf-8")
    assert table.split("\n\n")[block].strip() in (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["twice_the_epochs", "trainaug", "feature_beta5"])
def test_a_control_of_one_run_is_in_the_report_as_it_was_measured(name):
    folder = ROOT / "report"
    table = (folder / "controls" / name / "results.md").read_text(encoding="utf-8")
    miou, final = (cell.strip() for cell in table.splitlines()[2].split("|")[3:5])
    row = rf"\(controls/{name}/results.md\).*\| {miou} \| {final} \|"
    assert re.search(row, (folder / "report.md").read_text(encoding="utf-8"))


def test_every_file_it_links_or_lists_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for row in re.findall(r"^\| (`[^|]+) \|", README, flags=re.MULTILINE):
        links += re.findall(r"`([\w./]+)`", row)
    local = [link for link in links if "://" not in link]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_ci_runs_the_test_command_of_the_readme():
    command = re.search(r"^pip install -r requirements.txt pytest && (.*)$", README, re.MULTILINE)
    assert command and command.group(1) in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("name", LINES)
def test_scripts_can_be_read_in_one_sitting(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES[name]
    if name.endswith(".py"):
        assert max(map(len, lines)) <= 100
        nodes = ast.walk(ast.parse("\n".join(lines)))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 60


def test_shipped_files_stay_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert all(file.stat().st_size <= 12_000_000 for file in files)
    figures = [file.stat().st_size for file in files if "report" in file.parts]
    assert max(figures) <= 300_000 and sum(figures) <= 4_000_000
