"""What a type checker makes of the public functions: pyright checks every `assert_type` here (`make lint`)."""

import inspect
from typing import assert_type, get_type_hints

import jax
import jax.numpy as jnp
import pytest

import ringmoe
from ringmoe.attention import Options
from ringmoe.lowering.jit import Jitted

Q = jnp.zeros((1, 8, 2, 4))


def double(x: jax.Array, times: int = 2) -> jax.Array:
    return x * times


def test_attention_gives_an_array_or_a_pair():
    assert_type(ringmoe.dot_product_attention(Q, Q, Q), jax.Array)
    assert_type(ringmoe.dot_product_attention(Q, Q, Q, None, None, is_causal=True), jax.Array)
    pair = ringmoe.dot_product_attention(Q, Q, Q, return_residual=True, scale=1.0)
    assert_type(pair, tuple[jax.Array, jax.Array])
    assert pair[0].shape[:-1] == pair[1].shape
    with pytest.raises(TypeError, match="casual"):
        ringmoe.dot_product_attention(Q, Q, Q, casual=True)  # pyright: ignore[reportCallIssue]


def test_the_overloads_know_every_argument():
    parameters = inspect.signature(ringmoe.dot_product_attention).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == {**get_type_hints(Options), "return_residual": bool}


def test_jit_keeps_the_functions_type():
    jitted = ringmoe.jit(double)
    assert_type(jitted(Q, times=3), jax.Array)
    assert isinstance(jitted, Jitted)
    with pytest.raises(TypeError, match="time"):
        jitted(Q, time=3)  # pyright: ignore[reportCallIssue]


def test_jit_with_options_keeps_it_too():
    @ringmoe.jit(static_argnames="times")
    def triple(x: jax.Array, times: int = 3) -> jax.Array:
        return x * times

    assert_type(triple(Q, times=4), jax.Array)
    assert_type(ringmoe.jit(double, donate_argnums=())(Q), jax.Array)
