"""Random signals to the command line: each run ends with a complete report, the right exit code, and nothing left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from attrs import define, field
from programs import BACKENDS

from parallel_agents.serialization import read_report
from proof.processes import alive_with
from proof.tally import Proof

AGENTS = 6
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENDS_WITHIN = 60.0

SCRIPTS = (
    "sleep 0.1",
    "sleep 0.3",
    "exit 3",
    'trap "" TERM INT; sleep 0.3',
    "sleep 0.2 & sleep 0.2; wait",
)
"""What agents do, in a shell that is the program."""


@define
class Try:
    """One run of the command line, and the signals that it gets."""

    folder: Path
    backend: str
    random: Random
    token: str
    sent: list[signal.Signals] = field(factory=list)

    @property
    def report(self) -> Path:
        return self.folder / f"{self.token}.json"

    def _plan(self) -> Path:
        script = "{task.inputs[script]}"
        engine = {
            "kind": "process",
            "command": ["sh", "-c", script],
            "env": {"PROOF": self.token},
            "terminate_grace_seconds": 0.2,
        }
        tasks = [{"id": f"t{n}", "inputs": {"script": self.random.choice(SCRIPTS)}} for n in range(AGENTS)]
        plan = {
            "group_id": "g",
            "max_concurrency": self.random.randint(1, 4),
            "engine": engine,
            "assignments": [{"agent": f"a{n}", "task": task} for n, task in enumerate(tasks)],
        }
        path = self.folder / f"{self.token}.plan.json"
        path.write_text(json.dumps(plan))
        return path

    def run(self) -> None:
        options = ["--backend", self.backend, "--report", str(self.report)]
        command = [sys.executable, "-m", "parallel_agents", "run", str(self._plan()), *options]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            assert process.stderr is not None
            try:
                first_line = process.stderr.readline()
                while first_line and "started:" not in first_line:
                    first_line = process.stderr.readline()
                self._send_signals(process)
                stdout, stderr = process.communicate(timeout=ENDS_WITHIN)
            finally:
                process.kill()
        self._check(process.returncode, stdout, stderr)

    def _send_signals(self, process: "subprocess.Popen[str]") -> None:
        for _ in range(self.random.randint(1, 3)):
            time.sleep(self.random.uniform(0, 0.4))
            if process.poll() is None:
                self.sent.append(self.random.choice(SIGNALS))
                process.send_signal(self.sent[-1])

    def _check(self, code: int, stdout: str, stderr: str) -> None:
        assert "Traceback" not in stderr, stderr
        outcomes = read_report(self.report).result.outcomes
        assert [outcome.task_id for outcome in outcomes] == [f"t{n}" for n in range(AGENTS)]
        statuses = {outcome.status.value for outcome in outcomes}
        assert statuses <= {"succeeded", "failed", "rejected", "cancelled"}, statuses
        # a signal may come when all is over, just before the program ends
        own = 0 if statuses == {"succeeded"} else 1
        came_late = statuses <= {"succeeded", "failed"}
        assert code in ([128 + self.sent[0]] if self.sent else []) + ([own] if came_late else []), (code, statuses)
        assert not alive_with(self.token)


@pytest.mark.proves("S1", "S2", "X1")
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_signals_end_the_command_line_with_a_complete_report(tmp_path: Path, backend: str, proof: Proof) -> None:
    tally = proof.tally("random signals to the command line")
    sent = 0
    runs = proof.size(few=1, short=3, long=360)
    for seed in range(proof.seed, proof.seed + runs):
        with tally.run(backend, f"seed {seed}"):
            one = Try(tmp_path, backend, Random(seed), f"{backend}{seed}-{os.getpid()}")
            one.run()
            sent += len(one.sent)
    assert sent > 0
    tally.remarks.append(f"{sent} signals on {backend}")
