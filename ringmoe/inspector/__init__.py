"""The inspector: is a compiled program's communication hidden, what does it weigh, does it fit."""

from ringmoe.inspector.diff import Diff as Diff
from ringmoe.inspector.diff import diff as diff
from ringmoe.inspector.inspect import inspect as inspect
from ringmoe.inspector.report import OverlapReport as OverlapReport
from ringmoe.inspector.search import Trial as Trial
from ringmoe.inspector.search import search as search
from ringmoe.inspector.timeline import Collective as Collective
from ringmoe.inspector.timeline import Operation as Operation
