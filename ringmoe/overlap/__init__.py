"""The inspector: is a compiled program's communication hidden, what does it weigh, does it fit."""

from ringmoe.overlap.inspect import inspect as inspect
from ringmoe.overlap.report import OverlapReport as OverlapReport
from ringmoe.overlap.timeline import Collective as Collective
