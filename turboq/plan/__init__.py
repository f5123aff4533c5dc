"""Plans: types, strict reading, saving, and what they cost. See `turboq.plan.types`."""

# pyright: strict

from turboq.cache.layer import TokenPolicy as TokenPolicy
from turboq.plan.build import collect_arrays as collect_arrays
from turboq.plan.build import head_plan as head_plan
from turboq.plan.build import uniform_plan as uniform_plan
from turboq.plan.check import check_model as check_model
from turboq.plan.check import diff as diff
from turboq.plan.document import document as document
from turboq.plan.document import fingerprint as fingerprint
from turboq.plan.document import schema as schema
from turboq.plan.errors import PlanConflict as PlanConflict
from turboq.plan.errors import PlanError as PlanError
from turboq.plan.geometry import LayerGeometry as LayerGeometry
from turboq.plan.geometry import ModelGeometry as ModelGeometry
from turboq.plan.io import load as load
from turboq.plan.io import save as save
from turboq.plan.joined import compose as compose
from turboq.plan.provenance import Measurement as Measurement
from turboq.plan.provenance import Provenance as Provenance
from turboq.plan.provenance import Quality as Quality
from turboq.plan.provenance import TextSource as TextSource
from turboq.plan.summary import summary as summary
from turboq.plan.tensors import array_shapes as array_shapes
from turboq.plan.tensors import check_arrays as check_arrays
from turboq.plan.types import ArrayFile as ArrayFile
from turboq.plan.types import Bytes as Bytes
from turboq.plan.types import LayerPlan as LayerPlan
from turboq.plan.types import Plan as Plan
from turboq.plan.types import Producer as Producer
from turboq.plan.types import SidePlan as SidePlan
from turboq.plan.types import TensorSpec as TensorSpec
from turboq.plan.types import array_name as array_name
