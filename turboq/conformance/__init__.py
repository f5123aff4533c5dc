"""Conformance kit: does a TurboQuant implementation do what it says? Anyone's, not only ours.

    python -m turboq.conformance                               all codecs of turboq
    python -m turboq.conformance --adapter=my_module:MyAdapter   yours

An adapter (`turboq.conformance.adapters.Adapter`) is a small class around any implementation. The
checks know nothing of its insides: they look at tables, errors, biases and live bytes.
"""

from turboq.conformance.adapters import Adapter as Adapter
from turboq.conformance.adapters import Claims as Claims
from turboq.conformance.run import check as check
from turboq.conformance.verdict import Verdict as Verdict
