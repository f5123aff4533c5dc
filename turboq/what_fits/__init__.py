"""The memory planner: what a KV cache takes, what fits, and which way of storing it to choose.

Everything counts in bytes and GiB (2^30). Three habits make published numbers wrong, and ours
differ from them on purpose:

* block scales left out: llama.cpp's q8_0 is 34 bytes per 32 numbers (8.5 bits each) and q4_0 is 18
  (4.5), so Llama-3-8B at 32,768 tokens takes 2.125 and 1.125 GiB, not 2 and 1;
* GiB called GB: 4 GiB of cache is 4.29 GB, and an "8 GB" card has 8 GiB;
* a wrong head count: the cache holds KV heads (8 of Llama-3-8B's 32), not query heads, and only
  the layers that keep a cache (8 of Qwen3.5-4B's 32), and of sliding layers only the window.

No module here imports jax unless a turboq codec or plan is counted.
"""

from turboq.what_fits.budget import CARDS as CARDS
from turboq.what_fits.budget import GIB as GIB
from turboq.what_fits.budget import Budget as Budget
from turboq.what_fits.budget import Card as Card
from turboq.what_fits.budget import card_table as card_table
from turboq.what_fits.choice import Option as Option
from turboq.what_fits.choice import Verdict as Verdict
from turboq.what_fits.choice import by_quality as by_quality
from turboq.what_fits.choice import choose as choose
from turboq.what_fits.formats import FORMATS as FORMATS
from turboq.what_fits.formats import QUALITY_ORDER as QUALITY_ORDER
from turboq.what_fits.formats import head_bits as head_bits
from turboq.what_fits.formats import plain_name as plain_name
from turboq.what_fits.gguf_metadata import from_metadata as from_metadata
from turboq.what_fits.hf_config import from_config as from_config
from turboq.what_fits.layers import CacheGeometry as CacheGeometry
from turboq.what_fits.layers import CacheLayer as CacheLayer
from turboq.what_fits.parallel import rank as rank
from turboq.what_fits.roofline import Roofline as Roofline
from turboq.what_fits.roofline import decode_estimate as decode_estimate
from turboq.what_fits.sizes import Cache as Cache
from turboq.what_fits.sizes import Formula as Formula
from turboq.what_fits.sizes import LayerSize as LayerSize
from turboq.what_fits.sizes import Ours as Ours
from turboq.what_fits.sizes import baseline as baseline
from turboq.what_fits.sizes import differences as differences
from turboq.what_fits.sizes import formula as formula
from turboq.what_fits.sizes import plan_formula as plan_formula
from turboq.what_fits.sizes import plan_geometry as plan_geometry
from turboq.what_fits.storage import Storage as Storage
from turboq.what_fits.storage import of_codecs as of_codecs
from turboq.what_fits.storage import of_formats as of_formats
from turboq.what_fits.storage import of_plan as of_plan
from turboq.what_fits.storage import of_sides as of_sides
from turboq.what_fits.storage import option as option
from turboq.what_fits.weights import weights_bytes as weights_bytes
