"""Passes over whole functions: ringmoe.jit and ringmoe.explain."""

from ringmoe.lowering.jit import jit as jit
