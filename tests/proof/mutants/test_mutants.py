"""The suite finds the bugs that are planted in a copy of the package."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest

from proof.mutants.planted import PLANTED, SUITES, Mutant
from proof.mutants.running import GREEN, TESTS, is_found, plant, run_tests, text_of
from proof.tally import Proof


@pytest.mark.parametrize("mutant", PLANTED, ids=str)
def test_what_a_mutant_replaces_stands_in_its_file_once(mutant: Mutant) -> None:
    assert text_of(mutant.file).count(mutant.old) == 1
    compile(text_of(mutant.file).replace(mutant.old, mutant.new), mutant.file, "exec")


def test_there_are_many_mutants_and_each_has_tests() -> None:
    assert len(PLANTED) >= 30
    assert {mutant.file for mutant in PLANTED} == set(SUITES)
    assert Counter((mutant.file, mutant.old) for mutant in PLANTED).most_common(1)[0][1] == 1
    assert all((TESTS / module).exists() for modules in SUITES.values() for module in modules)


def chosen(proof: Proof) -> list[Mutant]:
    """Return all in the long form, otherwise some, which the seed chooses."""
    if proof.level == "long":
        return list(PLANTED)
    return Random(proof.seed).sample(PLANTED, proof.size(few=1, short=2, long=0))


def test_the_suite_finds_planted_bugs(tmp_path: Path, proof: Proof) -> None:
    tally = proof.tally("planted bugs, which the tests find")
    missed = []
    for number, mutant in enumerate(chosen(proof)):
        tally.runs += 1
        folder = tmp_path / str(number)
        if not is_found(mutant, folder):
            missed.append(str(mutant))
    tally.violations += len(missed)
    assert missed == []


def test_the_suite_is_green_without_a_bug(tmp_path: Path, proof: Proof) -> None:
    plant(None, tmp_path)
    if proof.level != "long":  # the tests themselves have just been run; what is seen here is that the copy works
        assert run_tests(["test_admission.py"], tmp_path) == GREEN
        return
    for file, modules in SUITES.items():
        assert run_tests(modules, tmp_path) == GREEN, file
