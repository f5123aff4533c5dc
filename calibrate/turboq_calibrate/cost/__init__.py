"""What each unit of the cache costs: predicted from activations, measured by KL, compared."""

from turboq_calibrate.sensitivity.activation import SCORES as SCORES
from turboq_calibrate.sensitivity.activation import activation_costs as activation_costs
from turboq_calibrate.sensitivity.divergence import Divergence as Divergence
from turboq_calibrate.sensitivity.divergence import Move as Move
from turboq_calibrate.sensitivity.divergence import isolated_costs as isolated_costs
from turboq_calibrate.sensitivity.divergence import measure as measure
from turboq_calibrate.sensitivity.divergence import unit_moves as unit_moves
from turboq_calibrate.sensitivity.engine import EXACT as EXACT
from turboq_calibrate.sensitivity.engine import Engine as Engine
