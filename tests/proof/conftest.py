"""Gives the proofs their size and their seed, and prints what they tried."""

import pytest

from proof.tally import Level, Proof

PROOF = pytest.StashKey[Proof]()


def pytest_configure(config: pytest.Config) -> None:
    level: Level = config.option.proof
    config.stash[PROOF] = Proof(level, config.option.proof_seed)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash[PROOF].tallies
    if tallies:
        terminalreporter.section(f"proof ({config.stash[PROOF].level})")
        for tally in tallies.values():
            terminalreporter.line(str(tally))


@pytest.fixture
def proof(request: pytest.FixtureRequest) -> Proof:
    return request.config.stash[PROOF]
