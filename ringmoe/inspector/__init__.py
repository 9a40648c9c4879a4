"""The inspector: is a compiled program's communication hidden, what does it weigh, does it fit."""

from ringmoe.inspector.inspect import inspect as inspect
from ringmoe.inspector.report import OverlapReport as OverlapReport
from ringmoe.inspector.timeline import Collective as Collective
