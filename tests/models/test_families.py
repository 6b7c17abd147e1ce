"""The rollout engine against transformers, before and after a publish: one architecture of each kind that a publish treats differently.

All of them: tests/benchmarks/families.py.
"""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import families

# experts in one tensor that the files have apart; under other names in the files; written past vLLM's loaders; by transformers' classes;
# soft caps, windows and a tied head
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "phi", "gemma2"]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict]:
    """What one process found about all of them: engines are started one after another."""
    command = [sys.executable, families.__file__, "--measure", *KINDS]
    done = subprocess.run(command, env=families.environment_of_engine(), capture_output=True, text=True, timeout=400)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"family"')]
    assert len(found) == len(KINDS), done.stderr[-2000:]
    return {row["family"]: row for row in found}


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_agrees_with_transformers_before_and_after_a_publish(measured, kind):
    assert "error" not in measured[kind], measured[kind]
    assert measured[kind]["proved"] and measured[kind]["start"] < 2e-5 and measured[kind]["drawn"] < 2e-5
    assert measured[kind]["in_parts"] < 2e-5 and measured[kind]["published"] < 2e-5
    assert measured[kind]["moved"] > 0.1
