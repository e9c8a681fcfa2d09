"""The models of the instructions in ptx.cuh, against the PTX manual's definitions and vectors recorded on GPUs."""

from __future__ import annotations

import numpy as np
import pytest
import vectors
from vectors import INSTRUCTIONS

RECORDED = vectors.recorded()


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))  # effects at once, as late as possible, in between
def test_model_meets_the_definition(host, instruction, seed):
    host.set_seed(seed)
    instruction.check(vectors.run(host.run_instruction, instruction))


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=str)
def test_definition_is_not_the_input_or_zero(instruction):
    """So that a model that does nothing can't pass."""
    assert instruction.expected.any()
    assert not np.array_equal(instruction.expected, instruction.output)


@pytest.mark.skipif(not RECORDED, reason="the models are unconfirmed: no vectors of a GPU yet (record_vectors.py)")
@pytest.mark.parametrize("device", RECORDED)
@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=str)
def test_model_meets_the_recorded_vectors(host, instruction, device):
    if instruction.name not in RECORDED[device]:
        pytest.skip(f"{device} does not have this instruction")
    got = vectors.run(host.run_instruction, instruction)
    vectors.compare(got, RECORDED[device][instruction.name], 2 * instruction.tolerance)


def test_unknown_instruction(host):
    with pytest.raises(RuntimeError, match="no such instruction"):
        host.run_instruction("mma_fp128", np.zeros(4, np.float32), np.zeros(4, np.float32))
