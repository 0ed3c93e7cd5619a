"""The scripts behind docs/scale.md, and that its figures are theirs."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_the_plan_in_the_documents_is_what_its_script_reckons() -> None:
    assert run("plan_scale.py").strip() in (ROOT / "docs" / "scale.md").read_text("utf-8")


def test_a_plan_follows_the_rates_it_is_given() -> None:
    (row,) = [
        line
        for line in run("plan_scale.py", "--images", "3.6e6", "--gpu-images-per-second", "100").splitlines()
        if line.startswith("| embedding on GPUs")
    ]
    assert "| 10 GPU hours" in row


def test_an_index_is_measured_against_a_comparison_with_all_vectors(data: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    output = run(
        "bench_scale.py",
        "--data",
        str(data),
        "--work",
        str(tmp_path),
        "--sizes",
        "2000",
        "--queries",
        "5",
        "--json",
        str(figures),
    )
    (record,) = json.loads(figures.read_text())
    assert record["n"] == 2000
    assert record["bytes"]["segments"] > 2000 * 512 * 4
    assert all(0.9 <= recall <= 1 for recall in record["recall"].values())
    assert "| 2,000 |" in output
    again = run(
        "bench_scale.py", "--data", str(data), "--work", str(tmp_path), "--sizes", "2000", "--queries", "5", "--keep"
    )
    assert "built in" in output and "built in" not in again
