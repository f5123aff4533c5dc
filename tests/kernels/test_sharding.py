"""Several devices: heads over a mesh axis, pages over another, on 8 virtual CPU devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kv_cases
import numpy as np
import pytest
from tolerances import TOL

from turboq_kernels import sharding

WORKER = Path(__file__).with_name("sharding_worker.py")


def test_eight_devices_give_what_one_gives():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), "triton"], env=environment, capture_output=True, text=True,
        timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["devices"] == 8
    assert got["heads"] < TOL["packed_attention"]
    # A Pallas kernel (interpreted) inside `shard_map`, against "xla" on one device.
    assert 0 < got["heads_triton"] < TOL["decode_bfloat16"]
    assert got["pages"] < 500 * TOL["decode_stored"]  # of totals up to 500


def test_every_device_has_a_share_of_every_group():
    layer = kv_cases.make_layer("mixed", np.random.default_rng(0))
    assert sharding.device_order(layer, 1) == (1, 0, 2)
    with pytest.raises(ValueError, match="a group of 1 KV heads does not divide over shards=2"):
        sharding.split_layer(layer, 2)
    assert [g.heads for g in sharding.split_layer(layer, 1).groups] == [(0,), (1, 2)]
