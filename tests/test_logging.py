"""What `ringmoe.jit` did is logged at absl's verbosity 1, a line for each op, and nothing at 0."""

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ringmoe
from ringmoe import cli
from tests.helpers import make_mesh, put


@pytest.fixture
def verbosity():
    before = logging.get_verbosity()
    yield logging.set_verbosity
    logging.set_verbosity(before)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "absl"]


def attend(q):
    return jnp.sum(ringmoe.dot_product_attention(q, q, q) ** 2)


def test_a_line_for_each_op_at_verbosity_1(verbosity, caplog):
    verbosity(1)
    (q,) = put(make_mesh((2, 4), AxisType.Auto), (jnp.ones((2, 8, 2, 4)),), (P("a", "b"),))
    step = ringmoe.jit(jax.grad(attend))
    step(q)
    forward, backward = lines(caplog)
    for line, op in ((forward, "attention"), (backward, "attention_backward")):
        assert line.startswith(f"ringmoe.jit attend: {op} at tests/test_logging.py:")
        assert "(attend): ring over b: queries and keys are sharded over the same axes; " in line
        assert line.endswith("(found by: ringmoe.jit)")
    step(q)
    assert len(lines(caplog)) == 2, "a program that is placed already was logged again"


def test_a_function_without_ops_says_so_at_verbosity_1(verbosity, caplog):
    verbosity(1)
    ringmoe.jit(jnp.sin)(1.0)
    assert lines(caplog) == ["ringmoe.jit sin: no RingMoE op found"]


def test_nothing_at_verbosity_0(verbosity, caplog):
    verbosity(0)
    (q,) = put(make_mesh((2, 4), AxisType.Auto), (jnp.ones((2, 8, 2, 4)),), (P("a", "b"),))
    ringmoe.jit(attend)(q)
    assert lines(caplog) == []


@pytest.mark.parametrize(("flags", "expected"), [((), 0), (("-v",), 1), (("--verbose",), 1)])
def test_the_command_lines_flag_sets_it(verbosity, capsys, flags, expected):
    verbosity(0)
    assert cli.main([*flags, "targets"]) == 0
    assert logging.get_verbosity() == expected


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        cli.main(["targets", "--unknown"])
    assert "--unknown" in capsys.readouterr().err
