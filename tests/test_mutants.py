"""The list of tests/mutants.py fits the scripts and the tests; make mutants runs them."""

import pytest
from conftest import ROOT, SCRIPTS
from mutants import mutants, mutated


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: f"{mutant.script} {mutant.old}")
def test_old_text_has_one_place_and_the_mutant_is_python(mutant):
    assert mutant.script.removesuffix(".py") in SCRIPTS
    assert (ROOT / f"tests/test_{mutant.tests.split()[0]}.py").exists()
    compile(mutated(mutant), mutant.script, "exec")
