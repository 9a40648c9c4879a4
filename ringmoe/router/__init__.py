"""The router: how tokens choose experts, who gets a slot, and what a training loop watches."""

from ringmoe.router.choose import hash_experts as hash_experts
from ringmoe.router.choose import jittered as jittered
from ringmoe.router.config import PRESETS as PRESETS
from ringmoe.router.config import RouterConfig as RouterConfig
from ringmoe.router.metrics import MoeMetrics as MoeMetrics
from ringmoe.router.metrics import drops_by_part as drops_by_part
from ringmoe.router.metrics import metrics as metrics
from ringmoe.router.metrics import update_selection_bias as update_selection_bias
from ringmoe.router.route import Routing as Routing
from ringmoe.router.route import check_mask as check_mask
from ringmoe.router.route import lie_alike as lie_alike
from ringmoe.router.route import route as route
