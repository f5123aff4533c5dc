"""What each unit of the cache costs: predicted from activations, measured by KL, compared."""

from turboq_calibrate.cost.measured import Divergence as Divergence
from turboq_calibrate.cost.measured import Move as Move
from turboq_calibrate.cost.measured import isolated_costs as isolated_costs
from turboq_calibrate.cost.measured import measure as measure
from turboq_calibrate.cost.measured import unit_moves as unit_moves
from turboq_calibrate.cost.predicted import SCORES as SCORES
from turboq_calibrate.cost.predicted import activation_costs as activation_costs
from turboq_calibrate.cost.side_by_side import EXACT as EXACT
from turboq_calibrate.cost.side_by_side import Engine as Engine
