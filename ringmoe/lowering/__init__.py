"""Passes over whole functions: ringmoe.jit and ringmoe.explain."""

from ringmoe.lowering.explain import Explanation as Explanation
from ringmoe.lowering.explain import explain as explain
from ringmoe.lowering.jit import jit as jit
