"""The conformance kit: it passes what is right and catches every defect planted here.

The defects are those of public implementations; each adapter below is a correct one with one thing
changed, so a check that fails says which.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from optimised import optimised
from scipy import special

from turboq import conformance
from turboq.codecs import CODECS
from turboq.conformance import Claims, __main__, adapters, checks_bytes, ours, run
from turboq.numbers import codebook as codebooks
from turboq.numbers.rotation import Rotation
from turboq_calibrate.choose.plan_within import LEARNED

DIM, VECTORS = 64, 2048


class Right:
    """TurboQuant_mse in NumPy: signed Hadamard, exact table, float16 norm, codes in whole bits."""

    bits, rule, unbiased = 3, "raw", False
    norm_type = np.float16

    def __init__(self):
        self.dim = DIM
        self.turn = Rotation(kind=self.kind, dim=DIM).matrix
        self.codebook = self.table()
        stored = self.bits + 8 * np.dtype(self.norm_type).itemsize * self.norms / DIM
        self.claims = Claims(bits_per_channel=stored, scale_rule=self.rule, unbiased=self.unbiased)

    kind, norms = "hadamard", 1

    @property
    def code_bits(self):
        return self.bits

    def table(self):
        return codebooks.lloyd_max("sphere", self.code_bits, DIM)

    def unit(self, x):
        """(rotated vectors of unit rms, rms), wide enough for any float32."""
        x = x.astype(np.float64)
        rms = np.sqrt(np.mean(x * x, -1, keepdims=True))
        return x / np.where(rms == 0, 1, rms) @ self.turn.T, rms

    def codes(self, u):
        return np.sum(u[..., None] > codebooks.thresholds(self.codebook), axis=-1).astype(np.uint8)

    def store(self, codes):
        """Bits to bytes: exactly `code_bits` per code."""
        planes = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., : self.code_bits]
        return np.packbits(planes.reshape(len(codes), -1), axis=-1, bitorder="little")

    def restore(self, stored):
        planes = np.unpackbits(stored, axis=-1, bitorder="little")
        planes = planes.reshape(len(stored), DIM, self.code_bits)
        return np.sum(planes << np.arange(self.code_bits), axis=-1)

    def quantize(self, x):
        u, rms = self.unit(x)
        with np.errstate(all="ignore"):
            return {"codes": self.store(self.codes(u)), "norms": rms.astype(self.norm_type)}

    def dequantize(self, stored):
        y = self.codebook[self.restore(stored["codes"])] * stored["norms"].astype(np.float64)
        return y @ self.turn

    def nbytes(self, stored):
        return sum(v.nbytes for v in stored.values())


class RightProd(Right):
    """TurboQuant_prod: one bit less for the codes, a Gaussian sign sketch of the residual."""

    rule, unbiased, norms = "gaussian_sketch", True, 2

    def __init__(self):
        super().__init__()
        self.sketch = np.random.default_rng(3).standard_normal((DIM, DIM)) * self.sketch_scale

    sketch_scale = 1.0

    @property
    def code_bits(self):
        return self.bits - 1

    def quantize(self, x):
        first = super().quantize(x)
        with np.errstate(all="ignore"):
            r = x - super().dequantize(first)
            z = np.packbits(r @ self.sketch.T >= 0, axis=-1)
            gamma = np.sqrt(np.mean(r * r, -1, keepdims=True)).astype(self.norm_type)
        return first | {"signs": z, "gamma": gamma}

    def dequantize(self, stored):
        z = np.unpackbits(stored["signs"], axis=-1) * 2.0 - 1.0
        gamma = stored["gamma"].astype(np.float64) * np.sqrt(DIM)
        correction = np.sqrt(np.pi / 2) / DIM * gamma * (z @ self.sketch)
        return super().dequantize(stored) + correction


class EqualProbability(Right):
    def table(self):
        edge = special.ndtri(np.arange(9) / 8)
        return 8 * np.diff(-np.exp(-(edge**2) / 2) / np.sqrt(2 * np.pi))


class EqualProbabilityHidden(EqualProbability):
    """The same without offering its table."""

    def __init__(self):
        super().__init__()
        self.secret = self.codebook
        del self.codebook

    def codes(self, u):
        self.codebook = self.secret
        out = super().codes(u)
        del self.codebook
        return out

    def dequantize(self, stored):
        self.codebook = self.secret
        out = super().dequantize(stored)
        del self.codebook
        return out


class PreScaledSketch(RightProd):
    """S already divided by sqrt(d), decoded by the formula for N(0, 1) entries."""

    sketch_scale = 1 / np.sqrt(DIM)


class ThresholdsAsCentroids(Right):
    def table(self):
        exact = super().table()
        edges = codebooks.thresholds(exact)
        return np.sort(np.concatenate([exact[[0, -1]], np.delete(edges, 3)]))


class TenIterations(Right):
    """Lloyd from an uneven start, stopped early: neither symmetric nor converged."""

    bits = 4

    def table(self):
        samples = np.random.default_rng(1).standard_normal(4000)
        c = np.linspace(-2, 3, 16)
        for _ in range(10):
            nearest = np.abs(samples[:, None] - c).argmin(axis=1)
            c = np.array([samples[nearest == i].mean() for i in range(16)])
        return c


class SignsOnTheWrongSide(Right):
    """x = H^T S y instead of S H^T y."""

    def dequantize(self, stored):
        signs = Rotation(kind="hadamard", dim=DIM).signs
        y = self.codebook[self.restore(stored["codes"])] * stored["norms"].astype(np.float64)
        return (y * signs) @ (self.turn * signs)


class ManyLevels(Right):
    """81 levels called 3 bits, kept as int16."""

    rule = None

    def __init__(self):
        super().__init__()
        del self.codebook

    def quantize(self, x):
        u, rms = self.unit(x)
        with np.errstate(all="ignore"):
            codes = np.clip(np.round(u * 8), -40, 40).astype(np.int16)
            return {"codes": codes, "norms": rms.astype(np.float16)}

    def dequantize(self, stored):
        return stored["codes"] / 8 * stored["norms"].astype(np.float64) @ self.turn

    def nbytes(self, stored):
        return stored["codes"].size * 3 // 8 + stored["norms"].nbytes


class ManyLevelsHidden(ManyLevels):
    """The same, with the codes in three bits' worth of bytes and the rest kept by the adapter."""

    kept: dict

    def quantize(self, x):
        stored = super().quantize(x)
        token = np.zeros((len(x), DIM * 3 // 8), np.uint8)
        self.kept = getattr(self, "kept", {}) | {id(token): (token, stored["codes"])}
        return {"codes": token, "norms": stored["norms"]}

    def dequantize(self, stored):
        return super().dequantize(stored | {"codes": self.kept[id(stored["codes"])][1]})

    def nbytes(self, stored):
        return sum(v.nbytes for v in stored.values())


class ThreeInFour(Right):
    """Two 3-bit codes per byte, quoted as 3 bits."""

    def store(self, codes):
        return codes[:, ::2] | codes[:, 1::2] << 4

    def restore(self, stored):
        return np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), DIM)


class LargerThanHalf(Right):
    """Codes in int64 and a formula for what they would take."""

    def store(self, codes):
        return codes.astype(np.int64)

    def restore(self, stored):
        return stored

    def nbytes(self, stored):
        return stored["codes"].size * 3 // 8 + stored["norms"].nbytes


class Undercounted(Right):
    """Forgets its norms."""

    def nbytes(self, stored):
        return stored["codes"].nbytes


class UnsignedHadamard(Right):
    kind = "walsh"


class MisScaled(Right):
    def table(self):
        return super().table() * 1.4


class DeadSketch(RightProd):
    """The residual's norm never arrives: the signs change nothing."""

    def quantize(self, x):
        stored = super().quantize(x)
        return stored | {"gamma": np.zeros_like(stored["gamma"])}


class HiddenNaN(Right):
    def quantize(self, x):
        return super().quantize(np.nan_to_num(x))


class ClampedNorm(Right):
    def quantize(self, x):
        u, rms = self.unit(x)
        norms = np.where(np.isnan(rms), rms, np.minimum(rms, 65504)).astype(np.float16)
        return {"codes": self.store(self.codes(u)), "norms": norms}


class ZeroDivision(Right):
    def unit(self, x):
        x = x.astype(np.float64)
        rms = np.sqrt(np.mean(x * x, -1, keepdims=True))
        with np.errstate(all="ignore"):
            return x / rms @ self.turn.T, np.where(rms == 0, np.nan, rms)


class NegativeZero(Right):
    def quantize(self, x):
        stored = super().quantize(x)
        minus = np.all((x == 0) & np.signbit(x), axis=-1, keepdims=True)
        return stored | {"norms": np.where(minus, np.float16(1), stored["norms"])}


class Raises(Right):
    def dequantize(self, stored):
        raise RuntimeError("no kernel\nfor this device")


ALL = set(run.CHECKS)
DEFECTS = {
    EqualProbability: ({"codebook", "distortion", "variance", "bias"}, "equal probability"),
    EqualProbabilityHidden: ({"distortion", "variance", "bias"}, "codebook, scale or inverse"),
    PreScaledSketch: ({"distortion", "variance", "bias"}, "inner products are biased"),
    ThresholdsAsCentroids: ({"codebook", "distortion", "variance", "bias"}, "thresholds"),
    TenIterations: ({"codebook", "distortion", "variance"}, "not symmetric"),
    SignsOnTheWrongSide: ({"distortion", "variance", "bias"}, "worse than zeros"),
    ManyLevels: ({"bytes", "shannon"}, "this rate cannot reach this error"),
    ManyLevelsHidden: ({"shannon"}, "this rate cannot reach this error"),
    ThreeInFour: ({"bytes"}, "stores more than it says"),
    LargerThanHalf: ({"bytes"}, "more than float16 would"),
    Undercounted: ({"bytes"}, "nbytes does not count what is stored"),
    UnsignedHadamard: ({"mean", "walsh"}, "no random signs"),
    MisScaled: ({"codebook", "distortion", "variance", "bias"}, "1.400 times too large"),
    DeadSketch: ({"distortion", "variance", "bias"}, "sketch does nothing"),
    HiddenNaN: ({"nan"}, "decodes to finite numbers"),
    ClampedNorm: ({"scale", "nan"}, "silently clamped"),
    ZeroDivision: ({"zero"}, "does not decode to finite"),
    NegativeZero: ({"zero"}, "-0.0 decodes otherwise"),
    Raises: (ALL - {"codebook", "bytes"}, "raised RuntimeError: no kernel"),
}


def failures(adapter):
    return {v.check: v.why for v in conformance.check(adapter, vectors=VECTORS) if v.failed}


@pytest.mark.parametrize("right", [Right, RightProd])
def test_right_implementations_pass(right):
    assert failures(right()) == {}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.__name__)
def test_planted_defects_are_caught_and_named(defect):
    expected, words = DEFECTS[defect]
    failed = failures(defect())
    assert set(failed) == expected
    assert any(words in why for why in failed.values()), failed


def test_every_codec_is_in_the_table_of_settings():
    assert set(ours.SETTINGS) == set(CODECS)


@pytest.mark.parametrize("name", list(CODECS))
def test_our_codecs_pass(name):
    for title, adapter in ours.adapters([DIM], [name], quick=True).items():
        assert failures(adapter) == {}, title


def test_the_default_learned_form_is_among_them_and_passes():
    """Window codes with a coded gain, by the defaults of `turboq plan --budget`."""
    (setting,) = (
        one
        for one in ours.SETTINGS["transform"]
        if (one.config.get("quantizer"), one.config.get("gain")) == ("window", "code")
    )
    with optimised():
        adapter = ours.make("transform", setting, DIM)
        assert adapter.codec == LEARNED.codec(DIM, adapter.codec.segments)
        assert failures(adapter) == {}


def test_live_bytes_count_every_buffer_once():
    whole = np.zeros(100, np.float32)

    class Slots:
        __slots__ = ("a", "b")

    slots = Slots()
    slots.a, slots.b = whole[:10], [b"abc", whole, {"x": whole[5:]}, "text", 3, None]
    assert checks_bytes.live_bytes(slots) == 403


def test_command_line_verdicts_and_exit_codes(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "planted", sys.modules[__name__])
    few = ["--vectors=512"]
    assert __main__.main(["--adapter=planted:Right", *few]) == 0
    assert __main__.main(["--adapter=planted:ThreeInFour", "--explain", *few]) == 1
    text = capsys.readouterr().out
    assert "ThreeInFour: bytes FAIL: 34 live bytes per vector" in text
    assert "ThreeInFour: codebook pass: distortion" in text
    assert text.rstrip().endswith("1 checked, 1 failed")
    for bad, words in (
        (["--adapter=planted"], "must be module:Class"),
        (["--adapter=planted:Missing"], "has no attribute 'Missing'"),
        (["--adapter=no_such_module:A"], "No module named 'no_such_module'"),
        (["--adapter=planted:Claims"], "is made as Class(dim=D, bits=b)"),
        (["--codec=unknown"], "'unknown' is no codec, format or path"),
        (["--vectors=100", "--codec=exact"], "must be a positive multiple of 512"),
    ):
        assert __main__.main(bad) == 2
        assert words in capsys.readouterr().err


def test_adapters_are_made_per_dim_and_bits_and_must_be_complete(monkeypatch):
    monkeypatch.setitem(sys.modules, "planted", sys.modules[__name__])
    made = adapters.load("planted:Choice", [64, 128], [2, 3])
    assert list(made) == [f"Choice D={d} b={b}" for d in (64, 128) for b in (2, 3)]
    assert made["Choice D=64 b=2"].claims == Claims(bits_per_channel=2.0, scale_rule="raw")
    with pytest.raises(ValueError, match="lacks claims, quantize, dequantize, nbytes"):
        adapters.load("planted:Incomplete", [64], [2])
    with pytest.raises(ValueError, match="scale_rule='best' must be None or one of"):
        Claims(bits_per_channel=1.0, scale_rule="best")


class Choice:
    def __init__(self, dim, bits):
        self.dim, self.bits = dim, bits
        self.claims = {"bits_per_channel": float(bits), "scale_rule": "raw"}

    def quantize(self, x):
        raise NotImplementedError

    dequantize = nbytes = quantize


class Incomplete:
    dim = bits = 0

    def __init__(self):
        pass
